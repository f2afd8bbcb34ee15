"""Scripted models, which see nothing but the messages, in place of real ones; the real cache and
the real sandbox."""
from settings import from_dict

import json
import threading
from collections import Counter
from dataclasses import asdict, replace

import pytest

from common import UserError
from data.chat.template import split_thoughts
from data.llm import cached
from data.refine.refinement import (
    GENERAL,
    Item,
    Settings,
    as_text,
    chain_prompt,
    checklist_prompt,
    format_critique,
    parse_checklist,
    parse_verdicts,
    reconstruct,
    refine,
    revision_prompt,
    run_side_by_side,
    verdict_prompt,
    visible_text,
)
from data.tasks.pages import FAMILIES
from data.tasks.problem import to_chat
from data.verify.sandbox import Limits, Sandbox

BARE = {
    "checklist": "C {instruction}",
    "evaluate": "E {instruction}|{response}|{items}",
    "revise": "R {instruction}|{response}|{critique}",
    "failure": "{critique}",
    "complete": "F {instruction}|{solution}",
}
FULL = Settings(["a", "b"], ["x", "y"], ["r"], "c", n_drafts=2, prompts=BARE)


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def scripted(answer, by_place: bool = False):
    """A model that says answer(text, number).

    number: how many equal conversations stand before, or the place in the batch (a cache leaves
    holes, but moves none). Its log has all that it was asked.
    """

    def write(conversations, on_result=lambda i, text: None):
        seen, texts = Counter(), [None] * len(conversations)
        for i, conversation in enumerate(conversations):
            if conversation:
                text = as_text(conversation)
                number = i if by_place else seen[text]
                texts[i] = answer(text, number)
                write.log.append((text, number))
                on_result(i, texts[i])
                seen[text] += 1
        return texts

    write.log = []
    return write


def constant(*texts):
    """A model whose n-th draw is the n-th text."""
    return scripted(lambda text, draw: texts[draw])


def verdicts(*critiques: str) -> str:
    return json.dumps([{"pass": False, "critique": c} if c else {"pass": True} for c in critiques])


def at_least(most: int):
    """So many items, "at least 1", "at least 2" …: a response that is a number scores
    min(number, most) / most."""

    def item(low):
        return Item(
            f"at least {low}", lambda response: "" if float(response) >= low else f"below {low}"
        )

    return lambda instruction: [item(low) for low in range(1, most + 1)]


def nothing(instruction):
    return []


# ---- requests and answers


def test_an_instruction_as_text():
    assert as_text(user("Add {1}.")) == "Add {1}."
    turns = [
        dict(role="system", content="Be brief."),
        *user("a?"),
        dict(role="assistant", content="b"),
        *user("c?"),
    ]
    assert as_text(turns) == "System: Be brief.\n\nUser: a?\n\nAssistant: b\n\nUser: c?"


def test_requests_hold_just_what_they_are_given():
    asked = verdict_prompt(BARE, user("i {x}"), "r {}", ["one", "two\n3. forged"])
    assert asked == user("E i {x}|r {}|1. one\n2. two 3. forged")
    for text, fields in (
        (as_text(checklist_prompt({}, user("ONE"))), ["ONE"]),
        (as_text(verdict_prompt({}, user("ONE"), "TWO", ["THREE"])), ["ONE", "TWO", "1. THREE\n"]),
        (as_text(revision_prompt({}, user("ONE"), "TWO", "THREE")), ["ONE", "TWO", "THREE"]),
        (as_text(chain_prompt({}, user("ONE"), "TWO")), ["ONE", "TWO"]),
    ):
        assert [text.count(field) for field in fields] == [1] * len(fields) and "{{" not in text
    item, verdict = (
        json.JSONDecoder().raw_decode(as_text(request).partition(before)[2])[0]
        for request, before in (
            (checklist_prompt({}, user("i")), "response's text, "),
            (verdict_prompt({}, user("i"), "r", ["a"]), "in order, "),
        )
    )
    compile(item["python"], "check", "exec")  # what the prompts show is JSON, and Python in it
    assert verdict == {"pass": True}


def test_a_bad_template_is_named():
    with pytest.raises(
        UserError,
        match=r"prompts\['evaluate'\] is no template of instruction, response, items.*twice",
    ):
        verdict_prompt({"evaluate": 'Say [{"pass": true}] {items}'}, user("i"), "r", ["a"])
    with pytest.raises(
        UserError, match="refine: unknown prompts .*evalute.*; there are checklist, evaluate"
    ):
        from_dict(
            Settings,
            dict(drafters=["a"], evaluators=[], revisers=[], prompts={"evalute": ""}),
            "refine",
        )


@pytest.mark.parametrize(
    "response, chain, content, both",
    [
        ("Answer: 3", "", "Answer: 3", "Answer: 3"),
        ("<think>\nA.\n</think>\n\nB", "A.", "B", "A.\nB"),
        ("a</think>b", "a", "b", "a\nb"),
        ("<think>on and on", "on and on", "", "on and on\n"),
        ("", "", "", ""),
        ("<think></think>b", "", "b", "b"),
        ("<think>a</think>b<think>c</think>\n  d\n", "abc", "  d", "abc\n  d"),
    ],
)
def test_split_and_shown(response, chain, content, both):
    assert split_thoughts(response) == (chain, content)
    assert visible_text(response, True) == both and visible_text(response, False) == content


@pytest.mark.parametrize(
    "text, read",
    [
        ('[{"pass": true}, {"pass": false, "critique": " Why. "}]', ["", "Why."]),
        (
            '<think>[{"pass": true}]</think>```json\n'
            '[{"pass": true, "critique": "fine"}, {"pass": true}]\n```',
            ["", ""],
        ),
        ('[{"pass": true}]', None),
        ('[{"pass": true}, {"pass": true}, {"pass": true}]', None),
        ("", None),
        ("[]", None),
        ('[{"pass": true}, {"pass": "true"}]', None),
        ('[{"pass": true}, {"pass": 1}]', None),
        ("[true, true]", None),
        ('[{"pass": true}, {"pass": false}]', None),
        ('[{"pass": true}, {"pass": false, "critique": " "}]', None),
        ('[{"pass": true}, {}]', None),
        ('{"pass": true}', None),
        ("Both pass.", None),
        ("[null, null]", None),
        ('<think>so [{"pass": true}, {"pass": true}]', None),
    ],
)  # a draft of a verdict, in thoughts that never end
def test_verdicts_are_read_or_refused(text, read):
    assert parse_verdicts(text, 2) == read


@pytest.mark.parametrize(
    "text, items",
    [
        ('Here: ["a", {"item": "b"}, {"item": "c", "python": null}]', ["a", "b", "c"]),
        ("a\nb", None),
        ("[]", None),
        (json.dumps(["x"] * 40), ["x"] * 12),
        ('["a", 1]', None),
        ('[" "]', None),
        ('[{"text": "a"}]', None),
        ('{"item": "a"}', None),
    ],
)
def test_checklists_are_read_or_refused(text, items):
    read = parse_checklist(text)
    assert (read and [item.text for item in read]) == items and not any(
        item.check for item in read or []
    )


# ---- scores


def test_scores_and_critiques_by_hand():
    """Items: a program's (fails), and three judged by two evaluators: passes, half, fails with the
    same words."""
    models = {
        "drafter": constant("<think>t</think>d"),
        "author": constant('["one", "two", "three"]'),
        "x": constant(verdicts("", "", "Bad.")),
        "y": constant(verdicts("", "Half.", "Bad.")),
        "reviser": constant(None),
    }
    settings = Settings(["drafter"], ["x", "y"], ["reviser"], "author", prompts=BARE)
    seen = []
    (case,) = refine(
        [user("i")],
        models,
        settings,
        lambda text: [Item("p", lambda r: seen.append((text, r)) or "Prog.")],
    )
    assert seen == [("i", "t\nd")] and models["author"].log == [("C i", 0)]
    assert models["x"].log == models["y"].log == [("E i|t\nd|1. one\n2. two\n3. three", 0)]
    assert case.attempts[0]["score"] == pytest.approx((0 + 1 + 0.5 + 0) / 4)
    assert case.attempts[0]["failed"] == [
        {"item": "p", "critique": "Prog.", "by": "program"},
        {"item": "two", "critique": "Half.", "by": "y"},
        {"item": "three", "critique": "Bad.", "by": "x"},
        {"item": "three", "critique": "Bad.", "by": "y"},
    ]
    assert models["reviser"].log == [("R i|t\nd|Prog.\nHalf.\nBad.", 0)]
    assert case.checklist == [{"item": "p", "runnable": True}] + [
        {"item": i, "runnable": False} for i in ("one", "two", "three")
    ]
    assert (
        format_critique({}, case.attempts[0]["failed"]) == "- p: Prog.\n- two: Half.\n- three: Bad."
    )
    models["x"].log.clear()
    refine([user("i")], models, replace(settings, thoughts=False), nothing)
    assert models["x"].log == [("E i|d|1. one\n2. two\n3. three", 0)]
    assert models["reviser"].log[1] == ("R i|d|Half.\nBad.", 0)


def test_without_items_nothing_is_claimed():
    (case,) = refine(
        [user("i")], {"d": constant("a"), "r": constant("b")}, Settings(["d"], [], ["r"]), nothing
    )
    assert (case.attempts[0]["score"], case.best, len(case.attempts), case.checklist) == (
        0,
        0,
        1,
        [],
    )


@pytest.mark.parametrize("response", ["", " \n", "<think>on and on", "<think>a</think>\n"])
def test_no_answer_scores_0_and_is_not_judged(response):
    judge = constant(verdicts(""))
    models = {
        "d": constant(response, "5"),
        "c": constant('["one"]'),
        "e": judge,
        "r": constant("6"),
    }
    (case,) = refine([user("i")], models, Settings(["d"], ["e"], ["r"], "c", prompts=BARE), nothing)
    assert (
        [a["score"] for a in case.attempts] == [0, 1]
        and case.best == 1
        and case.attempts[1]["round"] == 1
    )
    assert (
        judge.log == [("E i|6|1. one", 0)]
        and "is empty, or its thoughts never end" in models["r"].log[0][0]
    )


# ---- the loop


@pytest.mark.parametrize(
    "drafts, revisions, rounds, responses, best",
    [
        (
            ["1", "3", "3"],
            ["4", "5", "9"],
            4,
            ["1", "3", "3", "4", "5"],
            4,
        ),  # ends when all pass; of equals the first
        (["1", "2"], ["3", "3", "5"], 4, ["1", "2", "3", "3"], 2),  # the score stands still
        (["2", "1"], ["4", "3", "5"], 4, ["2", "1", "4", "3"], 2),  # it falls: the best is kept
        (["3", "3"], ["2"], 4, ["3", "3", "2"], 0),
        (["0"], ["1", "2", "3", "4", "5"], 4, ["0", "1", "2", "3", "4"], 4),
        (["0"], ["1", "2", "3"], 2, ["0", "1", "2"], 2),
        (["0"], [], 0, ["0"], 0),
        (["0", "5"], [], 4, ["0", "5"], 1),
        (["1"], ["2", None], 4, ["1", "2"], 1),
        (["1"], [None], 4, ["1"], 0),
        ([None, "1"], ["9"], 4, ["1", "9"], 1),
    ],
)
def test_stop_rules(drafts, revisions, rounds, responses, best):
    left = iter(revisions)
    models = {"d": constant(*drafts), "r": scripted(lambda text, draw: next(left))}
    settings = Settings(["d"], [], ["r"], n_drafts=len(drafts), rounds=rounds, prompts=BARE)
    (case,) = refine([user("i")], models, settings, at_least(5))
    assert [a["response"] for a in case.attempts] == responses and case.best == best
    n_drafts = sum(draft is not None for draft in drafts)
    assert [a["round"] for a in case.attempts] == [0] * n_drafts + list(
        range(1, len(responses) - n_drafts + 1)
    )
    assert len(models["r"].log) == len(revisions) - len(list(left))
    if len(responses) > n_drafts:  # what was revised, and by which critique: the best's so far
        asked = max(drafts, key=lambda d: int(d or -1))
        missed = "\n".join(f"below {k}" for k in range(int(asked) + 1, 6))
        assert models["r"].log[0][0] == f"R i|{asked}|{missed}"


def test_revisers_take_turns():
    def better(text, draw):
        return str(int(text.split("|")[1]) + 1)

    models = {"d": constant("0"), "r": scripted(better), "s": scripted(better)}
    (case,) = refine(
        [user("i")], models, Settings(["d"], [], ["r", "s"], rounds=3, prompts=BARE), at_least(9)
    )
    assert [a["writer"] for a in case.attempts] == ["d", "r", "s", "r"]


# ---- what models cannot be trusted with


@pytest.mark.parametrize(
    "draws, draw_used, unparsable",
    [
        (["Both pass.", '[{"pass": "yes"}]', verdicts("No.")], 2, 2),
        ([None, verdicts("No.")], 1, 1),
        (["[]", None, "x"], None, 3),
        ([verdicts("No."), verdicts("")], 0, 0),
    ],
)
def test_unusable_verdicts_are_asked_again_and_never_trusted(draws, draw_used, unparsable):
    """Asked again is c as [c, c], then [c, c, c], of which the last counts: so a cache has another
    draw each time."""
    models = {"d": constant("a", "a"), "c": constant('["one"]'), "e": constant(*draws)}
    (case,) = refine(
        [user("i")], models, Settings(["d"], ["e"], [], "c", n_drafts=2, prompts=BARE), nothing
    )
    used = len(draws) if draw_used is None else draw_used + 1
    assert models["e"].log == [("E i|a|1. one", draw) for n in range(used) for draw in range(n + 1)]
    by, critique = ("", "No evaluator could judge it.") if draw_used is None else ("e", "No.")
    for attempt in case.attempts:
        assert attempt["score"] == 0 and attempt["failed"] == [
            {"item": "one", "critique": critique, "by": by}
        ]
    assert (
        case.unparsable == 2 * unparsable
    )  # of each of the two equal drafts, which were judged once


def test_an_evaluator_that_fails_leaves_the_verdict_to_the_others():
    models = {
        "d": constant("a"),
        "c": constant('["one"]'),
        "x": constant(None, "?", "?"),
        "y": constant(verdicts("")),
    }
    (case,) = refine(
        [user("i")], models, Settings(["d"], ["x", "y"], [], "c", prompts=BARE), nothing
    )
    assert (
        case.attempts[0]["score"] == 1 and not case.attempts[0]["failed"] and case.unparsable == 3
    )


@pytest.mark.parametrize(
    "texts, items", [(["no", '["one"]', "no"], ["p", "one"]), (["no", None, "{}"], ["p", GENERAL])]
)
def test_a_checklist_is_asked_for_again_and_then_done_without(texts, items):
    models = {"d": constant("a"), "c": constant(*texts), "e": constant(verdicts(""))}
    (case,) = refine(
        [user("i")],
        models,
        Settings(["d"], ["e"], [], "c", prompts=BARE),
        lambda text: [Item("p", lambda response: "")],
    )
    assert [item["item"] for item in case.checklist] == items and case.attempts[0]["score"] == 1


def test_an_instruction_without_drafts_is_left_out(capsys):
    models = {
        "d": scripted(lambda text, draw: None if text == "j" else text),
        "c": constant('["one"]'),
        "e": constant(verdicts("")),
    }
    cases = refine(
        [user(text) for text in "ijk"],
        models,
        Settings(["d"], ["e"], [], "c", prompts=BARE),
        nothing,
    )
    assert [(case.number, case.attempts[0]["response"]) for case in cases] == [(0, "i"), (2, "k")]
    assert "1 of 3 instructions got no draft" in capsys.readouterr().err
    assert not any("E j" in text for text, _ in models["e"].log)


def test_requests_that_a_server_refuses_do_not_end_the_run(capsys):
    """http_llm raises where all of a batch fails, as a last, too long revision does: is it down, or
    this request?"""

    def refuse(text, draw):
        if text.startswith(("R", "E")):
            raise UserError("1 of 1 conversations got no usable answer")
        return "fine"

    models = {"d": constant("1"), "r": scripted(refuse)}
    (case,) = refine([user("i")], models, Settings(["d"], [], ["r"], prompts=BARE), at_least(2))
    assert len(case.attempts) == 1 and "no usable answer" in capsys.readouterr().err
    with pytest.raises(UserError, match="no usable answer"):  # no drafts at all are no accident
        refine(
            [user("R"), user("Q")], {"d": scripted(refuse)}, Settings(["d"], [], []), at_least(2)
        )


# a written check: (its critique of "no", and of "yes"), None where an evaluator judges
PROGRAMS = {
    "def check(response):\n    return '' if response == 'yes' else f'It says\\n{response}.'": (
        "It says no.",
        "",
    ),
    "def check(response):\n    return response == 'yes'": None,
    "def check(response):\n    return 1 / 0": None,
    "def check(response):\n    while True: pass": None,
    "check = ": None,
    "def other(response): return ''": None,
    "import os\ndef check(response):\n    os._exit(0)": None,
    "def check(response):\n    return ' '": None,
    "def check(response):\n    return open('/etc/passwd').read() and ''": None,
    "def check(response):\n    return '' if response == 'no' else None": None,
}  # failed once: judged for all drafts


def test_written_programs_run_in_the_sandbox_and_fail_into_judged_items():
    written = json.dumps(
        [{"item": f"item {i}", "python": program} for i, program in enumerate(PROGRAMS)]
    )
    runnable = [i for i, critiques in enumerate(PROGRAMS.values()) if critiques]
    models = {
        "d": constant("no", "yes"),
        "c": constant(written),
        "e": constant(verdicts(*["Judged."] * (len(PROGRAMS) - len(runnable)))),
    }
    with Sandbox(workers=2, limits=Limits(seconds=0.3, wall=3)) as box:
        (case,) = refine(
            [user("i")],
            models,
            Settings(["d"], ["e"], [], "c", n_drafts=2, prompts=BARE),
            nothing,
            box,
        )
    assert [i for i, item in enumerate(case.checklist) if item["runnable"]] == runnable
    for which, attempt in enumerate(case.attempts):
        said = {
            int(failure["item"].split()[1]): (failure["critique"], failure["by"])
            for failure in attempt["failed"]
        }
        assert said == {
            i: (critiques[which], "program") if critiques else ("Judged.", "e")
            for i, critiques in enumerate(PROGRAMS.values())
            if not critiques or critiques[which]
        }
        assert attempt["score"] == pytest.approx((len(PROGRAMS) - len(said)) / len(PROGRAMS))
    assert len(models["e"].log) == 2


# ---- the whole, with seven models


def scripted_models(tick=lambda: None) -> dict:
    """Drafts of a number; x passes what is at least 4, y what is at least 6; each revision adds 1.

    The first verdict and checklist of each batch are unusable. tick() is called before each answer.
    """

    def judge(low):
        def answer(text, place):
            return (
                verdicts("" if int(text.split("|")[1]) >= low else f"Below {low}.")
                if place
                else "hm"
            )

        return answer

    answers = {
        "a": lambda text, place: str(len(text) % 3 + place % 2),
        "b": lambda text, place: str(place % 2),
        "c": lambda text, place: '["It is high."]' if place else "hm",
        "x": judge(4),
        "y": judge(6),
        "r": lambda text, place: str(int(text.split("|")[1]) + 1),
    }
    return {
        name: scripted(
            lambda text, place, answer=answer: tick() or answer(text, place), by_place=True
        )
        for name, answer in answers.items()
    }


def with_cache(models: dict, folder) -> dict:
    return {name: cached(llm, folder / f"{name}.jsonl") for name, llm in models.items()}


INSTRUCTIONS = [user("i" * n) for n in (1, 2, 3, 4, 5, 3)]


def test_the_history_is_whole_and_fit_for_json():
    models = scripted_models()
    cases = refine(INSTRUCTIONS, models, FULL, at_least(3))
    assert [json.loads(json.dumps(asdict(case))) for case in cases] == [
        asdict(case) for case in cases
    ]
    written = Counter(a["writer"] for case in cases for a in case.attempts)
    assert written == {
        name: len(models[name].log) for name in "abr"
    }  # every draft and revision is there
    for case in cases:
        scores = [attempt["score"] for attempt in case.attempts]
        assert (
            case.best == scores.index(max(scores)) and case.instruction == INSTRUCTIONS[case.number]
        )
        for attempt in case.attempts:
            value, parts = int(attempt["response"]), 0
            parts += min(value, 3) + ((value >= 4) + (value >= 6)) / 2
            assert attempt["score"] == pytest.approx(parts / 4)
            assert len(attempt["failed"]) == 3 - min(value, 3) + (value < 4) + (value < 6)
        assert max(scores) == 0.875 and scores[case.best :] == [
            0.875,
            0.875,
        ]  # 4, then 5 is no rise


def test_no_gold_and_no_problem_in_any_request():
    problems = [
        replace(
            problem, answer="GOLD", steps=("GOLD.",), extra={"tests": "GOLD", "reply": "GOLD {}"}
        )
        for family in FAMILIES.values()
        for problem in family.problems("train", 3, 0)
    ]
    models, seen = scripted_models(), []
    refined = refine(
        [to_chat(problem)[:1] for problem in problems],
        models,
        FULL,
        lambda text: seen.append(text) or at_least(2)(text),
    )
    asked = [text for llm in models.values() for text, _ in llm.log]
    assert len(refined) == len(seen) == 15 and seen == [problem.question for problem in problems]
    assert len(asked) > 200 and not [text for text in asked + seen if "GOLD" in text]
    assert all(any(problem.question in text for problem in problems) for text in asked)


def test_a_run_from_the_cache_asks_nothing_and_is_the_same(tmp_path):
    models, again, usage, second_usage = scripted_models(), scripted_models(), Counter(), Counter()
    cases = refine(INSTRUCTIONS, with_cache(models, tmp_path), FULL, at_least(3), usage=usage)
    assert (
        refine(INSTRUCTIONS, with_cache(again, tmp_path), FULL, at_least(3), usage=second_usage)
        == cases
    )
    assert usage == second_usage and not any(llm.log for llm in again.values())
    for name, role in dict(a="draft", b="draft", c="checklist", r="revise").items():
        assert usage[name, role, "requests"] == len(
            models[name].log
        )  # what only stands before a draw is not counted
    assert usage["a", "draft", "written"] == 2 * len(INSTRUCTIONS)  # a digit each
    assert usage["c", "checklist", "written"] == 5 * len('["It is high."]') + len(
        "hm"
    )  # two are equal


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    unbroken, killed, left, kills = scripted_models(), Counter(), 0, 0
    expected, cases = (
        refine(INSTRUCTIONS, with_cache(unbroken, tmp_path / "unbroken"), FULL, at_least(3)),
        None,
    )

    def tick():
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError("killed")

    while cases is None:
        models, left = scripted_models(tick), 7
        try:
            cases = refine(INSTRUCTIONS, with_cache(models, tmp_path / "killed"), FULL, at_least(3))
        except RuntimeError:
            kills += 1
        killed.update((name, *entry) for name, llm in models.items() for entry in llm.log)
    assert cases == expected and kills > 10
    assert killed == Counter((name, *entry) for name, llm in unbroken.items() for entry in llm.log)


def test_models_of_a_step_work_side_by_side():
    meeting, busy = threading.Barrier(3, timeout=10), []

    def meets(text, draw):
        meeting.wait()
        return "1"

    models = {
        "a": scripted(meets),
        "b": scripted(meets),
        "c": scripted(lambda *asked: meets(*asked) and '["one"]'),
    }
    assert len(refine([user("i")], models, Settings(["a", "b"], [], [], "c"), nothing)) == 1

    def job(n):  # of one model: never two at once
        busy.append(n)
        assert busy == [n]
        busy.remove(n)
        return n

    assert run_side_by_side([("w", lambda n=n: job(n)) for n in range(50)]) == list(range(50))
    with pytest.raises(ZeroDivisionError):
        run_side_by_side([("a", lambda: 1 / 0), ("b", lambda: 1)])


def test_models_that_are_missing_or_named_twice():
    with pytest.raises(UserError, match="there is no model 'z'; there are a, b, c, x, y, r"):
        refine(INSTRUCTIONS, scripted_models(), replace(FULL, evaluators=["x", "z"]), nothing)
    for values, message in (
        (dict(drafters=["a", "a"]), "named twice"),
        (dict(drafters=[]), "drafters must be a list of at least 1"),
        (dict(rounds=-1), "rounds must be a whole number from 0"),
        (dict(n_drafts=0), "n_drafts must be a whole number from 1"),
        (dict(round=1), "rounds"),
    ):
        with pytest.raises(UserError, match=f"refine.*{message}"):
            from_dict(Settings, dict(drafters=["a"], evaluators=[], revisers=[]) | values, "refine")


# ---- reconstruction


@pytest.mark.parametrize(
    "text, read",
    [
        ("Summary: Add.\nChain: 1 + 2 = 3.\nSo 3.", ("Add.", "1 + 2 = 3.\nSo 3.")),
        (
            "<think>\nhm\n</think>\n\n**Summary:** Add\nthem.\n\n**Chain:**\n1 + 2 = 3.\n",
            ("Add\nthem.", "1 + 2 = 3."),
        ),
        ("Summary: Add.\nChain: Chain: 3\nChain: 4", ("Add.", "Chain: 3\nChain: 4")),
        ("Chain: 1 + 2 = 3.", None),
        ("Summary: Add.", None),
        ("Summary:\nChain: 3", None),
        ("Summary: Add.\nChain: ", None),
        ("", None),
        (None, None),
        ("<think>Summary: Add.\nChain: 3", None),
        ("Summary: Add.\nChain: <think>3</think>", None),
    ],
)
def test_reconstruction(text, read):
    llm = constant(text)
    assert reconstruct([(user("i"), "Answer: 3")], llm, BARE) == [read] and llm.log == [
        ("F i|Answer: 3", 0)
    ]
