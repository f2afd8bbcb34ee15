"""What a program can check of a response, from the instruction's own text alone: the runnable half
of a checklist.

No gold answer and no problem is known here, and no critique tells the right result: the reviser
must find it. The report has evaluators judge correctness and executability (arXiv 2512.06266,
section on SFT) and does not say how: all of this is our choice. In doubt an item passes, for
evaluators judge as well, while a false critique spoils what was right. The forms of data/tasks are
read exactly, by the families' own tables; other text where it has the same form.
"""
import ast
import doctest
import json
import re
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from functools import partial
from typing import NamedTuple

from data.refine.refinement import Item
from data.sets.programs import extract_program
from data.tasks import code, form
from data.tasks.math import NAMES
from data.tasks.problem import Problem, answer_line, only_number
from data.verify import answers, jail, sandbox
from data.verify.symbolic import Failed


def runnable_items(instruction: str, box: sandbox.Sandbox | None = None) -> list[Item]:
    """The items that the instruction has what it takes for.

    box: where programs run (default: the shared one). The check(response) of an item takes what
    refinement.visible_text() gives and returns "", a critique of one sentence, or None where the
    sandbox failed.
    """
    items = []
    tools, _ = parse_offer(instruction)
    examples = find_examples(instruction)
    if tools:
        items.append(Item("The answer calls an offered tool, with its arguments, by the request.",
                          partial(_check_call_in, instruction)))
    elif examples:
        items.append(Item("The program does what the examples say.",
                          partial(_check_examples, examples, box)))
    else:
        items.append(Item("Every calculation is true.",
                          partial(_check_steps, instruction, "false")))
        if find_numbers(instruction):
            items.append(Item("Every number is given or derived.",
                              partial(_check_steps, instruction, "underived")))
            items.append(Item("The answer is the last result.", _check_answer))
    items += _form_items(instruction)
    return items


# --------------------------------------------------------------------------------------------------
# Calculations

_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,4}|[0-9]{1,15})(?:\.[0-9]{1,15})?"
_RESULT = (rf"= *(-?{_NUMBER})"
           r"(?!\w|%|[.,][0-9]| *[-+*/^=] *(?:[0-9(\\]|[A-Za-z]\b))"    # not a part of more
           )
_EQUATION = re.compile(
    r"(?<![\w.,)\]}%^*/+-])(?<![-+*/^%] )(?<![0-9][ :])"                # nor this
    r"((?:(?:^|(?<=[(:=.])|(?<=[(:=.] ))-)?"                            # a minus that is a sign
    rf"{_NUMBER}(?: *[-+*/] *{_NUMBER}){{1,9}}) *{_RESULT}", re.MULTILINE)
_SPELLINGS = str.maketrans({"×": "*", "÷": "/", "−": "-", "$": None})
_NUMBER_WORDS = re.compile(     # of numbers that find_numbers() does not see
    r"\b(?:one|two|three|four|five|six|seven|eight|nine|ten|twelve|dozen|twice|doubled?|tripled?|"
    r"half|halves|thirds?|quarters?|per ?cent|week|year)\b|%", re.IGNORECASE)


class Equation(NamedTuple):
    left: str                   # "45 - 8"
    operands: list[Fraction]
    result: Fraction            # as the text has it
    true: bool
    start: int                  # where it stands in the normalized text


def normalize_operators(text: str) -> str:
    """One spelling of operators, and no bullets, which look like some."""
    text = re.sub(r"^[ \t]*[-*+•][ \t]+", "", text.translate(_SPELLINGS), flags=re.MULTILINE)
    return re.sub(r"(?<=[0-9]) ?(?:\\times|\\cdot|\bx\b) ?(?=[0-9])", " * ", text)


def find_numbers(text: str) -> set[Fraction]:
    return set(map(_value, re.findall(_NUMBER, text)))


def _value(number: str) -> Fraction:
    return Fraction(number.replace(",", ""))


def find_equations(text: str) -> list[Equation]:
    """Each `a op b = c`, also with up to nine operations, of a normalized text.

    Quotients may be rounded to decimals.
    """
    equations = []
    for match in _EQUATION.finditer(text):
        left, result = match.groups()
        first = re.match(f"-?{_NUMBER}", left)[0]
        rest = re.findall(rf"([-+*/]) *({_NUMBER})", left[1:])
        operands = [_value(first)] + [_value(number) for _, number in rest]
        operators = [operator for operator, _ in rest]
        error = abs(_calculate(operands, operators) - _value(result))
        tolerance = 0
        if "/" in left and "." in result:
            decimals = len(result.partition(".")[2])
            tolerance = Fraction(1, 2 * 10 ** decimals)
        is_true = error <= tolerance
        equations.append(Equation(left, operands, _value(result), is_true, match.start()))
    return equations


def _calculate(operands: list[Fraction], operators: list[str]) -> Fraction | float:
    """Products before sums; not a number for a division by 0."""
    terms = operands[:1]
    for operator, operand in zip(operators, operands[1:]):
        if operator == "+":
            terms.append(operand)
        elif operator == "-":
            terms.append(-operand)
        elif operator == "*":
            terms[-1] *= operand
        else:
            terms[-1] = terms[-1] / operand if operand else float("nan")
    return sum(terms)


def find_step_faults(instruction: str, text: str) -> Iterator[tuple[str, str]]:
    """("false" or "underived", critique) of each fault, in order; the steps are the equations,
    counted from 1."""
    text = normalize_operators(text)
    known = find_numbers(instruction)
    shows_all_numbers = bool(known) and not _NUMBER_WORDS.search(instruction)
    results = deque(re.finditer(f"= *(-?{_NUMBER})", text))
    for k, equation in enumerate(find_equations(text), 1):
        while results and results[0].start() < equation.start:
            known.add(_value(results.popleft()[1]))
        underived = [operand for operand in equation.operands if operand not in known]
        if shows_all_numbers and underived:
            number = _decimal(underived[0])
            yield "underived", f"Step {k} uses {number}, which is neither given nor derived."
        if not equation.true:
            result = _decimal(equation.result)
            yield "false", f"Step {k} is wrong: {equation.left} is not {result}."


def _decimal(number: Fraction) -> str:
    return str(number) if number.denominator == 1 else f"{float(number):.12g}"


def _check_steps(instruction: str, kind: str, response: str) -> str:
    """The first fault of the kind."""
    for fault, critique in find_step_faults(instruction, response):
        if fault == kind:
            return critique
    return ""


def last_result(text: str) -> str:
    """Of the last calculation, or of another equation that ends in a number, where there are
    calculations; else ""."""
    text = normalize_operators(text)
    if not _EQUATION.search(text):
        return ""
    return _decimal(_value(re.findall(_RESULT, text)[-1]))


def _check_answer(response: str) -> str:
    result, answer = last_result(response), only_number(answer_line(response))
    if result and answer and Fraction(result) != int(answer):
        return "The answer is not the last result."
    return ""


# --------------------------------------------------------------------------------------------------
# Programs: run in the sandbox, or else walked by data/tasks/code.py, which executes nothing

class Example(NamedTuple):
    call: str                   # "f([1, 2])"
    name: str
    arguments: list
    result: object


def find_examples(instruction: str) -> list[Example]:
    """`Example: f([1, 2]) = [2].` and doctests, where they are of literals."""
    pairs = re.findall(r"Example: (\w+\(.*\)) = (.*?)\.?$", instruction, re.MULTILINE)
    with suppress(ValueError):  # what doctest cannot read, were it not for the ends of docstrings
        bare = re.sub(r"^[^\S\n]*+(?:\"\"\"|'''|```).*", "", instruction, flags=re.MULTILINE)
        doctests = doctest.DocTestParser().get_examples(bare)
        pairs += [(example.source, example.want) for example in doctests]
    examples = [_parse_example(call, result) for call, result in pairs]
    return [example for example in examples if example is not None]


def _parse_example(call: str, result: str) -> Example | None:
    with suppress(ValueError, TypeError, RecursionError):
        match _parse_expression(call):
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                trees = [*arguments, _parse_expression(result)]
                values = [ast.literal_eval(tree) for tree in trees]
                jail.encode(values)             # TypeError: no plain data
                return Example(call.strip()[:100], name, values[:-1], values[-1])
    return None


def _parse_expression(text: str) -> ast.expr | None:
    errors = (SyntaxError, ValueError, MemoryError, RecursionError)
    with warnings.catch_warnings(), suppress(*errors):
        warnings.simplefilter("ignore")         # the parser comments on odd literals
        return ast.parse(text.strip(), mode="eval").body
    return None


def find_program(response: str, name: str) -> str | None:
    """The program that defines the function: a fenced block or the text, or else made of an answer
    in x."""
    # extract_program reads nothing of a problem but its extra
    problem = Problem(family="", key="", question="", steps=(), answer="", level=0,
                      extra={"names": [name]})
    program = extract_program(response, problem) or ""
    if re.search(rf"^(?:async +)?def +{name}\b|^{name} *=", program, re.MULTILINE):
        return program
    expression = _answered_expression(response)
    if _parse_expression(expression) is None:
        return None
    return f"def {name}(x):\n    return {expression}\n"


def _answered_expression(response: str) -> str:
    return answer_line(response).removeprefix("return ").strip()


def _check_examples(
        examples: list[Example], box: sandbox.Sandbox | None, response: str) -> str | None:
    """The first example that the response's program does not keep."""
    for example in examples:
        program = find_program(response, example.name)
        if program is None:
            return "There is no program."
        run = (box or sandbox.shared()).call(program, example.name, [example.arguments])
        if run.status == "broken":
            return None
        if run.status == "ok":
            value = run.values[0]
        else:
            last_line = run.stderr.strip().rpartition("\n")[2]
            kind, _, text = (last_line or run.status).partition(": ")
            value = jail.Raised(kind, text)
        critique = _critique_result(example, value)
        if critique:
            return critique
    return ""


def _critique_result(example: Example, value: object) -> str:
    """How a call's value differs from the example's result; "" if it does not."""
    if isinstance(value, jail.Raised):
        return f"{example.call} fails: {_shorten(str(value))}."
    if sandbox.same(value, example.result):
        return ""
    try:
        text = _shorten(repr(value))
    except ValueError:                          # more digits than Python shows
        text = "a huge number"
    return f"{example.call} gives {text}, not {_shorten(repr(example.result))}."


def _shorten(text: str) -> str:
    return " ".join(text.split())[:100].rstrip(".: ")


def compose_steps(chain: str) -> str:
    """The steps "a = sorted(x). b = a[::-1]." put into one another: an expression in x; "" if there
    are none."""
    expressions = {}

    def substitute(match: re.Match) -> str:
        name = match[0]
        return f"({expressions[name]})" if name in expressions else name

    composed = ""
    for name, step in re.findall(r"\b([a-z]) = (.{1,200}?)\.(?=\s+[a-z] = |\s*$)", chain):
        composed = re.sub(r"\b[a-z]\b", substitute, step)
        if len(composed) > 2000:                # steps may double each time
            return "?"  # no expression: whoever evaluates it fails
        expressions[name] = composed
    return composed


def _evaluate(expression: str, x: object) -> object:
    """The expression's value; a jail.Raised where it fails, or is not of the language of
    data/tasks/code.py."""
    try:
        return code.run(_parse_expression(expression), x)
    except Exception as error:                  # whatever fails here, the expression is its cause
        return jail.Raised(type(error).__name__, str(error))


# --------------------------------------------------------------------------------------------------
# Constraints of form, and calls of tools

_VALUES = {"mark": "|".join(form.MARKS), "opener": "|".join(form.OPENERS), "words": "[0-9]{1,4}"}
_CRITIQUES = {
    "name": "It does not name {}.",
    "unit": "It does not give the unit {}.",
    "mark": "It does not end with {}.",
    "opener": "It does not begin with {}.",
    "words": "It has {count} words, not at most {}.",
}


def _form_items(instruction: str) -> Iterator[Item]:
    """An item for each constraint of data/tasks/form.py that the instruction has."""
    person = re.match(rf"({'|'.join(NAMES)})\b", instruction)
    unit = re.search(rf"[0-9] ({'|'.join(form.STORIES)})\b", instruction)
    for kind, (wording, _) in form.CONSTRAINTS.items():
        pattern = re.escape(wording).replace(r"\{\}", f"({_VALUES.get(kind)})")
        constraint = re.search(pattern, instruction)
        with_value = {"name": person, "unit": unit}.get(kind, constraint)
        if constraint and with_value:
            value = int(with_value[1]) if kind == "words" else with_value[1]
            yield Item(constraint[0], partial(_check_form, kind, value))


def _check_form(kind: str, value: str | int, response: str) -> str:
    reply = answer_line(response)
    _, holds = form.CONSTRAINTS[kind]
    if reply and holds(reply, value):
        return ""
    return _CRITIQUES[kind].format(value, count=len(reply.split()))


def parse_offer(instruction: str) -> tuple[dict[str, list[str]], str]:
    """The arguments of each tool in `Tools: name(argument, …), … .`, and the request behind them;
    ({}, "") without such an offer."""
    offer = re.search(r"\bTools: (\w+\([\w, ]*\)(?:, \w+\([\w, ]*\))*)\. (.*)", instruction,
                      re.DOTALL)
    if not offer:
        return {}, ""
    tools = re.findall(r"\b(\w++)\(([^()]*+)\)", offer[1])
    return {name: arguments.split(", ") for name, arguments in tools}, offer[2]


def _parse_json(text: str) -> object:
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    return None


def _check_call_in(instruction: str, response: str) -> str:
    return check_call(instruction, _parse_json(answer_line(response)))


def check_call(instruction: str, call: object) -> str:
    """The critique of {"name", "arguments"} by what the instruction offers and requests."""
    tools, request = parse_offer(instruction)
    match call:
        case {"name": str(name), "arguments": dict(arguments), **others} if not others:
            pass
        case _:
            return "The answer is no JSON call."
    if name not in tools:
        return f"{_shorten(name)} is not offered."
    if set(arguments) != set(tools[name]):
        return f"The arguments of {name} are {', '.join(tools[name])}."
    for value in map(str, arguments.values()):
        if not value or not re.search(rf"(?<!\w){re.escape(value)}(?!\w)", request):
            return f"{_shorten(value) or 'Nothing'} is not in the request."
    return ""


def call_from_steps(chain: str) -> dict | None:
    """The call that "The tool is taxi. people = 3. city = Rome." says; None if it names no tool."""
    tool = re.search(r"The tool is (\w+)\.", chain)
    if not tool:
        return None
    arguments = {}
    for name, value in re.findall(r"\b(\w+) = (.{1,200}?)\.(?=\s|$)", chain):
        arguments[name] = int(value) if re.fullmatch("[0-9]{1,15}", value) else value
    return {"name": tool[1], "arguments": arguments}


# --------------------------------------------------------------------------------------------------
# Chains of thought, for the reconstruction in data/refine/refinement.py

_TEST_LISTS = [     # they tell operations apart
    [5, 2, 9, 0, 7, 4, 1, 8, 3, 6],
    [6, 3, 8, 1, 1, 0, 9, 4, 7, 2, 5],
    [3, 3, 8, 2],
]


def leads_to(instruction: str, chain: str, solution: str) -> bool | None:
    """Whether the answer that a chain leads to is the solution's (a response's content); None:
    nothing to compare.

    The former is a call or a program made of the steps, the last result, or the answer that the
    chain states.
    """
    tools, _ = parse_offer(instruction)
    examples = find_examples(instruction)
    if tools:
        return _same_call(chain, solution)
    if examples:
        return _same_program(chain, solution, [*examples[0].arguments[:1], *_TEST_LISTS])
    return _same_answer(chain, solution)


def _same_call(chain: str, solution: str) -> bool | None:
    call, answered_call = call_from_steps(chain), _parse_json(answer_line(solution))
    if call is None:
        return None
    return json.dumps(call, sort_keys=True) == json.dumps(answered_call, sort_keys=True)


def _same_program(chain: str, solution: str, inputs: list) -> bool | None:
    """Whether both give the same values, or fail, for all inputs; None: one fails for the first."""
    composed, answered = compose_steps(chain), _answered_expression(solution)
    by_chain = [_evaluate(composed, x) for x in inputs]
    by_solution = [_evaluate(answered, x) for x in inputs]
    if isinstance(by_chain[0], jail.Raised) or isinstance(by_solution[0], jail.Raised):
        return None
    for ours, theirs in zip(by_chain, by_solution):
        both_fail = type(ours) is type(theirs) is jail.Raised
        if not both_fail and not sandbox.same(ours, theirs):
            return False
    return True


def _same_answer(chain: str, solution: str) -> bool | None:
    reached = last_result(chain) or answers.final_answer(chain)
    stated = only_number(answer_line(solution)) or answers.final_answer(solution)
    if not stated or not reached:
        return None
    with suppress(Failed):
        return answers.decide(stated, reached)
    return None


def find_false_step(instruction: str, chain: str) -> str:
    """The critique of a chain's first step that is false or rests on nothing, or of what the steps
    make; "" if none is."""
    tools, _ = parse_offer(instruction)
    examples = find_examples(instruction)
    if tools:
        call = call_from_steps(chain)
        return check_call(instruction, call) if call else ""
    if examples:
        expression, example = compose_steps(chain), examples[0]
        if not expression or not example.arguments:
            return ""
        return _critique_result(example, _evaluate(expression, example.arguments[0]))
    for _, critique in find_step_faults(instruction, chain):
        return critique
    return ""
