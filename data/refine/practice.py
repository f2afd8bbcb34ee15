"""Responses with planted faults, and the records on which the small models of the refinement are
trained.

data/refine/refinement.py never sees a gold answer; its critic and reviser can be small models
because they learned from generated problems whose gold is known. Here it is known, so this is for
training problems alone. A fault is one that models make: a slip that is carried on, another
operation or value, a step left out, an answer that does not match the steps, a constraint not kept.
The report is silent about all of this: our choice.
"""
import json
import random
import re
from collections.abc import Iterable
from dataclasses import replace

from data.chat.template import split_thoughts
from data.refine import refinement
from data.refine.checklist import parse_offer, runnable_items
from data.tasks import code, form, registry, tools
from data.tasks.math import NAMES
from data.tasks.problem import Problem, between, pick, to_chat

ITEMS = {       # what no program checks: the item of a written checklist, which evaluators judge
    "math": ["Each step follows from the story."],
    "code": ["The operations are those asked for, in order."],
    "tools": ["The tool and the values fit the request."],
    "form": ["The sum is the one asked for."],
}


def to_response(problem: Problem) -> str:
    """The problem's own steps and answer as a reply, thoughts in think tags."""
    reply = to_chat(problem)[-1]
    if not reply["reasoning"]:
        return reply["content"]
    return f"<think>\n{reply['reasoning']}\n</think>\n\n{reply['content']}"


def question_messages(problem: Problem) -> list[dict]:
    """The problem's question as the user's message."""
    return to_chat(problem)[:1]


# --------------------------------------------------------------------------------------------------
# Planting: a problem whose steps or answer have a fault

def plant_fault(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """A wrong response (reward 0) to a problem of one of the ITEMS' families, and its critique."""
    while True:
        faulty = to_response(FAULTS[problem.family](problem, rng))
        if registry.reward(problem, faulty) == 0.0:
            return faulty, critique_response(problem, faulty)


OTHER_SIGN = {"+": "-", "-": "+", "*": "+"}


def _fault_in_math(problem: Problem, rng: random.Random) -> Problem:
    """A slip, another operation, another operand, no such step; or right steps and a slip in the
    answer."""
    first = re.match(r"\d+", problem.steps[0])[0]
    moves = [step.split()[1:3] for step in problem.steps]   # ["-", "5"] of "32 - 5 = 27."
    slips = [0] * len(moves)
    kind, k = between(rng, 0, 4), between(rng, 0, len(moves) - 1)
    sign, operand = moves[k]
    if kind == 0:
        slips[k] = _draw_slip(rng)
    elif kind == 1:
        moves[k] = OTHER_SIGN[sign], operand
    elif kind == 2:
        moves[k] = sign, str(between(rng, 2, 9))
    elif kind == 3 and k:           # the first result is what the others rest on
        del moves[k]
    total, steps = int(first), []
    for (sign, operand), slip in zip(moves, slips):
        result = _calculate(total, sign, int(operand)) + slip
        steps.append(f"{total} {sign} {operand} = {result}.")
        total = result
    if kind == 4:
        total += _draw_slip(rng)
    return replace(problem, steps=tuple(steps), answer=str(total))


def _calculate(a: int, sign: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


def _draw_slip(rng: random.Random) -> int:
    return pick(rng, (-10, -1, 1, 10, between(rng, 2, 9)))


def _fault_in_form(problem: Problem, rng: random.Random) -> Problem:
    """A fault of the sum, which the reply repeats, or a constraint that the reply does not keep."""
    if rng.random() < 0.5:
        wrong = _fault_in_math(problem, rng)
        right_sum = str(problem.extra["number"])
        return replace(wrong, answer=problem.answer.replace(right_sum, wrong.answer))
    constraints = list(problem.extra["constraints"].items())
    kind, value = pick(rng, constraints)
    return replace(problem, answer=_break_constraint(problem.answer, kind, value, rng))


def _break_constraint(reply: str, kind: str, value: str | int, rng: random.Random) -> str:
    """The reply changed so that it may not keep the constraint (see data/tasks/form.py)."""
    if kind == "name":
        return reply.replace(value, NAMES[value])
    if kind == "unit":
        return reply.replace(f" {value}", "")
    if kind == "mark":
        return reply[:-1] + pick(rng, ["", *form.MARKS.values()])
    if kind == "opener":
        return reply.replace(value, pick(rng, form.OPENERS))
    more_words = pick(rng, (" now", " by now", " by now in all"))
    return reply[:-1] + more_words + reply[-1]


def _fault_in_code(problem: Problem, rng: random.Random) -> Problem:
    """Another operation, another constant, two operations swapped; in steps and answer, or in the
    answer alone."""
    # "{x}[::-1]" of "b = a[::-1]."
    operations = [re.sub(r"\b[xab]\b", "{x}", step[4:-1]) for step in problem.steps]
    kind, k = between(rng, 0, 2), between(rng, 0, len(operations) - 1)
    if kind == 0:
        choices = code.LIST_OPERATIONS
        if k == len(operations) - 1:    # only the last may give a number
            choices = choices + code.NUMBER_OPERATIONS
        _, text, _, constants = pick(rng, choices)
        operations[k] = text.format(x="{x}", k=between(rng, *constants))
    elif kind == 1:
        operations[k] = re.sub(r"\d", str(between(rng, 0, 9)), operations[k], count=1)
    else:
        operations[k], operations[k - 1] = operations[k - 1], operations[k]
    steps, expression = [], "x"
    for operand, name, text in zip("xab", "abc", operations):
        expression = text.format(x=expression)
        steps.append(f"{name} = {text.format(x=operand)}.")
    if rng.random() < 0.2:
        steps = problem.steps
    return replace(problem, steps=tuple(steps), answer=f"return {expression}")


def _fault_in_call(problem: Problem, rng: random.Random) -> Problem:
    """Another tool (with its own arguments or these), no such argument, a wrong value, also in the
    answer alone."""
    call = json.loads(problem.answer)
    offer, _ = parse_offer(problem.question)
    name, values = call["name"], dict(call["arguments"])
    kind, argument = between(rng, 0, 3), pick(rng, list(values))
    if kind == 0:
        name = pick(rng, list(offer))
        if rng.random() < 0.5:
            values = dict(zip(offer[name], values.values()))
    elif kind == 1:
        del values[argument]
    else:
        arguments, *_ = tools.TOOLS[name]
        choices = dict(arguments)[argument]
        if not choices:     # a number
            numbers = [int(number) for number in re.findall(r"\d+", problem.question)]
            choices = [*numbers, between(rng, 2, tools.LARGEST)]
        values[argument] = pick(rng, choices)
    steps = problem.steps
    if kind != 3:
        said_values = [f"{argument} = {value}." for argument, value in values.items()]
        steps = (f"The tool is {name}.", *said_values)
    answer = json.dumps({"name": name, "arguments": values})
    return replace(problem, steps=steps, answer=answer)


FAULTS = {
    "math": _fault_in_math,
    "code": _fault_in_code,
    "tools": _fault_in_call,
    "form": _fault_in_form,
}


# --------------------------------------------------------------------------------------------------
# Hiding: a question whose chain of thought cannot be found without the solution

def hide_from_question(problem: Problem, rng: random.Random) -> Problem | None:
    """The problem with one thing left out of its question, which the solution tells: the number of
    the last step (in that step, too: a summary of it must not tell), or one of a program's
    operations. None for families that have no such thing.

    "She loses 8." becomes "She loses some.", and with "Answer: 37." it is 8 again. On these a chain
    completer learns to read the solution rather than to solve the problem anew.
    """
    if problem.family == "code":
        opening, _, rest = problem.question.partition(": ")
        phrases, _, example = rest.partition(". Example")
        operations = phrases.split(", then ")
        operations[between(rng, 0, len(operations) - 1)] = "do something"
        question = f"{opening}: {', then '.join(operations)}. Example{example}"
        return replace(problem, question=question)
    if problem.family in ("math", "form"):
        last_number = r"\d+(?=\D*$)" if problem.family == "math" else r"\d+(?= more\b)"
        total, sign, _, *rest = problem.steps[-1].split()
        hidden_step = " ".join([total, sign, "some", *rest])
        return replace(problem, question=re.sub(last_number, "some", problem.question),
                       steps=(*problem.steps[:-1], hidden_step))
    return None


# --------------------------------------------------------------------------------------------------
# Critiques

def critique_response(problem: Problem, response: str) -> str:
    """What is wrong with a response in one sentence, as far as possible in the words of
    data/refine/checklist.py; "" for a right one.

    What no runnable item finds is found by comparing the steps with the problem's own.
    """
    failed = _failed_items(problem, response)
    return failed[0]["critique"] if failed else ""


def _failed_items(problem: Problem, response: str) -> list[dict]:
    """The failed items of a wrong response, as data/refine/refinement.py has them: the runnable
    ones, or else the judged one."""
    if registry.reward(problem, response) == 1.0:
        return []
    text = refinement.visible_text(response, thoughts=True)
    failed = []
    for item in runnable_items(problem.question):
        critique = item.check(text)
        if critique:
            failed.append({"item": item.text, "critique": critique, "by": "program"})
    if failed:
        return failed
    chain, _ = split_thoughts(response)
    critique = compare_steps(problem, chain) or "The answer is wrong."
    return [{"item": ITEMS[problem.family][0], "critique": critique, "by": "program"}]


def compare_steps(problem: Problem, chain: str) -> str:
    """The critique of a chain's first step that does something else than the problem's, "" if none
    does.

    Whether its results are true is for programs to say.
    """
    moves = _find_moves(filter(None, re.split(r"(?<=\.)\s+", chain.strip())))
    right_moves = _find_moves(problem.steps)
    if moves == right_moves:
        return ""
    if len(moves) < len(right_moves) and _is_subsequence(moves, right_moves):
        return "A step is missing."
    k = 0
    while k < min(len(moves), len(right_moves)) and moves[k] == right_moves[k]:
        k += 1
    if problem.family == "tools" and k == 0:
        return "The tool is wrong."
    return f"Step {k + 1} is wrong."


def _find_moves(steps: Iterable[str]) -> list[str]:
    """What each step does: "32 - 5", then of "27 + 4 = 31." only "+ 4"; of "b = a[::-1]." it is
    "x[::-1]."."""
    moves = []
    for step in steps:
        calculation = re.fullmatch(r"(-?\d+ )([-+*] \d+) = -?\d+\.", step)
        if calculation:
            operand, operation = calculation.groups()
            moves.append(operation if moves else operand + operation)
        else:
            moves.append(re.sub(r"\b[abc]\b", "x", re.sub(r"^[abc] = ", "", step)))
    return moves


def _is_subsequence(some: list[str], whole: list[str]) -> bool:
    rest = iter(whole)
    return all(move in rest for move in some)   # `in` goes on behind the last one


# --------------------------------------------------------------------------------------------------
# Records: conversations whose last message is the model's reply, for sft.py.
# prompts: as in refinement.Settings.

def summarize(problem: Problem) -> str:
    """The reasoning in some ten words: the bare calculation, the operations in order, or the tool's
    name."""
    if problem.family == "code":
        operations = re.search(r"f\(x\): (.*)\. Example", problem.question)[1]
        return operations.replace(", then ", ", ")
    if problem.family == "tools":
        return problem.steps[0].removeprefix("The tool is ").rstrip(".")
    first, *_ = problem.steps[0].split()
    moves = [" ".join(step.split()[1:3]) for step in problem.steps]
    return f"{first} " + ", ".join(moves)


def draft_record(problem: Problem) -> dict:
    reply = {key: text for key, text in to_chat(problem)[-1].items() if text}
    return {"messages": [*question_messages(problem), reply]}


def checklist_record(problem: Problem, prompts: dict) -> dict:
    request = refinement.checklist_prompt(prompts, question_messages(problem))
    return _record(request, json.dumps(ITEMS[problem.family]))


def verdict_record(problem: Problem, response: str, prompts: dict) -> dict:
    """The verdict on the family's judged item alone: what programs check, they check."""
    chain, _ = split_thoughts(response)
    critique = compare_steps(problem, chain)
    verdict = {"pass": False, "critique": critique} if critique else {"pass": True}
    text = refinement.visible_text(response, thoughts=True)
    request = refinement.verdict_prompt(
        prompts, question_messages(problem), text, ITEMS[problem.family])
    return _record(request, json.dumps([verdict]))


def revision_record(problem: Problem, response: str, prompts: dict) -> dict:
    """From a wrong response and all that failed of it to the right one."""
    text = refinement.visible_text(response, thoughts=True)
    critique = refinement.format_critique(prompts, _failed_items(problem, response))
    request = refinement.revision_prompt(prompts, question_messages(problem), text, critique)
    right_reply = draft_record(problem)["messages"][-1]
    return {"messages": [*request, right_reply]}


def chain_record(problem: Problem, prompts: dict, asked: Problem | None = None) -> dict:
    """From instruction and solution to summary and chain.

    asked: what stands in place of the problem in the instruction and the summary, as of
    hide_from_question().
    """
    asked = asked or problem
    reply = to_chat(problem)[-1]
    request = refinement.chain_prompt(prompts, question_messages(asked), reply["content"])
    return _record(request, f"Summary: {summarize(asked)}\nChain: {reply['reasoning']}")


def _record(request: list[dict], reply: str) -> dict:
    return {"messages": [*request, {"role": "assistant", "content": reply}]}
