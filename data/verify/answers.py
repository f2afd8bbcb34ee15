"""Is the final answer to a mathematics problem right?

`final_answer` finds what a response offers. `equal` compares plain answers (numbers, units,
choices, words, lists, tuples, matrices) by exact arithmetic. Single expressions that it leaves
undecided, `\\frac{\\pi}{2}` against `\\pi/2`, go to math-verify 0.9.0 in a process of its own,
which may take long or die. `reward` is all of it.

A policy finds every wrong answer that passes, so doubt means wrong, and math-verify is held short:
it never sees text (to it 'east' is 'seat', a product of letters), units (it drops them), decimals
(it rounds them), lists, tuples or intervals (it mixes them up), nor looks for the answer in the
text (it takes part of what it cannot read).
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

from data.chat.template import after_thoughts
from data.tasks.problem import OpenAnswer
from data.verify import symbolic
from data.verify.symbolic import FUNCTIONS

MAX_ANSWER = 1000       # characters of an answer; a longer one is none
MAX_WORDS = 6           # of a gold in words; a longer one has too many wordings
MAX_EXPONENT = 999      # of 10: 1e999999999 is never written out
MAX_DEPTH = 5           # of values inside of values


# ---- what a response offers

def final_answer(response: str) -> str | None:
    """The last box; without one the last '#### x' line (GSM8K); else what follows 'answer is'.

    Of 'answer is' or 'Answer:' the last, too. None for no answer: also thoughts that never end, a
    last box that never ends, more than MAX_ANSWER characters.
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
    """What the last \\boxed{...} or \\fbox{...} holds, or stands behind it as in `\\boxed 5`.

    None if there is none, or it never ends.
    """
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    body = re.sub(r"^\\(?:boxed|fbox)\s*", "", text[start:start + MAX_ANSWER + 99])
    if not body.startswith("{"):
        line = re.match(r"[^$\n]*", body)[0]
        return line.strip().rstrip(".") or None
    depth = 0
    for mark in re.finditer(r"\\.|[{}]", body, re.DOTALL):  # an escaped brace is content
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return body[1:mark.start()].strip() or None
    return None


def _stated(text: str) -> str | None:
    """The rest of the sentence or line after the last 'answer is', 'Answer:' and the like.

    A decimal point ends no sentence.
    """
    last = None
    for match in re.finditer(r"\banswer[*_\s]*(?:is\b|[:=])", text, re.IGNORECASE):
        last = match
    if last is None:
        return None
    rest = text[last.end():last.end() + MAX_ANSWER + 99].lstrip("*_: \t\r\n")
    return re.split(r"\n|\.(?=[\s*_]|$)", rest, maxsplit=1)[0].rstrip("*_ \t\r")


# ---- one spelling: what LaTeX and plain text write in many ways.
# Words of \text stand in double quotes from here on.

_UNICODE = str.maketrans({
    "−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "/", "π": "\\pi ",
    "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ", "²": "^2", "³": "^3", "∪": "\\cup ", "±": "\\pm ",
    "“": " ", "”": " ", "’": "'",
})


def _quote_words(match: re.Match) -> str:
    """The content of \\text{...}: quoted where it is words, else as if it stood bare.

    Bare are `\\text{(C)}` and `\\mathbf{5}`.
    """
    if re.fullmatch(r"[A-Za-z .'/-]+", match[1]):
        return f' "{match[1].strip()}" '
    return f" {match[1]} "


def _fraction(match: re.Match) -> str:
    numerator, denominator = [part.strip("{}").strip() for part in match.groups()]
    return f"\\frac{{{numerator}}}{{{denominator}}}"


def _root(match: re.Match) -> str:
    content = next(part for part in match.groups() if part is not None)
    return f"\\sqrt{{{content}}}"


def _factorial(match: re.Match) -> str:
    return str(math.factorial(int(match[1])))


_SPELLINGS = (      # a pattern and what takes its place, one after the other
    (r"\\(?:text(?:bf|it|rm|sf|normal)?|mbox|hbox|mathrm|operatorname)\s*\{([^{}]*)\}",
     _quote_words),
    (r"\\(?:mathbf|mathit|mathsf|bold|displaystyle)(?![A-Za-z])", ""),
    (r"(?<=[0-9])(?:\{,\}|,?\\!|\\,)\s*(?=[0-9]{3}(?![0-9]))", ""),     # 1{,}000  1,\!000  1\,000
    (r"(?<!\\)\\!\s*", ""),
    (r"(?<!\\)\\[,;:> ]|\\q?quad(?![A-Za-z])|~", " "),
    (r"(?<!\\)\\[()\[\]]", " "),                                        # \( \) \[ \] as $
    (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])", ""),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\frac\s*(\{[^{}]*\}|[0-9A-Za-z])\s*(\{[^{}]*\}|[0-9A-Za-z])",   # \frac12  \frac 5 {9}
     _fraction),
    (r"\\sqrt\s*([0-9A-Za-z])", r"\\sqrt{\1}"),
    (r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)|√\s*\(([^()]*)\)|√\s*([0-9]+|[A-Za-z])", _root),
    (rf"(?<![\\A-Za-z])({'|'.join(FUNCTIONS)})(?![A-Za-z])", r"\\\1"),  # 2pi  sin x
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])", "°"),
    (r"\\%", "%"),
    (r"\\(?:leqslant|leq|le)(?![A-Za-z])|<=", r"\\le "),
    (r"\\(?:geqslant|geq|ge)(?![A-Za-z])|>=", r"\\ge "),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\*\*", "^"),
    (r"\\(?:times|cdot)(?![A-Za-z])|\*", r"\\cdot "),
    (r"\^\s*\(([^()]*)\)", r"^{\1}"),                                   # 2^(10)
    (r"\^\s*(-?[0-9]{2,}|-[A-Za-z0-9])", r"^{\1}"),                     # 2^10  x^-1
    (r"([_^])\s*\{\s*([0-9A-Za-z])\s*\}", r"\1\2"),
    (r"(?<![0-9.^])([12]?[0-9])!(?![!0-9])", _factorial),
)
_RULES = [(re.compile(pattern), replacement) for pattern, replacement in _SPELLINGS]


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

_SPELLINGS_OF_UNITS = {
    "%": "% percent percentage pct",
    "degree": "° degree deg",
    "radian": "radian rad",
    "dollar": "¤ $ dollar usd buck",
    "cent": "¢ cent",
    "euro": "€ euro eur",
    "yen": "¥ yen",
    "rupee": "₹ rupee",
    "pound": "£ pound lb",      # money or weight
    "mm": "mm millimeter millimetre",
    "cm": "cm centimeter centimetre",
    "m": "m meter metre",
    "in": "in inch inche",
    "km": "km kilometer kilometre",
    "ft": "ft foot feet",
    "yd": "yd yard",
    "mi": "mi mile",
    "mg": "mg milligram",
    "g": "g gram",
    "kg": "kg kilogram",
    "oz": "oz ounce",
    "ton": "ton tonne",
    "ml": "ml milliliter millilitre",
    "l": "l liter litre",
    "gallon": "gallon gal",
    "s": "s second sec",
    "min": "min minute",
    "h": "h hour hr",
    "day": "day",
    "week": "week",
    "month": "month",
    "year": "year yr",
    "mi/h": "mph",
    "km/h": "kph kmh",
    "unit": "unit",
}
_UNITS = {spelling: unit for unit, spellings in _SPELLINGS_OF_UNITS.items()
          for spelling in spellings.split()}
_KNOWN = set(_UNITS.values()) | {""}
# What may follow a number and change its value, or be another one: then it is no unit, and the text
# no plain number.
_NOT_UNIT = re.compile(rf"""
    (?:hundred|dozen|score|gross|grand|lakh|crore|pair|couple|double|half|halve|third|quarter|
    zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|time|plus|minus|over|mod|
    modulo|root|radical|factorial|power|choose|inverse|multiplied|divided|negative|less|more|fewer|
    than|not|and|or|to|except|unless|versus|above|below|base|squared|cubed|alpha|beta|gamma|delta|
    epsilon|zeta|eta|theta|kappa|lambda|rho|sigma|tau|phi|chi|psi|omega|infinity|infinite|cosine|
    sine|tangent|{'|'.join(FUNCTIONS)})s?|
    .*(?:th|teen|ty|illion)s?""", re.VERBOSE)
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


def _unit(text: str) -> str | None:
    """The unit that a tail is, in one spelling; None for what is no unit.

    As 'cm^2', 'mi/h', 'duck egg', 'base 8', or '' for no tail.
    """
    base = re.fullmatch(r"_\{?([0-9]{1,2})\}?", text)
    if base:
        return f"base {base[1]}"
    spaced = re.sub(r"([/^°%])", r" \1", text.replace('"', " ").lower()).replace("/", "/ ")
    parts = []
    power = per = ""
    for word in spaced.split():
        word = word.rstrip(".")
        if word in ("^2", "^3", "squared", "cubed") and parts:
            parts[-1] += {"squared": "^2", "cubed": "^3"}.get(word, word)
        elif word in ("square", "sq", "cubic", "cu"):
            power = "^2" if word[0] == "s" else "^3"
        elif word in ("per", "/"):
            per = "/"
        else:
            unit = _unit_of_word(word, text)
            if unit is None:
                return None
            parts.append(per + unit + power)
            power = per = ""
    if power or per:
        return None
    return " ".join(parts).replace(" /", "/")


def _unit_of_word(word: str, text: str) -> str | None:
    """A unit that we know, or a noun that may be one; None for what is neither. text: all of it."""
    stem = word[:-1] if len(word) > 2 and word.endswith("s") else word
    unit = _UNITS.get(word) or _UNITS.get(stem)
    if unit:        # a single letter is one only where it is set as text
        is_bare_letter = len(word) == 1 and word.isalpha() and '"' not in text
        return None if is_bare_letter else unit
    stands_apart = text[:1] in ' "'     # 'ab' in 5ab is no unit
    is_noun = len(word) > 2 and word.isascii() and word.isalpha() and not _NOT_UNIT.fullmatch(word)
    return stem if stands_apart and is_noun else None


def _units_agree(gold: str, answer: str) -> bool | None:
    """A unit that one side lacks is forgiven.

    But a base on the answer's side alone, 42_8 for 42, is another number.
    """
    if not answer or gold == answer:
        return True
    if not gold:
        return answer == "base 10" or not answer.startswith("base")
    return False if _is_known(gold) and _is_known(answer) else None     # 'egg' and 'duck egg'


def _is_known(unit: str) -> bool:
    return set(re.split(r"\^.|/| ", unit)) <= _KNOWN or unit.startswith("base")


# ---- a text to a value

class Value(NamedTuple):
    # number, choice, words, math; or of several: list, '()' '(]' '[)' '[]', 'matrix' and its shape
    kind: str
    # Fraction, letter, lower-case words, expression without spaces; or the Values
    body: object
    text: str = ""      # a single value as mathematics
    unit: str = ""
    name: str = ""      # of what is equal to it: 'x'; 'option B'


_DECIMAL = r"(?:[0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(rf"""
    (?P<sign>[-+]?)\s*(?P<currency>[¤€£¥₹]?)\s*(?P<sign_after>[-+]?)\s*
    (?:
    (?:(?P<whole>[0-9]+)\s*)?
        \\frac\{{(?P<top>[-+]?{_DECIMAL})\}}\{{(?P<bottom>[-+]?{_DECIMAL})\}} |
    (?:(?P<plain_whole>[0-9]+)\s+)?(?P<plain_top>{_DECIMAL})\s*/\s*(?P<plain_bottom>{_DECIMAL}) |
    (?P<decimal>{_DECIMAL})
        (?:[eE](?P<e>[-+]?[0-9]+)|\s*\\cdot\s*10\s*\^\s*\{{?(?P<power_of_10>[-+]?[0-9]+)\}}?)?
    )""", re.VERBOSE)
_SCALE = re.compile(r'[\s"]+(thousand|million|billion|trillion)(?![A-Za-z])')
_CHOICE = re.compile(r'[("]*([A-J])[)"]*')
# '(C) 5' is option C; '(C) or 5', '(C), 5', '(C)+1' and '(C) maybe D' are not
_OPTION = re.compile(r"""
    [("]*([A-J])"?(?:\)"?|[.:](?=\s))(?:\s*(?=[\w$\\"({.])|\s+(?=-))
    ((?!(?:or|and|not)\b)(?:(?!(?<![A-Za-z\\])[A-J](?![A-Za-z])).)+)""", re.VERBOSE)
_MATRIX = re.compile(r"\\begin\{([pbB]?(?:small)?matrix)\}(.*)\\end\{\1\}")
_THOUSANDS = re.compile(r"(?<![0-9,.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
_SEPARATOR = re.compile(r"""([(\[{])|([)\]}])|[,;]|\\cup(?![a-z])|"?\b(?:and|or)\b"?""")
_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![a-z])")
_NAME = re.compile(r"""
    ([A-Za-z"\\][A-Za-z" ]{0,30}(?:_\{?[A-Za-z0-9]{1,5}\}?)?'?(?:\([A-Za-z]\))?)
    \s*(?:=|\\in(?![a-z]))\s*(.+)""", re.VERBOSE)
_WORDS = re.compile(r"""[A-Za-z"' .-]*[A-Za-z]{3}[A-Za-z"' .-]*|"[A-Za-z .]+"|no""", re.IGNORECASE)
_TAIL = re.compile(r'(?:%|°|"[^"]*"(?:\s*\^[23])?|\s[A-Za-z][A-Za-z ]+(?:\^[23])?)$')
_NUMERALS = "zero one two three four five six seven eight nine ten eleven twelve".split()


@functools.lru_cache(1 << 14)       # a gold is read once for all of its responses
def _read(text: str) -> Value:
    return _parse(_tidy(text))


def _parse(text: str, depth: int = 0) -> Value:
    """The value that a tidy text stands for.

    By the first rule whose form it has. Mathematics that is not plain is of kind math, and so is
    nonsense. depth: of how many values this is a part.
    """
    number = _number(text)
    if number:
        return number
    expression = Value("math", re.sub(r"(?<![0-9]) +| +(?![0-9])", "", text), text)
    if not text or depth > MAX_DEPTH:
        return expression
    for rule in (_choice, _option, _matrix):
        value = rule(text, depth, expression)
        if value:
            return value
    if not re.search(r"[(\[{]", text):
        text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    for rule in (_separated, _bracketed, _named, _related, _plain_words, _with_unit):
        value = rule(text, depth, expression)
        if value:
            return value
    return expression


# The rules: each returns the value of a text of its form, None for another text, and `otherwise`
# for one that has the form alone.

def _choice(text: str, depth: int, otherwise: Value) -> Value | None:
    """(B)"""
    match = _CHOICE.fullmatch(text)
    return Value("choice", match[1]) if match else None


def _option(text: str, depth: int, otherwise: Value) -> Value | None:
    """(B) 5"""
    match = _OPTION.fullmatch(text)
    if not match:
        return None
    value = _parse(match[2], depth + 1)
    if value.kind not in ("number", "words", "math"):
        return otherwise
    return value._replace(name=f"option {match[1]}")


def _matrix(text: str, depth: int, otherwise: Value) -> Value | None:
    match = _MATRIX.fullmatch(text)
    if not match:
        return None
    lines = re.split(r"\\\\(?!\s*$)", match[2].removesuffix("\\\\"))
    rows = [line.split("&") for line in lines]
    cells = tuple(_parse(cell.strip(), depth + 1) for row in rows for cell in row)
    widths = [len(row) for row in rows]
    return Value(f"matrix {widths}", cells, text)


def _separated(text: str, depth: int, otherwise: Value) -> Value | None:
    """1, 2 and 3; 1 \\pm 2"""
    parts = _split(text)
    if not parts:
        return None
    if len(parts) > 1:
        return _several(text, parts, "list", depth)
    has_two_signs = _PLUS_MINUS.search(text) and "=" not in text
    if parts[0] == text and not has_two_signs:
        return None
    return _several(text, parts, "list", depth) if "\\" in text else _parse(parts[0], depth + 1)


def _bracketed(text: str, depth: int, otherwise: Value) -> Value | None:
    """(1, 2); \\{1, 2\\}; [1, 2)"""
    if text[:2] == "\\{" and text[-2:] == "\\}":
        kind, inner = "list", text[2:-2]
    elif text[0] == "{" and text[-1] == "}":
        kind, inner = "list", text[1:-1]
    else:
        kind, inner = text[0] + text[-1], text[1:-1]
    if kind not in ("list", "()", "(]", "[)", "[]"):
        return None
    parts = _split(inner)
    if not parts:
        return None
    if len(parts) == 1 and kind in ("list", "()") and "\\pm" not in inner:
        return _parse(parts[0], depth + 1)      # brackets around one value say nothing
    if len(parts) > 1 or kind == "list":
        return _several(text, parts, kind, depth)
    return None


def _named(text: str, depth: int, otherwise: Value) -> Value | None:
    """x = 5; x = 3/2 = 1.5"""
    match = _NAME.fullmatch(text)
    if not match:
        return None
    first, *others = [_parse(part.strip(), depth + 1) for part in match[2].split("=")]
    if all(_same(first, other, _undecided) for other in others):
        return first._replace(name=re.sub(r'[" {}]', "", match[1]))
    return None


def _related(text: str, depth: int, otherwise: Value) -> Value | None:
    """x > 3; 1 < x \\le 2"""
    if not any(relation in text for relation in ("<", ">", "\\le", "\\ge")):
        return None
    return _interval(text, depth) or otherwise


def _plain_words(text: str, depth: int, otherwise: Value) -> Value | None:
    """east; five"""
    if not _WORDS.fullmatch(text):
        return None
    words = " ".join(text.replace('"', " ").lower().split())
    if words not in _NUMERALS:
        return Value("words", words)
    number = _NUMERALS.index(words)
    return Value("number", Fraction(number), str(number))


def _with_unit(text: str, depth: int, otherwise: Value) -> Value | None:
    """288\\pi "cm"^3"""
    tail = _TAIL.search(text)
    if not tail or not tail.start():
        return None
    unit = _unit(text[tail.start():])
    if not unit or not ('"' in tail[0] or _is_known(unit)):
        return None
    value = _parse(text[:tail.start()].strip(), depth + 1)
    if value.kind not in ("number", "math") or value.unit:
        return otherwise
    return value._replace(unit=unit)


# What the rules rest on

def _number(text: str) -> Value | None:
    """A number and at most a unit; None for all else."""
    match = _NUMBER.match(text)
    if not match:
        return None
    groups = match.groupdict(default="")
    sign, sign_after, symbol = groups["sign"], groups["sign_after"], groups["currency"]
    rest = text[match.end():]
    scale = 1
    scale_word = _SCALE.match(rest)
    if scale_word:
        rest = rest[scale_word.end():].removeprefix('"')
        scale = _SCALES[scale_word[1]]
    unit = _unit(rest)
    if unit is None or (sign and sign_after):
        return None
    plain = text[:match.end()].replace(",", "")
    if symbol:
        currency = _UNITS[symbol]
        if unit not in ("", currency) and not unit.startswith("/"):
            return None
        if unit != currency:
            unit = currency + unit
        plain = plain.replace(symbol, "")

    value = _scientific(groups) if groups["decimal"] else _mixed(groups)
    if value is None:
        return None
    value *= -scale if "-" in (sign, sign_after) else scale
    return Value("number", value, plain if scale == 1 else str(value), unit)


def _scientific(groups: dict[str, str]) -> Fraction | None:
    """A decimal number, maybe times a power of ten; None if that is too large."""
    exponent = groups["e"] or groups["power_of_10"] or "0"
    value = _decimal(groups["decimal"])
    if value is None or len(exponent) > 9 or abs(int(exponent)) > MAX_EXPONENT:
        return None
    return value * Fraction(10) ** int(exponent)


def _mixed(groups: dict[str, str]) -> Fraction | None:
    """A fraction, maybe with a whole number before it."""
    top = _decimal(groups["top"] or groups["plain_top"])
    bottom = _decimal(groups["bottom"] or groups["plain_bottom"])
    if top is None or not bottom:
        return None
    value = top / bottom
    whole = groups["whole"] or groups["plain_whole"]
    if not whole:
        return value
    if not 0 <= value < 1:      # 2 3/2: a mixed number or a product?
        return None
    return value + int(whole)


def _decimal(text: str) -> Fraction | None:
    """None where commas are not those of thousands."""
    whole = text.lstrip("+-").partition(".")[0]
    if "," in whole and not re.fullmatch(r"[0-9]{1,3}(?:,[0-9]{3})+", whole):
        return None
    return Fraction(text.replace(",", ""))


def _split(text: str) -> list[str] | None:
    """The parts between commas, 'and', 'or' and unions that stand in no brackets.

    None where brackets do not match.
    """
    depth = start = 0
    parts = []
    for mark in _SEPARATOR.finditer(text):
        opens, closes = mark.groups()
        if opens:
            depth += 1
        if closes:
            depth -= 1
        if depth < 0:
            return None
        if depth == 0 and not closes:
            parts.append(text[start:mark.start()])
            start = mark.end()
    if depth:
        return None
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def _several(text: str, parts: list[str], kind: str, depth: int) -> Value:
    """The values of the parts; 1 \\pm 2 is two of them."""
    values = []
    for part in parts:
        for one in _both_signs(part):
            values.append(_parse(one.removeprefix("+").strip(), depth + 1))
    return Value(kind, tuple(values), text)


def _both_signs(part: str) -> list[str]:
    """1 + 2 and 1 - 2 of 1 \\pm 2; else the part alone."""
    upper = {"\\pm": "+", "\\mp": "-"}
    lower = {"\\pm": "-", "\\mp": "+"}
    signs = r"\\[pm][pm](?![a-z])"
    first = re.sub(signs, lambda sign: upper[sign[0]], part)
    if not _PLUS_MINUS.search(part):
        return [first]
    return [first, re.sub(signs, lambda sign: lower[sign[0]], part)]


def _interval(text: str, depth: int) -> Value | None:
    """x > 3 and 1 < x \\le 2 as intervals; None for all else."""
    parts = [part.strip() for part in re.split(r"(\\le|\\ge|<|>)(?![a-z])", text)]
    if len(parts) == 3:
        low, from_low, name, to_high, high = _ray(*parts)
    elif len(parts) != 5:
        return None
    elif {parts[1], parts[3]} <= {"<", "\\le"}:
        low, from_low, name, to_high, high = parts
    elif {parts[1], parts[3]} <= {">", "\\ge"}:
        high, to_high, name, from_low, low = parts
    else:
        return None
    if not (low and high and re.fullmatch("[a-zA-Z]", name)):
        return None
    opening = "[" if "e" in from_low else "("       # of \le or \ge
    closing = "]" if "e" in to_high else ")"
    ends = (_parse(low, depth + 1), _parse(high, depth + 1))
    return Value(opening + closing, ends, text, name=name)


def _ray(left: str, relation: str, right: str) -> tuple[str, str, str, str, str]:
    """x > 3 as 3 < x < \\infty: low end, relation, name, relation, high end."""
    if re.fullmatch("[a-zA-Z]", right):     # 3 < x
        left, right = right, left
        relation = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}[relation]
    if relation in (">", "\\ge"):
        return right, relation, left, "<", "\\infty"
    return "-\\infty", "<", left, relation, right


# ---- two values

Ask = Callable[[str, str], bool | None]     # of two expressions, the gold first: are they equal?


def _undecided(gold: str, answer: str) -> None:
    return None


def _same(gold: Value, answer: Value, ask: Ask) -> bool | None:
    """True, False, or None where neither plain rules nor `ask` can tell."""
    if "choice" in (gold.kind, answer.kind):
        return _letter(gold) == _letter(answer)
    if gold.name and answer.name and gold.name != answer.name:
        return _same_by_other_name(gold, answer, ask)
    gold_is_several = isinstance(gold.body, tuple)
    answer_is_several = isinstance(answer.body, tuple)
    if gold_is_several and answer_is_several:
        return _same_several(gold, answer, ask)
    if gold_is_several or answer_is_several:
        return _one_for_several(gold, answer)
    if "words" in (gold.kind, answer.kind):
        return _same_words(gold, answer)
    return _same_mathematics(gold, answer, ask)


def _letter(value: Value) -> str:
    """Of a choice or an option."""
    if value.kind == "choice":
        return value.body
    return value.name.removeprefix("option ") if value.name.startswith("option ") else ""


def _is_phrase(value: Value) -> bool:
    return value.kind == "words" and " " in value.body


def _same_by_other_name(gold: Value, answer: Value, ask: Ask) -> bool | None:
    """y = 5 for x = 5 is False; y + 1 = 6 is another matter."""
    if gold.name.startswith("option ") and answer.name.startswith("option "):
        return False
    if len(gold.name) == len(answer.name) == 1:
        return False
    without_names = _same(gold._replace(name=""), answer._replace(name=""), ask)
    return False if without_names is False else None


def _one_for_several(gold: Value, answer: Value) -> bool | None:
    """3 or 4 for 3: no hedging. What may be another wording of one thing stays open."""
    if _is_phrase(gold) or _is_phrase(answer):
        return None
    gold_is_several = isinstance(gold.body, tuple)
    if gold_is_several and answer.kind == "math":
        return None
    if answer.kind != "list" and "math" in (gold.kind, answer.kind):
        return None
    return False


def _same_words(gold: Value, answer: Value) -> bool | None:
    if gold.kind == answer.kind and gold.body == answer.body:
        return True
    is_open = _is_phrase(gold) or _is_phrase(answer) or "math" in (gold.kind, answer.kind)
    return None if is_open else False


def _same_mathematics(gold: Value, answer: Value, ask: Ask) -> bool | None:
    """Two single values with their units."""
    agree = _units_agree(gold.unit, answer.unit)
    if gold.kind == answer.kind == "number":
        equal = _equal_numbers(gold, answer)
    elif "=" in gold.text or "=" in answer.text:
        equal = gold.body == answer.body or ask(_equation(gold), _equation(answer))
    elif gold.body == answer.body:
        equal = True
    else:
        equal = ask(gold.text, answer.text) if agree is not False else None
    if equal is False or agree is False:
        return False
    return None if equal is None else agree


def _equation(value: Value) -> str:
    """A named value is an equation, too."""
    return f"{value.name}={value.text}" if value.name else value.text


def _equal_numbers(gold: Value, answer: Value) -> bool:
    """'%' is a unit that one side may lack; and for a gold without it 50% is also 1/2.

    For a gold of 0.5 it is only that: 0.5% would be the likely mistake. A gold of 50% is not 0.5,
    which means half a per cent.
    """
    if answer.unit == "%" != gold.unit:
        if answer.body / 100 == gold.body:
            return True
        return answer.body == gold.body and not 0 < abs(gold.body) < 1
    return answer.body == gold.body


def _same_several(gold: Value, answer: Value, ask: Ask) -> bool | None:
    if gold.kind != answer.kind:        # (1, 2) against [1, 2] or {1, 2}
        is_open = _is_bare_list(gold) or _is_bare_list(answer)
        return None if is_open or "matrix" in gold.kind + answer.kind else False
    if len(gold.body) != len(answer.body):
        return False
    if gold.kind != "list" or _only_one_has_names(gold, answer):
        return _same_in_order(gold, answer, ask)

    rest = list(answer.body)
    in_doubt = False
    for item in gold.body:      # equality is transitive, so the first match is as good as any
        verdicts = _compare_each(item, rest, ask)
        if True in verdicts:
            del rest[verdicts.index(True)]
        elif None in verdicts:
            in_doubt = True
        else:
            return False
    return None if in_doubt else True


def _is_bare_list(value: Value) -> bool:
    """It may have lost its brackets."""
    return value.kind == "list" and value.text[:1] not in "\\{"


def _only_one_has_names(gold: Value, answer: Value) -> bool:
    """x = 1, y = 2 against 1, 2: these are compared in their order."""
    gold_names = {value.name for value in gold.body}
    answer_names = {value.name for value in answer.body}
    fewer, more = sorted([len(gold_names), len(answer_names)])
    return more > 1 and fewer == 1


def _same_in_order(gold: Value, answer: Value, ask: Ask) -> bool | None:
    verdicts = [_same(one, other, ask) for one, other in zip(gold.body, answer.body)]
    if False in verdicts:
        return False
    return None if None in verdicts else True


def _compare_each(item: Value, others: list[Value], ask: Ask) -> list[bool | None]:
    """Whether each of the others is the item; `ask` only where plain rules find none that is."""
    verdicts = [_same(item, other, _undecided) for other in others]
    if True in verdicts:
        return verdicts
    return [_same(item, other, ask) for other in others]


def equal(gold: str, answer: str) -> bool | None:
    """By plain rules alone, exact and fast; None where they cannot tell."""
    return _compare(gold, answer, _undecided)


def _compare(gold: str, answer: str, ask: Ask) -> bool | None:
    if len(answer) > MAX_ANSWER:
        return False
    if "?" in answer and "?" not in gold:      # '5?' is a guess
        return False
    if gold.strip() == answer.strip():
        return bool(gold.strip())
    if len(gold) > MAX_ANSWER:
        return None
    return _same(_read(gold), _read(answer), ask)


# ---- rewards

class Verifier(symbolic.Pool):
    """The rules, and behind them math-verify in a pool of processes."""

    def verify(self, gold: str, answer: str) -> bool | None:
        """Whether the answer is right; None where one of the two cannot be read.

        Raises symbolic.Failed.
        """
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
    """Whether the answer is right, by rules and math-verify.

    None where neither can read one of the two. Raises symbolic.Failed.
    """
    return shared().verify(gold, answer)


def judge(gold: str, response: str) -> float | None | OpenAnswer:
    """1.0 for a right final answer, 0.0 for a wrong one or none, None where a verifier failed.

    Or the answer itself where it may be another wording of the gold: neither rules nor math-verify
    can read one of the two. The agentic verifier (data/verify/agentic.py) is for these.
    """
    answer = final_answer(response)
    if answer is None:
        return 0.0
    try:
        verdict = decide(gold, answer)
    except symbolic.Failed:
        return None
    return OpenAnswer(gold, answer) if verdict is None else float(verdict)


def reward(gold: str, response: str) -> float | None:
    """As `judge`; what it leaves open is wrong: 0.0."""
    verdict = judge(gold, response)
    return 0.0 if isinstance(verdict, OpenAnswer) else verdict


def check_golds(golds: Iterable[str]) -> list[int]:
    """Indices of the golds that cannot be read, which no answer but a copy would equal."""
    golds = list(golds)
    unique = list(dict.fromkeys(golds))
    n_workers = min(8, os.cpu_count() or 1)
    with Verifier(n_workers) as verifier, ThreadPoolExecutor(n_workers) as pool:
        verdicts = pool.map(functools.partial(_is_readable, verifier), unique)
        readable = dict(zip(unique, verdicts))
    return [i for i, gold in enumerate(golds) if not readable[gold]]


def _is_readable(verifier: Verifier, gold: str) -> bool:
    def is_readable(value: Value) -> bool:
        if isinstance(value.body, tuple):
            return all(map(is_readable, value.body))
        if value.kind == "words":
            return len(value.body.split()) <= MAX_WORDS
        return value.kind != "math" or bool(verifier.ask(value.text, value.text))

    if len(gold) > MAX_ANSWER:
        return False
    try:
        return is_readable(_read(gold))
    except TimeoutError:
        return False
