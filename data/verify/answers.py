"""Is the final answer to a mathematics problem right?

`final_answer` finds what a response offers. `equal` compares plain answers (numbers, units, choices, words, lists,
tuples, matrices) by exact arithmetic. Single expressions that it leaves undecided, `\\frac{\\pi}{2}` against `\\pi/2`,
go to math-verify 0.9.0 in a process of its own, which may take long or die. `reward` is all of it.

A policy finds every wrong answer that passes, so doubt means wrong, and math-verify is held short: it never sees text
(to it 'east' is 'seat', a product of letters), units (it drops them), decimals (it rounds them), lists, tuples or
intervals (it mixes them up), nor looks for the answer in the text (it takes part of what it cannot read).
"""
import atexit
import functools
import math
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import NamedTuple

from data.verify import symbolic
from data.verify.symbolic import FUNCTIONS
from data.chat.template import after_thoughts

MAX_ANSWER = 1000       # characters of an answer; a longer one is none
MAX_WORDS = 6           # of a gold in words; a longer one has too many wordings
MAX_EXPONENT = 999      # of 10: 1e999999999 is never written out


# ---- what a response offers

def final_answer(response: str) -> str | None:
    """The last box; without one, the last '#### x' line (GSM8K); else what follows the last 'answer is' or 'Answer:'.

    None for no answer: also thoughts that never end, a last box that never ends, more than MAX_ANSWER characters.
    """
    text = after_thoughts(response)
    if text is None:
        return None
    if "\\boxed" in text or "\\fbox" in text:
        answer = boxed(text)
    elif "####" in text:
        start = text.rfind("####") + 4
        answer = text[start:start + MAX_ANSWER + 9].partition("\n")[0]
    else:
        answer = _stated(text)
    answer = (answer or "").strip()
    return answer if 0 < len(answer) <= MAX_ANSWER else None


def boxed(text: str) -> str | None:
    """What the last \\boxed{...} or \\fbox{...} holds, or stands behind it as in `\\boxed 5`; None if it never ends."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    body = re.sub(r"^\\(?:boxed|fbox)\s*", "", text[start:start + MAX_ANSWER + 99])
    if not body.startswith("{"):
        return re.match(r"[^$\n]*", body)[0].strip().rstrip(".") or None
    depth = 0
    for mark in re.finditer(r"\\.|[{}]", body, re.DOTALL):  # an escaped brace is content
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return body[1:mark.start()].strip() or None
    return None


def _stated(text: str) -> str | None:
    """The rest of the sentence or line after the last 'answer is', 'Answer:' and the like; a decimal point goes on."""
    last = None
    for last in re.finditer(r"\banswer[*_\s]*(?:is\b|[:=])", text, re.IGNORECASE):
        pass
    if last is None:
        return None
    rest = text[last.end():last.end() + MAX_ANSWER + 99].lstrip("*_: \t\r\n")
    return re.split(r"\n|\.(?=[\s*_]|$)", rest, maxsplit=1)[0].rstrip("*_ \t\r")


# ---- one spelling: what LaTeX and plain text write in many ways. Words of \text stand in double quotes from here on

_UNICODE = str.maketrans({"−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "/", "π": "\\pi ",
                          "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ", "²": "^2", "³": "^3", "∪": "\\cup ",
                          "±": "\\pm ", "“": " ", "”": " ", "’": "'"})


def _words(match: re.Match) -> str:
    """The content of \\text{...}: quoted where it is words, else (`\\text{(C)}`, `\\mathbf{5}`) as if it stood bare."""
    return f' "{match[1].strip()}" ' if re.fullmatch(r"[A-Za-z .'/-]+", match[1]) else f" {match[1]} "


_RULES = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"\\(?:text(?:bf|it|rm|sf|normal)?|mbox|hbox|mathrm|operatorname)\s*\{([^{}]*)\}", _words),
    (r"\\(?:mathbf|mathit|mathsf|bold|displaystyle)(?![A-Za-z])", ""),
    (r"(?<=[0-9])(?:\{,\}|,?\\!|\\,)\s*(?=[0-9]{3}(?![0-9]))", ""),                 # 1{,}000  1,\!000  1\,000
    (r"(?<!\\)\\!\s*", ""),
    (r"(?<!\\)\\[,;:> ]|\\q?quad(?![A-Za-z])|~", " "),
    (r"(?<!\\)\\[()\[\]]", " "),                                                    # \( \) \[ \] as $
    (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])", ""),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\frac\s*(\{[^{}]*\}|[0-9A-Za-z])\s*(\{[^{}]*\}|[0-9A-Za-z])",               # \frac12  \frac 5 {9}
     lambda m: "\\frac{%s}{%s}" % tuple(part.strip("{}").strip() for part in m.groups())),
    (r"\\sqrt\s*([0-9A-Za-z])", r"\\sqrt{\1}"),
    (r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)|√\s*\(([^()]*)\)|√\s*([0-9]+|[A-Za-z])",
     lambda m: "\\sqrt{%s}" % next(part for part in m.groups() if part is not None)),
    (rf"(?<![\\A-Za-z])({'|'.join(FUNCTIONS)})(?![A-Za-z])", r"\\\1"),             # 2pi  sin x
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])", "°"),
    (r"\\%", "%"),
    (r"\\(?:leqslant|leq|le)(?![A-Za-z])|<=", r"\\le "),
    (r"\\(?:geqslant|geq|ge)(?![A-Za-z])|>=", r"\\ge "),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\*\*", "^"),
    (r"\\(?:times|cdot)(?![A-Za-z])|\*", r"\\cdot "),
    (r"\^\s*\(([^()]*)\)", r"^{\1}"),                                               # 2^(10)
    (r"\^\s*(-?[0-9]{2,}|-[A-Za-z0-9])", r"^{\1}"),                                 # 2^10  x^-1
    (r"([_^])\s*\{\s*([0-9A-Za-z])\s*\}", r"\1\2"),
    (r"(?<![0-9.^])([12]?[0-9])!(?![!0-9])", lambda m: str(math.factorial(int(m[1])))),
)]


def _tidy(text: str) -> str:
    text = (boxed(text) or text).replace('"', " ").replace("\\$", "¤").strip().strip("*`")
    if not text.isascii():
        text = text.translate(_UNICODE)
    if "$" in text:     # a single one is dollars, two enclose mathematics
        text = text.replace("$", "¤" if text.count("$") == 1 else " ")
    if not text.isalnum():
        for pattern, replacement in _RULES:
            text = pattern.sub(replacement, text)
    return " ".join(text.split()).rstrip(". ")


# ---- units

_UNITS = {variant: unit for unit, variants in {
    "%": "% percent percentage pct", "degree": "° degree deg", "radian": "radian rad",
    "dollar": "¤ $ dollar usd buck", "cent": "¢ cent", "euro": "€ euro eur", "yen": "¥ yen", "rupee": "₹ rupee",
    "pound": "£ pound lb",                                                          # money or weight
    "mm": "mm millimeter millimetre", "cm": "cm centimeter centimetre", "m": "m meter metre", "in": "in inch inche",
    "km": "km kilometer kilometre", "ft": "ft foot feet", "yd": "yd yard", "mi": "mi mile",
    "mg": "mg milligram", "g": "g gram", "kg": "kg kilogram", "oz": "oz ounce", "ton": "ton tonne",
    "ml": "ml milliliter millilitre", "l": "l liter litre", "gallon": "gallon gal",
    "s": "s second sec", "min": "min minute", "h": "h hour hr", "day": "day", "week": "week", "month": "month",
    "year": "year yr", "mi/h": "mph", "km/h": "kph kmh", "unit": "unit", "square": "", "cubic": "",
}.items() for variant in variants.split()}
_KNOWN = set(_UNITS.values()) | {""}
# What may follow a number and change its value, or be another one: then it is no unit, and the text no plain number.
_NOT_UNIT = re.compile(rf"""(?:hundred|dozen|score|gross|grand|lakh|crore|pair|couple|double|half|halve|third|quarter|
    zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|time|plus|minus|over|mod|modulo|root|radical|
    factorial|power|choose|inverse|multiplied|divided|negative|less|more|fewer|than|not|and|or|to|except|unless|versus|
    above|below|base|squared|cubed|alpha|beta|gamma|delta|epsilon|zeta|eta|theta|kappa|lambda|rho|sigma|tau|phi|chi|psi|
    omega|infinity|infinite|cosine|sine|tangent|{'|'.join(FUNCTIONS)})s?|.*(?:th|teen|ty|illion)s?""", re.VERBOSE)
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


def _unit(text: str) -> str | None:
    """The unit that a tail is, in one spelling: 'cm^2', 'mi/h', 'duck egg', 'base 8', ''; None for what is no unit."""
    if base := re.fullmatch(r"_\{?([0-9]{1,2})\}?", text):
        return f"base {base[1]}"
    apart = text[:1] in ' "'    # 'ab' in 5ab is no unit; and a single letter is one only where it is set as text
    parts, power, per = [], "", ""
    for word in re.sub(r"([/^°%])", r" \1", text.replace('"', " ").lower()).replace("/", "/ ").split():
        word = word.rstrip(".")
        if word in ("^2", "^3", "squared", "cubed") and parts:
            parts[-1] += {"squared": "^2", "cubed": "^3"}.get(word, word)
        elif word in ("square", "sq", "cubic", "cu"):
            power = "^2" if word[0] == "s" else "^3"
        elif word in ("per", "/"):
            per = "/"
        else:
            stem = word[:-1] if len(word) > 2 and word.endswith("s") else word
            unit = _UNITS.get(word) or _UNITS.get(stem)
            if unit and len(word) == 1 and word.isalpha() and '"' not in text:
                return None
            if not unit and not (apart and len(word) > 2 and word.isascii() and word.isalpha() and
                                 not _NOT_UNIT.fullmatch(word)):
                return None
            parts.append(per + (unit or stem) + power)
            power, per = "", ""
    return None if power or per else " ".join(parts).replace(" /", "/")


def _units_agree(gold: str, answer: str) -> bool | None:
    """A unit that one side lacks is forgiven, but a base on the answer's side alone, 42_8 for 42, is another number."""
    if not answer or gold == answer:
        return True
    if not gold:
        return answer == "base 10" or not answer.startswith("base")
    return False if _known(gold) and _known(answer) else None       # 'egg' and 'duck egg'


def _known(unit: str) -> bool:
    return set(re.split(r"\^.|/| ", unit)) <= _KNOWN or unit.startswith("base")


# ---- a text to a value

class Value(NamedTuple):
    kind: str           # number, choice, words, math; or of several: list, '()' '(]' '[)' '[]', 'matrix' and its shape
    body: object        # Fraction, letter, lower-case words, expression without spaces; or the Values
    text: str = ""      # a single value as mathematics
    unit: str = ""
    name: str = ""      # of what is equal to it: 'x'; 'option B'


_DECIMAL = r"(?:[0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(rf"""([-+]?)\s*([¤€£¥₹]?)\s*([-+]?)\s*(?:
    (?:([0-9]+)\s*)?\\frac\{{([-+]?{_DECIMAL})\}}\{{([-+]?{_DECIMAL})\}} |
    (?:([0-9]+)\s+)?({_DECIMAL})\s*/\s*({_DECIMAL}) |
    ({_DECIMAL})(?:[eE]([-+]?[0-9]+)|\s*\\cdot\s*10\s*\^\s*\{{?([-+]?[0-9]+)\}}?)? )""", re.VERBOSE)
_CHOICE = re.compile(r'[("]*([A-J])[)"]*')
# '(C) 5' is option C; '(C) or 5', '(C), 5', '(C)+1' and '(C) maybe D' are not
_OPTION = re.compile(r"""[("]*([A-J])"?(?:\)"?|[.:](?=\s))(?:\s*(?=[\w$\\"({.])|\s+(?=-))
                         ((?!(?:or|and|not)\b)(?:(?!(?<![A-Za-z\\])[A-J](?![A-Za-z])).)+)""", re.VERBOSE)
_NAME = re.compile(r"""([A-Za-z"\\][A-Za-z" ]{0,30}(?:_\{?[A-Za-z0-9]{1,5}\}?)?'?(?:\([A-Za-z]\))?)
                       \s*(?:=|\\in(?![a-z]))\s*(.+)""", re.VERBOSE)
_NUMERALS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def _decimal(text: str) -> Fraction | None:
    """None where commas are not those of thousands."""
    whole = text.lstrip("+-").partition(".")[0]
    if "," in whole and not re.fullmatch(r"[0-9]{1,3}(?:,[0-9]{3})+", whole):
        return None
    return Fraction(text.replace(",", ""))


def _number(text: str) -> Value | None:
    """A number and at most a unit; None for all else."""
    match = _NUMBER.match(text)
    if not match:
        return None
    sign, currency, sign_after, whole, top, bottom, whole_plain, top_plain, bottom_plain, decimal, *exponents = (
        match.groups(default=""))
    rest, scale = text[match.end():], 1
    if word := re.match(r'[\s"]+(thousand|million|billion|trillion)(?![A-Za-z])', rest):
        rest, scale = rest[word.end():].removeprefix('"'), _SCALES[word[1]]
    if (unit := _unit(rest)) is None or (sign and sign_after):
        return None
    if currency:
        currency = _UNITS[currency]
        if unit not in ("", currency) and not unit.startswith("/"):
            return None
        unit = unit if unit == currency else currency + unit
    if decimal:
        exponent = "".join(exponents) or "0"
        value = _decimal(decimal)
        if value is None or len(exponent) > 9 or abs(int(exponent)) > MAX_EXPONENT:
            return None
        value *= Fraction(10) ** int(exponent)
    else:
        above, below = _decimal(top or top_plain), _decimal(bottom or bottom_plain)
        if above is None or not below:
            return None
        value = above / below
        if whole := whole or whole_plain:
            if not 0 <= value < 1:      # 2 3/2: a mixed number or a product?
                return None
            value += int(whole)
    value *= -scale if "-" in (sign, sign_after) else scale
    plain = text[:match.end()].replace(currency and match[2], "").replace(",", "")
    return Value("number", value, plain if scale == 1 else str(value), unit)


def _split(text: str) -> list[str] | None:
    """The parts between commas, 'and', 'or' and unions that stand in no brackets; None where brackets do not match."""
    depth, start, parts = 0, 0, []
    for mark in re.finditer(r"""([(\[{])|([)\]}])|[,;]|\\cup(?![a-z])|"?\b(?:and|or)\b"?""", text):
        depth += bool(mark[1]) - bool(mark[2])
        if depth < 0:
            return None
        if depth == 0 and not mark[2]:
            parts.append(text[start:mark.start()])
            start = mark.end()
    return None if depth else [part.strip() for part in (*parts, text[start:]) if part.strip()]


def _several(text: str, parts: list[str], kind: str, depth: int) -> Value:
    """The values of the parts; 1 \\pm 2 is two of them."""
    signs = [{"\\pm": "+", "\\mp": "-"}, {"\\pm": "-", "\\mp": "+"}]
    parts = [re.sub(r"\\[pm][pm](?![a-z])", lambda m: way[m[0]], part).removeprefix("+").strip()
             for part in parts for way in signs[:1 + bool(re.search(r"\\(?:pm|mp)(?![a-z])", part))]]
    return Value(kind, tuple(_parse(part, depth + 1) for part in parts), text)


def _interval(text: str, depth: int) -> Value | None:
    """x > 3 and 1 < x \\le 2 as intervals; None for all else."""
    parts = [part.strip() for part in re.split(r"(\\le|\\ge|<|>)(?![a-z])", text)]
    if len(parts) == 3:
        left, relation, right = parts
        if re.fullmatch("[a-zA-Z]", right):
            left, relation, right = right, {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}[relation], left
        infinite = ["\\infty", "<"]
        parts = [right, relation, left, relation, *infinite[:1]] if relation in (">", "\\ge") else [
            "-\\infty", "<", left, relation, right]
        parts[1::2] = [relation, "<"] if relation in (">", "\\ge") else ["<", relation]
    elif len(parts) == 5 and {parts[1], parts[3]} <= {">", "\\ge"}:
        parts.reverse()
    elif len(parts) != 5 or not {parts[1], parts[3]} <= {"<", "\\le"}:
        return None
    low, from_low, name, to_high, high = parts
    if not (low and high and re.fullmatch("[a-zA-Z]", name)):
        return None
    kind = ("[" if "e" in from_low else "(") + ("]" if "e" in to_high else ")")
    return Value(kind, (_parse(low, depth + 1), _parse(high, depth + 1)), text, name=name)


def _parse(text: str, depth: int = 0) -> Value:
    """The value that a tidy text stands for; mathematics that is not plain is of kind math, and so is nonsense."""
    if found := _number(text):
        return found
    nothing = Value("math", re.sub(r"(?<![0-9]) +| +(?![0-9])", "", text), text)
    if not text or depth > 5:
        return nothing
    if choice := _CHOICE.fullmatch(text):
        return Value("choice", choice[1])
    if option := _OPTION.fullmatch(text):
        value = _parse(option[2], depth + 1)
        return value._replace(name=f"option {option[1]}") if value.kind in ("number", "words", "math") else nothing
    if matrix := re.fullmatch(r"\\begin\{([pbB]?(?:small)?matrix)\}(.*)\\end\{\1\}", text):
        rows = [row.split("&") for row in re.split(r"\\\\(?!\s*$)", matrix[2].removesuffix("\\\\"))]
        cells = tuple(_parse(cell.strip(), depth + 1) for row in rows for cell in row)
        return Value(f"matrix {[len(row) for row in rows]}", cells, text)
    if not re.search(r"[(\[{]", text):
        text = re.sub(r"(?<![0-9,.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])", lambda m: m[0].replace(",", ""), text)
    parts = _split(text)
    if parts and (len(parts) > 1 or parts[0] != text or re.search(r"\\(?:pm|mp)(?![a-z])", text) and "=" not in text):
        return _several(text, parts, "list", depth) if len(parts) > 1 or "\\" in text else _parse(parts[0], depth + 1)
    kind, inner = ("list", text[2:-2]) if text[:2] == "\\{" and text[-2:] == "\\}" else (
        ("list", text[1:-1]) if text[0] == "{" and text[-1] == "}" else (text[0] + text[-1], text[1:-1]))
    if kind in ("list", "()", "(]", "[)", "[]") and (parts := _split(inner)):
        if len(parts) == 1 and kind in ("list", "()") and "\\pm" not in inner:
            return _parse(parts[0], depth + 1)      # brackets around one value say nothing
        if len(parts) > 1 or kind == "list":
            return _several(text, parts, kind, depth)
    if named := _NAME.fullmatch(text):
        values = [_parse(part.strip(), depth + 1) for part in named[2].split("=")]
        if all(_same(values[0], value, _undecided) for value in values[1:]):    # x = 3/2 = 1.5
            return values[0]._replace(name=re.sub(r'[" {}]', "", named[1]))
    if "<" in text or ">" in text or "\\le" in text or "\\ge" in text:
        return _interval(text, depth) or nothing
    if re.fullmatch(r"""[A-Za-z"' .-]*[A-Za-z]{3}[A-Za-z"' .-]*|"[A-Za-z .]+"|no""", text, re.IGNORECASE):
        words = " ".join(text.replace('"', " ").lower().split())
        number = _NUMERALS.index(words) if words in _NUMERALS else None
        return Value("words", words) if number is None else Value("number", Fraction(number), str(number))
    tail = re.search(r'(?:%|°|"[^"]*"(?:\s*\^[23])?|\s[A-Za-z][A-Za-z ]+(?:\^[23])?)$', text)
    if tail and tail.start() and (unit := _unit(text[tail.start():])) and ('"' in tail[0] or _known(unit)):
        value = _parse(text[:tail.start()].strip(), depth + 1)
        return value._replace(unit=unit) if value.kind in ("number", "math") and not value.unit else nothing
    return nothing


@functools.lru_cache(1 << 14)       # a gold is read once for all of its responses
def _read(text: str) -> Value:
    return _parse(_tidy(text))


# ---- two values

Ask = Callable[[str, str], bool | None]     # of two expressions, the gold first: are they equal?


def _undecided(gold: str, answer: str) -> None:
    return None


def _equal_numbers(gold: Value, answer: Value) -> bool:
    """'%' is a unit that one side may lack; and for a gold without it 50% is also 1/2. (For a gold of 0.5 it is only
    that: 0.5% would be the likely mistake.) A gold of 50% is not 0.5, which means half a per cent."""
    if answer.unit == "%" != gold.unit:
        return answer.body / 100 == gold.body or answer.body == gold.body and not 0 < abs(gold.body) < 1
    return answer.body == gold.body


def _same(gold: Value, answer: Value, ask: Ask) -> bool | None:
    """True, False, or None where neither plain rules nor `ask` can tell."""
    kinds, phrase = (gold.kind, answer.kind), any(v.kind == "words" and " " in v.body for v in (gold, answer))
    if "choice" in kinds:
        letters = [v.body if v.kind == "choice" else v.name[7:] if v.name.startswith("option ") else "" for v in
                   (gold, answer)]
        return letters[0] == letters[1]
    if gold.name.startswith("option ") and answer.name.startswith("option ") and gold.name != answer.name:
        return False
    if gold.name and answer.name and gold.name != answer.name:     # y = 5 for x = 5; y + 1 = 6 is another matter
        if len(gold.name) == len(answer.name) == 1:
            return False
        return False if _same(gold._replace(name=""), answer._replace(name=""), ask) is False else None
    several = [isinstance(value.body, tuple) for value in (gold, answer)]
    if all(several):
        return _same_several(gold, answer, ask)
    if any(several):    # 3 or 4 for 3: no hedging. What may be another wording of one thing stays open
        open_ = phrase or several[0] and answer.kind == "math" or answer.kind != "list" and "math" in kinds
        return None if open_ else False
    if "words" in kinds:
        if kinds[0] == kinds[1] and gold.body == answer.body:
            return True
        return None if phrase or "math" in kinds else False
    agree = _units_agree(gold.unit, answer.unit)
    if kinds == ("number", "number"):
        equal = _equal_numbers(gold, answer)
    elif "=" in gold.text or "=" in answer.text:        # an equation; a named value is one, too
        whole = [f"{v.name}={v.text}" if v.name else v.text for v in (gold, answer)]
        equal = gold.body == answer.body or ask(*whole)
    else:
        equal = gold.body == answer.body or (ask(gold.text, answer.text) if agree is not False else None)
    return False if equal is False or agree is False else None if equal is None else agree


def _same_several(gold: Value, answer: Value, ask: Ask) -> bool | None:
    if gold.kind != answer.kind:        # (1, 2) against [1, 2] or {1, 2}; a bare list may have lost its brackets
        bare = any(v.kind == "list" and v.text[:1] not in "\\{" for v in (gold, answer))
        return None if bare or "matrix" in gold.kind + answer.kind else False
    if len(gold.body) != len(answer.body):
        return False
    names = [len({value.name for value in side.body}) for side in (gold, answer)]
    if gold.kind != "list" or max(names) > 1 and min(names) == 1:      # x = 1, y = 2 against 1, 2: in their order
        verdicts = [_same(g, a, ask) for g, a in zip(gold.body, answer.body)]
        return False if False in verdicts else None if None in verdicts else True
    left, doubt = list(answer.body), False
    for item in gold.body:              # equality is transitive, so the first match is as good as any
        for judge in (_undecided, ask):
            verdicts = [_same(item, other, judge) for other in left]
            if True in verdicts:
                del left[verdicts.index(True)]
                break
        else:
            if None not in verdicts:
                return False
            doubt = True
    return None if doubt else True


def equal(gold: str, answer: str) -> bool | None:
    """By plain rules alone, exact and fast; None where they cannot tell."""
    return _compare(gold, answer, _undecided)


def _compare(gold: str, answer: str, ask: Ask) -> bool | None:
    if len(answer) > MAX_ANSWER or "?" in answer and "?" not in gold:      # '5?' is a guess
        return False
    if gold.strip() == answer.strip():
        return bool(gold.strip())
    return _same(_read(gold), _read(answer), ask) if len(gold) <= MAX_ANSWER else None


class Verifier(symbolic.Pool):
    """The rules, and behind them math-verify in a pool of processes."""

    def verify(self, gold: str, answer: str) -> bool | None:
        """Whether the answer is right; None where one of the two cannot be read. Raises symbolic.Failed."""
        try:
            return _compare(gold, answer, self.ask)
        except TimeoutError:
            return False


@functools.cache
def _shared(process: int) -> Verifier:
    verifier = Verifier()
    atexit.register(verifier.close)
    return verifier


def shared() -> Verifier:
    """The verifier of this process; a fork gets one of its own."""
    return _shared(os.getpid())


def decide(gold: str, answer: str) -> bool | None:
    """Whether the answer is right by rules and math-verify; None where neither can read one of the two. Failed."""
    return shared().verify(gold, answer)


def reward(gold: str, response: str, judge: Callable[[str, str], bool | None] | None = None) -> float | None:
    """1.0 for a right final answer, 0.0 for a wrong one or none, None where the judge itself failed.

    `judge(gold, answer)` is asked about what may be another wording; without one it is wrong.
    """
    answer = final_answer(response)
    if answer is None:
        return 0.0
    try:
        verdict = decide(gold, answer)
    except symbolic.Failed:
        return None
    if verdict is None:
        verdict = judge(gold, answer) if judge else False
    return None if verdict is None else float(verdict)


def check_golds(golds: Iterable[str]) -> list[int]:
    """Indices of the golds that cannot be read, which no answer but a copy would equal."""
    golds, workers = list(golds), min(8, os.cpu_count() or 1)
    unique = list(dict.fromkeys(golds))
    with Verifier(workers) as verifier, ThreadPoolExecutor(workers) as pool:
        readable = dict(zip(unique, pool.map(functools.partial(_gold_reads, verifier), unique)))
    return [i for i, gold in enumerate(golds) if not readable[gold]]


def _gold_reads(verifier: Verifier, gold: str) -> bool:
    def reads(value: Value) -> bool:
        if isinstance(value.body, tuple):
            return all(map(reads, value.body))
        if value.kind == "words":
            return len(value.body.split()) <= MAX_WORDS
        return value.kind != "math" or bool(verifier.ask(value.text, value.text))

    try:
        return len(gold) <= MAX_ANSWER and reads(_read(gold))
    except TimeoutError:
        return False
