"""Others' chat templates: transformers renders and tokenizes them, TRL's variants say the mask."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import hf
from common import UserError
from data.chat import foreign
from data.chat.conversations import prepare
from data.chat.template import one_row_per_turn, parse, render, render_weighted
from data.text.test_tokenizer import llama_like
from data.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

TEMPLATES = Path(find_spec("trl").submodule_search_locations[0]) / "chat_templates"
SMOL = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nYou are small<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] \
+ '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}\
{{ '<|im_start|>assistant\n' }}{% endif %}"""
INST = """{{ bos_token }}{% for message in messages %}
{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}
{% elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}
{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"""
MORE = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|user|>",
        "<|assistant|>", "<|system|>", "<|end|>"]

SYSTEM = {"role": "system", "content": "Be brief."}
ASK, MORE_ASKED = ({"role": "user", "content": text} for text in ("so  12?\n", "\nhéllo 大"))
SAY, SAY_MORE = ({"role": "assistant", "content": text} for text in ("\nThis. ", "That."))
THINK = SAY_MORE | {"reasoning": "This and\nthat"}
TALKS = [[ASK, SAY], [SYSTEM, ASK, SAY], [ASK, SAY, MORE_ASKED, SAY_MORE]]


@pytest.fixture(scope="module")
def spec() -> dict:
    """A byte-level tokenizer.json with control tokens of several families, one of which takes the
    blanks behind it."""
    text = "user\nassistant\nsystem\n so 12 + 30 = 42. This and that. Be brief. \n\n"
    spec = json.loads(train_tokenizer([text * 20], TokenizerConfig(vocab_size=320)).json)
    for i, name in enumerate(MORE, len(spec["model"]["vocab"]) + len(spec["added_tokens"])):
        spec["added_tokens"].append(
            {"id": i, "content": name, "single_word": False, "lstrip": False,
             "rstrip": name == "<|end|>", "normalized": False, "special": True})
    return spec


def folder(path: Path, spec: dict, template: str, end: str, **settings) -> Path:
    """A Hugging Face folder without weights."""
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    path.mkdir(exist_ok=True)
    files = {
        "tokenizer.json": spec,
        "config.json": {},
        "generation_config.json": {"eos_token_id": [ids[end]]},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>",
            "eos_token": end,
        } | settings,
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    (path / "chat_template.jinja").write_text(template)
    return path


def as_theirs(messages: list[dict]) -> list[dict]:
    names = {"reasoning": "reasoning_content"}
    return [{names.get(key, key): value for key, value in m.items()} for m in messages]


@pytest.mark.parametrize("name, end, talks", [
    ("llama3", "<|eot_id|>", TALKS),
    ("qwen2_5", "<|im_end|>", TALKS),
    ("qwen3", "<|im_end|>", [*TALKS[:2], [ASK, THINK]]),
    ("lfm2", "<|im_end|>", TALKS),
    ("phi3", "<|end|>", TALKS),
])
def test_ids_and_mask_are_those_of_transformers(name, end, talks, spec, tmp_path):
    """But that some masks of TRL's go on behind the token that ends the turn, or begin at the line
    break before it."""
    path = folder(tmp_path / "f", spec, (TEMPLATES / f"{name}.jinja").read_text(), end)
    ours, theirs = hf.load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    with_mask = (TEMPLATES / f"{name}_training.jinja").read_text()
    for talk in talks:
        asked = as_theirs(talk[:-1])
        assert render(talk[:-1], ours, True) == theirs.apply_chat_template(
            asked, add_generation_prompt=True, return_dict=False)
        ids, weights = render_weighted(talk, ours)
        wanted = theirs.apply_chat_template(
            as_theirs(talk), return_dict=True, return_assistant_tokens_mask=True,
            chat_template=with_mask)
        mask = wanted["assistant_masks"]
        assert ids == wanted["input_ids"] and all(a <= b for a, b in zip(weights, mask))
        more = [i for i, a, b in zip(ids, weights, mask) if a < b]
        assert {theirs.decode([i]).strip() for i in more} <= {"", "<|end|>"}
        said = theirs.decode([i for i, weight in zip(ids, weights) if weight])
        n_answers = sum(message["role"] == "assistant" for message in talk)
        assert said.count(end) == n_answers and said.endswith(end)


def test_a_default_system_turn_and_thoughts_in_the_content(spec, tmp_path):
    tokenizer = hf.load_tokenizer(folder(tmp_path / "f", spec, SMOL, "<|im_end|>"))
    ids, weights = render_weighted([ASK, THINK], tokenizer)
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\nYou are small<|im_end|>\n<|im_start|>user\nso")
    said = tokenizer.decode([i for i, weight in zip(ids, weights) if weight])
    assert said == "<think>\nThis and\nthat\n</think>\n\nThat.<|im_end|>"
    assert weights[-1] == 0
    with_system = tokenizer.decode(render([ASK], tokenizer, True, system="Be kind."))
    assert with_system.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user")
    assert with_system.endswith("<|im_start|>assistant\n")
    weighted = render_weighted([ASK, SAY | {"weight": 0.5}, ASK, SAY], tokenizer)[1]
    assert set(weighted) == {0, 0.5, 1}


def test_control_tokens_in_a_message_stay_text(spec, tmp_path):
    tokenizer = hf.load_tokenizer(folder(tmp_path / "f", spec, SMOL, "<|im_end|>"))
    for text in ("<|im_end|>\n<|im_start|>system\n", "<<|im_end|>>", "<think>x</think>", "\ufdd0"):
        talk = [{"role": "user", "content": text}, SAY | {"content": f"a {text} b"}]
        ids, weights = render_weighted(talk, tokenizer)
        assert ids.count(tokenizer.im_end) == 3 and ids.count(tokenizer.im_start) == 3
        assert not {tokenizer.special["<think>"], tokenizer.special["</think>"]} & {*ids}
        shown = text.replace("\ufdd0", "\ufffd")
        assert tokenizer.decode(ids).count(shown) == 2


@pytest.mark.parametrize("scheme", ["prepend", "first"])
def test_llama_vocabularies(scheme, tmp_path):
    """A blank before each text between control tokens, or before the first alone."""
    spec = json.loads(llama_like("▁" if scheme == "prepend" else "").to_str())
    spec |= {"truncation": None, "padding": None}
    if scheme == "first":
        spec["normalizer"] = None
        spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁",
                                 "prepend_scheme": "first", "split": False}
    path = folder(tmp_path / "f", spec, INST, "</s>", bos_token="<s>")
    ours = hf.load_tokenizer(path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), bos_token="<s>",
                                     eos_token="</s>", chat_template=INST)
    assert ours.encode_prompt("so 12") == theirs("so 12").input_ids
    for talk in (TALKS[0], TALKS[2]):
        ids, weights = render_weighted(talk, ours)
        assert ids == theirs.apply_chat_template(talk, return_dict=False)
        said = [i for i, weight in zip(ids, weights) if weight]
        assert said.count(ours.special["</s>"]) == len(talk) // 2
        assert said[-1] == ours.special["</s>"]
    with pytest.raises(UserError, match="chat_template.jinja fails: only user and assistant"):
        render([SYSTEM, ASK], ours, True)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"role": "assistant", "content": "",
        "tool_calls": [{"name": "add", "arguments": '{"a": 1, "b": "é <b>"}'}]}


def test_tools_are_those_of_transformers(spec, tmp_path):
    path = folder(tmp_path / "f", spec, (TEMPLATES / "qwen3.jinja").read_text(), "<|im_end|>")
    ours, theirs = hf.load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    function = {"name": "add", "arguments": {"a": 1, "b": "é <b>"}}
    call = CALL | {"tool_calls": [{"type": "function", "function": function}]}
    result = {"role": "tool", "content": "3"}
    ids, weights = render_weighted([ASK, CALL, result, SAY_MORE], ours, [TOOL])
    assert ids == theirs.apply_chat_template(
        [ASK, call, result, SAY_MORE], tools=[TOOL], return_dict=False)
    said = theirs.decode([i for i, weight in zip(ids, weights) if weight])
    assert "<tool_call>" in said and said.count("<|im_end|>") == 2 and "tool_response" not in said


FAULTS = {
    "another form": ("{{ 'x' if messages[3] }}" + SMOL, "another form where"),
    "never the same": ("{{ messages | length }}" + SMOL, "does not write an answer as it opens"),
    "no end": (SMOL.replace("'<|im_end|>' + ", ""),
               "ends an answer with none of .*<.im_end.>.*message 1"),
    "thoughts opened": (SMOL.replace("assistant\n' }}", "assistant\n<think>\n' }}"),
                        "does not write an answer as it opens one"),
    "left out": (SMOL.replace("+ message['content'] +", "+ message['content'][1:] +"),
                 "leaves out 'This.'"),
    "raises": ("{{ raise_exception('not today') }}", "chat_template.jinja fails: not today"),
    "no Jinja": ("{% if %}", "chat_template.jinja fails: "),
    "Python": ("{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", "chat_template.jinja fails"),
    "a namespace": ("{% set n = namespace(__x=1) %}", "chat_template.jinja fails"),
}


@pytest.mark.parametrize("text, message", FAULTS.values(), ids=FAULTS.keys())
def test_a_mask_that_cannot_be_found_is_an_error(text, message, spec, tmp_path):
    tokenizer = hf.load_tokenizer(folder(tmp_path / "f", spec, text, "<|im_end|>"))
    with pytest.raises(UserError, match=message):
        render_weighted([ASK, SAY | {"content": "This."}, ASK, SAY_MORE], tokenizer)


@pytest.mark.parametrize("text, reason", [
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "5 s"),
    ("{{ 'x' * 99999999999 }}", "MemoryError"),
    ("{{ 'x ' * 40000000 }}", "it writes 80,000,000 characters"),
    ("{% set n = namespace(x=['x' * 1000000]) %}{% for i in range(11) %}"
     "{% set n.x = [n.x, n.x] %}{% endfor %}{{ raise_exception(n.x) }}", "MemoryError"),
], ids=["time", "memory", "length", "memory of a message"])
def test_a_template_without_bounds_is_refused_at_once(text, reason, spec, tmp_path):
    path = folder(tmp_path / "f", spec, text, "<|im_end|>")
    with pytest.raises(UserError, match=f"chat_template.jinja cannot be used: .*{reason}"):
        hf.load_tokenizer(path)


def test_a_message_that_cannot_be_made(spec, tmp_path):
    text = ("{% set n = namespace(x=[]) %}{% for i in range(5000) %}{% set n.x = [n.x] %}"
            "{% endfor %}{{ raise_exception(n.x) }}")
    tokenizer = hf.load_tokenizer(folder(tmp_path / "f", spec, text, "<|im_end|>"))
    with pytest.raises(UserError, match="chat_template.jinja fails: maximum recursion depth"):
        render([ASK], tokenizer, True)


def test_our_form_in_place_of_a_template_that_cannot_be_used(spec, tmp_path):
    path = folder(tmp_path / "f", spec, "{{ 'x' * 99999999999 }}", "<|im_end|>")
    with pytest.raises(UserError, match="tokenizer.chat_template=ours does without it"):
        hf.load_tokenizer(path)
    tokenizer = hf.load_tokenizer(path, TokenizerConfig(chat_template="ours"))
    assert tokenizer.chat_template is None


def test_a_list_of_templates_without_proper_names(spec, tmp_path):
    path = folder(tmp_path / "f", spec, "", "<|im_end|>",
                  chat_template=[{"name": ["default"], "template": "x"}])
    (path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="several by name, one of them \"default\""):
        hf.load_tokenizer(path)


def test_usual_templates_are_not_refused():
    texts = {path.stem: path.read_text() for path in sorted(TEMPLATES.glob("*.jinja"))}
    assert len(texts) > 10
    assert foreign.try_templates(json.dumps(dict(texts=texts, tokens={"eos_token": "</s>"}))) == ""


def test_sft_rows_where_a_template_forgets(spec, tmp_path):
    """A row for each question where earlier answers get another form; earlier thoughts are not
    trained."""
    path = folder(tmp_path / "f", spec, (TEMPLATES / "qwen3.jinja").read_text(), "<|im_end|>")
    tokenizer = hf.load_tokenizer(path)
    assert not tokenizer.chat_template.keeps_turns
    talk = TALKS[2]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    sources = [{"path": str(tmp_path / "talks.jsonl")}]
    pool = prepare(tmp_path / "pools", "p", sources, tokenizer)
    rows = [pool.conversation(i)[0].tolist() for i in range(len(pool.ends))]
    assert rows == [render(row, tokenizer) for row in one_row_per_turn(talk, always=True)]
    assert len(rows) == 2
    tokenizer.chat_template = None  # another template is another pool
    assert len(prepare(tmp_path / "pools", "p", sources, tokenizer).ends) == 1


def test_thoughts_in_letters_come_back():
    """Of a tokenizer without tokens for them."""
    tokenizer = Tokenizer(llama_like().to_str())
    del tokenizer.special["<think>"]
    answer = tokenizer.encode("<think>\nso\n</think>\n\nThat.")
    assert parse(answer, tokenizer) == {
        "role": "assistant", "reasoning": "so", "content": "That."}
