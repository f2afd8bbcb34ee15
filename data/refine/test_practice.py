"""Planted faults are wrong, their critiques name the right step; records are what the refinement
sends and reads."""

import json
import re
from dataclasses import replace

import pytest

from data.chat.template import split_thoughts
from data.refine import refinement
from data.refine.checklist import leads_to, runnable_items
from data.refine.practice import (
    ITEMS,
    chain_record,
    checklist_record,
    compare_steps,
    critique_response,
    draft_record,
    hide_from_question,
    plant_fault,
    revision_record,
    summarize,
    to_response,
    verdict_record,
)
from data.tasks import recall, registry
from data.tasks.pages import FAMILIES
from data.tasks.problem import Problem, seeded_rng

families = pytest.mark.parametrize("family", ITEMS)
MATH = Problem(
    "math",
    "",
    "Mia has 45 pens. She loses 8. Tom brings 3 more. How many pens does Mia have now?",
    ("45 - 8 = 37.", "37 + 3 = 40."),
    "40",
    2,
)
CODE = Problem(
    "code",
    "",
    "Write f(x): sort the list, then reverse the list. Example: f([1, 2]) = [2, 1].",
    ("a = sorted(x).", "b = a[::-1]."),
    "return sorted(x)[::-1]",
    2,
    {"tests": [[[3, 1, 2], [3, 2, 1]]]},
)
TOOLS = Problem(
    "tools",
    "",
    "Tools: taxi(people, city), move(count, item). I am 41 years old. "
    "Call a taxi for 3 people to Oslo.",
    ("The tool is taxi.", "people = 3.", "city = Oslo."),
    '{"name": "taxi", "arguments": {"people": 3, "city": "Oslo"}}',
    1,
)
FORM = Problem(
    "form",
    "",
    "Ben runs 12 miles. He runs 7 more. What is the total? Begin with So.",
    ("12 + 7 = 19.",),
    "So the total is 19.",
    1,
    {"number": 19, "constraints": {"opener": "So"}},
)


@pytest.mark.parametrize(
    "problem, steps, answer, said",
    [
        (MATH, "45 - 8 = 37. 37 + 3 = 40.", "40", ""),
        (MATH, "45 - 8 = 36. 36 + 3 = 39.", "39", "Step 1 is wrong: 45 - 8 is not 36."),
        (MATH, "45 - 8 = 37. 37 + 3 = 41.", "41", "Step 2 is wrong: 37 + 3 is not 41."),
        (MATH, "45 - 8 = 37. 37 - 3 = 34.", "34", "Step 2 is wrong."),
        (MATH, "45 + 8 = 53. 53 + 3 = 56.", "56", "Step 1 is wrong."),
        (
            MATH,
            "45 - 8 = 37. 37 + 9 = 46.",
            "46",
            "Step 2 uses 9, which is neither given nor derived.",
        ),
        (MATH, "8 - 8 = 0. 0 + 3 = 3.", "3", "Step 1 is wrong."),
        (MATH, "45 - 8 = 37.", "37", "A step is missing."),
        (MATH, "45 + 3 = 48.", "48", "Step 1 is wrong."),
        (MATH, "45 + 8 = 53.", "53", "Step 1 is wrong."),
        (MATH, "45 - 8 = 37. 37 + 3 = 40. 40 + 3 = 43.", "43", "Step 3 is wrong."),
        (MATH, "45 - 8 = 37. 37 + 3 = 40.", "41", "The answer is not the last result."),
        (MATH, "45 - 8 = 37. 37 + 3 = 40.", "many", "The answer is wrong."),
        (MATH, "", "41", "A step is missing."),
        (
            CODE,
            "a = sorted(x). b = a[:1].",
            "return sorted(x)[:1]",
            "f([1, 2]) gives [1], not [2, 1].",
        ),
        (CODE, "a = x[::-1].", "return x[::-1]", "A step is missing."),  # the example holds
        (CODE, "a = x[::-1]. b = a[:2].", "return x[::-1][:2]", "Step 1 is wrong."),
        (CODE, "a = sorted(x). b = a[::-1].", "return x[::-1]", "The answer is wrong."),
        (
            TOOLS,
            "The tool is move. count = 3. item = Oslo.",
            '{"name": "move", "arguments": {"count": 3, "item": "Oslo"}}',
            "The tool is wrong.",
        ),
        (
            TOOLS,
            "The tool is taxi. people = 41. city = Oslo.",
            '{"name": "taxi", "arguments": {"people": 41, "city": "Oslo"}}',
            "Step 2 is wrong.",
        ),
        (
            TOOLS,
            "The tool is taxi. people = 3.",
            '{"name": "taxi", "arguments": {"people": 3}}',
            "The arguments of taxi are people, city.",
        ),
        (FORM, "12 + 7 = 19.", "The total is 19.", "It does not begin with So."),
        (FORM, "12 - 7 = 5.", "So the total is 5.", "Step 1 is wrong."),
    ],
)
def test_critiques_name_what_is_wrong(problem, steps, answer, said):
    assert (
        critique_response(
            problem,
            to_response(
                replace(
                    problem,
                    steps=tuple(re.split(r"(?<=\.) ", steps)) if steps else (),
                    answer=answer,
                )
            ),
        )
        == said
    )


BAND = {"math": (0.55, 0.7), "code": (0.8, 0.97), "tools": (0.83, 0.94), "form": (0.83, 0.95)}


@families
def test_planted_faults(family):
    """Wrong, in the form of a response, as the seed says, and of many kinds; programs catch most,
    but not all."""
    problems = FAMILIES[family].problems("train", 60 if family == "code" else 300, 21)
    planted = [plant_fault(problem, seeded_rng("faults", i)) for i, problem in enumerate(problems)]
    caught, kinds = 0, set()
    for i, (problem, (faulty, said)) in enumerate(zip(problems, planted)):
        assert (
            registry.reward(problem, faulty) == 0.0
            and said
            and said == critique_response(problem, faulty)
        )
        assert split_thoughts(faulty)[0] and faulty != to_response(problem)
        assert i > 5 or plant_fault(problem, seeded_rng("faults", i)) == (faulty, said)
        caught += (
            said.startswith("f(")
            if family == "code"
            else any(
                item.check(refinement.visible_text(faulty, True))
                for item in runnable_items(problem.question)
            )
        )
        kinds.add(re.sub(r"\d+|: .*", "", said))
        if family in ("math", "form"):  # the right result is not given away
            steps = " ".join([problem.question, faulty])
            assert all(
                number in re.findall(r"\d+", steps) or len(number) == 1
                for number in re.findall(r"\d+", said)
            )
    low, high = BAND[family]
    assert low < caught / len(problems) < high, caught / len(problems)
    assert len(kinds) >= 5


@families
def test_right_responses_have_no_critique(family):
    for problem in FAMILIES[family].problems("train", 40, 22):
        assert (
            critique_response(problem, to_response(problem)) == ""
            and 0 < len(summarize(problem).split()) <= 12
        )


def test_summaries():
    assert [summarize(problem) for problem in (MATH, CODE, TOOLS, FORM)] == [
        "45 - 8, + 3",
        "sort the list, reverse the list",
        "taxi",
        "12 + 7",
    ]


@pytest.mark.parametrize(
    "problem, question, summary",
    [
        (
            MATH,
            "Mia has 45 pens. She loses 8. Tom brings some more. "
            "How many pens does Mia have now?",
            "45 - 8, + some",
        ),
        (
            FORM,
            "Ben runs 12 miles. He runs some more. What is the total? Begin with So.",
            "12 + some",
        ),
    ],
)
def test_what_the_solution_tells_is_hidden(problem, question, summary):
    hidden = hide_from_question(problem, seeded_rng("hide"))
    assert (hidden.question, summarize(hidden)) == (question, summary)


def test_one_operation_of_a_program_is_hidden():
    start, end = "Write f(x): ", ". Example: f([1, 2]) = [2, 1]."
    hidden = {hide_from_question(CODE, seeded_rng("hide", i)).question for i in range(20)}
    assert hidden == {
        f"{start}do something, then reverse the list{end}",
        f"{start}sort the list, then do something{end}",
    }
    assert hide_from_question(TOOLS, seeded_rng("hide")) is None


@families
def test_a_chain_is_the_same_when_its_question_hides_something(family):
    for problem in FAMILIES[family].problems("train", 20, 24):
        hidden = hide_from_question(problem, seeded_rng("hide", problem.key))
        *request, reply = chain_record(problem, {}, hidden)["messages"]
        shown = reply["content"].split("\nChain: ")[1]
        assert chain_record(problem, {})["messages"][-1]["content"].endswith(f"Chain: {shown}")
        assert (request == chain_record(problem, {})["messages"][:-1]) == (family == "tools")


@families
def test_records_are_what_the_refinement_asks_and_reads(family):
    prompts = {
        "evaluate": "{instruction}\n{response}\n{items}",
        "revise": "{instruction}\n{response}\n{critique}",
        "failure": "{critique}",
    }
    for problem in FAMILIES[family].problems("train", 6, 23):
        instruction = [{"role": "user", "content": problem.question}]
        faulty, said = plant_fault(problem, seeded_rng("records", problem.key))
        shown = refinement.visible_text(faulty, thoughts=True)
        assert draft_record(problem)["messages"][:-1] == instruction
        *request, reply = checklist_record(problem, prompts)["messages"]
        assert request == refinement.checklist_prompt(prompts, instruction)
        assert [item.text for item in refinement.parse_checklist(reply["content"])] == ITEMS[family]
        for text, critique_ in ((faulty, said), (to_response(problem), "")):
            *request, reply = verdict_record(problem, text, prompts)["messages"]
            visible = refinement.visible_text(text, True)
            content = f"{problem.question}\n{visible}\n1. {ITEMS[family][0]}"
            assert request[0]["content"] == content
            judged = compare_steps(problem, split_thoughts(text)[0])
            assert (
                refinement.parse_verdicts(reply["content"], 1) == [judged]
                and reply["role"] == "assistant"
            )
            assert critique_ or not judged
        *request, reply = revision_record(problem, faulty, prompts)["messages"]
        assert request[0]["content"].startswith(f"{problem.question}\n{shown}\n{said}")
        assert reply == draft_record(problem)["messages"][-1] and problem.answer in reply["content"]
        assert registry.reward(problem, reply["content"]) == 1.0 and reply["reasoning"] == " ".join(
            problem.steps
        )
        *request, reply = chain_record(problem, prompts)["messages"]
        assert request == refinement.chain_prompt(prompts, instruction, f"Answer: {problem.answer}")
        head, chain = reply["content"].split("\nChain: ")
        assert head == f"Summary: {summarize(problem)}" and leads_to(
            problem.question, chain, f"Answer: {problem.answer}"
        )
    assert json.loads(json.dumps(draft_record(recall.problems("train", 1, 0)[0])))["messages"][
        -1
    ].keys() == {"role", "content"}
