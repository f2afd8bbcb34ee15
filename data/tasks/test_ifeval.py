"""IFEval: for each of the 25 types a right and a wrong response, by hand."""
import json
import time

import pytest

from data.tasks import ifeval
from data.tasks.ifeval import CONSTRAINTS, loose, read, reward, sentences

CASES = {  # type: arguments, right responses, wrong responses
    "keywords:existence": (dict(keywords=["tea", "cup"]), ["A Cup of TEA."], ["A cup.", "te a cup"]),
    "keywords:frequency": (dict(keyword="tea", frequency=2, relation="at least"), ["tea, Tea"], ["tea"]),
    "keywords:forbidden_words": (dict(forbidden_words=["tea"]), ["A team.", "coffee"], ["Tea!", "no tea"]),
    "keywords:letter_frequency": (dict(letter="e", let_frequency=3, let_relation="less than"), ["Eel"], ["Eee"]),
    "language:response_language": (dict(language="de"), ["Das ist ein schöner Tag und wir gehen spazieren."],
                                   ["This is a beautiful day and we go for a walk."]),
    "length_constraints:number_sentences": (dict(num_sentences=2, relation="at least"), ["One. Two?", "A!\nB."],
                                            ["One.", "It is 3.5 m."]),
    "length_constraints:number_paragraphs": (dict(num_paragraphs=2), ["a\n***\nb", "***\na\n***\nb\n***"],
                                             ["a", "a *** b *** c", "a\n***\n***\nb"]),
    "length_constraints:number_words": (dict(num_words=3, relation="less than"), ["two words"], ["now three words"]),
    "length_constraints:nth_paragraph_first_word": (
        dict(num_paragraphs=2, nth_paragraph=2, first_word="weekend"), ["a\n\nWeekend, b", 'a\n\n"weekend" b'],
        ["a\n\nb weekend", "weekend\n\na", "a\n\nweekend\n\nb", "a"]),
    "detectable_content:number_placeholders": (dict(num_placeholders=2), ["[name] of [place]"], ["[name]", "[a\nb] [c]"]),
    "detectable_content:postscript": (dict(postscript_marker="P.S."), ["Hi.\nP.S. more", "p. s. more"], ["Hi.", "PS more"]),
    "detectable_format:number_bullet_lists": (dict(num_bullets=2), ["* a\n* b", "- a\n* b"], ["* a", "* a\n* b\n* c", "**a**\n* b"]),
    "detectable_format:constrained_response": ({}, ["My answer is yes.", "So: My answer is maybe."], ["Yes.", "My answer is."]),
    "detectable_format:number_highlighted_sections": (dict(num_highlights=2), ["*a* and *b*", "**a** *b*"], ["*a*", "** **", "*a\nb* *c*"]),
    "detectable_format:multiple_sections": (dict(section_spliter="SECTION", num_sections=2), ["SECTION 1\na\nSECTION 2\nb"],
                                            ["SECTION 1\na", "section 1 section 2"]),
    "detectable_format:json_format": ({}, ['{"a": 1}', '```json\n[1]\n```'], ["{a: 1}", "Here: {}"]),
    "detectable_format:title": ({}, ["<<poem>>\ntext"], ["<poem>", "<<>>", "<<a\nb>>", "<< >>"]),
    "combination:two_responses": ({}, ["a\n******\nb"], ["a", "a******a", "a******b******c", "a************b"]),
    "combination:repeat_prompt": (dict(prompt_to_repeat="Say hi."), ["say HI. Hi!"], ["Hi! Say hi."]),
    "startend:end_checker": (dict(end_phrase="The end."), ["So. the end.", '"The end."\n'], ["The end. No."]),
    "startend:quotation": ({}, ['"Hi."', ' "a" '], ["Hi.", '"', '"Hi']),
    "change_case:capital_word_frequency": (dict(capital_frequency=2, capital_relation="at least"), ["BIG DAY", "A big DAY"], ["BIG day"]),
    "change_case:english_capital": ({}, ["THIS IS A SENTENCE IN ENGLISH."], ["THIS IS a SENTENCE.", "DAS IST EIN SATZ AUF DEUTSCH."]),
    "change_case:english_lowercase": ({}, ["this is a sentence in english."], ["This is a sentence."]),
    "punctuation:no_comma": ({}, ["None at all."], ["One, at least."]),
}


def problem(*names, prompt="Do."):
    return read({"key": 1, "prompt": prompt, "instruction_id_list": list(names), "kwargs": [CASES[name][0] for name in names]})


def test_all_25_types_have_cases():
    assert CASES.keys() == CONSTRAINTS.keys() and len(CASES) == 25


@pytest.mark.parametrize("name", CASES)
def test_type(name):
    one = problem(name)
    for response in CASES[name][1]:
        assert reward(one, response) == 1.0 == reward(one, f"<think>\nx,,, TEA\n</think>\n\n{response}"), response
        assert reward(one, f"<think>{response}") == 0.0
    for response in (*CASES[name][2], "", " \n"):
        assert reward(one, response) == 0.0, response


def test_all_must_hold_and_loose_variants():
    two = problem("punctuation:no_comma", "startend:quotation")
    assert reward(two, '"a"') == 1.0 and reward(two, '"a, b"') == 0.0 == reward(two, "a") and two.level == 2
    assert loose(two, 'Sure, here:\n"a b"') == [True, True] and reward(two, 'Sure, here:\n"a b"') == 0.0
    assert loose(problem("startend:quotation"), '**"a"**') == [True] and loose(two, "<think>") == [False, False]


def test_rows_of_the_hub_have_all_arguments_as_none():
    row = {"key": 5, "prompt": "p", "instruction_id_list": ["punctuation:no_comma", "keywords:frequency"], "kwargs": [
        dict.fromkeys(["keyword", "num_words"]), dict(keyword="a", frequency=1, relation="at least", num_words=None)]}
    assert reward(read(row), "a") == 1.0
    json.dumps(read(row).extra)


@pytest.mark.parametrize("name, kwargs, error", [
    ("keywords:frequency", {"keyword": "a"}, "keywords:frequency.*frequency"), ("punctuation:no_comma", {"x": 1}, "no_comma.*x"),
    ("keywords:frequency", dict(keyword="a", frequency=1, relation="about"), "about"), ("keywords:rhyme", {}, "unknown"),
    ("keywords:existence", {"keywords": 5}, "existence")])
def test_malformed_records(name, kwargs, error):
    with pytest.raises(ValueError, match=error):
        read({"key": 1, "prompt": "p", "instruction_id_list": [name], "kwargs": [kwargs]})


@pytest.mark.parametrize("response", ["[" * 29_000, "*" * 29_000, "\0" * 29_000, "<<" * 14_000, "-\n" * 14_000, "a." * 14_000, "\ud800",
                                      " " * 29_000 + "a", "\n" * 29_000 + "a", "[a" * 14_000, "x" * 10 ** 6], ids=range(11))
def test_hostile_responses(response):
    started = time.time()
    for name in CASES:
        if "language" not in name and "english" not in name:
            assert reward(problem(name), response) in (0.0, 1.0)
    assert time.time() - started < 5


def test_sentences():
    assert len(sentences('He said "Stop!" Then he left. It cost 3.50 dollars... Really?')) == 4
    assert ifeval.SOURCE["hf"] == "google/IFEval"
