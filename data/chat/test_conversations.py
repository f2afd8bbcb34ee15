"""Oracles: each dialect's record written out beside what it says; render_weighted for what is in a
pool.
"""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from common import UserError
from conftest import ROOT
from data.chat.conversations import (
    MAX_CHARACTERS,
    normalize,
    prepare,
    read_conversations,
    read_pool,
)
from data.chat.template import one_row_per_turn, render_weighted
from data.text.sources import ReadPosition
from data.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

USER, ANSWER = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}
THOUGHT = {"role": "assistant", "reasoning": "one and one", "content": "2"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"name": "add", "arguments": {"a": 1, "b": [1]}}],
}
RESULT = {"role": "tool", "content": "2"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
OPENAI_CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "add", "arguments": '{"a": 1, "b": [1]}'},
}

DIALECTS = {  # name: (record, its messages)
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "2"}, "two"]},
            ],
        },
        [USER, ANSWER | {"content": "2\ntwo"}],
    ),
    "TRL": (
        {"prompt": [USER, ANSWER, USER], "completion": [THOUGHT]},
        [USER, ANSWER | {"weight": 0.0}, USER, THOUGHT],
    ),
    "TRL, a text behind messages": ({"prompt": [USER], "completion": "2"}, [USER, ANSWER]),
    "tools as texts": (
        {"messages": [USER, ANSWER], "tools": [json.dumps(TOOL)]},
        [USER, ANSWER],
    ),
    "thoughts that the template began": (
        {"messages": [USER, ANSWER | {"content": "one and one\n</think>\n\n2"}]},
        [USER, THOUGHT],
    ),
    "of the tag itself": (
        {"messages": [USER, ANSWER | {"content": "It is </think>."}]},
        [USER, ANSWER | {"content": "It is </think>."}],
    ),
    "smoltalk2": (
        {
            "messages": [USER, {"role": "assistant", "content": "<think>\n\n</think>\n\n2"}],
            "source": "x",
            "chat_template_kwargs": {"enable_thinking": False},
        },
        [USER, ANSWER],
    ),
    "Nemotron": (
        {
            "uuid": "x",
            "reasoning": "on",
            "messages": [
                {"role": "system", "content": "Be brief."},
                USER,
                {"role": "assistant", "content": "<think>\none and one\n</think>\n\n2"},
            ],
        },
        [{"role": "system", "content": "Be brief."}, USER, THOUGHT],
    ),
    "AM-DeepSeek-R1": (
        {
            "messages": [
                USER | {"info": {"source": "x"}},
                {
                    "role": "assistant",
                    "content": "<think>one and one</think> <answer>2\n</answer>",
                    "info": {"answer_content": "2"},
                },
            ]
        },
        [USER, THOUGHT],
    ),
    "OpenR1-Math": (
        {
            "problem": "1 + 1?",
            "solution": "no",
            "generations": ["<think>"],
            "messages": [USER, ANSWER],
        },
        [USER, ANSWER],
    ),
    "Arrow's absent fields": (
        {
            "prompt": None,
            "messages": [
                USER | {"tool_calls": None, "reasoning": None},
                ANSWER | {"tool_calls": None, "reasoning": None, "weight": None},
            ],
        },
        [USER, ANSWER],
    ),
    "OpenThoughts3": (
        {
            "difficulty": 7,
            "conversations": [
                {"from": "human", "value": "1 + 1?"},
                {"from": "gpt", "value": "<think>\none and one\n\n</think>\n2"},
            ],
        },
        [USER, THOUGHT],
    ),
    "a system prompt beside": (
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "user", "value": "1 + 1?"},
                {"from": "assistant", "value": "2"},
            ],
        },
        [{"role": "system", "content": "Be brief."}, USER, ANSWER],
    ),
    "roles in conversations": ({"conversations": [USER, ANSWER]}, [USER, ANSWER]),
    "OpenAI's calls": (
        {
            "tools": [TOOL],
            "messages": [
                {"role": "developer", "content": "Add."},
                USER,
                {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]},
                RESULT,
                ANSWER,
            ],
        },
        [{"role": "system", "content": "Add."}, USER, CALL, RESULT, ANSWER],
    ),
    "plain calls": (
        {
            "tools": json.dumps([TOOL]),
            "messages": json.dumps(
                [
                    USER,
                    CALL,
                    RESULT | {"role": "function"},
                    ANSWER | {"reasoning_content": "\none and one\n", "weight": 0},
                ]
            ),
        },
        [USER, CALL, RESULT, THOUGHT | {"weight": 0.0}],
    ),
    "ShareGPT's calls": (
        {
            "tools": json.dumps([TOOL]),
            "conversations": [
                {"from": "human", "value": "1 + 1?"},
                {"from": "function_call", "value": json.dumps(CALL["tool_calls"][0])},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "2"},
            ],
        },
        [USER, CALL, RESULT, ANSWER],
    ),
    "Alpaca": (
        {"instruction": "Add.", "input": "1, 1", "output": "2"},
        [{"role": "user", "content": "Add.\n\n1, 1"}, ANSWER],
    ),
    "Alpaca without input": (
        {"instruction": "1 + 1?", "input": "", "output": "2", "system": ""},
        [USER, ANSWER],
    ),
    **{
        f"{a}, {b}": ({a: "1 + 1?", b: "2", "id": 3}, [USER, ANSWER])
        for a, b in [
            ("prompt", "response"),
            ("prompt", "completion"),
            ("question", "answer"),
            ("problem", "solution"),
            ("problem", "generated_solution"),
            ("input", "output"),
        ]
    },
}

BAD = [  # a record, and the reason that is given
    ({"text": "a page"}, "no known form of a conversation in the columns text"),
    ({"messages": []}, "messages is no list of messages"),
    ({"messages": "[{"}, "messages that are no JSON"),
    ({"messages": [USER, "2"]}, "message 1 is no JSON object"),
    (
        {"messages": [{"role": "tutor", "content": ""}, ANSWER]},
        "message 0 has the unknown role 'tutor'",
    ),
    ({"messages": [{"role": ["user"], "content": ""}, ANSWER]}, "message 0 has the unknown role"),
    ({"messages": [USER, ANSWER, USER]}, "ends with the user"),
    ({"messages": [USER | {"role": "system"}]}, "there is no assistant turn"),
    (
        {"messages": [USER, {"role": "system", "content": ""}, ANSWER]},
        "message 1 is a system message",
    ),
    ({"messages": [USER, ANSWER | {"content": "\n"}]}, "message 1 is an assistant's, and empty"),
    (
        {"messages": [USER, ANSWER | {"content": None}]},
        "message 1 has content or reasoning that is no text",
    ),
    (
        {"messages": [USER | {"content": {"text": "hi"}}, ANSWER]},
        "message 0 has content that is no text",
    ),
    (
        {"messages": [USER, ANSWER | {"reasoning": ["so"]}]},
        "message 1 has content or reasoning that is no text",
    ),
    (
        {"messages": [USER, ANSWER | {"content": "<think>one and"}]},
        "message 1 has thoughts that never end",
    ),
    ({"messages": [USER, ANSWER | {"weight": 2}]}, "message 1 has the weight 2"),
    ({"messages": [USER, ANSWER | {"weight": "1"}]}, "message 1 has the weight '1'"),
    (
        {"messages": [USER, CALL | {"tool_calls": [{"name": "add", "arguments": "[1]"}]}]},
        "arguments are no JSON obj",
    ),
    (
        {"messages": [USER, CALL | {"tool_calls": [{"name": "add", "arguments": "a=1"}]}]},
        "message 1 .* no JSON: 'a=1'",
    ),
    (
        {"messages": [USER, CALL | {"tool_calls": [{"arguments": {}}]}]},
        "message 1 has a tool call without a name",
    ),
    (
        {"messages": [USER, CALL | {"tool_calls": ["add"]}]},
        "tool calls that are no JSON: 'add'",
    ),
    (
        {"conversations": [{"from": "function_call", "value": "add 1"}]},
        "message 0 has tool calls that are no JSON",
    ),
    ({"messages": [USER, ANSWER], "tools": "add"}, "^tools that are no JSON"),
    ({"messages": [USER, ANSWER], "tools": ["add"]}, "^tools that are no JSON: 'add'"),
    ({"messages": [USER, ANSWER], "tools": [7]}, "^tools that are no list of JSON objects"),
    (
        {"messages": [USER | {"content": [{"type": "image_url", "image_url": "x"}]}, ANSWER]},
        "message 0 has a part that is no text: 'image_url'",
    ),
    (
        {"messages": [USER, ANSWER | {"content": "2" * 1_234_567}]},
        "message 1 has 1,234,567 characters",
    ),
    ({"prompt": "1 + 1?", "response": 2}, "message 1 has content or reasoning that is no text"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(
        ["user\nassistant\nsystem\n 1 + 1? one and one 2"], TokenizerConfig(kind="char")
    ).save(path)
    return Tokenizer.load(path)


@pytest.fixture
def jsonl(tmp_path) -> Path:
    """Every dialect, three bad lines (2, 4 and 7) between them, and a last one in which nothing is
    trained.
    """
    lines = [json.dumps(record) for record, _ in DIALECTS.values()]
    lines[1:1] = ['{"messages": ']
    lines[3:3] = [json.dumps({"messages": [USER, ANSWER, USER]})]
    lines[6:6] = [json.dumps({"messages": [USER, RESULT, ANSWER]})]
    path = tmp_path / "sft.jsonl"
    path.write_text(
        "\n".join([*lines, json.dumps({"messages": [USER, ANSWER | {"weight": 0}]})]) + "\n"
    )
    return path


def rows_of(pool) -> list[tuple[list, list]]:
    return [
        tuple(column.tolist() for column in pool.conversation(i)) for i in range(len(pool.ends))
    ]


def expected(tokenizer) -> list[tuple[list, list]]:
    """The rows of all DIALECTS."""
    return [
        tuple(render_weighted(row, tokenizer, [TOOL] if "tools" in record else ()))
        for record, messages in DIALECTS.values()
        for row in one_row_per_turn(messages)
    ]


@pytest.mark.parametrize("record, messages", DIALECTS.values(), ids=DIALECTS)
def test_every_dialect_says_the_same(record, messages):
    before = json.dumps(record)
    assert normalize(record) == {"messages": messages, "tools": [TOOL] if "tools" in record else []}
    assert json.dumps(record) == before


@pytest.mark.parametrize("record, why", BAD, ids=[why for _, why in BAD])
def test_what_is_wrong_is_said(record, why):
    with pytest.raises(ValueError, match=why):
        normalize(record)


def test_given_columns_go_first():
    record = {"question": "no", "answer": "no", "messages": "no", "q": "1 + 1?", "a": "2"}
    assert normalize(record, ["q", "a"])["messages"] == [USER, ANSWER]
    with pytest.raises(
        ValueError, match="no q and b in the columns a, answer, messages, q, question"
    ):
        normalize(record, ["q", "b"])


def test_a_long_message_is_allowed_up_to_the_limit():
    content = "é" * MAX_CHARACTERS
    assert normalize({"prompt": "1 + 1?", "response": content})["messages"][1]["content"] == content


def test_a_pool_holds_the_rendered_rows(tmp_path, tokenizer, jsonl, capsys):
    pool = prepare(tmp_path, "pool", [{"path": str(jsonl)}], tokenizer)
    rows = expected(tokenizer)
    assert rows_of(pool) == rows
    assert pool.lengths.tolist() == [len(ids) for ids, _ in rows]
    assert pool.trained.tolist() == [sum(weight > 0 for weight in weights) for _, weights in rows]
    output = capsys.readouterr()
    assert output.out == (
        f"pool pool: {len(rows)} rows of {len(DIALECTS) + 1} conversations, {sum(pool.lengths):,} "
        f"tokens, {sum(pool.trained):,} of them trained; bad lines: 3 (the first: {jsonl}:2: "
        "not JSON: Expecting value: line 2 column 1 (char 14)), "
        "conversations without a trained token: 1\n"
    )
    assert f"{jsonl}:4: the conversation ends with the user" in output.err
    assert f"{jsonl}:7: message 1 is a tool's" in output.err  # what only rendering finds


@pytest.mark.parametrize(
    "lines, where",
    [
        (slice(2), ":2: not JSON"),
        (slice(2, 4), ":2: the conv.* ends"),
        (slice(4, 7), ":3: message 1 is a tool's"),
    ],
    ids=["JSON", "form", "order"],
)
def test_stop_at_the_first_bad_line(tmp_path, tokenizer, jsonl, lines, where):
    jsonl.write_text("\n".join(jsonl.read_text().splitlines()[lines]))
    with pytest.raises(UserError, match=f"pool 'pool': .*sft.jsonl{where}.*on_bad_line=skip"):
        prepare(tmp_path, "pool", [{"path": str(jsonl)}], tokenizer, on_bad_line="stop")
    assert not (tmp_path / "pool").exists()


def test_sources_may_select(tmp_path):
    """Columns, "keep" and "documents" of files and of a data set laid out like the hub's; absent
    fields are None.
    """
    chats = [[USER, ANSWER], [USER, CALL, RESULT, THOUGHT]]
    rows = [{"q": f"{i}?", "a": str(i), "score": i, "messages": chats[i % 2]} for i in range(20)]
    (tmp_path / "set").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set" / "train.parquet")
    for kind in ("path", "hf"):

        def read(**settings):
            place = ReadPosition(stop=True)
            source = {kind: str(tmp_path / "set")} | settings
            return [
                found for _, found in read_conversations([source], place, place.bad_line)
            ], place.left_out

        found, left_out = read(column=["q", "a"], keep={"score": [5, None]}, documents=3)
        assert [[m["content"] for m in c["messages"]] for c in found] == [
            [f"{i}?", str(i)] for i in (5, 6, 7)
        ]
        assert left_out == 5
        assert [c["messages"] for c in read()[0]] == [row["messages"] for row in rows]


def test_padding_of_arrow_is_no_argument(tmp_path):
    """Arrow gives all calls the fields of all tools; null in JSON lines is meant."""
    calls = [{"name": "add", "arguments": {"a": 1, "b": None}}, {"name": "now", "arguments": {}}]
    tools = [{"name": "add", "parameters": {"a": "int"}}, {"name": "now", "parameters": {}}]
    answer = {"role": "assistant", "content": "", "tool_calls": calls}
    row = {"messages": [USER, answer, {"role": "tool", "content": "2"}, ANSWER], "tools": tools}
    table = pyarrow.Table.from_pylist([row])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    for name, b in (("a.parquet", {}), ("a.arrow", {}), ("a.jsonl", {"b": None})):
        place = ReadPosition(stop=True)
        sources = [{"path": str(tmp_path / name)}]
        ((_, found),) = read_conversations(sources, place, place.bad_line)
        add, now = found["messages"][1]["tool_calls"]
        assert (add["arguments"], now["arguments"]) == ({"a": 1} | b, {})
        assert found["tools"] == tools


def test_made_again_when_and_only_when_something_changes(tmp_path, tokenizer, jsonl, capsys):
    source, manifest = {"path": str(jsonl)}, tmp_path / "pool" / "manifest.json"

    def made(*sources, tokenizer=tokenizer, **settings) -> bool:
        before = manifest.stat().st_ino if manifest.exists() else None
        prepare(tmp_path, "pool", list(sources), tokenizer, **settings)
        ready = "pool pool: ready, " in capsys.readouterr().out
        assert ready == (manifest.stat().st_ino == before)
        return not ready

    assert made(source) and not made(source)
    assert made(source | {"documents": 3}) and not made(source | {"documents": 3})
    other = train_tokenizer(["xyz 123"], TokenizerConfig(kind="char"))
    assert made(source, tokenizer=other) and not made(source, tokenizer=other)
    jsonl.write_text("\n".join(jsonl.read_text().splitlines()[:-1]))  # without the untrained one
    assert made(source) and not made(source)
    with open(tmp_path / "pool" / "weights.bin", "r+b") as f:
        f.truncate(10)
    assert made(source)
    for older in ("{}", "[]", "{"):  # as older code wrote it, or not whole
        manifest.write_text(older)
        assert made(source)
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps({"messages": [USER, ANSWER]}))
    assert made(source, {"path": str(good)}) and made({"path": str(good)})
    assert made({"path": str(good)}, on_bad_line="stop")
    assert {path.name for path in tmp_path.iterdir()} == {"pool", "sft.jsonl", "good.jsonl"}


KILLED = """
import os, sys, pathlib
from data.chat.conversations import prepare
from data.text.tokenizer import Tokenizer
folder, tokenizer = pathlib.Path(sys.argv[1]), Tokenizer.load(sys.argv[2])
encode, calls = tokenizer.encode, []
def encode_or_die(text):
    calls.append(text)
    if len(calls) > 5000:
        os._exit(9)
    return encode(text)
tokenizer.encode = encode_or_die
prepare(folder, "pool", [{"path": sys.argv[3]}], tokenizer)
"""


def test_a_kill_leaves_nothing_half(tmp_path, tokenizer):
    lines = [json.dumps({"prompt": f"{i}?", "response": "2" * 300}) for i in range(2000)]
    path = tmp_path / "sft.jsonl"
    path.write_text("\n".join(lines[:3]))
    old = rows_of(prepare(tmp_path, "pool", [{"path": str(path)}], tokenizer))
    path.write_text("\n".join(lines))
    command = [sys.executable, "-c", KILLED, str(tmp_path), tokenizer.name, str(path)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 9
    assert (tmp_path / "pool.tmp" / "tokens.bin").stat().st_size > 0  # it died in the middle
    assert rows_of(read_pool(tmp_path / "pool", tokenizer.hash)) == old
    assert len(prepare(tmp_path, "pool", [{"path": str(path)}], tokenizer).ends) == 2000
    assert not (tmp_path / "pool.tmp").exists()


def test_wrong_use_is_named(tmp_path, tokenizer, jsonl):
    for source, why in [
        ({"stdlib": 1}, "must be a path or an hf source"),
        ({"pth": "x"}, "must have one of"),
        ({"path": str(jsonl), "column": "text"}, r"column of .* must be \[prompt, response\]"),
        ({"path": str(jsonl), "megabytes": 1}, "whose beginning is given as documents"),
        ({"path": str(tmp_path / "no")}, "no .txt, .md, .jsonl, .parquet, .arrow, .json file"),
    ]:
        with pytest.raises(UserError, match=why):
            prepare(tmp_path, "pool", [source], tokenizer)
    with pytest.raises(UserError, match="on_bad_line is 'ignore'"):
        prepare(tmp_path, "pool", [{"path": str(jsonl)}], tokenizer, on_bad_line="ignore")
    with pytest.raises(UserError, match="no whole pool of conversations"):
        read_pool(tmp_path / "pool", tokenizer.hash)
    (tmp_path / "page.txt").write_text("a page")
    with pytest.raises(
        UserError, match="no conversation to train on: bad lines: 1 .*page.txt:1: no known form"
    ):
        prepare(tmp_path, "pool", [{"path": str(tmp_path / "page.txt")}], tokenizer)
    prepare(tmp_path, "pool", [{"path": str(jsonl)}], tokenizer)
    with pytest.raises(UserError, match="made with tokenizer"):
        read_pool(tmp_path / "pool", "another")
    spec = json.loads(tokenizer.json)
    spec["added_tokens"] = [
        token for token in spec["added_tokens"] if token["content"] != "<|im_end|>"
    ]
    with pytest.raises(UserError, match="no token for turn end"):
        prepare(tmp_path, "other", [{"path": str(jsonl)}], Tokenizer(json.dumps(spec)))
