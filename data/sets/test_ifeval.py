"""IFEval: each constraint on responses judged by hand, records as they come, responses that mean
harm.
"""

import random
import threading
import time

import pytest

from data.sets import ifeval
from data.sets.ifeval import CONSTRAINTS, followed, read, reward

LEAST, LESS = {"relation": "at least"}, {"relation": "less than"}
ENGLISH = (
    "This is a plain sentence in the English language, "
    "and it is long enough to be told from others."
)
GERMAN = "Das ist ein kurzer deutscher Satz über das Wetter in der Stadt, und er ist lang genug."
CASES = [  # constraint, kwargs, right responses, wrong ones
    (
        "keywords:existence",
        {"keywords": ["sun", "Sea"]},
        ["The SEA and sunlight."],
        ["The sun.", "sea su n"],
    ),
    (
        "keywords:frequency",
        {"keyword": "cat", "frequency": 2} | LEAST,
        ["Cat, concatenate"],
        ["a cat"],
    ),
    ("keywords:frequency", {"keyword": "a.c", "frequency": 1} | LESS, ["abc"], ["a.c"]),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["cat", "dog"]},
        ["concatenate", "cat_"],
        ["A CAT!", "my dog"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "q", "let_frequency": 2, "let_relation": "at least"},
        ["Qq"],
        ["q"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "#", "let_frequency": 2, "let_relation": "less than"},
        ["#a"],
        ["##"],
    ),
    ("language:response_language", {"language": "de"}, [GERMAN, "1234 !"], [ENGLISH]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3} | LEAST,
        ["One. Two! Three?", "1. Eat. Go", '"Eh?" Bee. See'],
        ["One. Two", "One\n\nTwo\n\nThree", "Mr. Ax met Dr. By in the U.S. Army. Yes... no."],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2} | LESS,
        ["One, two"],
        ["One. Two."],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***a***b***"],
        ["a", "a***b***c", "a***\n***b", "a\n\nb"],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3} | LEAST,
        ["it's so"],
        ["two words", "a_b c"],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3} | LESS,
        ["two words"],
        ["now three words"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Two"},
        ["One.\n\nTWO, b", 'a\n\n\'"two" b', "a\n\n two's"],
        ["two\n\na", "a\n\nb\n\ntwo", "a\n\n**Two**", "a\n\n\n\ntwo", "a"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[a] [[b]", "[]x[y]"],
        ["[a]", "[a\n] [b]"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Hi\nP.S. x", "p. s. x"],
        ["PS", "P.S"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        ["p.p. sorry", "P.P.S"],
        ["P.S.", "PPS"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "N.B."}, ["n.b. x"], ["nxbx"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "* a\n\n - b\ntext", "* a\n--"],
        ["* a", "* a\n** b", "* a\n* b\n- c", "x * a\n* b", "* a\n*", "*\n* a"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is maybe.", "So: My answer is no. !"],
        ["my answer is no."],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* *b*", "**a** *b*", "*a**b*"],
        ["*a*", "** ** *a*", "*a\nb* *c*", "* *a*"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2", "**SECTION1 SECTION\n2"],
        ["SECTION 1", "Section 1 Section 2", "SECTION  1 SECTION  2"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": 1}', "```json\n[1]\n```", "```\nNaN```", "1"],
        ["{'a': 1}", 'So: {"a": 1}', "```", '{"a": 1}{}', "9" * 5000],
    ),
    (
        "detectable_format:title",
        {},
        ["<<a>>", "x <<<b>> c>>", "<<>>\n<<a>>"],
        ["<a>", "<<>>", "<< >>", "<<a\nb>>", "<<<>>>"],
    ),
    (
        "combination:two_responses",
        {},
        ["a******b", "******\na\n******\nb\n******"],
        ["a", "a****** a", "a******b******c", "a******\n******b"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Say it. "},
        [" say IT. Yes"],
        ["Well, say it.", "Say  it."],
    ),
    (
        "startend:end_checker",
        {"end_phrase": "The End. "},
        ["So. the end.", 'So "the end."\n'],
        ["The end. So.", "The end.'"],
    ),
    ("startend:quotation", {}, ['"a"', ' "a" "b"\n'], ['"', "“a”", '"a".', "a"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 3, "capital_relation": "at least"},
        [
            "NASA's big U.S. DAY.",
            "I DON'T",
            "A,B C",
            "I'm, I'll, I'd",
            "CANNOT go I",
            "ONE—TWO*THREE*",
        ],
        ["A big DAY", "A,5B C", "A-B-C", "ABC's", "Can't I AND"],
    ),
    ("change_case:english_capital", {}, [ENGLISH.upper()], [ENGLISH, GERMAN.upper(), "1 2"]),
    ("change_case:english_lowercase", {}, [ENGLISH.lower()], [ENGLISH, GERMAN.lower(), "1 2"]),
    ("punctuation:no_comma", {}, ["a; b", "a， b"], ["a, b"]),
]


def record(*constraints, prompt="Do it.", key=7):
    return {
        "key": key,
        "prompt": prompt,
        "instruction_id_list": [name for name, _ in constraints],
        "kwargs": [kwargs for _, kwargs in constraints],
    }


def test_every_constraint_has_cases():
    assert {name for name, *_ in CASES} == set(CONSTRAINTS) and len(CONSTRAINTS) == 25


@pytest.mark.parametrize("name, kwargs, right, wrong", CASES)
def test_constraints(name, kwargs, right, wrong):
    problem = read(record((name, kwargs)))
    for responses, expected in ((right, 1.0), (wrong, 0.0), (["", " \n\t"], 0.0)):
        for response in responses:
            assert reward(problem, response) == expected, response
            assert (
                reward(problem, f"<think>\n{GERMAN}, *a* [b]\n</think>\n\n{response}") == expected
            ), response
            assert (
                reward(problem, f"<think>\n{response}")
                == reward(problem, f"</think>x<think>{response}")
                == 0.0
            )


def test_prompts_are_kept_as_a_whole():
    problem = read(
        record(
            ("punctuation:no_comma", {}),
            ("startend:quotation", {}),
            ("detectable_format:title", {}),
            ("keywords:existence", {"keywords": ["a"]}),
        )
    )
    assert (problem.family, problem.key, problem.question, problem.answer) == (
        "ifeval",
        "ifeval 7",
        "Do it.",
        "",
    )
    assert problem.level == 3 and problem.extra["prompt"] == "Do it."
    assert followed(problem, '"<<a>>"') == [True] * 4 and reward(problem, '"<<a>>"') == 1.0
    assert (
        followed(problem, "<<b, c>>") == [False, False, True, False]
        and reward(problem, '"<<a>>,"') == 0.0
    )


@pytest.mark.parametrize(
    "response", ['Sure:\n"a"', '"a"\nBye.', 'Sure:\n\n"a"\nBye.', '**"a"**', 'Sure:\n*"a"*\nBye.']
)
def test_loose(response):
    problem = read(record(("startend:quotation", {})))
    assert followed(problem, response) == [False] and followed(problem, response, loose=True) == [
        True
    ]
    assert (
        followed(problem, f"<think>\n{response}", loose=True)
        == [False]
        == followed(problem, 'a "b"', loose=True)
    )
    assert followed(problem, '"a"', loose=True) == [True]


def test_nulls_of_the_parquet_are_no_kwargs():
    every = dict.fromkeys(key for _, kwargs, *_ in CASES for key in kwargs)
    for name, kwargs, *_ in CASES:
        assert read(record((name, every | kwargs))) == read(record((name, kwargs)))
    assert read(record(("punctuation:no_comma", None))) == read(
        record(("punctuation:no_comma", {"keywords": []}))
    )


@pytest.mark.parametrize(
    "name, kwargs, message",
    [
        ("keywords:rhyme", {}, "unknown constraint 'keywords:rhyme'"),
        ("keywords:frequency", {"keyword": "a", "frequency": 1}, "keywords:frequency: no relation"),
        (
            "keywords:frequency",
            {"keyword": "a", "frequency": 1, "relation": "about"},
            "frequency: relation is 'about'",
        ),
        (
            "keywords:frequency",
            {"keyword": "a", "frequency": 0} | LEAST,
            "frequency: frequency is 0",
        ),
        (
            "keywords:frequency",
            {"keyword": "a", "frequency": True} | LEAST,
            "frequency: frequency is True",
        ),
        (
            "keywords:frequency",
            {"keyword": " ", "frequency": 1} | LEAST,
            "frequency: keyword is ' '",
        ),
        ("keywords:existence", {"keywords": "sun"}, "existence: keywords is 'sun'"),
        ("keywords:existence", {"keywords": ["a", 1]}, "existence: keywords is"),
        ("keywords:existence", {"keywords": []}, "existence: no keywords"),
        ("punctuation:no_comma", {"language": "de"}, "no_comma: unknown language"),
        (
            "length_constraints:number_words",
            {"num_words": "3"} | LEAST,
            "number_words: num_words is '3'",
        ),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "a"},
            "first_word: nth_paragraph is 3 of 2",
        ),
    ],
)
def test_malformed_kwargs(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        read(record((name, kwargs)))


def test_malformed_records():
    for change in ({"kwargs": []}, {"instruction_id_list": [], "kwargs": []}, {"prompt": None}):
        with pytest.raises(ValueError, match="constraints, and kwargs"):
            read(record(("punctuation:no_comma", {})) | change)


LONG = 100_000
HOSTILE = [
    "[" * LONG,
    "<" * LONG,
    "*" * LONG,
    "\n" * LONG + "x",
    " " * LONG + "x",
    "a." * LONG,
    "]" * LONG,
    "A'S" * LONG,
    "\0\ud800" * LONG,
    ".) " * LONG,
    "<<" * LONG + ">",
    "p. " * LONG,
    "P" * 10**6,
    "a@" * LONG,
    "]>> " * LONG,
    "[" * LONG + "]" * LONG,
]


@pytest.mark.parametrize("response", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_responses(response):
    problem = read(record(*((name, kwargs) for name, kwargs, *_ in CASES)))
    started = time.process_time()
    assert reward(problem, response) == 0.0
    assert time.process_time() - started < 5


def test_language_is_the_same_in_every_run_and_thread():
    """A text of no clear language, judged by threads that start at once; the global dice stay as
    they were.
    """
    ifeval.detectors.cache_clear()
    random.seed(1)
    before, verdicts = random.getstate(), []
    threads = [
        threading.Thread(
            target=lambda: verdicts.append(ifeval.is_language("hotel radio taxi", "en"))
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(verdicts) == 3 and len(set(verdicts)) == 1 and random.getstate() == before
    assert ifeval.detectors().seed == 0


@pytest.mark.parametrize(
    "text, count",
    [
        ("Mr. Ax and Mrs. By left. He came.", 2),
        ("At 5 p.m. Tuesday.", 1),
        ("It was 5 p.m. The sun set.", 2),
        ("J. Bach", 1),
        ("Wait... what? Oh", 2),
        ("**Bold.** *So!* (Yes.) “No.” End", 5),
        ("A 3.5 m wall", 1),
        ("1. Go.\n2. Stay", 4),
        ("It is I. You", 2),
        ("on 1. may", 1),
        ("", 0),
    ],
)
def test_sentences(text, count):
    assert len(ifeval.sentences(text)) == count
