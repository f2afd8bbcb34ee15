"""Transcripts: whole conversations of the protocol, whose truth is known."""

import json
import re
from dataclasses import replace

import pytest

from data.tasks import phrases
from data.verify import answers, transcripts
from data.verify.agentic import Prompts
from data.verify.sandbox import Sandbox

PROMPTS = Prompts(system="", case="Gold: {gold}\nGiven: {answer}", ran="{stdout}", last="")


def test_cases_have_their_truth():
    cases = transcripts.draw_cases(800, 0, "train")
    assert len({(case.gold, case.answer) for case in cases}) == 800
    n_equal = sum(case.equal for case in cases)
    n_tricks = sum(case.kind in transcripts.TRICKS for case in cases)
    assert 320 < n_equal < 480 and 100 < n_tricks < 220
    for case in cases:
        if case.program:
            comparison = case.program.removeprefix("print(").removesuffix(")")
            assert eval(comparison) == case.equal
        else:
            assert not case.equal and case.kind in transcripts.TRICKS
        if case.kind == "number":
            assert int(case.answer) == eval(case.code)


def test_rules_decide_none_of_the_wrong_ones_for_right():
    for case in transcripts.draw_cases(300, 1, "train"):
        decided = answers.decide(case.gold, case.answer)
        assert decided is None or decided == case.equal, case


def test_splits_share_no_gold():
    golds = []
    for split in ("train", "dev", "test"):
        golds.append({case.gold for case in transcripts.draw_cases(300, 0, split)})
    assert not golds[0] & golds[1] and not golds[0] & golds[2] and not golds[1] & golds[2]
    held_out = transcripts.draw_cases(100, 0, "test", held_out=True)
    assert {case.gold for case in held_out}.isdisjoint(golds[0])
    spelled = [case.gold for case in transcripts.draw_cases(500, 0, "train")]
    assert not any(re.search(r"[a-z] (times|less than) [a-z]", gold) for gold in spelled)
    assert ("times", ("words", "words")) in phrases.HELD_OUT


def test_records_are_what_the_verifier_is_sent_and_says():
    cases = transcripts.draw_cases(60, 2, "train")
    with Sandbox(workers=2) as box:
        records = transcripts.transcribe(cases, PROMPTS, box)
        right = next(case for case in cases if case.equal)
        with pytest.raises(RuntimeError, match="the protocol and the truth differ"):
            transcripts.transcribe([replace(right, equal=False)], PROMPTS, box)
    for case, record in zip(cases, records):
        roles = [message["role"] for message in record["messages"]]
        texts = [message["content"] for message in record["messages"]]
        assert json.loads(texts[0].split("Given: ")[1]) == case.answer
        if case.program:
            assert roles == ["user", "assistant"] * 2
            assert texts[2] == json.dumps(f"{case.equal}\n")
        else:
            assert roles == ["user", "assistant"]
        assert texts[-1] == f"Verdict: {'equivalent' if case.equal else 'different'}"
