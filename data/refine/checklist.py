"""What a program can check of a response, from the instruction's own text alone: the runnable half of a checklist.

No gold answer and no problem is known here, and no critique tells the right result: the reviser must find it. The
report has evaluators judge correctness and executability (arXiv 2512.06266, section on SFT) and does not say how: all
of this is our choice. In doubt an item passes, for evaluators judge as well, while a false critique spoils what was
right. The forms of data/tasks are read exactly, by the families' own tables; other text where it has the same form.
"""
import ast
import doctest
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from functools import partial
from typing import NamedTuple

from data.verify import answers, jail, sandbox
from data.tasks.problem import Problem, final_answer, only_number
from data.refine.refinement import Item
from data.verify.symbolic import Failed
from data.tasks import code, form
from data.tasks.math import NAMES
from data.sets.programs import extract_program


def runnable_items(instruction: str, box: sandbox.Sandbox | None = None) -> list[Item]:
    """The items that the instruction has what it takes for. box: where programs run (default: the shared one).

    check(response) takes what refinement.visible_text() gives: "", a critique of one sentence, or None where the sandbox failed.
    """
    if offered(instruction)[0]:
        items = [Item("The answer calls an offered tool, with its arguments, by the request.",
                      lambda response: call_fault(instruction, _json(final_answer(response))))]
    elif examples := stated_examples(instruction):
        items = [Item("The program does what the examples say.", partial(_example_fault, examples, box))]
    else:
        items = [Item("Every calculation is true.", partial(_step_fault, instruction, "false"))]
        if numbers(instruction):
            items += [Item("Every number is given or derived.", partial(_step_fault, instruction, "underived")),
                      Item("The answer is the last result.", _answer_fault)]
    return items + list(_constraints(instruction))


# ---- calculations

_N = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,4}|[0-9]{1,15})(?:\.[0-9]{1,15})?"
_RESULT = rf"= *(-?{_N})(?!\w|%|[.,][0-9]| *[-+*/^=] *(?:[0-9(\\]|[A-Za-z]\b))"        # not a part of more
_EQUATION = re.compile(r"(?<![\w.,)\]}%^*/+-])(?<![-+*/^%] )(?<![0-9][ :])"             # nor this
                       r"((?:(?:^|(?<=[(:=.])|(?<=[(:=.] ))-)?"                         # a minus that is a sign
                       rf"{_N}(?: *[-+*/] *{_N}){{1,9}}) *{_RESULT}", re.MULTILINE)
_SPELLINGS = str.maketrans({"×": "*", "÷": "/", "−": "-", "$": None})
_WORDS = re.compile(r"\b(?:one|two|three|four|five|six|seven|eight|nine|ten|twelve|dozen|twice|doubled?|tripled?|half|"
                    r"halves|thirds?|quarters?|per ?cent|week|year)\b|%", re.IGNORECASE)  # numbers that we do not see


class Equation(NamedTuple):
    left: str                   # "45 - 8"
    operands: list[Fraction]
    result: Fraction            # as shown
    true: bool
    start: int                  # where it stands in the plain text


def plain(text: str) -> str:
    """One spelling of operators, and no bullets, which look like some."""
    text = re.sub(r"^[ \t]*[-*+•][ \t]+", "", text.translate(_SPELLINGS), flags=re.MULTILINE)
    return re.sub(r"(?<=[0-9]) ?(?:\\times|\\cdot|\bx\b) ?(?=[0-9])", " * ", text)


def numbers(text: str) -> set[Fraction]:
    return set(map(_value, re.findall(_N, text)))


def _value(number: str) -> Fraction:
    return Fraction(number.replace(",", ""))


def equations(text: str) -> list[Equation]:
    """Each `a op b = c`, also with up to nine operations, of a plain text; quotients may be rounded to decimals."""
    found = []
    for match in _EQUATION.finditer(text):
        left, shown = match.groups()
        first, rest = re.match(f"-?{_N}", left)[0], re.findall(rf"([-+*/]) *({_N})", left[1:])
        operands = [_value(first), *(_value(number) for _, number in rest)]
        error = abs(_computed(operands, [operator for operator, _ in rest]) - _value(shown))
        rounding = Fraction(1, 2 * 10 ** len(shown.partition(".")[2])) if "/" in left and "." in shown else 0
        found.append(Equation(left, operands, _value(shown), error <= rounding, match.start()))
    return found


def _computed(operands: list[Fraction], operators: list[str]) -> Fraction | float:
    """Products before sums; not a number for a division by 0."""
    terms = operands[:1]
    for operator, operand in zip(operators, operands[1:]):
        if operator in "+-":
            terms.append(operand if operator == "+" else -operand)
        elif operator == "*":
            terms[-1] *= operand
        else:
            terms[-1] = terms[-1] / operand if operand else float("nan")
    return sum(terms)


def step_faults(instruction: str, text: str) -> Iterator[tuple[str, str]]:
    """("false" or "underived", critique) of each fault, in order; the steps are the equations, counted from 1."""
    text, given = plain(text), numbers(instruction)
    known = bool(given) and not _WORDS.search(instruction)    # then it shows every number that may be used
    results = [(match.start(), _value(match[1])) for match in re.finditer(f"= *(-?{_N})", text)][::-1]
    for k, equation in enumerate(equations(text), 1):
        while results and results[-1][0] < equation.start:
            given.add(results.pop()[1])
        if known and (strange := [operand for operand in equation.operands if operand not in given]):
            yield "underived", f"Step {k} uses {_decimal(strange[0])}, which is neither given nor derived."
        if not equation.true:
            yield "false", f"Step {k} is wrong: {equation.left} is not {_decimal(equation.result)}."


def _decimal(number: Fraction) -> str:
    return str(number) if number.denominator == 1 else f"{float(number):.12g}"


def _step_fault(instruction: str, kind: str, response: str) -> str:
    return next((critique for found, critique in step_faults(instruction, response) if found == kind), "")


def last_result(text: str) -> str:
    """Of the last calculation, or other equation that ends in a number, where there are calculations; else ""."""
    text = plain(text)
    return _decimal(_value(re.findall(_RESULT, text)[-1])) if _EQUATION.search(text) else ""


def _answer_fault(response: str) -> str:
    last, answer = last_result(response), only_number(final_answer(response))
    return "The answer is not the last result." if last and answer and Fraction(last) != int(answer) else ""


# ---- programs: run in the sandbox, or else walked by data/tasks/code.py, which executes nothing

class Example(NamedTuple):
    call: str                   # "f([1, 2])"
    name: str
    arguments: list
    result: object


def stated_examples(instruction: str) -> list[Example]:
    """`Example: f([1, 2]) = [2].` and doctests, where they are of literals."""
    pairs = re.findall(r"Example: (\w+\(.*\)) = (.*?)\.?$", instruction, re.MULTILINE)
    with suppress(ValueError):  # what doctest cannot read, were it not for the ends of docstrings
        bare = re.sub(r"^\s*(?:\"\"\"|'''|```).*", "", instruction, flags=re.MULTILINE)
        pairs += [(example.source, example.want) for example in doctest.DocTestParser().get_examples(bare)]
    return [example for pair in pairs if (example := _example(*pair))]


def _example(call: str, result: str) -> Example | None:
    with suppress(ValueError, TypeError, RecursionError):
        match _tree(call):
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                values = [ast.literal_eval(tree) for tree in (*arguments, _tree(result))]
                jail.encode(values)             # TypeError: no plain data
                return Example(call.strip()[:100], name, values[:-1], values[-1])
    return None


def _tree(text: str) -> ast.expr | None:
    with warnings.catch_warnings(), suppress(SyntaxError, ValueError, MemoryError, RecursionError):
        warnings.simplefilter("ignore")         # the parser comments on odd literals
        return ast.parse(text.strip(), mode="eval").body
    return None


def program_in(response: str, name: str) -> str | None:
    """The program that defines the function: a fenced block or the text, or else made of an answer in x."""
    program = extract_program(response, Problem("", "", "", (), "", 0, {"names": [name]})) or ""
    if re.search(rf"^(?:async +)?def +{name}\b|^{name} *=", program, re.MULTILINE):
        return program
    answer = _expression(response)
    return f"def {name}(x):\n    return {answer}\n" if _tree(answer) else None


def _expression(response: str) -> str:
    return final_answer(response).removeprefix("return ").strip()


def _example_fault(examples: list[Example], box: sandbox.Sandbox | None, response: str) -> str | None:
    for example in examples:
        program = program_in(response, example.name)
        if program is None:
            return "There is no program."
        run = (box or sandbox.shared()).call(program, example.name, [example.arguments])
        if run.status == "broken":
            return None
        kind, _, text = (run.stderr.strip().rpartition("\n")[2] or run.status).partition(": ")
        value = run.values[0] if run.status == "ok" else jail.Raised(kind, text)
        if critique := _differs(example, value):
            return critique
    return ""


def _differs(example: Example, value: object) -> str:
    if isinstance(value, jail.Raised):
        return f"{example.call} fails: {_short(str(value))}."
    if sandbox.same(value, example.result):
        return ""
    try:
        shown = _short(repr(value))
    except ValueError:                          # more digits than Python shows
        shown = "a huge number"
    return f"{example.call} gives {shown}, not {_short(repr(example.result))}."


def _short(text: str) -> str:
    return " ".join(text.split())[:100].rstrip(".: ")


def composed(chain: str) -> str:
    """The steps "a = sorted(x). b = a[::-1]." put into one another: an expression in x; "" if there are none."""
    expressions, whole = {}, ""
    for name, text in re.findall(r"\b([a-z]) = (.{1,200}?)\.(?=\s+[a-z] = |\s*$)", chain):
        whole = re.sub(r"\b[a-z]\b", lambda m: f"({expressions[m[0]]})" if m[0] in expressions else m[0], text)
        if len(whole) > 2000:                   # steps may double each time
            return "?"
        expressions[name] = whole
    return whole


def _run(expression: str, x: object) -> object:
    """Its value; a jail.Raised where it fails, or is not of the language of data/tasks/code.py."""
    try:
        return code.run(_tree(expression), x)
    except Exception as error:                  # whatever fails here, the expression is its cause
        return jail.Raised(type(error).__name__, str(error))


# ---- constraints of form, and calls of tools

_VALUES = {"mark": "|".join(form.MARKS), "opener": "|".join(form.OPENERS), "words": "[0-9]{1,4}"}
_CRITIQUES = {"name": "It does not name {}.", "unit": "It does not give the unit {}.",
              "mark": "It does not end with {}.", "opener": "It does not begin with {}.",
              "words": "It has {count} words, not at most {}."}


def _constraints(instruction: str) -> Iterator[Item]:
    person = re.match(rf"({'|'.join(NAMES)})\b", instruction)
    unit = re.search(rf"[0-9] ({'|'.join(form.STORIES)})\b", instruction)
    for kind, (wording, _) in form.CONSTRAINTS.items():
        asked = re.search(re.escape(wording).replace(r"\{\}", f"({_VALUES.get(kind)})"), instruction)
        source = {"name": person, "unit": unit}.get(kind, asked)
        if asked and source:
            yield Item(asked[0], partial(_form_fault, kind, int(source[1]) if kind == "words" else source[1]))


def _form_fault(kind: str, value: str | int, response: str) -> str:
    reply = final_answer(response)
    kept = reply and form.CONSTRAINTS[kind][1](reply, value)
    return "" if kept else _CRITIQUES[kind].format(value, count=len(reply.split()))


def offered(instruction: str) -> tuple[dict[str, list[str]], str]:
    """The arguments of each tool in `Tools: name(argument, …), … .`, and the request behind them; without: ({}, "")."""
    found = re.search(r"\bTools: (\w+\([\w, ]*\)(?:, \w+\([\w, ]*\))*)\. (.*)", instruction, re.DOTALL)
    tools = re.findall(r"(\w+)\((.*?)\)", found[1]) if found else []
    return {name: arguments.split(", ") for name, arguments in tools}, found[2] if found else ""


def _json(text: str) -> object:
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    return None


def call_fault(instruction: str, call: object) -> str:
    tools, request = offered(instruction)
    match call:
        case {"name": str(name), "arguments": dict(arguments), **rest} if not rest:
            if name not in tools:
                return f"{_short(name)} is not offered."
            if set(arguments) != set(tools[name]):
                return f"The arguments of {name} are {', '.join(tools[name])}."
            strange = [value for value in map(str, arguments.values())
                       if not value or not re.search(rf"(?<!\w){re.escape(value)}(?!\w)", request)]
            return f"{_short(strange[0]) or 'Nothing'} is not in the request." if strange else ""
    return "The answer is no JSON call."


def chain_call(chain: str) -> dict | None:
    """The call that "The tool is taxi. people = 3. city = Rome." says; None if it names no tool."""
    tool, values = re.search(r"The tool is (\w+)\.", chain), re.findall(r"\b(\w+) = (.{1,200}?)\.(?=\s|$)", chain)
    arguments = {name: int(value) if re.fullmatch("[0-9]{1,15}", value) else value for name, value in values}
    return {"name": tool[1], "arguments": arguments} if tool else None


# ---- chains of thought, for the reconstruction in data/refine/refinement.py

_LISTS = [[5, 2, 9, 0, 7, 4, 1, 8, 3, 6], [6, 3, 8, 1, 1, 0, 9, 4, 7, 2, 5], [3, 3, 8, 2]]  # tell operations apart


def leads_to(instruction: str, chain: str, solution: str) -> bool | None:
    """Whether the answer that a chain leads to is the solution's (a response's content); None: nothing to compare.

    The former is a call or a program made of the steps, the last result, or the answer that the chain states.
    """
    answer = final_answer(solution)
    if offered(instruction)[0]:
        call = chain_call(chain)
        return call and json.dumps(call, sort_keys=True) == json.dumps(_json(answer), sort_keys=True)
    if examples := stated_examples(instruction):
        lists = [*examples[0].arguments[:1], *_LISTS]
        ours, theirs = ([_run(expression, x) for x in lists] for expression in (composed(chain), _expression(solution)))
        if isinstance(ours[0], jail.Raised) or isinstance(theirs[0], jail.Raised):
            return None
        return all(type(a) is type(b) is jail.Raised or sandbox.same(a, b) for a, b in zip(ours, theirs))
    reached = last_result(chain) or answers.final_answer(chain)
    stated = only_number(answer) or answers.final_answer(solution)
    with suppress(Failed):
        return answers.decide(stated, reached) if stated and reached else None
    return None


def false_step(instruction: str, chain: str) -> str:
    """The critique of a chain's first step that is false or rests on nothing, or of what they make; "" if none is."""
    if offered(instruction)[0]:
        call = chain_call(chain)
        return call_fault(instruction, call) if call else ""
    if examples := stated_examples(instruction):
        expression, example = composed(chain), examples[0]
        return _differs(example, _run(expression, example.arguments[0])) if expression and example.arguments else ""
    return next((critique for _, critique in step_faults(instruction, chain)), "")
