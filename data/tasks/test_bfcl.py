"""BFCL's rules on small records of its schema."""
import json

import pytest

from common import UserError
from data import tasks
from data.tasks import bfcl

FUNCTION = {"name": "geo.area", "description": "Area.", "parameters": {"type": "dict", "required": ["base", "unit"], "properties": {
    "base": {"type": "float"}, "unit": {"type": "string"}, "exact": {"type": "boolean"}, "tags": {"type": "array"},
    "at": {"type": "dict"}}}}
RECORD = {"id": "simple_0", "question": [[{"role": "user", "content": "The area?"}]], "function": [FUNCTION]}
GOLD = {"geo.area": {"base": [3.0, 4.5], "unit": ["Square-Meters", "m2"], "exact": [True, ""], "tags": ["", ["a", "b"]],
                     "at": [{"x": [1], "y": [2, ""]}, ""]}}
RIGHT = {"base": 3, "unit": "square meters"}


def rendered(calls):
    """The calls in each form."""
    tags = "".join(f"<tool_call>\n{json.dumps({'name': n, 'arguments': a})}\n</tool_call>\n" for n, a in calls)
    python = "[" + ", ".join(f"{n}({', '.join(f'{k}={v!r}' for k, v in a.items())})" for n, a in calls) + "]"
    return tags, python, json.dumps([{"name": n, "arguments": a} for n, a in calls]), f"<think>hm</think>\n{tags}"


@pytest.mark.parametrize("arguments, right", [
    (RIGHT, 1), ({"unit": "M2", "base": 4.5}, 1), (RIGHT | {"exact": True}, 1), (RIGHT | {"tags": ["A", "b"]}, 1),
    (RIGHT | {"at": {"x": 1}}, 1), (RIGHT | {"at": {"y": 2, "x": 1}}, 1),
    ({"base": 3}, 0), ({"unit": "m2"}, 0), (RIGHT | {"base": 5}, 0), (RIGHT | {"base": "3"}, 0), (RIGHT | {"base": True}, 0),
    (RIGHT | {"unit": "cm2"}, 0), (RIGHT | {"exact": False}, 0), (RIGHT | {"exact": 1}, 0), (RIGHT | {"tags": ["b", "a"]}, 0),
    (RIGHT | {"tags": ["a"]}, 0), (RIGHT | {"at": {"x": 1, "z": 1}}, 0), (RIGHT | {"at": {"y": 2}}, 0),
    (RIGHT | {"at": {"x": 1.5}}, 0), (RIGHT | {"more": 1}, 0), ({"base": "square meters", "unit": 3}, 0),
    ({"Base": 3, "unit": "m2"}, 0),
])
def test_arguments(arguments, right):
    problem = bfcl.read(RECORD, [GOLD])
    for text in rendered([("geo.area", arguments)]):
        assert bfcl.reward(problem, text) == right, text
        assert bfcl.reward(problem, text.replace("geo.area", "geo.Area")) == 0


def test_parallel_calls():
    golds = [{"f": {"a": [1, 2]}}, {"f": {"a": [1]}}, {"f": {"a": [2]}}]
    record = RECORD | {"id": "parallel_0", "function": [{"name": "f", "parameters": {"type": "dict", "properties": {}}}]}
    problem = bfcl.read(record, golds)
    call = {n: ("f", {"a": n}) for n in (1, 2, 3)}
    for numbers, right in (((1, 2, 2), 1), ((2, 1, 1), 1), ((1, 2), 0), ((1, 2, 3), 0), ((1, 2, 1, 2), 0), ((2, 2, 1), 1), ((1, 1, 1), 0)):
        assert all(bfcl.reward(problem, text) == right for text in rendered([call[n] for n in numbers]))


def test_irrelevance_tools_and_forms():
    nothing = bfcl.read(RECORD | {"id": "irrelevance_3"}, [])
    assert bfcl.reward(nothing, "None of them fits.") == 1 and nothing.level == 2
    for text in ("", " \n", "<think>no", "geo.area(base=1)", *rendered([("geo.area", RIGHT)]), "<tool_call>\n{"):
        assert bfcl.reward(nothing, text) == 0
    problem = bfcl.read(RECORD, [GOLD])
    assert problem.extra["tools"][0]["function"]["parameters"]["properties"]["base"] == {"type": "number"}
    assert tasks.chat(problem)[0]["content"] == "The area?" and bfcl.reward(problem, tasks.chat(problem)[1]["content"]) == 1
    json.dumps(problem.extra)


HOSTILE = ["<tool_call>" * 9999, "[" * 100_000, '[{"name": ' * 50_000, "[f(" * 9999, "f(" + "(" * 9999, "[geo.area(**{'base': 3})]",
           "[geo.area(3, 'm2')]", "[__import__('os').system('true')]", "[geo.area(base=open('/etc/passwd'), unit='m2')]",
           "<tool_call>[]</tool_call>", "<tool_call>null</tool_call>", '<tool_call>{"name": 5, "arguments": []}</tool_call>', "\0\ud800",
           '<tool_call>{"name": "geo.area", "arguments": "{}"}</tool_call>', "x" * 10 ** 6, "[geo.area(base=3, base=3)]"]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_responses(text):
    assert bfcl.reward(bfcl.read(RECORD, [GOLD]), text) == 0.0


def test_files(tmp_path):
    questions, answers = tmp_path / "BFCL_v4_simple.jsonl", tmp_path / "BFCL_v4_simple_answer.jsonl"
    questions.write_text(json.dumps(RECORD) + "\n")
    with pytest.raises(UserError, match="no answers"):
        bfcl.load(str(questions))
    answers.write_text(json.dumps({"id": "simple_1", "ground_truth": [GOLD]}) + "\n")
    with pytest.raises(UserError, match="no answer to simple_0"):
        bfcl.load(str(questions))
    answers.write_text(json.dumps({"id": "simple_0", "ground_truth": [GOLD]}) + "\n")
    problem, = bfcl.load(str(questions))
    assert problem.extra["ground_truth"] == [GOLD]
    answers.rename(tmp_path / "x")
    (tmp_path / "possible_answer").mkdir()
    (tmp_path / "x").rename(tmp_path / "possible_answer" / questions.name)
    assert bfcl.load(str(questions)) == [problem]
    questions.write_text(json.dumps({"id": "simple_0", "question": []}) + "\n")
    with pytest.raises(UserError, match="simple_0 is malformed"):
        bfcl.load(str(questions))
