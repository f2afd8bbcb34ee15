"""Solutions of public sets as conversations for SFT."""
import json
import sys

import pytest

from common import UserError
from data.chat.conversations import normalize
from data.sets import solutions

ROWS = [
    {"question": "Ann has 9 apples.\nAnd 3?", "answer": "9 + 3 = <<9+3=12>>12.\nSo 12.\n#### 12"},
    {"question": "What is 1,000?", "answer": "#### 1,000"},
]


def test_a_solution_is_thoughts_and_an_answer(tmp_path, monkeypatch, capsys):
    source, path = tmp_path / "train.jsonl", tmp_path / "made" / "solutions.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.setattr(sys, "argv", ["solutions", f"gsm8k={source}", str(path)])
    solutions.main()
    assert capsys.readouterr().err == f"2 conversations in {path}\n"
    found = {}
    for line in path.read_text().splitlines():
        question, reply = normalize(json.loads(line))["messages"]
        found[question["content"]] = reply
    asked = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert found == {
        ROWS[0]["question"] + asked: {
            "role": "assistant", "reasoning": "9 + 3 = 12.\nSo 12.", "content": "\\boxed{12}"},
        ROWS[1]["question"] + asked: {"role": "assistant", "content": "\\boxed{1000}"},
    }


def test_a_set_without_answers_is_refused(tmp_path):
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "Why?"}\n' * 3)
    splits = []
    for split in ("train", "dev", "test"):
        with pytest.raises(UserError, match="none of [01] problems has an answer") as raised:
            solutions.write(f"constraints={source}", split, tmp_path / "out.jsonl")
        splits.append(str(raised.value))
    assert any("none of 1 " in said for said in splits)
    assert not (tmp_path / "out.jsonl").exists()
