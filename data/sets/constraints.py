"""Any prompts, joined with constraints of IFEval's 25 types: problems whose rewards are rules.

    constraints=PATH        the reward is 1 where a response meets all constraints, else 0
    constraints_share=PATH  the reward is the share of them that it meets: more signal for a model
                            that rarely meets all
    constraints_new=PATH    as `constraints`, but of combinations that the other two never have:
                            to see whether more was learned than these

Reinforcement learning on such problems is RLVR of Tülu 3 (arXiv 2411.15124, section 6), and with
several constraints a prompt IF-RLVR (arXiv 2507.02833). Drawing and words are ours; the verdicts
are those of data/sets/ifeval.py. None of IFEval's prompts is in here, but its types are: a gain on
IFEval says that these types were learned, not that any instruction is followed better.

PATH: one-turn prompts in .jsonl, .json or .parquet, in the column prompt, instruction (with an
input or context), question or problem, or as messages, of which the first user's is taken. A
prompt's text decides what it is joined with, one to three constraints, and by its hash whether it
is for "train", "dev" or "test": the same in every run.

Of all pairs of types that go together a fifth, by their hash, is new: no problem of `constraints`
holds both types of one, in any split, and each of `constraints_new` does.
"""
import functools
import itertools
import random
from collections.abc import Iterator, Sequence

from data.sets import ifeval
from data.tasks.problem import Problem, assign_split, between, pick, seeded_rng, shuffled

MOST = 3            # constraints of a prompt, as in IFEval
REPEATABLE = 200    # characters of a prompt that a response may be asked to repeat
NEW_SHARE = 0.2     # of the pairs of types

NAMES = {name.partition(":")[2]: name for name in ifeval.CONSTRAINTS}

# None holds another, nor j, q, x or z; so two constraints never ask for and forbid the same.
WORDS = tuple(
    "anchor basket bridge butter candle carpet castle cloud corner cotton desert dinner dragon "
    "engine family feather finger forest friend garden ginger hammer harbor honey hunter island "
    "kitchen ladder lantern leather letter lemon market meadow memory metal mirror morning "
    "mountain number ocean orange paper pencil people pepper planet pocket powder river rocket "
    "saddle season shadow silver spider spring summer sunset table teacher thunder ticket tiger "
    "travel tunnel valley village violin water weather window winter wonder yellow".split())
LANGUAGES = {"de": "German", "es": "Spanish", "fr": "French", "it": "Italian", "pt": "Portuguese"}
ENDINGS = ("That is all there is to say.", "I wish you good luck.", "Does this help you?",
           "Feel free to ask me more.", "The rest is up to you.")
BOTH = ("at least", "less than")

# ---- how each type is asked for: ways of it, each a text and the choices for what it names.
# Of keywords and forbidden words the choice is how many; other words come from WORDS
WAYS: dict[str, list[tuple[str, dict[str, Sequence]]]] = {
    "existence": [
        ("Include the words {keywords}.", {"keywords": (2, 3)}),
        ("Your answer must contain the word {keywords}.", {"keywords": (1,)}),
    ],
    "frequency": [
        ('Use the word "{keyword}" {relation} {frequency} times.',
         {"keyword": WORDS, "relation": BOTH, "frequency": range(2, 5)}),
    ],
    "forbidden_words": [
        ("Do not use any of these words: {forbidden_words}.", {"forbidden_words": (2, 3, 4)}),
        ("Avoid the word {forbidden_words}.", {"forbidden_words": (1,)}),
    ],
    "letter_frequency": [  # "less than" of rare ones alone, so that long answers can do it
        ("The letter {letter} must appear {let_relation} {let_frequency} times.",
         {"letter": "abcdefghiklmnoprstuvwy", "let_relation": BOTH[:1],
          "let_frequency": range(3, 13)}),
        ("Use the letter {letter} {let_relation} {let_frequency} times.",
         {"letter": "jqxz", "let_relation": BOTH, "let_frequency": range(2, 5)}),
    ],
    "response_language": [
        ("Answer in {language} only.", {"language": tuple(LANGUAGES)}),
        ("Your whole response must be in {language}; no other language is allowed.",
         {"language": tuple(LANGUAGES)}),
    ],
    "number_sentences": [
        ("Answer in {relation} {num_sentences} sentences.",
         {"relation": BOTH, "num_sentences": range(3, 9)}),
    ],
    "number_paragraphs": [
        ("Write {num_paragraphs} paragraphs, and divide them by a line of three asterisks: ***",
         {"num_paragraphs": range(2, 5)}),
    ],
    "number_words": [
        ("Answer in {relation} {num_words} words.",
         {"relation": BOTH, "num_words": range(40, 160, 10)}),
        ("The response should have {relation} {num_words} words.",
         {"relation": BOTH, "num_words": range(50, 200, 25)}),
    ],
    "nth_paragraph_first_word": [
        ("Write {num_paragraphs} paragraphs, divided by empty lines and nothing else. Paragraph "
         '{nth_paragraph} must begin with the word "{first_word}".',
         {"num_paragraphs": (2, 3, 4), "nth_paragraph": (1, 2), "first_word": WORDS}),
    ],
    "number_placeholders": [
        ("Put in at least {num_placeholders} placeholders in square brackets, such as [name].",
         {"num_placeholders": range(2, 5)}),
    ],
    "postscript": [
        ("Add a postscript at the end, which begins with {postscript_marker}",
         {"postscript_marker": ("P.S.", "P.P.S")}),
    ],
    "number_bullet_lists": [
        ("Give exactly {num_bullets} bullet points, in markdown, such as: * This is a point.",
         {"num_bullets": range(2, 6)}),
    ],
    "constrained_response": [
        ("Answer with one of these sentences: " + " ".join(ifeval.OPTIONS), {}),
    ],
    "number_highlighted_sections": [
        ("Highlight at least {num_highlights} parts of your answer in markdown, like *this part*.",
         {"num_highlights": range(2, 5)}),
    ],
    "multiple_sections": [
        ("Divide your answer into {num_sections} sections. Begin each with {section_spliter} and "
         "its number, as in: {section_spliter} 1",
         {"num_sections": range(2, 5), "section_spliter": ("SECTION", "Section", "PART")}),
    ],
    "json_format": [
        ("Wrap the whole answer in JSON; markdown's ``` around it is fine.", {}),
        ("The whole output must be valid JSON.", {}),
    ],
    "title": [
        ("Give your answer a title in double angular brackets, such as <<a title>>.", {}),
    ],
    "two_responses": [
        ("Give two different answers, with six asterisks and nothing else between them: ******",
         {}),
    ],
    "repeat_prompt": [
        ("But first repeat this request without its conditions, word for word; then answer it.",
         {}),
    ],
    "end_checker": [
        ('End with exactly this, and with nothing behind it: "{end_phrase}"',
         {"end_phrase": ENDINGS}),
    ],
    "quotation": [
        ("Put your whole answer in double quotation marks.", {}),
    ],
    "capital_word_frequency": [
        ("Write {capital_relation} {capital_frequency} words in capital letters alone.",
         {"capital_relation": BOTH, "capital_frequency": range(2, 7)}),
    ],
    "english_capital": [
        ("Answer in English, and in capital letters alone.", {}),
    ],
    "english_lowercase": [
        ("Answer in English, all in small letters; no capital letter is allowed.", {}),
    ],
    "no_comma": [
        ("Do not use a comma.", {}),
        ("Your answer must not contain any commas.", {}),
    ],
}

# ---- what goes together

ONLY_WITH = {  # types that decide the whole form, and the only ones that they go with
    "constrained_response": (),
    "json_format": ("existence", "frequency", "forbidden_words", "letter_frequency"),
    "two_responses": ("existence", "frequency", "forbidden_words", "letter_frequency",
                      "response_language", "no_comma"),
    "repeat_prompt": ("existence", "number_placeholders", "postscript", "title", "end_checker",
                      "number_highlighted_sections"),
    "response_language": ("two_responses", "number_sentences", "number_paragraphs", "title",
                          "number_placeholders", "number_bullet_lists", "quotation", "no_comma",
                          "number_highlighted_sections"),
}
CLASHES = [  # of each of these one at most
    {"number_sentences", "number_words"},
    {"number_paragraphs", "nth_paragraph_first_word"},
    {"nth_paragraph_first_word", "multiple_sections"},
    {"english_capital", "english_lowercase", "capital_word_frequency", "multiple_sections"},
]


@functools.cache
def go_together(one: str, other: str) -> bool:
    if other not in ONLY_WITH.get(one, NAMES) or one not in ONLY_WITH.get(other, NAMES):
        return False
    return not any({one, other} <= clash for clash in CLASHES)


@functools.cache
def new_pairs() -> frozenset[frozenset[str]]:
    """The pairs of types that only `constraints_new` has."""
    pairs = []
    for one, other in itertools.combinations(sorted(NAMES), 2):
        is_new = seeded_rng("new pair", one, other).random() < NEW_SHARE
        if is_new and go_together(one, other):
            pairs.append(frozenset((one, other)))
    return frozenset(pairs)


def has_new_pair(names: Sequence[str]) -> bool:
    pairs = map(frozenset, itertools.combinations(names, 2))
    return not new_pairs().isdisjoint(pairs)


# ---- a problem

def read(record: dict) -> Problem:
    """The problem of a prompt, by seen combinations of constraints."""
    return join(find_prompt(record), is_new=False)


def read_new(record: dict) -> Problem:
    """The problem of a prompt, by a combination that is held out."""
    return join(find_prompt(record), is_new=True)


def find_prompt(record: dict) -> str:
    """The request of a row. KeyError where it has none of the columns; ValueError for no text."""
    columns = ("prompt", "instruction", "question", "problem", "messages", "conversations")
    column = next((column for column in columns if record.get(column)), None)
    if column is None:
        raise KeyError("prompt")
    prompt = record[column]
    if isinstance(prompt, list):
        roles = [message.get("role") or message.get("from") for message in prompt]
        if roles[:1] not in (["user"], ["human"]):
            raise ValueError("does not begin with a user")
        prompt = prompt[0].get("content") or prompt[0].get("value")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("prompt without a text")
    more = record.get("input") or record.get("context")
    if column == "instruction" and isinstance(more, str):
        prompt = f"{prompt.strip()}\n\n{more}"
    return prompt.strip()


def join(prompt: str, is_new: bool) -> Problem:
    rng = seeded_rng("constraints", is_new, prompt)
    names = draw_names(rng, prompt, is_new)
    words = iter(shuffled(rng, WORDS))
    texts, kwargs = [], []
    for name in names:
        text, values = draw_constraint(rng, name, prompt, words)
        texts.append(text)
        kwargs.append(values)
    layout = pick(rng, (" {}", "\n{}", "\n\n{}"))
    question = prompt + layout.replace("{}", " ".join(texts))
    extra = {
        "instructions": [NAMES[name] for name in names],
        "kwargs": kwargs,
        "prompt": question,
        "split": assign_split(prompt),
    }
    return Problem("constraints", prompt, question, (), "", len(names), extra)


def draw_names(rng: random.Random, prompt: str, is_new: bool) -> list[str]:
    """One to MOST types that go together; with a new pair two at least."""
    excluded = set() if len(prompt) <= REPEATABLE else {"repeat_prompt"}
    names = []
    if is_new:
        pairs = [sorted(pair) for pair in new_pairs() if not pair & excluded]
        names = pick(rng, sorted(pairs))
    size = between(rng, max(1, len(names)), MOST)
    for name in shuffled(rng, sorted(NAMES.keys() - excluded)):
        fits = name not in names and all(go_together(name, other) for other in names)
        if len(names) < size and fits and (is_new or not has_new_pair([*names, name])):
            names.append(name)
    return names


def draw_constraint(rng: random.Random, name: str, prompt: str, words: Iterator[str]
                    ) -> tuple[str, dict]:
    """The sentence that asks for it, and its values, as IFEval names them.

    words: those of WORDS that no other constraint of the prompt has.
    """
    text, choices = pick(rng, WAYS[name])
    values = {}
    for key, options in choices.items():
        if options is WORDS:
            values[key] = next(words)
        elif key in ("keywords", "forbidden_words"):
            values[key] = list(itertools.islice(words, pick(rng, options)))
        else:
            values[key] = pick(rng, options)
    shown = {key: show(value) for key, value in values.items()}
    if name == "repeat_prompt":
        values["prompt_to_repeat"] = prompt
    return text.format_map(shown), values


def show(value: str | int | list[str]) -> str:
    """A value as the sentence has it."""
    if isinstance(value, list):
        return ", ".join(f'"{word}"' for word in value)
    return LANGUAGES.get(value, str(value))
