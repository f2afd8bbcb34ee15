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
    "### Answer\n7": "7",
    "#### Answer\n7": "7",  # a heading, and not GSM8K's mark
    "#### Conclusion\nThe answer is 7.": "7",
    "##### Answer\n7": "7",
    " #### Answer\n7": "7",
    "#### **Answer:** 7": "7",
    "####\nThe answer is 7.": "7",
    "#### 结论\n答案是 7": "7",
    "#### Step 3: Add\nThe answer is 7.": "7",
    "#### 3. Conclusion\nThe answer is 7.": "7",
    "#### blue": "blue",
    "#### $1,200\nSo the answer is above.": "$1,200",
    "#### 5\n\nNote: the answer is in dollars.": "5",
    r"\boxed{5}": "5",
    r"a \boxed{3} then \boxed{\frac{1}{2}}.": r"\frac{1}{2}",
    r"\boxed{\{1,2\}}": r"\{1,2\}",
    r"\boxed 7": "7",
    r"\boxed{\boxed{5}}": "{5}",
    r"\boxed{10-\boxed{5}}": "10-{5}",
    r"\boxed{\boxed{3}, \boxed{5}}": "{3}, {5}",
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
\frac{1}{2} | 1/2 | 0.5 | .5 | \dfrac12 | \tfrac{1}{2} | \frac{2}{4}
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
1 | 1\%
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
\frac{1}{2} | 0.51 | 50\% | 2 | 1/3 | 0.49999999999
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
    lines = [line for line in table.strip().splitlines() if not line.startswith("# ")]
    return [[cell.strip() for cell in line.split(" | ")] for line in lines]


@pytest.mark.parametrize("row", rows(SAME), ids=lambda r: r[0])
def test_equal(row):
    for answer in row:
        assert reward(row[0], f"\\boxed{{{answer}}}") == 1.0, answer


@pytest.mark.parametrize("row", rows(OTHER), ids=lambda r: r[0])
def test_not_equal(row):
    assert reward(row[0], f"\\boxed{{{row[0]}}}") == 1.0
    for answer in row[1:]:
        assert reward(row[0], f"\\boxed{{{answer}}}") == 0.0, answer


# Forms that people and models write, a kind a line: the gold, then what is right, or wrong, for it.
# A form in which no answer is named stands in a box.
RIGHT_FORMS = r"""
1000 | 1 000 | 1'000 | 1’000 | 1{,}000 | 1 000 dollars | \$1 000 | １，０００
B | The answer is option B. | Choice B | b | (b) | Option (B) | The answer is (B).
B | \text{Option B} | The correct option is B. | 选B | 答案选B | 答案是B。 | (b) 5
B | The correct choice is (B) 5 | **Answer: B** | B.
5 | 答案：5 | 答案是5。 | 5元 | 5个 | 5个苹果 | 5 米 | ５
5 | 答案为：5。 | 最终答案：5 | 5平方米 | 5\text{元} | 5 小时
50 | 百分之50
50000 | 5万 | 5万元
(1,2) | （1，2） | (x,y)=(1,2) | (x, y) = (1, 2) | \langle 1,2\rangle | x=1, y=2 | x = 1 and y = 2
x=5 | ｘ＝５ | x＝5
1234567 | 1 234 567 | 1'234'567
1234.5 | 1.234,5 | 1 234.5 | 1'234.5 | 1,234.5 | 1.234,50
1/2 | ½ | {1 \over 2} | 1 \over 2 | \nicefrac12 | \nicefrac{1}{2} | \sfrac12 | \sfrac{1}{2} | 1⁄2
5/2 | 2½ | 2 ½ | 2.5
1/3 | 0.\overline{3} | 0.\bar{3} | .\overline{3} | 0.\overline3
7/6 | 1.1\overline{6}
5 | 5\frac{\text{m}}{\text{s}} | 5\ \frac{\mathrm{m}}{\mathrm{s}} | 5\,\Omega | 5 Ω
5 | 5 meters per second | 5\,\text{m/s}^2 | 5 m/s | 5 kilos | 5 Watts | 5 \text{ N}
5 | 5 \text{ kWh}
20 | 20°C | 20 °C | 20^\circ\text{C} | 20^\circ C | 20℃ | 20 degrees Celsius | 20\degree C
5 m | 5 meters | 5\text{ m} | 5 m | 5 metres
5 \text{ m} | 5 m | 5 meters | 5 米
10 | USD 10 | Rs. 10 | Rs 10 | US$10 | US\$10 | €10 | 10 € | EUR 10 | 10 USD | 10$ | ¥10
10 | The answer is Rs. 10. | £10 | INR 10
3 | 3rd | 3^{\text{rd}} | 3^{rd} | 3 rd
11 | 11th | eleven
12:30 | 12:30 PM | 12:30 p.m. | 12:30pm | 12:30\text{ PM}
3:00 PM | 15:00 | 3 PM | 3:00 p.m.
3:4 | 3 to 4 | 3 : 4 | 3\text{ to }4 | 3：4 | 3\colon 4
0.001 | 10^{-3} | 1 \times 10^{-3} | 1e-3 | 10⁻³
10^{-3} | 0.001 | 1/1000
1500 | 1.5 x 10^3 | 1.5×10³
\{1,2\} | \lbrace 1, 2\rbrace | \left\lbrace 1,2 \right\rbrace | ｛1，2｝
\emptyset | \varnothing | ∅ | \{\} | \{ \} | empty set | the empty set
(-1,1) | -1<x<1 | -1 < x < 1 | (−1, 1) | x \in (-1,1) | 1 > x > -1
(3,\infty) | x>3 | \{x \mid x>3\} | \{ x : x > 3 \} | 3<x
\begin{pmatrix}1\\2\end{pmatrix} | \left[\begin{array}{c}1\\2\end{array}\right]
\begin{pmatrix}1\\2\end{pmatrix} | \begin{bmatrix}1\\2\end{bmatrix}
\begin{pmatrix}1\\2\end{pmatrix} | \left(\begin{array}{c} 1 \\ 2 \end{array}\right)
\begin{pmatrix}1\\2\end{pmatrix} | \left[\begin{matrix}1\\2\end{matrix}\right]
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \left[\begin{array}{cc}1&2\\3&4\end{array}\right]
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \left[\begin{array}{c|c}1&2\\3&4\end{array}\right]
5 | The answer is 5! | **Answer:** 5 | The final answer is **5**. | ## Answer: 5
5 | The answer to the question is 5. | The answer is $5$. | The answer is 5 because 2 + 3 = 5.
5 | The answer is x = 5. | 答：5 | Final answer: \(5\) | The answer would be 5.
5 | The answer is \textbf{5}.
72 | The answer is 72 clips, altogether. | The answer is 72 clips.
72 | The answer is 72 clips in total. | The answer is 72 red clips. | 72 clips | 72\text{ clips}
72 | seventy-two | Seventy-two clips | 72 hair clips left | The answer is 72 more clips.
72 | 72 people | 72 years old | \$72 per day | 72 dollars every day | \$72 a week | \$72 each
72 | 72 cups of water | 72 inches tall | 72 times | 72 logs
1 | 1 apple | one apple | 1st
460 | \text{The answer is 460} | \text{The answer is } 460 | \text{Answer: } 460
460 | four hundred sixty | four hundred and sixty | 460.00
21 | twenty-one | twenty one | Twenty-One
2305 | two thousand three hundred five | two thousand, three hundred and five
\text{no solution} | There is no solution | No solutions | There are no solutions.
\text{no solution} | no solution exists | The equation has no solution
3, 5 | $x=\boxed{3}$, $y=\boxed{5}$ | \boxed{3} and \boxed{5} | \boxed{5}, \boxed{3}
5 | \boxed{3}, so \boxed{5}
120 | 5! | \boxed{5!}
500 | five hundred | 5 hundred
-5 | negative five | minus 5 | －5 | –5
2/3 | two-thirds | two thirds | ⅔ | 0.\dot{6}
1/2 | one half | one-half | ½ cup
5 | HK$5 | C$5 | CAD 5 | 5 CAD | = 5 | 5\,\mathrm{k\Omega} | 5\mu\text{m} | 5 元/个
B | [B] | The answer is B because 2 is prime.
(-\infty,\infty) | \mathbb{R} | x \in \mathbb R | all real numbers
yes | Yes! | YES
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix} 1 & 2 \\[2pt] 3 & 4 \end{pmatrix}
"""
WRONG_FORMS = r"""
B | \boxed{(B) maybe (d)} | (B) rather c | (B) or (C) | b or c | (B), (C) | c | (B) is wrong
B | (B) d | not B | option C | options B and C
A | (A) b | (A) incorrect
b | B
5 | 5 wrong | 5 tripled | 5 halved | 5 kilo | 5 xyz | 5... | 5, | 5%% | 5 googol | 5 false
5 | 5 incorrect | 5 approx | 5\text{ wrong} | 5 dozens | 5 pairs | 5 ± 1 | ~5 | ≈5 | about 5 | 5;
5 | , 5 | 5 cm kg | 5 sixths | 5 of 6 | 5% of x | 5万 | 5半 | 5倍 | 5左右 | 5 halves of it
5 | 5 perhaps
5 | 5 guess | 5… | 5.. | 3 to 5 | 5:5 | 5 times two | 5 times x | 5 vs | 5 dozen eggs
5 | 5 hundred apples
5 | \boxed{3} or \boxed{5} | \boxed{3}, \boxed{5} | 5\text{ wrong}^2 | 5 unlike | five hundred
5 | five six | fifty | 5fifth | 5 PM or 6 PM | not 5 | 5 not | The answer is not 5. | 5 k | 5!!
5 | 5x | 5 x
3 | 3th | 3st | 3 thirds | 3rds
50 | 0.5 | 50%% | 50% off or so
0.5 | 50% | 0.5% | 50\%
1/2 | 50% | 2½ | ½% | ½ ½
12:30 PM | 12:30 AM | 12:30 | 12:31 PM | 0:30
3:4 | 4:3 | 3 to 5 | 3 | 3 to 4 to 5
1234.5 | 1.234,6 | 12.34,5
1.234 | 1.234,5
1000 | 1 00 | 1 0000 | 10 00 | 1'00 | 1 000 000 | 1 | 1, 000
2 | 2 000 | 2'000 | 2½
1/3 | 0.3 | 0.333... | 0.\overline{33}4 | 0.3\overline{4} | 3.\overline{3}
5 \text{ m} | 5 s | 5 cm | 5\text{ g} | 5 m^2 | 5 kg
20°C | 20°F
(1,2) | (x,y)=(2,1) | x=2, y=1 | (1,2,) | （2，1）
(-1,1) | -1<x\le 1 | -1<x<2 | [-1,1]
\begin{pmatrix}1\\2\end{pmatrix} | \left[\begin{array}{c}2\\1\end{array}\right]
\begin{pmatrix}1\\2\end{pmatrix} | \left[\begin{array}{cc}1&2\end{array}\right]
\begin{pmatrix}1\\2\end{pmatrix} | \left|\begin{array}{c}1\\2\end{array}\right|
\emptyset | 0 | \{0\}
10 | USD 100 | Rs. 1 | 10 cents USD
\$10 | €10 | 10 cents | 10 euros
72 | The answer is 72 wrong. | 72 clips or 73 clips | The answer is 72 clips, or 73. | 72 maybe
72 | 72 clips 5 | 72 thousand clips | seventy-three
21 | twenty | twenty-two | twenty-one thousand
\text{no solution} | one solution | There is a solution | no real solution or one
3, 5 | \boxed{3} | $x=\boxed{3}$, so $y=\boxed{5}$ | 3, 5,
5 | \boxed{\mm, 3} | \boxed{\pp, 3}
# tricks
B | (B) perhaps | (B) (C) | (B)(C) | B/C | B-C | B, not C | \text{B or C} | (B) wait (C)
B | \text{(B) no, (C)} | (B) the other is c | (B) x or (c) y | B?? | any of A-D
B | (B) 5 (C) 6 | (b) 5 (c) 6 | BC | B B | B \text{ and } C | all of the above | A, B | b c
B | bc | The answer is not B. | The answer is B or C. | The answer is either B or C.
B | option B or C | B和C | B或C | 选B或C | 选BC | 不选B | \boxed{B}, \boxed{C}
5 | 5 m/ | 5/ | 5 per | 5 = 6 | 5=6 | x = 5 = 6 | 5 \neq 6 | 5 \text{ or } 6 | 5 / 6 | 5 \ 6
5 | 56 | 5 6 | 5\,6 | {5}{6} | 5^{1}6 | 5 - 6 | 5-6 | 5–6 | [5,6] | (5,6) | between 5 and 6
5 | 5 to 6 | 5 (or 6) | 5 (6) | 5, i.e. 6 | 5 \to 6 | 5 \approx 6 | 5 apples and 6
5 | 5 apples, 6 pears | 5 million | 5 thousand | 5 trillion | 5 hundreds | 5 tens
5 | 5 billions | 5千 | 5百 | 5亿 | 5 squared | 5^2 | 5! | 5!! | -5 | +-5 | \pm 5 | 5i
5 | 5\% of 10 | 5 percent of 10 | 5 parts of 6 | 5 sixths of it | 5 of 6 parts | 5 halves
5 | 5 doubles | 5 triples | 5 scores | 5 pair of shoes | 5 couples | 5 less | 5 more than 6
5 | 5 fewer | 5 more | 5 remaining plus 6 | 5 left over 6 | more than 5 | at least 5
5 | at most 5 | <5 | >5 | \ge 5 | 5+ | 5- | 5' | 5'' | #5 | @5 | 5e | 5e0x | 0x5 | 5_6
5 | 5_{10}6 | 5 base 6 | 5 mod 6 | 5 \pmod 6 | 5 \bmod 6 | n=5k | 5k | 5n | five or six
5 | five hundred | fifty five | five six | one five | five million | minus five
5 | five sixths | 5 fifths | 5 wrongs | 5 falses | 5 nots | 5 unsure | 5 guessed
5 | 5 probable | 5 unless 6 | 5 zeros | 5 zeroes | 5 digits 6 | 5\text{ or so} | 5\text{ish}
5 | 5 \text{ish} | about five | around 5 | ca. 5 | 5±0 | 5 \pm 0.1 | 5.0.0 | 5..
5 | 5:00 AM or 6 | 5:30 | 5:00:30 | 5 AM 6 PM | 25:00 | 5 ratio 1 | 5:1 | five:one | 5 个半
5 | 5个左右 | 5多 | 约5 | 大约5 | 5以上 | 第5或6 | 5或6 | 5和6 | 不是5 | The answer is about 5.
5 | The answer is between 5 and 6. | The answer is 5 or 6. | The answer is 5, or maybe 6.
5 | The answer is at least 5. | The answer is 5-6. | The answer is 5/6.
5 | The answer is not known. 5 | Answer: 6 or 5 | 答案不是5。 | 答案是5或6。 | 答案是5左右。
5 | \boxed{5} or \boxed{6} | \boxed{5}\boxed{6} | \boxed{6}\boxed{5} | \boxed{6}/\boxed{5}
5 | \boxed{\boxed{6}, 5} | \boxed{6 \boxed{5}} | \boxed{\text{not }\boxed{5}}
5 | \boxed{-\boxed{5}} | \boxed{9-\boxed{5}} | \boxed{\frac{\boxed{5}}{2}}
50 | 50% less | 50% more | 50% of 80 | 50 percent off | 5 tens | half a hundred | 0.5
0.5 | 50% | .5% | half% | 0.5 halves
30 | 5(5) | 5 6 | 30 dozen | 3 tens | thirty thirds
1 | 1 wrong | 1 of 2 | one or two | one not | 1 dozen | a dozen | 1 kilo | 1 googol
1 | one third | 1 half | 1 and a half | one and a half | 1½ | 1 quarter | 1 percent of 5
(1,2) | x=1, y=2 or x=2, y=1 | (1,2) or (2,1) | (1,2),(2,1) | (x,y)=(1,2) or (2,1)
(1,2) | (x,y) = (1,2), (3,4) | [1,2] | 1,2,3 | a=1, c=2
[1,2] | (1,2] | 1<x≤2 | \{1,2\}
\text{east} | east or west | not east | least | The answer is not east. | southeast
no solution | not no solution | no solution or 5 | one solution | no, solution
12:30 | 12:30 or 1:30 | 12.30 | 1230
100 | one hundred one | hundred | 100 hundred | 1 hundredth | one hundredth | 1 00
42_8 | 42_9
1 | one half | one third | one of two | = -1 | minus 1 | HK$10
-5 | negative six | negative | minus
\text{CAD} 5 | HK$5 | \$6
3/4 | three fifths | four thirds
3:4 | 3/4 | 6:8
42 | 42_8
"""
OF_SEVERAL_LINES = [     # gold, response, reward; and what is invisible
    ("5", "**Final Answer**\n5", 1.0),
    ("5", "### Answer\n5", 1.0),
    ("5", "### Final Answer\n\n**5**", 1.0),
    ("5", "Answer:\n5", 1.0),
    ("5", "Answer\n6", 0.0),
    ("5", "5\nAnswer\n", 0.0),
    ("4", "\\boxed{4\u200b}", 1.0),
    ("4", "\\boxed{\ufeff4}", 1.0),
    ("4", "\\boxed{4\u200b5}", 0.0),
    ("1000", "\\boxed{1\u2009000}", 1.0),
    ("1000", "\\boxed{1\u202f000}", 1.0),
    ("1000", "\\boxed{1\u00a0000}", 1.0),
    ("100", "\\boxed{1\u200900}", 0.0),
    ("5", "\\boxed{5}\n\n\\boxed{5}", 1.0),
    ("5", "\\boxed{3}\n\\boxed{5}", 0.0),
]


def response(form: str) -> str:
    names_an_answer = "\\boxed" in form or "nswer" in form and "\\text" not in form or "答" in form
    return form if names_an_answer else f"\\boxed{{{form}}}"


@pytest.mark.parametrize("row", rows(RIGHT_FORMS), ids=lambda r: r[0])
def test_right_forms(row):
    for form in row[1:]:
        assert reward(row[0], response(form)) == 1.0, form


@pytest.mark.parametrize("row", rows(WRONG_FORMS), ids=lambda r: r[0])
def test_wrong_forms(row):
    for form in row[1:]:
        assert reward(row[0], response(form)) == 0.0, form


@pytest.mark.parametrize("case", OF_SEVERAL_LINES, ids=ascii)
def test_forms_of_several_lines(case):
    gold, text, expected = case
    assert reward(gold, text) == expected


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


def test_a_worker_that_dies_or_never_ends_is_replaced(monkeypatch):
    monkeypatch.setattr(symbolic, "_is_heavy", lambda text: False)
    with Verifier(seconds=1) as verifier:
        assert verifier.verify(r"\frac{\pi}{2}", r"\pi/2") is True
        os.kill(pid(verifier), signal.SIGKILL)
        assert verifier.verify(r"\frac{\pi}{3}", r"\pi/3") is True
        threading.Timer(0.3, os.kill, (pid(verifier), signal.SIGKILL)).start()  # amid a question
        assert (
            verifier.verify(r"\pi", r"\binom{99999999}{49999999}") is False
        )  # which nothing answers in a second
        assert verifier.verify(r"\frac{\pi}{4}", r"\pi/4") is True
    assert verifier.cost.questions == 4 and verifier.cost.slow == 1


# Each of them took a second or more before numbers were compared first, or is equal and slow.
SLOW = [
    ("x+5", "(x+y+z+w+a+b+c)^{999}"),
    ("x+5", "(" * 50 + "x" + ")" * 50),
    ("x+5", "(x+1)^{99}(x+2)^{99}(x+3)^{99}"),
    ("x+5", r"\sqrt{" * 20 + "x" + "}" * 20),
    ("x+5", r"\sin(\sin(\sin(\sin(x))))"),
    ("x+5", r"\frac{1}{" * 12 + "x" + "}" * 12),
    ("x+5", r"\frac{(x+1)^{99}}{(x+2)^{99}}"),
    ("x+5", r"(1+\sqrt{2}+\sqrt{3})^{99}"),
    ("x+5", r"\log(x+1)\log(x+2)\log(x+3)+\sin(x)\cos(y)\tan(z)"),
    (r"\frac{\pi}{2}", r"\binom{99999999}{49999999}"),
    ("y=x+5", "(x+y+z)^{99}=(x+1)^{99}"),
]


def test_what_differs_in_numbers_is_quickly_wrong():
    with Verifier(seconds=8) as verifier:       # a busy machine counts more of them
        for gold, answer in SLOW:
            before = verifier.cost.seconds
            assert verifier.verify(gold, answer) is False, answer
            assert verifier.cost.seconds - before < 2, answer
        assert verifier.cost.slow == 0


EQUAL_AND_SLOW = [
    ("(x+1)^{299}(x+2)^{299}(x+3)^{299}", "(x^2+3x+2)^{299}(x+3)^{299}"),  # 20 seconds and more
    ("(x+1)^{99}(y+2)^{99}(z+3)^{99}", "(xy+2x+y+2)^{99}(z+3)^{99}"),
]


def test_a_slow_question_is_wrong_and_all_of_them_have_a_budget():
    with Verifier(seconds=3) as verifier:
        gold, answer = EQUAL_AND_SLOW[0]
        assert verifier.verify(gold, answer) is False
        assert verifier.cost.slow == 1 and 2 < verifier.cost.seconds < 5
        assert verifier.verify(gold, answer) is False       # remembered
        assert verifier.cost.questions == 1
        assert verifier.budget < symbolic.BUDGET - 1

        verifier.budget = -1.0
        before = verifier.cost.seconds
        gold, answer = EQUAL_AND_SLOW[1]
        assert verifier.verify(gold, answer) is False
        assert verifier.cost.slow == 2 and verifier.cost.seconds - before < 1.5
        assert verifier.verify(r"\frac{\pi}{2}", r"\pi/2") is True     # a quick one needs none


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



TOKENS = (
    r"\mm \pp \pm \mp \frac \frac12 \over \sqrt \boxed{ \text{ } { ( ) [ ] \{ \} \left( "
    r"\right] \overline{ \begin{array}{c} \end{array} \begin{pmatrix} \end{pmatrix} \\ & , ; : "
    r". .. ! ? % \% $ \$ ^ _ _8 ^\circ °C 0. 0 1 5 12:30 999 1e9 10^{-3} 1'000 + - = < > \le "
    r"\cup \in \mid and or to of per each x y i B (b) (C) pm am st rd one hundred twenty "
    r"million wrong apples cm m/s USD Rs. ½ ² ₈ ， 。 元 万 百分之 答案 是 \Omega \infty \emptyset "
    r"option answer is no solution "
).split() + ["\u200b", "\u2009", " ", "\n", '"']


def test_no_text_makes_it_fail():
    rng = random.Random(0)
    for _ in range(10_000):
        text = rng.choice(["", " "]).join(rng.choices(TOKENS, k=rng.randint(1, 9)))
        for gold in "86413", "(C)", text:
            assert equal(gold, text) in (True, False, None)
        assert equal("86413", text) is not True, text
        final_answer(text)


def test_no_form_pleases_two_golds_that_exclude_each_other():
    golds = ["5", "50", "0.5", "5/2", "1000", "1", "1234.5", "1.234", "2", "21", "72", "A", "B",
             "3:4", "12:30", "12:31", "(1,2)", "(2,1)", "(-1,1)", "[-1,1]", "0.001", "1/3",
             "\\emptyset", "no solution", "east", "50000", "500", "3, 5", "3", "10"]
    forms = {form for row in rows(RIGHT_FORMS) for form in row[1:]} | {"50%", "5 wrong", "(B) b"}
    forms -= {"(b) 5", "The correct choice is (B) 5"}       # B, which is 5
    for form in sorted(forms):
        pleased = [gold for gold in golds if reward(gold, response(form)) == 1.0]
        assert len(pleased) <= 1, (form, pleased)


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
