"""What may follow a number and leave its value alone: a unit of measure, or a noun that is counted.

Units stand in a closed list. A word outside of it counts as a noun only in the plural ('72 clips'),
or in the list of COUNTED. Every other word is kept and marked, because a gold may have one ('18
\\text{ percentile}'), but no answer is right with it: 'wrong', 'tripled' and 'kilo' look the same.
"""
import re
from itertools import pairwise

_SPELLINGS_OF_UNITS = {
    "%": "% percent percentage pct",
    "degree": "° degree deg",
    "celsius": "celsius °c",
    "fahrenheit": "fahrenheit °f",
    "radian": "radian rad",
    "dollar": "¤ $ dollar usd buck",
    "cent": "¢ cent",
    "euro": "€ euro eur",
    "¥": "¥",
    "yen": "yen jpy",
    "yuan": "yuan rmb cny",
    "rupee": "₹ rupee inr",
    "pound": "£ pound lb gbp",      # money or weight
    "hkd": "hkd",
    "cad": "cad",
    "aud": "aud",
    "mm": "mm millimeter millimetre",
    "cm": "cm centimeter centimetre",
    "m": "m meter metre",
    "in": "in inch inche",
    "km": "km kilometer kilometre",
    "ft": "ft foot feet",
    "yd": "yd yard",
    "mi": "mi mile",
    "micrometer": "microm micrometer micrometre",
    "microgram": "microg microgram",
    "microsecond": "micros microsecond",
    "mg": "mg milligram",
    "g": "g gram",
    "kg": "kg kilogram",
    "oz": "oz ounce",
    "ton": "ton tonne",
    "ml": "ml milliliter millilitre",
    "l": "l liter litre",
    "gallon": "gallon gal",
    "quart": "quart qt",
    "pint": "pint pt",
    "cup": "cup",
    "tablespoon": "tablespoon tbsp",
    "teaspoon": "teaspoon tsp",
    "acre": "acre",
    "hectare": "hectare ha",
    "ms": "ms millisecond",
    "s": "s second sec",
    "min": "min minute",
    "h": "h hour hr",
    "day": "day",
    "week": "week wk",
    "month": "month",
    "year": "year yr",
    "decade": "decade",
    "century": "century centuries",
    "mi/h": "mph",
    "km/h": "kph kmh",
    "newton": "newton",
    "joule": "joule",
    "watt": "watt",
    "kilowatt": "kilowatt kw",
    "volt": "volt",
    "ampere": "ampere amp",
    "ohm": "ohm",
    "kilohm": "kilohm",
    "kelvin": "kelvin",
    "hertz": "hertz hz",
    "pascal": "pascal",
    "mol": "mol mole",
    "calorie": "calorie cal",
    "kilocalorie": "kilocalorie kcal",
    "byte": "byte",
    "bit": "bit",
    "kilowatt h": "kwh",
    "point": "point",
    "unit": "unit",
}
_UNITS = {spelling: unit for unit, spellings in _SPELLINGS_OF_UNITS.items()
          for spelling in spellings.split()}
_KNOWN = set(_UNITS.values()) | {""}
# These two may stand side by side; of all others the second would be another unit.
_PAIRS = {("degree", "celsius"), ("degree", "fahrenheit"), ("kilowatt", "h"), ("newton", "m"),
          ("ft", "pound"), ("%", "point")}
# A sign that stands for several units agrees with each of them.
_VAGUE = {"degree": {"celsius", "fahrenheit"}, "¥": {"yen", "yuan"}}
# Letters that are units only where they are set as text, and in capitals.
_CAPITALS = {"N": "newton", "J": "joule", "W": "watt", "V": "volt", "A": "ampere", "K": "kelvin",
             "C": "celsius", "F": "fahrenheit", "Pa": "pascal"}
CHINESE = {
    "/个": "", "/人": "", "个": "", "只": "", "人": "people", "名": "", "位": "", "本": "",
    "张": "", "支": "", "件": "",
    "条": "", "头": "", "辆": "", "颗": "", "朵": "", "棵": "", "次": "", "页": "pages",
    "块钱": "yuan", "人民币": "yuan", "美元": "dollar", "欧元": "euro", "日元": "yen", "元": "yuan",
    "毫米": "mm", "厘米": "cm", "千米": "km", "公里": "km", "英里": "mile", "英尺": "feet",
    "英寸": "inch", "米": "meter", "平方": "square", "立方": "cubic", "毫克": "mg", "千克": "kg",
    "公斤": "kg", "克": "gram", "吨": "ton", "磅": "pound", "毫升": "ml", "升": "liter",
    "加仑": "gallon", "摄氏度": "celsius", "度": "degree", "秒": "second", "分钟": "minute",
    "个小时": "hour", "小时": "hour", "天": "day", "周": "week", "星期": "week", "个月": "month",
    "月": "month", "年": "year", "岁": "year", "每": "/", "个苹果": "apples", "名学生": "students",
    "个学生": "students", "只鸡": "chickens", "本书": "books", "朵花": "flowers",
}
_CHINESE = re.compile("|".join(sorted(CHINESE, key=len, reverse=True)))
# What may follow a number and change its value, take it back, or be another one: then it is no
# unit, and the text no plain number.
_NOT_UNIT = re.compile(r"""
    (?:hundred|dozen|score|gross|grand|lakh|crore|pair|couple|trio|double|triple|half|halve|third|
    quarter|ten|zeroe?|one|two|three|four|five|six|seven|eight|nine|eleven|twelve|time|fold|plus|
    minus|over|mod|modulo|root|radical|factorial|power|exponent|choose|inverse|multiplied|divided|
    negative|more|fewer|less|than|not|and|or|to|except|unless|versus|vs|above|below|base|squared|
    cubed|doubled|tripled|quadrupled|halved|alpha|beta|gamma|delta|epsilon|zeta|eta|theta|kappa|
    lambda|rho|sigma|tau|phi|chi|psi|omega|infinity|infinite|cosine|sine|tangent|kilo|mega|giga|
    tera|milli|micro|googol|googolplex|wrong|false|incorrect|lie|fail|guesse?|perhap|alway|
    sometime|maybe|probably|possibly|approx|approximately|about|roughly|instead|rather|but|never|
    reciprocal|opposite|complement|conjugate|negation|remainder)s?|
    arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|sinh|cosh|tanh|ln|log|exp|sqrt|pi|
    is|was|has|does|thus|this|its|yes|these|those|besides|exceeds|equals|makes|misses|becomes|
    .*(?:th|teen|ty|illion)s?""", re.VERBOSE)
_PLURALS = frozenset("people children men women geese mice teeth sheep fish deer oxen dice cattle "
                     "kids clothes".split())
COUNTED = frozenset(    # in the singular as well: 1 apple
    "person student child man woman boy girl kid friend teacher animal dog cat bird cow horse pig "
    "duck chicken egg apple orange banana cookie cake pizza slice piece candy book page pencil pen "
    "marble coin card stamp sticker toy ball game car bus bike truck train boat box bag bottle can "
    "jar basket pack bunch tree flower rose plant seed chair table house room ticket shirt shoe "
    "dress hat ring stone block bead trip lap step mile class team player vote word letter number "
    "song solution root prime triangle square circle side face edge vertex digit way".split())
_MORE = re.compile(r"\s*(?:more|fewer|additional|extra)(?=\s+[a-z])")       # 5 more apples
_CLOSING = re.compile(      # said of the whole, after the noun: 72 clips, altogether
    r'[\s,"]+(?:altogether|in total|in all|total|overall|combined|each|apiece|left|remaining|left '
    r'over|together|old|tall|long|wide|high|deep)"?$')
_OF = re.compile(r" of (?:the |his |her |their )?[a-z]+(?: [a-z]+)?$")         # 5 cups of water
_PER = ("per", "/", "every", "each", "a", "an")


def read(text: str) -> str | None:
    """The unit that a tail is, in one spelling; None for what is no unit.

    As 'cm^2', 'mi/h', 'duck egg', 'base 8', or '' for no tail. A word that is neither a unit nor a
    noun in the plural has '?' before it: '?wrong'.
    """
    if not text:
        return ""
    base = re.fullmatch(r"_\{?([0-9]{1,2})\}?", text)
    if base:
        return f"base {base[1]}"
    words = _words(text)
    if words is None:
        return None
    if words == ["times"]:      # 5 times, with nothing that is multiplied
        return "time"
    parts = []
    power = per = ""
    for word in words:
        if word in ("^2", "^3", "squared", "cubed") and parts:
            parts[-1] += {"squared": "^2", "cubed": "^3"}.get(word, word)
        elif word in ("square", "sq", "cubic", "cu"):
            power = "^2" if word[0] == "s" else "^3"
        elif word in _PER and not per and not power:
            per = "/"
        else:
            unit = _of_word(word, text)
            if unit is None:
                return None
            parts.append(per + unit + power)
            power = per = ""
    if power or per:        # nothing follows it
        return None
    return _joined(parts)


def _words(text: str) -> list[str] | None:
    """The words of a tail, without what may stand around the unit; None for '...' and ','."""
    if not text.isascii():
        text = _CHINESE.sub(lambda word: f" {CHINESE[word[0]]} ", text)
    if '"' in text:
        for capital, name in _CAPITALS.items():
            text = re.sub(rf"(?<![A-Za-z]){capital}(?![A-Za-z])", f" {name} ", text)
    text = re.sub(r"°\s*C(?![A-Za-z])", " celsius ", text)
    text = re.sub(r"°\s*F(?![A-Za-z])", " fahrenheit ", text)
    text = re.sub(r'k\s*\\Omega', " kilohm ", text)
    text = re.sub(r'\\mu\s*"?\s*([mgs])(?![A-Za-z])', r' "micro\1" ', text)
    text = text.replace("\\Omega", " ohm ").replace('"', " ").lower()
    text = _CLOSING.sub("", _MORE.sub(" ", text, count=1))
    thing = _OF.search(text)
    if thing and not _NOT_UNIT.fullmatch(thing[0].split()[-1]):
        text = text[:thing.start()]
        if "%" in text or "percent" in text or not text.strip():     # 50% of x is no 50
            return None
    words = re.sub(r"([/^°%])", r" \1", text).replace("/", "/ ").split()
    words = [re.sub(r"(?<=[a-z])\.$", "", word) for word in words]      # 5 in.
    return None if "." in words or "," in words else words


def _of_word(word: str, text: str) -> str | None:
    """A unit that we know, or a word that may be one; None for what is neither. text: all of it."""
    stem = word[:-1] if len(word) > 2 and word.endswith("s") else word
    unit = _UNITS.get(word) or _UNITS.get(stem)
    if word == "kilos":     # and 'kilo' is none
        unit = "kg"
    if unit:        # a single letter is one only where it is set as text
        is_bare_letter = len(word) == 1 and word.isalpha() and '"' not in text
        return None if is_bare_letter else unit
    stands_apart = text[:1] in ' "' or not text.isascii()       # 'ab' in 5ab is no unit
    is_word = len(word) > 2 and word.isascii() and word.isalpha() and not _NOT_UNIT.fullmatch(word)
    if not (stands_apart and is_word):
        return None
    is_plural = word.endswith("s") and not word.endswith(("ss", "us", "is", "ous"))
    is_noun = is_plural or word in _PLURALS or word in COUNTED
    return stem if is_noun else f"?{stem}"


def _joined(parts: list[str]) -> str | None:
    """The unit of several words; None for two units side by side, as in '5 cm kg' and '5%%'.

    Of words that are no units the last is the noun: 'red apples' is no doubtful word.
    """
    for first, second in pairwise(parts):
        both_known = is_known(first) and is_known(second)
        if both_known and "/" not in second and (first, second) not in _PAIRS:
            return None
    if ("degree" in parts) and len(parts) == 2:
        parts = parts[1:]
    if parts and not parts[-1].startswith("?"):
        parts = [part.removeprefix("?") for part in parts]
    return " ".join(parts).replace(" /", "/")


def is_known(unit: str) -> bool:
    return set(re.split(r"\^.|/| ", unit)) <= _KNOWN or unit.startswith("base")


def agree(gold: str, answer: str) -> bool | None:
    """Whether an answer's unit fits the gold's. A unit that one side lacks is forgiven.

    But a base on the answer's side alone, 42_8 for 42, is another number; and with a word that may
    be no unit at all, '5 wrong', no answer is right. None: 'eggs' and 'duck eggs'.
    """
    if not answer or gold.replace("?", "") == answer.replace("?", ""):
        return True
    if answer in _VAGUE.get(gold, ()) or gold in _VAGUE.get(answer, ()):
        return True
    if not gold:
        if answer.startswith("base"):
            return answer == "base 10"
        return "?" not in answer
    return False if is_known(gold) and is_known(answer) else None


def of_sign(sign: str) -> str:
    """The unit that a currency sign before a number stands for."""
    return _UNITS[sign]
