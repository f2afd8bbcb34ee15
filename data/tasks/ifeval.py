"""IFEval (arXiv 2311.07911, section 2): does a response keep the constraints of its prompt that a program can check?

All 25 constraint types, with the verdicts of the official scorer (google-research/instruction_following_eval, and its
copy in lm-evaluation-harness), quirks included. The reward is the paper's strict accuracy by prompt: 1.0 if every
constraint is kept. Different from the official scorer are
    sentences     found by a rule (`sentences`) in place of nltk's punkt, whose trained model is a download of its own;
                  the two differ at abbreviations that one of them does not know, and after initials
    language      the detector has a seed, without which its verdicts change from run to run
    letters       "#" and "!" (in two prompts) are counted; officially another letter is drawn by lot
    keywords      are plain text, not regular expressions: they differ in no prompt
    JSON          that is nested too deeply to be read is none; officially an error stops the run
    time          is linear in the response, also where the official regular expressions are not
    thoughts      are left out: only the text after the last </think> is judged
"""
import functools
import inspect
import json
import re
from collections.abc import Callable
from itertools import pairwise

from langdetect import LangDetectException
from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

from data.tasks import Problem

SOURCE = {"hf": "google/IFEval"}        # its only split is called train


# ---- what several constraints ask of a text

def compare(count: int, relation: str, bound: int) -> bool:
    return count >= bound if relation == "at least" else count < bound


def up_to_last(mark: str, text: str) -> list[str]:
    """The lines with the mark, each up to its last one: a pattern that ends with it never scans a rest in vain."""
    return [line[:line.rfind(mark) + len(mark)] for line in text.split("\n") if mark in line]


OPENING, CLOSING = "\"'“‘«([{*_", "\"'”’»)]}*_"
NEVER_LAST = frozenset("mr mrs ms dr prof rev gen col capt lt sgt st mt no fig vs e.g i.e cf approx".split())
SELDOM_LAST = frozenset("etc jr sr inc ltd co corp dept".split())     # of a sentence: only before a capital letter


def sentences(text: str) -> list[str]:
    """A sentence ends with a word in . ? or !, closing marks aside, unless it is an abbreviation or an initial.

    As with punkt a line break ends none, and the number of a list ("1.") is one by itself.
    """
    found, words = [], []
    for word, following in pairwise([*text.split(), ""]):
        words.append(word)
        if not following or ends_sentence(word, following):
            found.append(" ".join(words))
            words = []
    return found


def ends_sentence(word: str, following: str) -> bool:
    core = word.rstrip(CLOSING)
    if not core.endswith("."):
        return core.endswith(("?", "!"))
    stem = core[:-1].lstrip(OPENING).lower()
    if stem in NEVER_LAST or len(stem) == 1 and stem.isalpha() and stem != "i":
        return False
    seldom = stem in SELDOM_LAST or "." in stem[1:] and stem[-1:] != "."    # a.m., U.S.
    return not (seldom or stem.endswith(".")) or following.lstrip(OPENING)[:1].isupper()


SEPARATORS = re.compile(r"""[\]\[(){}<>?!;@#$%&*"`«»“”„‘’\u2012-\u2015]|''|--|\.{2,}|[:,](?!\d)""")
CLITICS = (re.compile(r"(?<=[^'\s])('[sSmMdD]?)(?=\s)"),
           re.compile(r"(?<=[^'\s])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T)(?=\s)"))
CONTRACTIONS = re.compile(r"(?i)\b(can(?=not\b)|gim(?=me\b)|lem(?=me\b)|gon(?=na\b)|wan(?=na\s)|got(?=ta\b)|d(?='ye\b)|"
                          r"more(?='n\b))('?\w+)")


def tokens(sentence: str) -> list[str]:
    """Words and marks as in the Penn Treebank (R. MacIntyre's tokenizer, 1995), whose rules nltk's follows.

    "Don't" is two, and so is "it's". The full stop of the sentence is left out; others belong to their words.
    """
    text = sentence.rstrip()
    end = len(text.rstrip("])}>\"'»”’ ")) - 1
    if text[end:end + 1] == "." and text[end - 1:end] not in ("", "."):
        text = f"{text[:end]} {text[end + 1:]}"
    text = f" {SEPARATORS.sub(r' \g<0> ', text)} "
    for pattern in CLITICS:
        text = pattern.sub(r" \1 ", text)
    return CONTRACTIONS.sub(r" \1 \2 ", text).split()


@functools.cache
def detectors() -> DetectorFactory:
    """A factory of our own, whole before anyone sees it: langdetect's global one is filled in view of other threads."""
    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    factory.set_seed(0)
    return factory


def is_language(text: str, code: str) -> bool:
    """True also where no language can be told (text without letters), as officially."""
    detector = detectors().create()
    detector.append(text)
    try:
        return detector.detect() == code
    except LangDetectException:
        return True


# ---- the constraints; the names after `response` are the data set's, with its spelling

def keywords_exist(response: str, keywords: list[str]) -> bool:
    return all(re.search(re.escape(word), response, re.IGNORECASE) for word in keywords)


def keyword_frequency(response: str, keyword: str, frequency: int, relation: str) -> bool:
    return compare(len(re.findall(re.escape(keyword.strip()), response, re.IGNORECASE)), relation, frequency)


def no_forbidden_words(response: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(response: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return compare(response.lower().count(letter.lower()), let_relation, let_frequency)


def response_language(response: str, language: str) -> bool:
    return is_language(response, language)


def number_sentences(response: str, num_sentences: int, relation: str) -> bool:
    return compare(len(sentences(response)), relation, num_sentences)


def number_paragraphs(response: str, num_paragraphs: int) -> bool:
    """Between dividers; before the first and after the last one there may be nothing."""
    filled = [bool(paragraph.strip()) for paragraph in response.split("***")]
    return all(filled[1:-1]) and sum(filled) == num_paragraphs


def number_words(response: str, num_words: int, relation: str) -> bool:
    return compare(len(re.findall(r"\w+", response)), relation, num_words)


def nth_paragraph_first_word(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Empty paragraphs are not counted, but the n-th is found with them (as officially)."""
    paragraphs = [paragraph.strip() for paragraph in response.split("\n\n")]
    if sum(map(bool, paragraphs)) != num_paragraphs or not paragraphs[nth_paragraph - 1]:
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def number_placeholders(response: str, num_placeholders: int) -> bool:
    return sum(len(re.findall(r"\[.*?\]", line)) for line in up_to_last("]", response)) >= num_placeholders


def postscript(response: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    pattern = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(marker, re.escape(marker.lower()))
    return re.search(pattern, response.lower()) is not None


def number_bullet_lists(response: str, num_bullets: int) -> bool:
    stars = re.findall(r"^[^\S\n]*\*[^*].*$", response, re.MULTILINE)
    return len(stars) + len(re.findall(r"^[^\S\n]*-", response, re.MULTILINE)) == num_bullets


def constrained_response(response: str) -> bool:
    return any(option in response for option in ("My answer is yes.", "My answer is no.", "My answer is maybe."))


def number_highlighted_sections(response: str, num_highlights: int) -> bool:
    found = re.findall(r"\*[^\n*]*\*", response) + re.findall(r"\*\*[^\n*]*\*\*", response)
    return sum(part.strip("*").strip() != "" for part in found) >= num_highlights


def multiple_sections(response: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(re.escape(section_spliter.strip()) + r"\s?\d+", response)) >= num_sections


def json_format(response: str) -> bool:
    text = response.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(response: str) -> bool:
    found = [match[0] for line in up_to_last(">>", response) if (match := re.search("<<.+>>", line))]
    return any(text.lstrip("<").rstrip(">").strip() for text in found)


def two_responses(response: str) -> bool:
    parts = [part.strip() for part in response.split("******")]
    replies = [part for part in parts if part]
    return all(parts[1:-1]) and len(replies) == 2 and replies[0] != replies[1]


def repeat_prompt(response: str, prompt_to_repeat: str) -> bool:
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(response: str, end_phrase: str) -> bool:
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(response: str) -> bool:
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def capital_word_frequency(response: str, capital_frequency: int, capital_relation: str) -> bool:
    count = sum(token.isupper() for sentence in sentences(response) for token in tokens(sentence))
    return compare(count, capital_relation, capital_frequency)


def english_capital(response: str) -> bool:
    return response.isupper() and is_language(response, "en")


def english_lowercase(response: str) -> bool:
    return response.islower() and is_language(response, "en")


def no_comma(response: str) -> bool:
    return "," not in response


CONSTRAINTS: dict[str, Callable[..., bool]] = {
    "keywords:existence": keywords_exist,
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": no_forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}


# ---- records and rewards

def read(record: dict) -> Problem:
    """A record of google/IFEval, as JSON line or from its Parquet, where each kwargs has every key, most of them null."""
    names, kwargs, prompt = record["instruction_id_list"], record["kwargs"], record["prompt"]
    if not names or len(names) != len(kwargs):
        raise ValueError(f"{len(names)} constraints with {len(kwargs)} kwargs")
    extra = {"instructions": list(names), "kwargs": list(map(checked, names, kwargs)), "prompt": prompt}
    return Problem("ifeval", f"ifeval {record['key']}", prompt, (), "", min(3, len(names)), extra)


def checked(name: str, kwargs: dict | None) -> dict:
    """The kwargs without nulls; ValueError for one that is missing, unknown or not as the constraint needs it."""
    if name not in CONSTRAINTS:
        raise ValueError(f"unknown constraint {name!r}")
    wanted = dict([*inspect.get_annotations(CONSTRAINTS[name]).items()][1:-1])      # without response and result
    given = {key: value for key, value in (kwargs or {}).items() if value not in (None, [])}
    if odd := sorted(wanted.keys() ^ given.keys()):
        raise ValueError(f"{name}: {'no' if odd[0] in wanted else 'unknown'} {odd[0]}")
    for key, value in given.items():
        if wanted[key] is int:
            fits = type(value) is int and value > 0
        elif wanted[key] is str:
            fits = isinstance(value, str) and value.strip() != ""
        else:
            fits = isinstance(value, list) and all(isinstance(word, str) and word.strip() for word in value)
        if not fits or key.endswith("relation") and value not in ("at least", "less than"):
            raise ValueError(f"{name}: {key} is {value!r}")
    if given.get("nth_paragraph", 0) > given.get("num_paragraphs", 0):
        raise ValueError(f"{name}: nth_paragraph is {given['nth_paragraph']} of {given['num_paragraphs']}")
    return given


def judged(response: str) -> str:
    """What is judged: the text after the last </think>; thoughts that never end leave nothing."""
    _, end, text = response.rpartition("</think>")
    if "<think>" in text:
        return ""
    return text.lstrip("\n") if end else text


def followed(problem: Problem, response: str, loose: bool = False) -> list[bool]:
    """For each constraint whether it is kept; a blank response keeps none.

    Loosely (section 2.2) it may be kept without the first line, the last or both, and without markdown's asterisks.
    """
    texts = [judged(response)]
    if loose:
        lines = texts[0].split("\n")
        texts += ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
        texts += [text.replace("*", "") for text in texts]
    return [any(CONSTRAINTS[name](text, **kwargs) for text in texts if text.strip())
            for name, kwargs in zip(problem.extra["instructions"], problem.extra["kwargs"])]


def reward(problem: Problem, response: str) -> float:
    return float(all(followed(problem, response)))
