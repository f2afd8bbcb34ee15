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
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import NamedTuple

from data.chat.template import after_thoughts
from data.tasks.problem import OpenAnswer
from data.verify import symbolic, units
from data.verify.spelling import digits_for_words, tidy

MAX_ANSWER = 1000       # characters of an answer; a longer one is none
MAX_WORDS = 6           # of a gold in words; a longer one has too many wordings
MAX_EXPONENT = 999      # of 10: 1e999999999 is never written out
MAX_DEPTH = 5           # of values inside of values


# ---- what a response offers

# The answer follows. The last of them counts.
_STATEMENT = re.compile(r"""
    \banswers?\b (?:\ (?:to|of|for)\ (?:the|this)\ (?:question|problem|exercise))?
        [*_\s]*+ (?:(?:is|are|equals|would\ be|will\ be|must\ be)\b|[:=]) |
    ^[ \t\#>*_]*+ (?:the\ )?(?:final\ |correct\ )?answer [*_ \t]*+$ |
    答案[*_\s]*+(?:应该?)?(?:是|为|选|[:=：]) | 答[:：] | 故选""",
    re.VERBOSE | re.IGNORECASE | re.MULTILINE)
# Behind ####: a number is GSM8K's mark; "3. Conclusion" and other words may be a heading.
_MARKED = re.compile(r"[*_ $£€¥]*+(?!\d+[.)] )[-+−.(\[{\\]*+\d")
# A decimal point ends no sentence, nor does that of 'Rs. 10'; an exclamation is no factorial.
_END = re.compile(r"""
    \n|[。！？]|(?<!Rs)\.(?=[\s*_]|$)|!(?=[*_]*\s*(?:[A-Z]|$))|,?\s(?:because|since)\b""",
    re.VERBOSE)
_BETWEEN_BOXES = re.compile(r"""
    (?:[\s$,;.&*/|:-]|\\[()\[\]\\,;]|\\q?quad\b|\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|[和或])*+
    (?:[A-Za-z]\s*=\s*)?""", re.VERBOSE)
_NAME_BEFORE_BOX = re.compile(r"(?<![A-Za-z\\])([A-Za-z])\s*=\s*$")


def final_answer(response: str) -> str | None:
    """The last box; without one the last '#### x' line (GSM8K); else what follows 'answer is'.

    Where no number stands behind ####, it may be a heading above what says the answer.
    Boxes with nothing but commas, 'and' or 'or' between them are one answer: `x=\\boxed{3}` and
    `y=\\boxed{5}` are 'x=3, y=5'. Of 'answer is', 'Answer:', '答案' and headings that say 'Answer'
    the last, too. None for no answer: also thoughts that never end, a last box that never ends,
    more than MAX_ANSWER characters.
    """
    text = after_thoughts(response)
    if text is None:
        return None
    if "\\boxed" in text or "\\fbox" in text:
        answer = _boxed_together(text)
    elif "####" in text:
        start = text.rfind("####") + 4
        answer = text[start:start + MAX_ANSWER + 9].lstrip("# ").partition("\n")[0]
        if not _MARKED.match(answer):
            answer = _stated(text[len(text[:start].rstrip("#")):]) or answer
    else:
        answer = _stated(text)
    answer = (answer or "").strip()
    return answer if 0 < len(answer) <= MAX_ANSWER else None


def boxed(text: str) -> str | None:
    """What the last \\boxed{...} or \\fbox{...} holds, or stands behind it as in `\\boxed 5`.

    None if there is none, or it never ends.
    """
    return _box(text, _outermost_box(text))[0]


def _last_box(text: str, end: int) -> int:
    """Where the last box before `end` starts; -1 if there is none."""
    return max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))


def _outermost_box(text: str) -> int:
    """Where the last box starts, or the one that it stands in: \\boxed{-\\boxed{5}} is no 5."""
    last = start = _last_box(text, len(text))
    before = _last_box(text, last)
    while before > last - MAX_ANSWER and before >= 0:
        if _box(text, before)[1] > last:
            start = before
        before = _last_box(text, before)
    return start


def _box(text: str, start: int) -> tuple[str | None, int]:
    """What the box that starts there holds, and where it ends. None for no box."""
    if start < 0:
        return None, -1
    command = re.compile(r"\\(?:boxed|fbox)\s*").match(text, start, start + MAX_ANSWER + 99)
    if not command:
        return None, -1
    body = text[command.end():start + MAX_ANSWER + 99]
    if not body.startswith("{"):
        line = re.match(r"[^$\n]*", body)[0]
        return line.strip().rstrip(".") or None, command.end() + len(line)
    depth = 0
    for mark in re.finditer(r"\\.|[{}]", body, re.DOTALL):  # an escaped brace is content
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            content = re.sub(r"\\(?:boxed|fbox)(?![A-Za-z])\s*", "", body[1:mark.start()])
            return content.strip() or None, command.end() + mark.end()
    return None, -1


def _boxed_together(text: str) -> str | None:
    """The last box, and those before it that only commas and the like separate from it."""
    start = _outermost_box(text)
    content, _ = _box(text, start)
    contents, named = [], []
    while content:
        name = _NAME_BEFORE_BOX.search(text[max(0, start - 9):start])
        contents.append(content)
        named.append(f"{name[1]}={content}" if name else content)
        next_start = start
        start = _last_box(text, start)
        content, end = _box(text, start)
        is_joined = 0 < end <= next_start and next_start - end < 60
        if not is_joined or not _BETWEEN_BOXES.fullmatch(text[end:next_start]):
            break
    if not named:
        return None
    if len(set(named)) == 1:  # one answer, maybe said twice: its name says nothing
        return contents[0]
    return ", ".join(reversed(named))


def _stated(text: str) -> str | None:
    """The rest of the sentence or line after the last 'answer is', 'Answer:' and the like."""
    last = None
    for match in _STATEMENT.finditer(text):
        last = match
    if last is None:
        return None
    rest = text[last.end():last.end() + MAX_ANSWER + 99].lstrip("*_:： \t\r\n")
    return _END.split(rest, maxsplit=1)[0].rstrip("*_ \t\r")


# ---- a text to a value

class Value(NamedTuple):
    # number, choice, words, time, math; or of several: list, ratio, '()' '(]' '[)' '[]', 'matrix'
    # and its shape
    kind: str
    # Fraction, letter, lower-case words, 'hours:minutes', expression without spaces; or the Values
    body: object
    text: str = ""      # a single value as mathematics
    unit: str = ""
    name: str = ""      # of what is equal to it: 'x'; 'option B'


_DECIMAL = r"(?:[0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(rf"""
    (?P<sign>[-+]?)\s*+(?P<currency>[¤€£¥₹]?)\s*+(?P<sign_after>[-+]?)\s*+
    (?:
    (?:(?P<whole>[0-9]+)\s*)?
        \\frac\{{(?P<top>[-+]?{_DECIMAL})\}}\{{(?P<bottom>[-+]?{_DECIMAL})\}} |
    (?:(?P<plain_whole>[0-9]+)\s+)?(?P<plain_top>{_DECIMAL})\s*/\s*(?P<plain_bottom>{_DECIMAL}) |
    10\s*\^\s*(?:\{{(?P<power>[-+]?[0-9]+)\}}|(?P<digit>[0-9])(?![0-9])) |
    (?P<decimal>{_DECIMAL})
        (?:[eE](?P<e>[-+]?[0-9]+)|\s*\\cdot\s*10\s*\^\s*\{{?(?P<power_of_10>[-+]?[0-9]+)\}}?)?
    )""", re.VERBOSE)
_SCALE = re.compile(r'[\s"]+(hundred|thousand|million|billion|trillion)(?![A-Za-z])|\s*([万亿])')
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
           "trillion": 10**12, "万": 10**4, "亿": 10**8}
_ORDINAL = re.compile(r'\s?"?(st|nd|rd|th)"?(?![A-Za-z])')
_CHOICE = re.compile(r'[("]*([A-J])[)"]*|\[([A-J])\]')
_SMALL_CHOICE = re.compile(r"\(?([a-j])\)?")
# '(C) 5' is option C; '(C) or 5', '(C), 5', '(C)+1', '(C) maybe d' and '(C) d' are not
_OPTION = re.compile(r"""
    (?: [("]*([A-J])"?(?:\)"?|[.:](?=\s))(?:\s*(?=[\w$\\"({.])|\s+(?=-)) | \(([a-j])\)\s+(?=[\w"]) )
    ((?:(?!(?<![A-Za-z\\])[A-J](?![A-Za-z])).)+)""", re.VERBOSE)
_HEDGE = re.compile(r"""
    ^(?:or|and|not)\b|^"?[a-j]"?$|\([a-j]\)|
    \b(?:maybe|perhaps|possibly|probably|rather|instead|but|either|neither|nor|wrong|incorrect|
    false|isn't|is\ not|unsure)\b""", re.VERBOSE | re.IGNORECASE)
_WORD = re.compile(r"[a-z]{3}", re.IGNORECASE)
_OTHER_LETTER = re.compile(r"\b[b-hj]\b")
_TIME = re.compile(r"""([0-9]{1,2})(?::([0-9]{2}))?\s*"?(?:([ap])\.?\s?m\.?|o'clock)?"?""",
                   re.VERBOSE | re.IGNORECASE)
_RATIO = re.compile(r':|(?<!\\)"?\bto\b"?')
_MATRIX = re.compile(r"\\begin\{([pbB]?(?:small)?matrix)\}(.*)\\end\{\1\}")
_THOUSANDS = re.compile(r"(?<![0-9,.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
_SEPARATOR = re.compile(r"""
    ([(\[{])|([)\]}])|[,;]\s*"?(?:and|or)\b"?|[,;]|\\cup(?![a-z])|"?\b(?:and|or)\b"?|[和或]""",
    re.VERBOSE)
_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![a-z])")
_NAME = re.compile(r"""
    ([A-Za-z"\\][A-Za-z" ]{0,30}(?:_\{?[A-Za-z0-9]{1,5}\}?)?'?(?:\([A-Za-z]\))?|
    \([A-Za-z](?:,\ ?[A-Za-z])+\)(?=\s*=\s*\())
    \s*(?:=|\\in(?![a-z]))\s*(.+)""", re.VERBOSE)
_WORDS = re.compile(r"""[A-Za-z"' .-]*[A-Za-z]{3}[A-Za-z"' .-]*|"[A-Za-z .]+"|no""", re.IGNORECASE)
_TAIL = re.compile(r'(?:%|°|"[^"]*"(?:\s*\^[23])?|\s[A-Za-z][A-Za-z ]+(?:\^[23])?)$')
_NO_SOLUTION = re.compile(
    r"(?:there (?:is|are|exists?) )?(?:no|not any) ((?:[a-z]+ )?)solutions?(?: exists?)?|"
    r"(?:the )?(?:equation|system|problem) has no ((?:[a-z]+ )?)solutions?")
_MEANING = {"no real number": "no real solution", "empty set": "\\emptyset",
            "the empty set": "\\emptyset", "dne": "does not exist", "无解": "no solution"}
_LETTER_UNIT = re.compile(
    r"([-+]?[0-9.,]+)\s+([a-zA-Z]{1,3}(?:\^[23])?(?:/[a-z]{1,3}(?:\^[23])?)?)")


@functools.lru_cache(1 << 14)       # a gold is read once for all of its responses
def _read(text: str) -> Value:
    return _parse(tidy(boxed(text) or text))


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
    for rule in (_choice, _option, _matrix, _time, _ratio):
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
    return Value("choice", match[1] or match[2]) if match else None


def _option(text: str, depth: int, otherwise: Value) -> Value | None:
    """(B) 5"""
    match = _OPTION.fullmatch(text)
    if not match:
        return None
    text_of_option = match[3]
    names_another = _WORD.search(text_of_option) and _OTHER_LETTER.search(text_of_option)
    if names_another or _HEDGE.search(text_of_option):
        return otherwise
    value = _parse(text_of_option, depth + 1)
    if value.kind not in ("number", "words", "math"):
        return otherwise
    return value._replace(name=f"option {(match[1] or match[2]).upper()}")


def _matrix(text: str, depth: int, otherwise: Value) -> Value | None:
    match = _MATRIX.fullmatch(text)
    if not match:
        return None
    lines = re.split(r"\\\\(?!\s*$)", match[2].removesuffix("\\\\"))
    rows = [line.split("&") for line in lines]
    cells = tuple(_parse(cell.strip(), depth + 1) for row in rows for cell in row)
    widths = [len(row) for row in rows]
    return Value(f"matrix {widths}", cells, text)


def _time(text: str, depth: int, otherwise: Value) -> Value | None:
    """12:30; 3 PM; 15:00, which is 3:00 PM"""
    match = _TIME.fullmatch(text)
    if not match or not (match[2] or text.strip('0123456789"')):
        return None
    hour, minute = int(match[1]), int(match[2] or 0)
    half = (match[3] or "").lower()
    if hour > (12 if half else 24) or minute > 59:
        return None
    if hour > 12 or hour == 0:
        half = "a" if hour in (0, 24) else "p"
    return Value("time", f"{(hour - 1) % 12 + 1}:{minute:02}", text, half)


def _ratio(text: str, depth: int, otherwise: Value) -> Value | None:
    """3:4; 3 to 4"""
    parts = [part.strip() for part in _RATIO.split(text)]
    if len(parts) == 1 or not all(parts):
        return None
    values = tuple(_parse(part, depth + 1) for part in parts)
    if any(value.kind not in ("number", "math") or value.name for value in values):
        return None
    return Value("ratio", values, text)


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
    """east; there are no solutions"""
    if not _WORDS.fullmatch(text) and text not in _MEANING:
        return None
    words = " ".join(text.replace('"', " ").lower().split())
    words = _NO_SOLUTION.sub(r"no \1\2solution", words) if "solution" in words else words
    words = _MEANING.get(words, words)
    return Value("math" if words.startswith("\\") else "words", words, words)


def _with_unit(text: str, depth: int, otherwise: Value) -> Value | None:
    """288\\pi "cm"^3"""
    tail = _TAIL.search(text)
    if not tail or not tail.start():
        return None
    unit = units.read(text[tail.start():])
    if not unit or not ('"' in tail[0] or units.is_known(unit)):
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
        text = digits_for_words(text)
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
        scale = _SCALES[scale_word[1] or scale_word[2]]
    ordinal = _ORDINAL.match(rest)
    if ordinal and ordinal[1] == _ordinal_ending(match[0]):
        rest = rest[ordinal.end():]
    unit = units.read(rest)
    if unit is None or (sign and sign_after):
        return None
    plain = text[:match.end()].replace(",", "")
    if symbol:
        currency = units.of_sign(symbol)
        if unit not in ("", currency) and not unit.startswith("/"):
            return None
        if unit != currency:
            unit = currency + unit
        plain = plain.replace(symbol, "")

    if groups["decimal"] or groups["power"] or groups["digit"]:
        value = _scientific(groups)
    else:
        value = _mixed(groups)
    if value is None:
        return None
    factor = -scale if "-" in (sign, sign_after) else scale
    if factor != 1:
        value *= factor
    return Value("number", value, plain if scale == 1 else str(value), unit)


def _scientific(groups: dict[str, str]) -> Fraction | None:
    """A decimal number, maybe times a power of ten; None if that is too large."""
    exponent = groups["e"] or groups["power_of_10"] or groups["power"] or groups["digit"] or "0"
    value = _decimal(groups["decimal"] or "1")
    if value is None or len(exponent) > 9 or abs(int(exponent)) > MAX_EXPONENT:
        return None
    return value * Fraction(10) ** int(exponent) if exponent != "0" else value


def _ordinal_ending(number: str) -> str:
    """'rd' of 3, 'th' of 13."""
    if not number.isdigit():
        return ""
    if number[-2:-1] == "1":
        return "th"
    return {"1": "st", "2": "nd", "3": "rd"}.get(number[-1], "th")


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

    None where brackets do not match, or a part is empty.
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
    stripped = [part.strip() for part in parts]
    return stripped if all(stripped) else None


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
    if not _PLUS_MINUS.search(part):
        return [part]
    return [_PLUS_MINUS.sub(lambda sign: signs[sign[0]], part) for signs in (upper, lower)]


def _interval(text: str, depth: int) -> Value | None:
    """x > 3 and 1 < x \\le 2 as intervals; None for all else."""
    parts = [part.strip() for part in re.split(r"(\\[lg]e(?![a-z])|<|>)", text)]
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
        return _letter(gold) == _letter(answer) or _is_small_letter(gold, answer)
    if "time" in (gold.kind, answer.kind):
        return _same_time(gold, answer)
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


def _is_small_letter(gold: Value, answer: Value) -> bool:
    """b for B. But B is not the variable b."""
    small = _SMALL_CHOICE.fullmatch(answer.text) if answer.kind == "math" else None
    return bool(small) and gold.kind == "choice" and small[1].upper() == gold.body


def _same_time(gold: Value, answer: Value) -> bool:
    """3:00 PM for 3:00 and, where the hour was asked for, for 3. 3:00 for 3:00 PM is half of it."""
    if gold.kind == "number":
        return not gold.unit and answer.body == f"{gold.body}:00"
    return gold.kind == answer.kind and gold.body == answer.body and gold.unit in ("", answer.unit)


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
    if answer.kind == "number" and answer.unit:
        gold = _with_letter_unit(gold)
    if gold.kind == "number":
        answer = _with_letter_unit(answer)
    agree = units.agree(gold.unit, answer.unit)
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


def _with_letter_unit(value: Value) -> Value:
    """5 m as five metres, which by itself may be five times m."""
    match = _LETTER_UNIT.fullmatch(value.text) if value.kind == "math" else None
    return _number(f'{match[1]} "{match[2]}"') or value if match else value


def _equation(value: Value) -> str:
    """A named value is an equation, too."""
    return f"{value.name}={value.text}" if value.name else value.text


def _equal_numbers(gold: Value, answer: Value) -> bool:
    """A per cent is a unit, which one side may lack: 50% is right for 50, and not for 1/2.

    So no answer pleases both. And 0.5% for 0.5 is the likely mistake.
    """
    if answer.unit == "%" != gold.unit and 0 < abs(gold.body) < 1:
        return False
    return answer.body == gold.body


def _same_several(gold: Value, answer: Value, ask: Ask) -> bool | None:
    if gold.kind != answer.kind and not _are_coordinates(gold, answer):
        # (1, 2) against [1, 2] or {1, 2}
        is_open = _is_bare_list(gold) or _is_bare_list(answer)
        return None if is_open or "matrix" in gold.kind + answer.kind else False
    if len(gold.body) != len(answer.body):
        return False
    if gold.kind != "list" or answer.kind != "list" or _only_one_has_names(gold, answer):
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


def _are_coordinates(one: Value, other: Value) -> bool:
    """x = 1, y = 2 and (1, 2). Letters that are no neighbours, m and b, have no order."""
    named, point = (one, other) if one.kind == "list" else (other, one)
    names = "".join(value.name for value in named.body)
    is_named = len(names) == len(named.body) and names in "abcdefghijklmnopqrstuvwxyz"
    return named.kind == "list" and point.kind == "()" and is_named


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
