"""BFCL: each rule on small records of its schema, in all forms of a call; replies that mean harm;
files.
"""

import json
import time

import pytest

from common import UserError
from data.sets import bfcl
from data.tasks.problem import to_chat

PROPERTIES = {
    "n": {"type": "integer"},
    "x": {"type": "float"},
    "s": {"type": "string"},
    "b": {"type": "boolean"},
    "l": {"type": "array", "items": {"type": "string"}},
    "f": {"type": "array", "items": {"type": "float"}},
    "t": {"type": "tuple", "items": {"type": "integer"}},
    "any": {"type": "any"},
    "d": {"type": "dict", "properties": {"type": {"type": "float"}}},
    "ds": {"type": "array", "items": {"type": "dict"}},
}
ONE = {
    "n": 1,
    "x": 2.5,
    "s": "Rome, Italy",
    "b": True,
    "l": ["a-b", "c"],
    "f": [1.0, 2.5],
    "t": [1, 2],
    "any": "it",
    "d": {"type": 5, "who": "A B"},
    "ds": [{"k": "v"}, {"k": "w"}],
}
GOLD = {key: [value] for key, value in ONE.items()} | {
    "d": [{"type": [5], "who": ["A B", ""]}],
    "ds": [[{"k": ["v", "u"]}, {"k": ["w"]}]],
}


def function(name="geo.f", properties=PROPERTIES, required=()):
    parameters = {"type": "dict", "properties": properties, "required": list(required)}
    return {"name": name, "description": "d", "parameters": parameters}


def problem(golds, functions=(function(),), category="simple_python"):
    question = [[{"role": "user", "content": "Call it."}]]
    return bfcl.read(
        {"id": f"{category}_3", "question": question, "function": list(functions)}, golds
    )


def forms(*calls):
    """The same calls in each form that is read, between thoughts and in marks of code."""
    objects = [{"name": name, "arguments": arguments} for name, arguments in calls]
    blocks = "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in objects)
    python = ", ".join(
        f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"
        for name, arguments in calls
    )
    return [
        blocks,
        f"<think>\n{blocks}</think>\n\nI call:\n{blocks}\nDone.",
        json.dumps(objects),
        f"[{python}]",
        python,
        f"```\n[{python}]\n```",
    ]


def scores(one, *calls):
    found = {bfcl.reward(one, form) for form in forms(*calls)}
    assert len(found) == 1
    return found.pop()


@pytest.mark.parametrize(
    "key, right, wrong",
    [
        ("n", [1], [2, 1.0, True, "1", None, [1], -1]),
        ("x", [2.5], [2, "2.5"]),
        (
            "s",
            ["rome italy", "ROME,ITALY", "Rome-Ita_l*y.", " Rome/ Italy^"],
            ["Rome; Italy", "", ["Rome, Italy"], None],
        ),
        ("b", [True], [False, 1, "True", "true"]),
        (
            "l",
            [["a-b", "c"], ["AB", "C."]],
            [["c", "a-b"], ["a-b"], ["a-b", "c", "c"], [], "a-b", ["a-b", 1], [["a-b", "c"]]],
        ),
        ("f", [[1.0, 2.5]], [[1, 2.5], [True, 2.5], [2.5, 1.0]]),
        ("t", [[1, 2]], [[2, 1], [1.0, 2.0], "12"]),
        ("any", ["IT"], [1]),
        (
            "d",
            [
                {"type": 5, "who": "a b"},
                {"who": "A B", "type": 5},
                {"type": 5},
                {"type": 5.0},
                {"type": 5, "who": ""},
            ],
            [
                {"who": "A B"},
                {"type": "5"},
                {"type": True},
                {"type": 5, "more": 1},
                {"Type": 5},
                [5],
                5,
                {},
            ],
        ),
        (
            "ds",
            [[{"k": "u"}, {"k": "W"}]],
            [[{"k": "w"}, {"k": "v"}], [{"k": "v"}], {"k": "v"}, [{"k": "v"}, {}], [1, 2]],
        ),
    ],
)
def test_values(key, right, wrong):
    one = problem([{"geo.f": GOLD}])
    for values, expected in ((right, 1.0), (wrong, 0.0)):
        for value in values:
            assert scores(one, ("geo.f", ONE | {key: value})) == expected, value


def test_numbers_of_floats_and_tuples_of_python():
    one = problem([{"geo.f": {"x": [2.0], "t": [[1, 2]]}}])
    assert (
        bfcl.reward(one, "geo.f(x=2, t=(1, 2))")
        == bfcl.reward(one, "[geo.f(t=[1, 2], x=2.0)]")
        == 1.0
    )
    assert (
        bfcl.reward(one, f"geo.f(x={10**400}, t=(1, 2))")
        == bfcl.reward(one, "geo.f(x=True, t=(1, 2))")
        == 0.0
    )
    assert scores(problem([{"geo.f": {"x": [2]}}]), ("geo.f", {"x": 2.0})) == 1.0
    assert scores(problem([{"geo.f": {"l": [["a"]]}}]), ("geo.f", {"l": ["a"]})) == 1.0
    assert bfcl.reward(problem([{"geo.f": {"l": [["a"]]}}]), "geo.f(l=('a',))") == 0.0


def test_names_of_functions_and_arguments():
    one = problem(
        [{"geo.f": {"n": [1, 2], "s": ["a", ""], "l": ["", ["a"]], "b": ["", True]}}],
        [function(required=["n"])],
    )
    for arguments in (
        {"n": 1},
        {"n": 2, "s": "A"},
        {"b": True, "s": "a", "n": 1},
        {"n": 1, "s": "", "l": []},
    ):
        assert scores(one, ("geo.f", arguments)) == 1.0, arguments
        assert not any(scores(one, (name, arguments)) for name in ("geo_f", "Geo.f", "f"))
    for arguments in (
        {},
        {"s": "a"},
        {"N": 1},
        {"n": 1, "m": 1},
        {"n": 1, "x": 1.0},
        {"n": 3},
        {"n": 1, "b": ""},
        {"n": 1, "b": []},
        {"n": 1, "s": []},
        {"n": 1, "l": ""},
        {"n": 1, "b": None},
    ):
        assert scores(one, ("geo.f", arguments)) == 0.0, arguments
    needed = problem(
        [{"geo.f": {"n": [1, ""]}}], [function(required=["n"])]
    )  # required, whatever the gold allows
    assert scores(needed, ("geo.f", {"n": 1})) == 1.0 and scores(needed, ("geo.f", {})) == 0.0
    assert (
        scores(problem([{"geo.f": {"n": [1], "s": ["a"]}}]), ("geo.f", {"n": 1})) == 0.0
    )  # optional, but asked for
    assert scores(problem([{"geo.f": {}}]), ("geo.f", {})) == 1.0


def test_parallel_calls():
    golds = [{"geo.f": {"n": [1, 2]}}, {"geo.f": {"n": [1]}}, {"g": {"s": ["a"]}}]
    one = problem(golds, [function(), function("g")], "parallel")
    first, second, third = ("geo.f", {"n": 1}), ("geo.f", {"n": 2}), ("g", {"s": "a"})
    for calls in ((first, second, third), (third, second, first), (first, first, third)):
        assert scores(one, *calls) == 1.0, calls
    for calls in (
        (first, second),
        (second, second, third),
        (first, second, third, third),
        (first, second, second),
        (third, third, first),
        (first, second, ("g", {"s": "b"})),
    ):
        assert scores(one, *calls) == 0.0, calls
    assert one.level == 3 and problem(golds[2:], [function("g")], "multiple").level == 2


def test_irrelevance():
    one = problem([], category="irrelevance")
    for reply in (
        "None of the functions fits.",
        "[none of these]",
        "geo.f would need n (see its text).",
        "{}",
        "42",
        "[]",
        "<think>geo.f(n=1)</think>No.",
    ):
        assert bfcl.reward(one, reply) == 1.0, reply
    for reply in (
        *forms(("geo.f", {"n": 1})),
        "geo.f()",
        "",
        " \n",
        "<think>None fits.",
        "<tool_call>",
        "<tool_call>{</tool_call>",
        '{"name": "f", "arguments": {}}',
    ):
        assert bfcl.reward(one, reply) == 0.0, reply
    assert one.level == 2 and one.answer == ""


def test_problems():
    one = problem([{"geo.f": GOLD}])
    assert (one.family, one.key, one.question, one.level) == (
        "bfcl",
        "bfcl simple_python_3",
        "Call it.",
        1,
    )
    assert bfcl.reward(one, one.answer) == bfcl.reward(one, to_chat(one)[-1]["content"]) == 1.0
    [tool] = one.extra["tools"]
    parameters = tool["function"]["parameters"]
    assert (
        tool["type"] == "function"
        and parameters["type"] == "object"
        and parameters["required"] == []
    )
    kinds = {key: value["type"] for key, value in parameters["properties"].items()}
    assert kinds == dict(
        n="integer",
        x="number",
        s="string",
        b="boolean",
        l="array",
        f="array",
        t="array",
        any="string",
        d="object",
        ds="array",
    )
    assert parameters["properties"]["d"]["properties"] == {
        "type": {"type": "number"}
    }  # an argument called type
    assert parameters["properties"]["ds"]["items"] == {"type": "object"}
    assert json.loads(json.dumps(one.extra)) == one.extra


MALFORMED = [
    "<tool_call>\n{}\n</tool_call>",
    "<tool_call>[]</tool_call>",
    '<tool_call>{"name": "geo.f"}</tool_call>',
    '<tool_call>{"name": "geo.f", "arguments": {"n": 1}}',
    '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
    '<tool_call>{"name": "geo.f", "arguments": "{}"}</tool_call>',
    '[{"name": "geo.f", "arguments": {"n": 1}}, 1]',
    "null",
    "geo.f(1)",
    "geo.f(n=x)",
    "geo.f(n=1+1)",
    "geo.f(n=open('x'))",
    "geo.f(**{'n': 1})",
    "geo.f(n=1, n=1)",
    "geo.f(n=1); x",
    "geo.f(n=1",
    "Call geo.f(n=1)",
    "[geo.f(n=1), 2]",
    "(geo.f(n=1),)",
    "lambda: geo.f(n=1)",
    "geo.f(n={1: [}])",
    "geo.f(n={[]: 1})",
    "[geo.f(n=1) for n in x]",
    "__import__('os').system(n=1)",
    "geo.f(n={{}})",
    "geo.f(n=1" + " " * 20_000 + ")",
]  # too long to be a call


@pytest.mark.parametrize("reply", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_calls(reply):
    assert bfcl.calls(reply) is None and bfcl.reward(problem([{"geo.f": {"n": [1]}}]), reply) == 0.0


@pytest.mark.parametrize(
    "reply",
    [
        "x" * 10**6,
        "[" * 100_000,
        "[" * 19_000,
        "(" * 19_000,
        "-" * 19_000 + "1",
        '{"a":' * 3_000,
        "<tool_call>" * 90_000,
        "<tool_call>" + "[" * 19_000 + "</tool_call>",
        "\0",
        "geo.f(n='\0')",
        "geo.f(n=\ud800)",
        "geo.f(n=" + "9" * 9_000 + ")",
        "geo.f(n=" + "[" * 9_000 + "]" * 9_000 + ")",
        "f" + "()" * 9_000,
        "a." * 9_000 + "f()",
        "geo.f(n='\\d')",
        "[NaN, 1e999]",
    ],
    ids=range(17),
)
def test_hostile_replies(reply):
    started = time.process_time()
    assert bfcl.reward(problem([{"geo.f": {"n": [1]}}]), reply) == 0.0
    bfcl.reward(problem([], category="irrelevance"), reply)
    assert time.process_time() - started < 5


def test_many_calls_that_nearly_match():
    """Each of 60 golds fits each of 60 calls, but the last fits none: no search through
    all orders.
    """
    golds = [{"geo.f": {"n": [1]}}] * 59 + [{"geo.f": {"n": [2]}}]
    started = time.process_time()
    assert scores(problem(golds, category="parallel"), *[("geo.f", {"n": 1})] * 60) == 0.0
    assert time.process_time() - started < 5


def write(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_files(tmp_path):
    record = {
        "id": "multiple_0",
        "question": [[{"role": "user", "content": "Call it."}]],
        "function": [function()],
    }
    answer = {"id": "multiple_0", "ground_truth": [{"geo.f": {"n": [1]}}]}
    plain = write(tmp_path / "BFCL_v4_multiple.jsonl", record)
    with pytest.raises(UserError, match="no answers"):
        bfcl.load(plain)
    write(tmp_path / "BFCL_v4_multiple_answer.jsonl", {**answer, "id": "multiple_1"})
    with pytest.raises(UserError, match="no answer to multiple_0"):
        bfcl.load(plain)
    write(tmp_path / "BFCL_v4_multiple_answer.jsonl", answer)
    official = write(tmp_path / "official" / "BFCL_v4_multiple.json", record)
    write(tmp_path / "official" / "possible_answer" / "BFCL_v4_multiple.json", answer)
    assert bfcl.load(plain) == bfcl.load(official) == bfcl.read_problems([record], [answer])
    nothing = write(tmp_path / "BFCL_v4_irrelevance.jsonl", {**record, "id": "irrelevance_0"})
    assert [one.extra["ground_truth"] for one in bfcl.load(nothing)] == [[]]
    for change in (
        {"question": []},
        {"question": [[], []]},
        {"function": None},
        {"function": []},
        {"id": "multi_turn_0"},
    ):
        with pytest.raises(UserError, match="malformed"):
            bfcl.read_problems([record | change], [answer | {"id": (record | change)["id"]}])
    for text in ("{", "[1]", "1"):
        (tmp_path / "BFCL_v4_irrelevance.jsonl").write_text(text)
        with pytest.raises(UserError, match="BFCL_v4_irrelevance.jsonl"):
            bfcl.load(nothing)
    with pytest.raises(UserError, match="cannot be read"):
        bfcl.load(str(tmp_path / "irrelevance_missing.jsonl"))
