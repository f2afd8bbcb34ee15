"""One spelling for what LaTeX, Unicode, Markdown and plain text write in many ways.

Words of \\text stand in double quotes from here on.
"""
import math
import re
import unicodedata
from fractions import Fraction

from data.verify.symbolic import FUNCTIONS

# ---- Unicode

_UNICODE = str.maketrans({
    "−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "/", "π": "\\pi ",
    "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ", "∪": "\\cup ", "±": "\\pm ", "∓": "\\mp ",
    "∅": "\\emptyset ", "Ω": "\\Omega ", "θ": "\\theta ", "α": "\\alpha ",
    "β": "\\beta ", "λ": "\\lambda ", "“": " ", "”": " ", "’": "'", "‘": "'", "º": "°",
    "⁄": "/", "∕": "/", "∈": "\\in ", "、": ",", "。": ".", "∶": ":", "〈": "(", "〉": ")",
    "⟨": "(", "⟩": ")",
    # of no width: an answer looks the same with them
    "\u200b": "", "\u200c": "", "\u200d": "", "\u2060": "", "\ufeff": "", "\u00ad": "",
})
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")


def _from_unicode(text: str) -> str:
    """Full-width signs, small digits, ½, thin spaces and the like as ASCII and LaTeX."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda digits: f"^{{{digits[0].translate(_RAISED)}}}", text)
    text = re.sub("[₀-₉]+", lambda digits: f"_{{{digits[0].translate(_LOWERED)}}}", text)
    text = re.sub("[¼½¾⅐-⅞]", _small_fraction, text)
    return unicodedata.normalize("NFKC", text.translate(_UNICODE)).translate(_UNICODE)


def _small_fraction(match: re.Match) -> str:
    value = Fraction(unicodedata.numeric(match[0])).limit_denominator(10)
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


# ---- LaTeX and plain text

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


def _repeating(match: re.Match) -> str:
    """0.1\\overline{6} as \\frac{1}{6}."""
    whole, start, period = match.groups()
    nines = (10 ** len(period) - 1) * 10 ** len(start)
    digits_with_period = int((whole or "0") + start + period)
    value = Fraction(digits_with_period - int((whole or "0") + start), nines)
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _joined_digits(match: re.Match) -> str:
    return re.sub(r"[ ']", "", match[0])


def _european(match: re.Match) -> str:
    return match[0].replace(".", "").replace(",", ".")


_CURRENCIES = {"usd": "¤", "us¤": "¤", "eur": "€", "gbp": "£", "rs": "₹", "inr": "₹", "rmb": "¥",
               "cny": "¥"}


_OTHER_DOLLARS = {"HK": "hkd", "C": "cad", "CA": "cad", "A": "aud", "AU": "aud"}


def _currency(match: re.Match) -> str:
    return _CURRENCIES[match[1].lower()]


def _other_dollars(match: re.Match) -> str:
    """HK$5 and CAD 5 as 5 "hkd" and 5 "cad"."""
    code = (match[2] or _OTHER_DOLLARS[match[1]]).lower()
    return f'{match[3]} "{code}"'


_SPELLINGS = (      # a pattern and what takes its place, one after the other
    (r"\\(?:text(?:bf|it|rm|sf|normal)?|mbox|hbox|mathrm|operatorname)\s*\{([^{}]*)\}",
     _quote_words),
    (r"\\(?:mathbf|mathit|mathsf|bold|displaystyle)(?![A-Za-z])", ""),
    (r"(?<=[0-9])(?:\{,\}|,?\\!|\\,)\s*(?=[0-9]{3}(?![0-9]))", ""),     # 1{,}000  1,\!000  1\,000
    (r"(?<!\\)\\!\s*", ""),
    (r"(?<!\\)\\[,;:> ]|\\q?quad(?![A-Za-z])|(?<=[^\s])~", " "),        # '~5' is about 5
    (r"(?<!\\)\\[()\[\]]", " "),                                        # \( \) \[ \] as $
    (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])", ""),
    (r"\\lbrace(?![A-Za-z])", r"\\{"),
    (r"\\rbrace(?![A-Za-z])", r"\\}"),
    (r"\\(?:langle|lparen)(?![A-Za-z])", "("),
    (r"\\(?:rangle|rparen)(?![A-Za-z])", ")"),
    (r"\\lbrack(?![A-Za-z])", "["),
    (r"\\rbrack(?![A-Za-z])", "]"),
    (r"\\(?:varnothing|emptyset)(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset"),
    (r"[\[(]\s*\\begin\{(?:array\}\s*\{[clr| ]*|(?:small)?matrix)\}(.*?)"
     r"\\end\{(?:array|(?:small)?matrix)\}\s*[\])]", r"\\begin{pmatrix}\1\\end{pmatrix}"),
    (r"\\\{\s*[a-z]\s*(?:\\in\s*\\mathbb\s*\{?R\}?)?\s*(?:\\mid|\\vert|[|:])\s*([^{}]*)\\\}",
     r"\1"),                                                            # {x | x > 3}
    (r"\\(?:[dtc]|nice|x)?s?frac(?![A-Za-z])", r"\\frac"),
    (r"\\frac\s*(\{[^{}]*\}|[0-9A-Za-z])\s*(\{[^{}]*\}|[0-9A-Za-z])",   # \frac12  \frac 5 {9}
     _fraction),
    (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}|^([^{}\\]*)\\over(?![A-Za-z])([^{}\\]*)$",
     r"\\frac{\1\3}{\2\4}"),
    (r'\\frac\{\s*"([^"{}]*)"\s*\}\{\s*"([^"{}]*)"\s*\}', r' "\1/\2" '),    # m over s
    (r"\\sqrt\s*([0-9A-Za-z])", r"\\sqrt{\1}"),
    (r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)|√\s*\(([^()]*)\)|√\s*([0-9]+|[A-Za-z])", _root),
    (rf"(?<![\\A-Za-z])({'|'.join(FUNCTIONS)})(?![A-Za-z])", r"\\\1"),  # 2pi  sin x
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])", "°"),
    (r"\\%", "%"),
    (r"\\(?:leqslant|leq|le)(?![A-Za-z])|<=", r"\\le "),
    (r"\\(?:geqslant|geq|ge)(?![A-Za-z])|>=", r"\\ge "),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\\colon(?![A-Za-z])", ":"),
    (r"\*\*", "^"),
    (r"(?<=[0-9])\s*x\s*(?=10\s*\^)", r"\\cdot "),                      # 2 x 10^3
    (r"\\(?:times|cdot)(?![A-Za-z])|\*", r"\\cdot "),
    (r"\^\s*\(([^()]*)\)", r"^{\1}"),                                   # 2^(10)
    (r'(?<=[0-9])\s*\^\s*\{?\s*"?(st|nd|rd|th)(?![A-Za-z])"?\s*\}?', r"\1"),    # 3^{rd}
    (r"\^\s*(-?[0-9]{2,}|-[A-Za-z0-9])", r"^{\1}"),                     # 2^10  x^-1
    (r"([_^])\s*\{\s*([0-9A-Za-z])\s*\}", r"\1\2"),
    (r"([0-9]{0,9})\.([0-9]{0,9})\\(?:overline|bar|dot)\s*\{?([0-9]{1,9})\}?", _repeating),
    (r"(?<![0-9.^])([12]?[0-9])!(?![!0-9])", _factorial),
    (r"(?<![0-9.,'])[0-9]{1,3}(?:'[0-9]{3})+(?![0-9'])", _joined_digits),       # 1'000
    (r"(?<![0-9.] )(?<![0-9.,])[1-9][0-9]{0,2}(?: [0-9]{3})+(?! ?[0-9/]|,[0-9])", _joined_digits),
    (r"(?<![0-9.,])[0-9]{1,3}(?:\.[0-9]{3})+,(?:[0-9]{1,2}|[0-9]{4,})(?![0-9.,])", _european),
    (r'"?(?<![A-Za-z\\])(USD|US¤|EUR|GBP|Rs|INR|RMB|CNY)\.?"?\s*(?=[-0-9.¤])', _currency),
    (r"¤\s*¤", "¤"),
    (r"(?<![A-Za-z])(?:(HK|CA?|AU?)¤|(HKD|CAD|AUD)\s?)\s*([0-9][0-9,]*(?:\.[0-9]+)?)(?![0-9])",
     _other_dollars),
    (r"^\s*=\s*", ""),
    (r"\\\\\s*\[[0-9.]+(?:pt|em|ex|mm)\]", r"\\\\"),                  # \\[2pt]
    (r'^(?:[a-z]\s*\\in\s*)?(?:\\mathbb\s*\{?R\}?|"?all real(?: number)?s"?)$',
     r"(-\\infty, \\infty)"),
    (r"百分之\s*([0-9.]+)", r"\1%"),
)
_RULES = [(re.compile(pattern), replacement) for pattern, replacement in _SPELLINGS]
_EXCLAIMED = re.compile(r"[A-Za-z ]{2,}!")
_PLAIN = re.compile(r"-?[0-9]+(?:\.[0-9]+)?|[A-Za-z]+")
# What leads to an answer and says nothing of it: 'The answer is 5', 'option B', '答案：5'
_LEAD = re.compile(r"""
    ["\s]*+(?:(?:so|thus|hence|therefore)[,\s]++)?
    (?:(?:the\s++)?(?:(?:final|correct|right|best)\s++)?
       (?:(?:answer|option|choice)\s*+(?:is\b|:|=)|(?:option|choice)\b(?=[\s"]*\(?[A-Ja-j]\b))|
       (?:最终)?答案\s*(?:是|为|选|:)|选项?\s*(?=\(?[A-J]))
    [\s":]*+(?:(?:option|choice)\b|选项?)?\s*+:?(?P<rest>.+)""", re.VERBOSE | re.IGNORECASE)


def tidy(text: str) -> str:
    """An answer, in or without its box, in one spelling."""
    if _PLAIN.fullmatch(text):
        return text
    text = text.replace('"', " ").replace("\\$", "¤").strip().strip("*`")
    if not text.isascii():
        text = _from_unicode(text)
    if "$" in text:     # a single one is dollars, two enclose mathematics
        text = text.replace("$", "¤" if text.count("$") == 1 else " ")
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = " ".join(text.split())
    lead = _LEAD.fullmatch(text)
    if lead:
        text = lead["rest"].strip()
    if text.endswith(".") and not text.endswith(".."):      # '5...' goes on
        text = text[:-1].rstrip()
    return text[:-1] if _EXCLAIMED.fullmatch(text) else text


# ---- numbers in words

_ONES = dict(zip("one two three four five six seven eight nine".split(), range(1, 10)))
_TEENS = dict(zip("ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
                  "nineteen".split(), range(10, 20)))
_TENS = dict(zip("twenty thirty forty fifty sixty seventy eighty ninety".split(),
                 range(20, 100, 10)))
_SCALES = {"thousand": 10**3, "million": 10**6}
_VALUES = _ONES | _TEENS | _TENS | {"zero": 0}
_BELOW_100 = (rf"(?:(?:{'|'.join(_TENS)})(?:[\s-]+(?:{'|'.join(_ONES)}))?"
              rf"|{'|'.join(_TEENS)}|{'|'.join(_ONES)})(?![a-z])")
_BELOW_1000 = (rf"(?:(?:{'|'.join(_ONES)})\s+hundred(?![a-z])(?:\s+(?:and\s+)?{_BELOW_100})?"
               rf"|{_BELOW_100})")
_IN_WORDS = re.compile(
    rf"zero(?![a-z])|(?!and)(?:{_BELOW_1000}\s+million(?![a-z])[\s,]*)?"
    rf"(?:{_BELOW_1000}\s+thousand(?![a-z])[\s,]*)?(?:(?:and\s+)?{_BELOW_1000})?",
    re.IGNORECASE)

_NEGATIVE = re.compile(r"(?:negative|minus)\s+(?=[a-z0-9])", re.IGNORECASE)
_PARTS = dict(zip("half third quarter fifth sixth seventh eighth ninth tenth".split(),
                  range(2, 11)))
_PARTS |= {"halve": 2, "fourth": 4}
_PART = re.compile(rf"[\s-]+({'|'.join(_PARTS)})s?(?![a-z])", re.IGNORECASE)


def digits_for_words(text: str) -> str:
    """'twenty-one apples' as '21 apples', 'two-thirds' as '\\frac{2}{3}', 'negative 5' as '-5'.

    The text itself where it starts with no number in words.
    """
    bare = text.lstrip(' "')
    sign = _NEGATIVE.match(bare)
    if sign:
        positive = digits_for_words(bare[sign.end():])
        return f"-{positive}" if positive[:1].isdigit() or positive[:1] == "\\" else text
    match = _IN_WORDS.match(bare)
    words = match[0].rstrip(" ,") if match else ""
    if not words:
        return text
    total = below_1000 = 0
    for word in re.split(r"[\s,-]+", words.lower()):
        if word == "hundred":
            below_1000 *= 100
        elif word in _SCALES:
            total += below_1000 * _SCALES[word]
            below_1000 = 0
        elif word != "and":
            below_1000 += _VALUES[word]
    rest = bare[len(words):]
    part = _PART.match(rest)
    if part:
        return f"\\frac{{{total + below_1000}}}{{{_PARTS[part[1].lower()]}}}{rest[part.end():]}"
    return f"{total + below_1000}{rest}"
