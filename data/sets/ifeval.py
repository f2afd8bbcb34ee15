"""IFEval (arXiv 2311.07911, section 2): does a response keep the constraints of its prompt?

All 25 constraint types, with the verdicts of the official scorer, quirks included
(google-research/instruction_following_eval, and its copy in lm-evaluation-harness). The reward is
the paper's strict accuracy by prompt: 1.0 if every constraint is kept. Different from the official
scorer are
    sentences     found by a rule (`sentences`) in place of nltk's punkt, whose trained model is a
                  download of its own; the two differ at rare abbreviations, and at words that punkt
                  knows to start a sentence
    language      the detector has a seed, without which its verdicts change from run to run
    letters       "#" and "!" (in two prompts) are counted; officially another letter is drawn
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

from data.chat.template import after_thoughts
from data.tasks.problem import Problem

SOURCE = {"hf": "google/IFEval"}        # its only split is called train


# ---- what several constraints ask of a text

def is_met(count: int, relation: str, bound: int) -> bool:
    """relation: "at least" or "less than"."""
    return count >= bound if relation == "at least" else count < bound


def count_word(word: str, text: str) -> int:
    return len(re.findall(re.escape(word), text, re.IGNORECASE))


def up_to_last(mark: str, text: str) -> list[str]:
    """The lines with the mark, each up to its last one.

    So that a pattern that ends with the mark never scans a rest in vain.
    """
    return [line[:line.rfind(mark) + len(mark)] for line in text.split("\n") if mark in line]


OPENING, CLOSING = "\"'“‘«([{*_", "\"'”’»)]}*_"
# not etc., e.g. and i.e., which punkt does not know either
ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof gen col lt sen rep st jr sr inc ltd co corp bros vs ft ph.d jan feb aug "
    "sept oct nov dec".split())
STARTERS = frozenset(
    "A An And As At But For From He Her His How However I If In It Its My No On Our She So Some "
    "That The Their Then There These They This Those To We What When Where Which Who Why You Your"
    .split())
INITIALS = re.compile(r"[a-z](\.[a-z])*")       # j, u.s, a.m


def sentences(text: str) -> list[str]:
    """A sentence ends with a word in . ? or !, closing marks aside.

    As with punkt a line break ends none. After an abbreviation, an initial or dots (...) one ends
    only where a word follows that often starts one.
    """
    complete, words = [], []
    for word, next_word in pairwise([*text.split(), ""]):
        words.append(word)
        if not next_word or ends_sentence(word.rstrip(CLOSING), next_word.lstrip(OPENING)):
            complete.append(" ".join(words))
            words = []
    return complete


def ends_sentence(word: str, next_word: str) -> bool:
    if not word.endswith("."):
        return word.endswith(("?", "!"))
    stem = word[:-1].lstrip(OPENING).lower()
    if stem.isdigit():      # "1." is a sentence by itself, as officially; "on 1. may" is none
        return not next_word[:1].islower()
    is_initial = stem not in ("e.g", "i.e", "i") and INITIALS.fullmatch(stem)
    if stem in ABBREVIATIONS or stem[-1:] == "." or is_initial:
        return next_word.rstrip(",") in STARTERS
    return True


SEPARATORS = re.compile(
    r"""[\]\[(){}<>?!;@#$%&*"`«»“”„‘’\u2012-\u2015]|''|--|\.{2,}|[:,](?!\d)""")
CLITICS = (
    re.compile(r"(?<=[^'\s])('[sSmMdD]?)(?=\s)"),
    re.compile(r"(?<=[^'\s])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T)(?=\s)"),
)
CONTRACTIONS = re.compile(
    r"(?i)\b(can(?=not\b)|gim(?=me\b)|lem(?=me\b)|gon(?=na\b)|wan(?=na\s)|got(?=ta\b)|"
    r"d(?='ye\b)|more(?='n\b))('?\w+)")


def tokens(sentence: str) -> list[str]:
    """Words and marks as in the Penn Treebank (R. MacIntyre's tokenizer, 1995).

    nltk's follows its rules, too. "Don't" is two, and so is "it's". The full stop of the sentence
    is left out; others belong to their words.
    """
    text = sentence.rstrip()
    end = len(text.rstrip("])}>\"'»”’ ")) - 1
    if text[end:end + 1] == "." and text[end - 1:end] not in ("", "."):
        text = f"{text[:end]} {text[end + 1:]}"
    text = " " + SEPARATORS.sub(r" \g<0> ", text) + " "
    for pattern in CLITICS:
        text = pattern.sub(r" \1 ", text)
    return CONTRACTIONS.sub(r" \1 \2 ", text).split()


@functools.cache
def detectors() -> DetectorFactory:
    """A factory of our own, whole before anyone sees it.

    langdetect's global one is filled in view of other threads.
    """
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

def keyword_existence(response: str, keywords: list[str]) -> bool:
    return all(count_word(word, response) for word in keywords)


def keyword_frequency(response: str, keyword: str, frequency: int, relation: str) -> bool:
    return is_met(count_word(keyword.strip(), response), relation, frequency)


def forbidden_words(response: str, forbidden_words: list[str]) -> bool:
    for word in forbidden_words:
        if re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE):
            return False
    return True


def letter_frequency(response: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return is_met(response.lower().count(letter.lower()), let_relation, let_frequency)


def response_language(response: str, language: str) -> bool:
    return is_language(response, language)


def number_sentences(response: str, num_sentences: int, relation: str) -> bool:
    return is_met(len(sentences(response)), relation, num_sentences)


def number_paragraphs(response: str, num_paragraphs: int) -> bool:
    """Between dividers; before the first and after the last one there may be nothing."""
    filled = [bool(paragraph.strip()) for paragraph in response.split("***")]
    return all(filled[1:-1]) and sum(filled) == num_paragraphs


def number_words(response: str, num_words: int, relation: str) -> bool:
    return is_met(len(re.findall(r"\w+", response)), relation, num_words)


def nth_paragraph_first_word(response: str, num_paragraphs: int, nth_paragraph: int,
                             first_word: str) -> bool:
    """Empty paragraphs are not counted, but the n-th is found with them (as officially)."""
    paragraphs = [paragraph.strip() for paragraph in response.split("\n\n")]
    if sum(map(bool, paragraphs)) != num_paragraphs or not paragraphs[nth_paragraph - 1]:
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def number_placeholders(response: str, num_placeholders: int) -> bool:
    counts = [len(re.findall(r"\[.*?\]", line)) for line in up_to_last("]", response)]
    return sum(counts) >= num_placeholders


def postscript(response: str, postscript_marker: str) -> bool:
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    marker = postscript_marker.strip()
    pattern = patterns.get(marker, re.escape(marker.lower()))
    return re.search(pattern, response.lower()) is not None


def number_bullet_lists(response: str, num_bullets: int) -> bool:
    stars = re.findall(r"^[^\S\n]*\*[^*].*$", response, re.MULTILINE)
    dashes = re.findall(r"^[^\S\n]*-", response, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def constrained_response(response: str) -> bool:
    return any(option in response for option in OPTIONS)


def number_highlighted_sections(response: str, num_highlights: int) -> bool:
    sections = re.findall(r"\*[^\n*]*\*", response) + re.findall(r"\*\*[^\n*]*\*\*", response)
    return sum(section.strip("*").strip() != "" for section in sections) >= num_highlights


def multiple_sections(response: str, section_spliter: str, num_sections: int) -> bool:
    pattern = re.escape(section_spliter.strip()) + r"\s?\d+"
    return len(re.findall(pattern, response)) >= num_sections


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
    for line in up_to_last(">>", response):
        match = re.search("<<.+>>", line)
        if match and match[0].lstrip("<").rstrip(">").strip():
            return True
    return False


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
    count = 0
    for sentence in sentences(response):
        count += sum(token.isupper() for token in tokens(sentence))
    return is_met(count, capital_relation, capital_frequency)


def english_capital(response: str) -> bool:
    return response.isupper() and is_language(response, "en")


def english_lowercase(response: str) -> bool:
    return response.islower() and is_language(response, "en")


def no_comma(response: str) -> bool:
    return "," not in response


OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
CONSTRAINTS: dict[str, Callable[..., bool]] = {
    "keywords:existence": keyword_existence,
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": forbidden_words,
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
    """The problem of a record of google/IFEval.

    A JSON line, or a row of its Parquet, where all kwargs have every key, most of them null.
    """
    names, kwargs, prompt = record["instruction_id_list"], record["kwargs"], record["prompt"]
    if not isinstance(prompt, str) or not names or len(names) != len(kwargs):
        raise ValueError(f"prompt {prompt!r:.40} has {len(names)} constraints, "
                         f"and kwargs for {len(kwargs)}")
    extra = {
        "instructions": list(names),
        "kwargs": list(map(check_kwargs, names, kwargs)),
        "prompt": prompt,
    }
    level = min(3, len(names))
    return Problem("ifeval", f"ifeval {record['key']}", prompt, (), "", level, extra)


def check_kwargs(name: str, kwargs: dict | None) -> dict:
    """The kwargs without nulls.

    ValueError for one that is missing, unknown or not as the constraint needs it.
    """
    if name not in CONSTRAINTS:
        raise ValueError(f"unknown constraint {name!r}")
    needed = inspect.signature(CONSTRAINTS[name]).parameters.keys() - {"response"}
    kwargs = {key: value for key, value in (kwargs or {}).items() if value not in (None, [])}
    different = sorted(needed ^ kwargs.keys())
    if different:
        fault = "no" if different[0] in needed else "unknown"
        raise ValueError(f"{name}: {fault} {different[0]}")
    for key, value in kwargs.items():
        if not _fits(key, value):
            raise ValueError(f"{name}: {key} is {value!r}")
    nth, n = kwargs.get("nth_paragraph", 0), kwargs.get("num_paragraphs", 0)
    if nth > n:
        raise ValueError(f"{name}: nth_paragraph is {nth} of {n}")
    return kwargs


def _fits(key: str, value: object) -> bool:
    if key.startswith(("num_", "nth_")) or key.endswith("frequency"):
        return type(value) is int and value > 0
    if key.endswith("relation"):
        return value in ("at least", "less than")
    words = value if key in ("keywords", "forbidden_words") else [value]
    return isinstance(words, list) and all(isinstance(w, str) and w.strip() for w in words)


def reply_text(response: str) -> str:
    """The text after the thoughts, without the empty lines that follow them.

    Thoughts that never end leave nothing.
    """
    text = after_thoughts(response) or ""
    return text.lstrip("\n") if "</think>" in response else text


def followed(problem: Problem, response: str, loose: bool = False) -> list[bool]:
    """For each constraint whether it is kept; a blank response keeps none.

    Loosely (section 2.2) it may be kept without the first line, the last or both, and without
    markdown's asterisks.
    """
    texts = [reply_text(response)]
    if loose:
        lines = texts[0].split("\n")
        for part in (lines[1:], lines[:-1], lines[1:-1]):
            texts.append("\n".join(part).strip())
        texts += [text.replace("*", "") for text in texts]
    texts = [text for text in texts if text.strip()]
    kept = []
    for name, kwargs in zip(problem.extra["instructions"], problem.extra["kwargs"]):
        is_kept = CONSTRAINTS[name]
        kept.append(any(is_kept(text, **kwargs) for text in texts))
    return kept


def reward(problem: Problem, response: str) -> float:
    return float(all(followed(problem, response)))


def share(problem: Problem, response: str) -> float:
    """The share of the constraints that are kept."""
    kept = followed(problem, response)
    return sum(kept) / len(kept)
