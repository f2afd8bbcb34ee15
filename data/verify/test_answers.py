"""The verifier: what is the answer, what is equal, what is hostile."""

import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from data.verify import answers, symbolic
from data.verify.answers import Verifier, check_golds, decide, equal, final_answer, judge, reward

ANSWERS = {
    r"\boxed{5}": "5",
    r"a \boxed{3} then \boxed{\frac{1}{2}}.": r"\frac{1}{2}",
    r"\boxed{\{1,2\}}": r"\{1,2\}",
    r"\boxed 7": "7",
    r"\fbox{8}": "8",
    r"\boxed{5": None,
    r"\boxed{3} and \boxed{4": None,
    r"\boxed{}": None,
    r"\boxed{a{b}c}": "a{b}c",
    r"\boxed{a\}b}": r"a\}b",
    "work\n#### 1,200": "1,200",
    "#### 1\n#### 2\n": "2",
    "The answer is 12.": "12",
    "the final answer is: **3.5**.": "3.5",
    "Answer: 7\nmore": "7",
    "ANSWER IS $x$": "$x$",
    "The answer is 1. Or the answer is 2. Yes": "2",
    "**Answer:**\n\n$\\frac12$\n": "$\\frac12$",
    "answer: .5": ".5",
    "12": None,
    "": None,
    "<think>\\boxed{5}": None,
    "<think>\\boxed{4}</think>\\boxed{5}": "5",
    "</think>\\boxed{5}<think>": None,
    "<think>\\boxed{4}</think> no": None,
    "\\boxed{4}</think>5": None,
    "\\boxed{" + "1" * 1001 + "}": None,
    "\\boxed{" + "1" * 1000 + "}": "1" * 1000,
    "Answer: " + "1" * 1001: None,
    "#### 4 or\n": "4 or",
    "Answer: 4\n\\boxed{5}\n#### 6": "5",
    "Answer: 4\n#### 6": "6",
}


@pytest.mark.parametrize("response", ANSWERS)
def test_final_answer(response):
    assert final_answer(response) == ANSWERS[response]


SAME = r"""
5 | 5.0 | +5 | 05 | 5. | $5$ | \$5 | \text{5} | x = 5 | \frac{10}{2} | 10/2 | 5 \text{ cm}
5 | 5 apples | five
1,000 | 1000 | 1{,}000 | 1\,000 | 1,\!000 | 1.0e3 | 10^3 | 1 \times 10^3 | 1 thousand
\frac{1}{2} | 1/2 | 0.5 | .5 | \dfrac12 | \tfrac{1}{2} | \frac{2}{4} | 50\%
\frac{1}{2} | \left(\frac{1}{2}\right)
-\frac{3}{4} | -3/4 | -0.75 | \frac{-3}{4} | −0.75
2\frac{1}{2} | 2.5 | 5/2 | 2 1/2
50\% | 50 | 50 percent | 50%
5 \text{ cm}^2 | 5 | 5 \text{ square centimeters} | 5 cm^2
\$3.50 | 3.5 | 3.50 dollars
90^\circ | 90 | 90 degrees
(C) | C | \text{(C)} | C. | (C) 5
\text{east} | East | east
yes | Yes
(3, \frac{\pi}{2}) | (3,\pi/2) | \left( 3, \frac{\pi}{2} \right)
[2, \infty) | \left[2,\infty\right) | x \ge 2
\{1,2\} | {2, 1} | 1, 2 | 2 and 1
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{bmatrix}1\\2\end{bmatrix}
\frac{\sqrt{2}}{2} | 1/\sqrt{2} | \sqrt{2}/2
x^2+2x+1 | (x+1)^2 | 1+2x+x^2
2\pi | 2 \cdot \pi | \pi*2 | 2π
y = 2x + 3 | y=3+2x | 2x - y + 3 = 0
30 | 5(6) | (5)(6) | 2 \cdot 15
52_8 | 52 | 52_{8}
42 | 42_{10}
1 | 100\% | 1\%
x \in [-2,7] | -2 \le x \le 7 | [-2, 7]
(-\infty, 2) \cup (3, \infty) | x<2 or x>3
1 \pm \sqrt{19} | 1+\sqrt{19}, 1-\sqrt{19}
6-5i | -5i+6
120 | 5! | 120 miles per hour
10 \text{ m/s} | 10 | 10 meters per second
288\pi | 288 \pi \text{ cm}^3
two | 2
Tom and Sally | Sally, Tom
"""
OTHER = r"""
5 | 6 | -5 | 5.01 | 55 | 3 or 5 | 5, 6 | 5? | 5 hundred | 5x | 5 + 1 | x | [5] | 5!
1,000 | 1 | 1.000 | 100
\frac{1}{2} | 0.51 | 2 | 1/3 | 0.49999999999
\frac{1}{3} | 0.333 | 0.3333333333
50\% | 0.5 | 5 | 51
0.5 | 0.5\% | 5
5 \text{ cm} | 5 m | 5 cm^2 | 5 kg | 6
(C) | B | C or B | (C), (D) | (C)+1 | \text{(C)} or 30 | (C) maybe D | 5
\text{east} | seat | west | east or west | e a s t
(1,2) | (2,1) | [1,2] | (1,2] | \{1,2\} | (1,2,3) | 1
[2, \infty) | (2, \infty) | [3,\infty) | x > 2
\{1,2\} | {1} | {1,3} | {1,2,3}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix} 1 & 2 \end{pmatrix}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix} 2 \\ 1 \end{pmatrix}
x^2+2x+1 | x^2+2x | (x-1)^2 | x^2+2x+1+0.0001
\pi | 3.14 | 22/7 | 3.14159265358979
y = 2x + 3 | 2x + 4 = y | y = 3x + 2
42 | 42_8
52_8 | 42 | 52_9
11 | 5(6) | (5)(6)
12 | 2\binom{5}{2}
\frac{7}{2} | 3(1/2) | 3 \cdot \frac{1}{2}
\pi | 2\frac{1}{2}\pi
5 | 5 grand | 5 five | 5 sevenths | 5 thirty | 5 pairs | 5 plus six | 5 million | 5k | 2 3 | 5_8
50 | 0.5 | 500\%
\$5 | 5 cents | €5
r > 0 | x > 0 | r \ge 0 | r < 0
x = 5 | y = 5 | x = 6
x = 1, y = 2 | 2, 1 | x = 2, y = 1
\triangle ABC | \triangle | ABC
R^2 | r^2 | R
\frac{7}{2} | 2\frac{3}{2} | 2 3/2
x + y = y + x | x + y = 3
\sqrt{2} | 1.41421356237309504880168872420969807856967187537694807317667973799 | \sqrt{2}, -\sqrt{2}
"""


def rows(table):
    return [[cell.strip() for cell in line.split(" | ")] for line in table.strip().splitlines()]


@pytest.mark.parametrize("row", rows(SAME), ids=lambda r: r[0])
def test_equal(row):
    for answer in row:
        assert reward(row[0], f"\\boxed{{{answer}}}") == 1.0, answer


@pytest.mark.parametrize("row", rows(OTHER), ids=lambda r: r[0])
def test_not_equal(row):
    assert reward(row[0], f"\\boxed{{{row[0]}}}") == 1.0
    for answer in row[1:]:
        assert reward(row[0], f"\\boxed{{{answer}}}") == 0.0, answer


def test_what_is_wrong_for_sure_goes_to_nobody():
    with Verifier() as verifier:
        for gold, answer in [
            ("5", "5?"),
            ("5", "3 or 5"),
            ("x = 5", "y = 5"),
            ("east", "seat"),
            ("(C)", "30"),
            ("5", "9^{9^{9^9}}"),
            ("5", "95**95**95"),
            ("x", "(x^{99})^{99}"),
            ("5", "99!"),
            ("x", "x + " * 90 + "x"),
            ("5", "1" * 1001),
        ]:
            assert verifier.verify(gold, answer) is False, answer
        assert verifier.idle.queue == [None]  # none was started


HOSTILE = [
    "9^{9^{9^9}}",
    "9^9^9^9",
    "95**95**95",
    "(((9^{999})^{999})^{999})^{999}",
    "99999!",
    "((99!)!)!",
    "1e999999999",
    "10^{10^{10}}",
    "x^{99999}",
    "{" * 400,
    "9" * 900,
    "\\frac{" * 150,
    "\\sqrt{" * 150 + "5",
    "(" * 900,
    "x" * 300,
    "5, " * 300,
    "\\text{" * 200,
    "{" * 100_000 + "5" + "}" * 100_000,
    "5\0",
    "\ud800",
    "٥",
    "\u202e5",
    "5\u200b",
    "__import__('os')",
    r"\input{/etc/passwd}",
    "5;os._exit(0)",
    "5\\\\5",
    "''.join([])",
    "lambda: 5",
    "nan",
    "inf",
    r"\infty",
    r"\int_0^{5} 1 dx",
    r"\sum_{i=1}^{5} 1",
    r"\lim_{x\to 5} x",
    "5=5",
    "True",
    "x=x",
    "5|5",
    "5\n6",
    "0/0",
    "1/0",
    "the correct answer",
    "5 (or maybe 6)",
    "not 5",
    "5 or 6",
    "less than 5.1",
]


@pytest.mark.parametrize("answer", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_are_wrong_and_quick(answer):
    started = time.time()
    for gold in "5", r"\frac{\pi}{2}", "x+5", "(1,2)":
        assert reward(gold, f"\\boxed{{{answer}}}") == 0.0
    assert time.time() - started < 20


HUGE = [
    r"\boxed{" * 10**6,
    "{" * 10**6,
    r"\boxed{" + "{" * 10**6 + "}" * 10**6 + "}",
    "answer is " * 10**5,
    "#" * 10**6,
    "</think>" * 10**5,
    "$" * 10**6,
    r"\boxed{5" + " " * 10**6 + "}",
    "answer" + " " * 10**6,
]


@pytest.mark.parametrize("response", HUGE, ids=range(len(HUGE)))
def test_huge_responses(response):
    started = time.time()
    assert reward("5", response) == 0.0 and time.time() - started < 5


def pid(verifier: Verifier) -> int:
    worker = verifier.idle.get()
    verifier.idle.put(worker)
    return worker.pid


def test_a_worker_that_dies_or_never_ends_is_replaced():
    with Verifier(seconds=1) as verifier:
        assert verifier.verify(r"\frac{\pi}{2}", r"\pi/2") is True
        os.kill(pid(verifier), signal.SIGKILL)
        assert verifier.verify(r"\frac{\pi}{2}", r"\pi/2") is True
        threading.Timer(0.3, os.kill, (pid(verifier), signal.SIGKILL)).start()  # amid a question
        assert (
            verifier.verify(r"\pi", r"\binom{99999999}{49999999}") is False
        )  # which nothing answers in a second
        assert verifier.verify(r"\frac{\pi}{2}", r"\pi/2") is True


def test_many_threads_ask_at_once():
    with Verifier(workers=2) as verifier, ThreadPoolExecutor(8) as pool:
        halves = [rf"\frac{{{2 * n + n % 2}\pi}}{{2}}" for n in range(40)]
        verdicts = list(pool.map(lambda n: verifier.verify(rf"{n}\pi", halves[n]), range(40)))
    assert verdicts == [n % 2 == 0 for n in range(40)]


def test_none_where_the_verifier_itself_fails(monkeypatch):
    monkeypatch.setattr(symbolic, "START", 0.0)
    with Verifier() as verifier:
        with pytest.raises(symbolic.Failed):
            verifier.verify(r"\frac{\pi}{2}", r"\pi/2")
        monkeypatch.setattr(answers, "decide", verifier.verify)
        assert (
            reward(r"\frac{\pi}{2}", r"\boxed{\pi/2}") is None and reward("5", r"\boxed{5}") == 1.0
        )


def test_golds_and_other_wordings():
    golds = [
        "5",
        "x+1",
        "one of many different possible wordings of it all",
        "",
        r"\frac{1}{",
        "(A)",
        "east",
    ]
    assert check_golds(golds) == [2, 3, 4]
    assert decide("a long gold in words", "the same in other words") is None
    response = "\\boxed{the same in other words}"
    assert judge("a long gold in words", response) == (
        "a long gold in words",
        "the same in other words",
    )
    assert reward("a long gold in words", response) == 0.0
    assert judge("5", r"\boxed{6}") == 0.0  # what rules decide is not open
    assert judge("5", r"\boxed{5}") == 1.0 and judge("a long gold in words", "none") == 0.0


GOLDS = [
    "7919",
    r"\frac{355}{113}",
    "0.4375",
    r"(3,\frac{\pi}{2})",
    "east",
    r"\{1,2,86\}",
    "x^2+97",
    r"37\%",
]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(max_size=40), st.sampled_from(GOLDS))
def test_random_text_is_wrong(text, gold):
    assert equal(gold, text) is not True and reward(gold, text) == 0.0


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.fractions(-(10**6), 10**6, max_denominator=400), st.fractions(-99, 99, max_denominator=20)
)
def test_numbers_are_those_of_fractions(a, b):
    """Against Python's own exact arithmetic, in several spellings."""

    def spellings(x: Fraction) -> list[str]:
        texts = [f"{x.numerator}/{x.denominator}", rf"\frac{{{x.numerator}}}{{{x.denominator}}}"]
        if 10**6 % x.denominator == 0:
            texts.append(f"{float(x):.6f}")
        return texts + ([f"{x.numerator:,}", f"{x.numerator} apples"] if x.denominator == 1 else [])

    for gold in spellings(a):
        assert all(equal(gold, same) for same in spellings(a))
        assert all(equal(gold, other) is (a == b) for other in spellings(b))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(-4, 4), min_size=2, max_size=3), st.randoms(use_true_random=False))
def test_brackets_and_order_mean_what_they_mean(values, rng):
    brackets = ["()", "{}", "[]", "(]", "[)"] if len(values) == 2 else ["()", "{}"]
    others, kind, other_kind = (
        rng.sample(values, len(values)),
        rng.choice(brackets),
        rng.choice(brackets),
    )

    def text(kind, values):
        middle = ", ".join(f"{v}.0" if rng.random() < 0.3 else str(v) for v in values)
        return rf"\{{{middle}\}}" if kind == "{}" else rf"\left{kind[0]}{middle}\right{kind[1]}"

    expected = kind == other_kind and (
        sorted(values) == sorted(others) if kind == "{}" else values == others
    )
    assert equal(text(kind, values), text(other_kind, others)) is expected


def test_expressions_are_those_of_sympy():
    """Random expressions in two forms, and with a change: sympy knows whether they differ, and
    writes them.
    """
    rng, x, y = random.Random(0), *sympy.symbols("x y", real=True)
    leaves = [sympy.Rational(2, 3), sympy.Integer(-4), x, y, sympy.pi, sympy.sqrt(3), sympy.I]

    def expression(depth: int) -> sympy.Expr:
        if not depth or rng.random() < 0.2:
            return rng.choice(leaves)
        one, other = expression(depth - 1), expression(depth - 1)
        return rng.choice([one + other, one * other, one**2, sympy.sin(one), sympy.sqrt(one)])

    def write(value: sympy.Expr) -> str:
        return sympy.latex(value, ln_notation=True)

    for i in range(60):
        gold = expression(2)
        answer = rng.choice([sympy.expand, sympy.factor, sympy.together])(gold)
        wrong = rng.choice([gold + 1, 2 * gold + x, gold + sympy.Rational(1, 10**9), gold * x + y])
        assert decide(write(gold), write(answer)) is True, (gold, answer)
        assert decide(write(gold), write(wrong)) is False, (gold, wrong)
