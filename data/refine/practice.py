"""Responses with planted faults, and the records on which the small writers of the refinement are trained.

data/refine/refinement.py never sees a gold answer; its critic and reviser can be small models because they learned from generated
problems whose gold is known. Here it is known, so this is for training problems alone. A fault is one that models make:
a slip that is carried on, another operation or value, a step left out, an answer that does not match the steps, a
constraint not kept. The report is silent about all of this: our choice.
"""
import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace

from data.refine import refinement
from data.tasks.problem import to_chat
from data.tasks import registry
from data.refine.checklist import offered, runnable_items
from data.tasks.problem import between, pick, Problem
from data.tasks import code, form, tools
from data.tasks.math import NAMES

ITEMS = {       # what no program checks: the item of a written checklist, which evaluators judge
    "math": ["Each step follows from the story."],
    "code": ["The operations are those asked for, in order."],
    "tools": ["The tool and the values fit the request."],
    "form": ["The sum is the one asked for."],
}


def response(problem: Problem) -> str:
    """The problem's own steps and answer as a reply, thoughts in think tags."""
    reply = to_chat(problem)[-1]
    thoughts = f"<think>\n{reply['reasoning']}\n</think>\n\n" if reply["reasoning"] else ""
    return thoughts + reply["content"]


def question_messages(problem: Problem) -> list[dict]:
    """The problem's question as the user's message."""
    return to_chat(problem)[:1]


# ---- planting

def plant_fault(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """A wrong response (reward 0) to a problem of one of the ITEMS' families, and its critique."""
    while True:
        faulty = response(FAULTS[problem.family](problem, rng))
        if registry.reward(problem, faulty) == 0.0:
            return faulty, critique(problem, faulty)


OPERATE = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
OTHER = {"+": "-", "-": "+", "*": "+"}


def _math(problem: Problem, rng: random.Random) -> Problem:
    """A slip, another operation, another operand, no such step; or right steps and a slip in the answer."""
    first, *moves = re.match(r"\d+", problem.steps[0])[0], *(step.split()[1:3] for step in problem.steps)
    kind, k, slips = between(rng, 0, 4), between(rng, 0, len(moves) - 1), [0] * len(moves)
    if kind == 0:
        slips[k] = _slip(rng)
    elif kind == 1:
        moves[k] = OTHER[moves[k][0]], moves[k][1]
    elif kind == 2:
        moves[k] = moves[k][0], str(between(rng, 2, 9))
    elif kind == 3 and k:           # the first result is what the others rest on
        del moves[k]
    total, steps = int(first), []
    for (sign, operand), slip in zip(moves, slips):
        result = OPERATE[sign](total, int(operand)) + slip
        steps.append(f"{total} {sign} {operand} = {result}.")
        total = result
    total += _slip(rng) if kind == 4 else 0
    return replace(problem, steps=tuple(steps), answer=str(total))


def _slip(rng: random.Random) -> int:
    return pick(rng, (-10, -1, 1, 10, between(rng, 2, 9)))


def _form(problem: Problem, rng: random.Random) -> Problem:
    """A fault of the sum, which the reply repeats, or a constraint that the reply does not keep."""
    if rng.random() < 0.5:
        wrong = _math(problem, rng)
        return replace(wrong, answer=problem.answer.replace(str(problem.extra["number"]), wrong.answer))
    kind, value = pick(rng, list(problem.extra["constraints"].items()))
    return replace(problem, answer=BREAK[kind](problem.answer, value, rng))


BREAK = {       # kind of constraint: (reply, value) -> one that does not keep it
    "name": lambda reply, name, rng: reply.replace(name, NAMES[name]),
    "unit": lambda reply, unit, rng: reply.replace(f" {unit}", ""),
    "mark": lambda reply, mark, rng: reply[:-1] + pick(rng, ["", *form.MARKS.values()]),
    "opener": lambda reply, opener, rng: reply.replace(opener, pick(rng, form.OPENERS)),
    "words": lambda reply, most, rng: reply[:-1] + pick(rng, (" now", " by now", " by now in all")) + reply[-1],
}


def _code(problem: Problem, rng: random.Random) -> Problem:
    """Another operation, another constant, two operations swapped; in steps and answer, or in the answer alone."""
    codes = [re.sub(r"\b[xab]\b", "{x}", step[4:-1]) for step in problem.steps]
    kind, k = between(rng, 0, 2), between(rng, 0, len(codes) - 1)
    if kind == 0:
        _, text, _, constants = pick(rng, code.LIST_OPERATIONS + code.NUMBER_OPERATIONS * (k == len(codes) - 1))
        codes[k] = text.format(x="{x}", k=between(rng, *constants))
    elif kind == 1:
        codes[k] = re.sub(r"\d", str(between(rng, 0, 9)), codes[k], count=1)
    else:
        codes[k], codes[k - 1] = codes[k - 1], codes[k]
    steps, expression = [], "x"
    for given, name, text in zip("xab", "abc", codes):
        expression = text.format(x=expression)
        steps.append(f"{name} = {text.format(x=given)}.")
    steps = problem.steps if rng.random() < 0.2 else tuple(steps)
    return replace(problem, steps=steps, answer=f"return {expression}")


def _tools(problem: Problem, rng: random.Random) -> Problem:
    """Another tool (with its own arguments or these), no such argument, a wrong value, also in the answer alone."""
    call, offer = json.loads(problem.answer), offered(problem.question)[0]
    name, values, kind = call["name"], dict(call["arguments"]), between(rng, 0, 3)
    argument = pick(rng, list(values))
    if kind == 0:
        name = pick(rng, list(offer))
        values = dict(zip(offer[name], values.values())) if rng.random() < 0.5 else values
    elif kind == 1:
        del values[argument]
    else:
        choices = dict(tools.TOOLS[name][0])[argument]
        seen = [int(number) for number in re.findall(r"\d+", problem.question)]
        values[argument] = pick(rng, choices or [*seen, between(rng, 2, tools.LARGEST)])
    steps = (f"The tool is {name}.", *(f"{argument} = {value}." for argument, value in values.items()))
    answer = json.dumps({"name": name, "arguments": values})
    return replace(problem, steps=problem.steps if kind == 3 else steps, answer=answer)


FAULTS = {"math": _math, "code": _code, "tools": _tools, "form": _form}


# ---- critiques

def critique(problem: Problem, response: str) -> str:
    """What is wrong with a response in one sentence, as far as possible in data/checklist's words; "" for a right one.

    What no runnable item finds is found by comparing the steps with the problem's own.
    """
    failed = _failed(problem, response)
    return failed[0]["critique"] if failed else ""


def _failed(problem: Problem, response: str) -> list[dict]:
    """The failed items of a wrong response, as data/refine/refinement.py has them: the runnable ones, or else the judged one."""
    if registry.reward(problem, response) == 1.0:
        return []
    shown = refinement.visible_text(response, thoughts=True)
    ran = [(item.text, item.check(shown)) for item in runnable_items(problem.question)]
    judged = [(ITEMS[problem.family][0], compared(problem, refinement.split_thoughts(response)[0]) or "The answer is wrong.")]
    found = [(item, said) for item, said in ran if said] or judged
    return [{"item": item, "critique": said, "by": "program"} for item, said in found]


def compared(problem: Problem, chain: str) -> str:
    """The critique of a chain's first step that does something else than the problem's, "" if none does.

    Whether its results are true is for programs to say.
    """
    moves, own = (_moves(steps) for steps in (re.findall(r"\S.*?(?:\.(?=\s|$)|$)", chain), problem.steps))
    left = iter(own)
    if moves == own:
        return ""
    if len(moves) < len(own) and all(move in left for move in moves):
        return "A step is missing."
    k = next((k for k, pair in enumerate(zip(moves, own)) if pair[0] != pair[1]), min(len(moves), len(own)))
    return "The tool is wrong." if problem.family == "tools" and k == 0 else f"Step {k + 1} is wrong."


def _moves(steps: Sequence[str]) -> list[str]:
    """What each step does: "32 - 5", then of "27 + 4 = 31." only "+ 4"; of "b = a[::-1]." it is "x[::-1]."."""
    moves = []
    for step in steps:
        calculation = re.fullmatch(r"(-?\d+ )([-+*] \d+) = -?\d+\.", step)
        if calculation:
            moves.append(calculation[2] if moves else calculation[1] + calculation[2])
        else:
            moves.append(re.sub(r"\b[abc]\b", "x", re.sub(r"^[abc] = ", "", step)))
    return moves


# ---- records: conversations whose last message is the writer's reply, for sft.py

def summary(problem: Problem) -> str:
    """The reasoning in some ten words: the bare calculation, the operations in order, or the tool's name."""
    if problem.family == "code":
        return re.search(r"f\(x\): (.*)\. Example", problem.question)[1].replace(", then ", ", ")
    if problem.family == "tools":
        return problem.steps[0].removeprefix("The tool is ").rstrip(".")
    first = problem.steps[0].split()[0]
    return f"{first} " + ", ".join(" ".join(step.split()[1:3]) for step in problem.steps)


def draft_record(problem: Problem) -> dict:
    reply = {key: text for key, text in to_chat(problem)[-1].items() if text}
    return {"messages": [*question_messages(problem), reply]}


def checklist_record(problem: Problem, prompts: dict) -> dict:
    return _record(refinement.checklist_prompt(prompts, question_messages(problem)), json.dumps(ITEMS[problem.family]))


def verdict_record(problem: Problem, response: str, prompts: dict) -> dict:
    """The verdict on the family's judged item alone: what programs check, they check."""
    said, shown = compared(problem, refinement.split_thoughts(response)[0]), refinement.visible_text(response, thoughts=True)
    verdict = {"pass": False, "critique": said} if said else {"pass": True}
    return _record(refinement.verdict_prompt(prompts, question_messages(problem), shown, ITEMS[problem.family]),
                   json.dumps([verdict]))


def revision_record(problem: Problem, response: str, prompts: dict) -> dict:
    """From a wrong response and all that failed of it to the right one."""
    said = refinement.format_critique(prompts, _failed(problem, response))
    request = refinement.revision_prompt(prompts, question_messages(problem), refinement.visible_text(response, thoughts=True), said)
    return {"messages": [*request, draft_record(problem)["messages"][-1]]}


def chain_record(problem: Problem, prompts: dict) -> dict:
    """From instruction and solution to summary and chain."""
    reply = to_chat(problem)[-1]
    return _record(refinement.chain_prompt(prompts, question_messages(problem), reply["content"]),
                   f"Summary: {summary(problem)}\nChain: {reply['reasoning']}")


def _record(request: list[dict], reply: str) -> dict:
    return {"messages": [*request, {"role": "assistant", "content": reply}]}
