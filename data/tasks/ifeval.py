"""IFEval (arXiv 2311.07911): constraints on the form of a response that a program can check; all 25 types.

Each function is one type, by the rules of the official scorer, warts included; reward is its strict accuracy of the
whole prompt, `loose` its loose one. Two differ: sentences are split by a regular expression, the official scorer
downloads nltk's punkt (which knows abbreviations such as "e.g. " that end no sentence here, and splits at a quotation
mark behind the stop as we do); capital words are runs of letters joined by - . or ', where nltk splits "DON'T" in two.
"""
import inspect
import json
import re
from collections.abc import Callable

import langdetect
from langdetect.lang_detect_exception import LangDetectException

from data.tasks import Problem

SOURCE = {"hf": "google/IFEval", "split": "train"}      # its only split
ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
MOST = 30_000       # characters of a response; nobody asks for a longer one

langdetect.DetectorFactory.seed = 0     # else its verdict is drawn anew each time


def _relation(count: int, relation: str, wanted: int) -> bool:
    if relation not in ("less than", "at least"):
        raise ValueError(f"relation is {relation!r}, neither 'less than' nor 'at least'")
    return count < wanted if relation == "less than" else count >= wanted


def _count(text: str, response: str) -> int:
    return len(re.findall(re.escape(text), response, re.IGNORECASE))


def _is_language(response: str, language: str) -> bool:
    try:
        return langdetect.detect(response) == language
    except LangDetectException:     # no letters: the official scorer lets it pass
        return True


def sentences(text: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?])[\"'”’)\]*_]*\s+|\n[ \t]*\n", text) if re.search(r"\w", s)]


def _parts(response: str, separator: str) -> list[str] | None:
    """What stands between separators; None if there is nothing between two of them."""
    parts = [part.strip() for part in re.split(separator, response)]
    if any(not part for part in parts[1:-1]):
        return None
    return [part for part in parts if part]


def number_paragraphs(response: str, num_paragraphs: int) -> bool:
    parts = _parts(response, r"\s?\*\*\*\s?")
    return parts is not None and len(parts) == num_paragraphs


def nth_paragraph_first_word(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = response.split("\n\n")
    count = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if nth_paragraph > count or not paragraphs[nth_paragraph - 1].strip():
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return count == num_paragraphs and re.match(r"[^.,?!'\"]*", word)[0].lower() == first_word.lower()


def postscript(response: str, postscript_marker: str) -> bool:
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(known.get(postscript_marker, re.escape(postscript_marker.lower())), response.lower()) is not None


def number_highlighted_sections(response: str, num_highlights: int) -> bool:
    single = sum(bool(found.strip("*").strip()) for found in re.findall(r"\*[^\n*]*\*", response))
    double = sum(bool(found[2:-2].strip()) for found in re.findall(r"\*\*[^\n*]*\*\*", response))
    return single + double >= num_highlights


def json_format(response: str) -> bool:
    text = re.sub(r"^```(?:json|Json|JSON)?", "", response.strip()).removesuffix("```").strip()
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def title(response: str) -> bool:
    spans = [(line, line.find("<<"), line.rfind(">>")) for line in response.split("\n")]
    return any(0 <= first < last and line[first:last].lstrip("<").rstrip(">").strip() for line, first, last in spans)


def two_responses(response: str) -> bool:
    parts = _parts(response, r"\*{6}")
    return parts is not None and len(parts) == 2 and parts[0] != parts[1]


def quotation(response: str) -> bool:
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def capital_word_frequency(response: str, capital_frequency: int, capital_relation: str) -> bool:
    words = re.findall(r"\w+(?:[-.'’]\w+)*", response)
    return _relation(sum(word.isupper() for word in words), capital_relation, capital_frequency)


CONSTRAINTS: dict[str, Callable[..., bool]] = {
    "keywords:existence": lambda response, keywords: all(_count(word, response) for word in keywords),
    "keywords:frequency": lambda response, keyword, frequency, relation:
        _relation(_count(keyword, response), relation, frequency),
    "keywords:forbidden_words": lambda response, forbidden_words: not any(
        re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE) for word in forbidden_words),
    "keywords:letter_frequency": lambda response, letter, let_frequency, let_relation:
        _relation(response.lower().count(letter.lower()), let_relation, let_frequency),
    "language:response_language": lambda response, language: _is_language(response, language),
    "length_constraints:number_sentences": lambda response, num_sentences, relation:
        _relation(len(sentences(response)), relation, num_sentences),
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": lambda response, num_words, relation:
        _relation(len(re.findall(r"\w+", response)), relation, num_words),
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": lambda response, num_placeholders:
        len(re.findall(r"\[[^\n\[\]]*\]", response)) >= num_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": lambda response, num_bullets:
        len(re.findall(r"^[^\S\n]*(?:\*[^*]|-)", response, re.MULTILINE)) == num_bullets,
    "detectable_format:constrained_response": lambda response: any(answer in response for answer in ANSWERS),
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": lambda response, section_spliter, num_sections:
        len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", response)) >= num_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": lambda response, prompt_to_repeat:
        response.strip().lower().startswith(prompt_to_repeat.strip().lower()),
    "startend:end_checker": lambda response, end_phrase:
        response.strip().strip('"').lower().endswith(end_phrase.strip().lower()),
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": lambda response: response.isupper() and _is_language(response, "en"),
    "change_case:english_lowercase": lambda response: response.islower() and _is_language(response, "en"),
    "punctuation:no_comma": lambda response: "," not in response,
}


def read(record: dict) -> Problem:
    """A row of the set; ValueError for an unknown constraint, or one whose arguments do not fit."""
    prompt, names = record["prompt"], record["instruction_id_list"]
    if len(names) != len(record["kwargs"]) or not names:
        raise ValueError("instruction_id_list and kwargs do not fit")
    arguments = []
    for name, kwargs in zip(names, record["kwargs"]):
        kwargs = {key: value for key, value in (kwargs or {}).items() if value is not None}    # the hub's have them all
        if name not in CONSTRAINTS:
            raise ValueError(f"unknown constraint {name}")
        try:
            inspect.signature(CONSTRAINTS[name]).bind("", **kwargs)
            CONSTRAINTS[name]("A try.", **kwargs)
        except (TypeError, AttributeError, ValueError, re.error) as error:
            raise ValueError(f"{name}: {error}") from None
        arguments.append(kwargs)
    return Problem("", prompt, prompt, (), "", min(3, len(names)), {"constraints": list(names), "kwargs": arguments})


def followed(problem: Problem, response: str) -> list[bool]:
    """For each constraint whether the text after the chain of thought keeps it; a blank one keeps none."""
    text = response.rpartition("</think>")[2].lstrip("\n")
    usable = "<think>" not in text and text.strip() and len(text) <= MOST
    return [bool(usable and CONSTRAINTS[name](text, **kwargs))
            for name, kwargs in zip(problem.extra["constraints"], problem.extra["kwargs"])]


def reward(problem: Problem, response: str) -> float:
    """1.0 if every constraint is kept, strictly, else 0.0."""
    return float(all(followed(problem, response)))


def loose(problem: Problem, response: str) -> list[bool]:
    """As `followed`, if any of the official variants keeps it: without the first line, the last, both; without *."""
    lines = response.rpartition("</think>")[2].split("\n")
    if "<think>" in response and "</think>" not in response:
        return followed(problem, response)
    variants = ["\n".join(part).strip() for part in (lines, lines[1:], lines[:-1], lines[1:-1])]
    verdicts = [followed(problem, text) for v in variants for text in (v, v.replace("*", ""))]
    return [any(column) for column in zip(*verdicts)]
