r"""verify.py and what it stands on: what counts as the answer, what is equal, what it may cost.

    python -m pytest -q tests/test_verify.py     samples, a few seconds
    python tests/test_verify.py --full     300,000 mutations, 30,000 loops, 100,000 pairs: times

The labelled cases, hostile strings and benchmark answers in ../shared are read where they exist.
"""

from __future__ import annotations

import json
import math
import random
import re
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from core.boxes import is_answer  # noqa: E402
from core.equality import MAX_WORK, Comparison  # noqa: E402
from core.mathexpr import MAX_DEPTH, parse  # noqa: E402
from core.mathtext import MAX_CHARS, Unread, tokenize  # noqa: E402
from core.mathvalue import evaluate  # noqa: E402
from core.reading import read  # noqa: E402
from verify import (  # noqa: E402
    extract_answer,
    is_equivalent,
    main,
    verify,
    verify_row,
    verify_rows,
)

SHARED = ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(
    not (SHARED / "verify").is_dir(), reason="no labelled cases beside this checkout"
)

# every pair of a line is equal; one line is one form
EQUAL = r"""
5 | 5.0 | 005 | +5 | \frac{10}{2} | 5.00 | $5$ | \text{5} | \mathbf{5} | (5) | {5}
5 | \left(5\right) | \text{five}
5 | 2+3 | x = 5 | 5 = x | 2 + 3 = 5 | \{5\} | [5] | \sqrt{25} | |-5| | 5 \text{ apples}
-\frac{1}{2} | \frac{-1}{2} | \frac{1}{-2} | -0.5 | -.5 | -1/2 | -\dfrac12 | -\tfrac 1 2 | -½
-\frac{1}{2} | k = -\frac{1}{2}
\frac\pi2 | \frac{\pi}{2} | \pi/2 | π/2 | 0.5\pi | \frac12\pi | \frac{1}{2} \cdot \pi
\frac\pi2 | \pi\frac{1}{2}
2\frac{2}{3} | 2 \frac23 | 2 2/3 | \frac83 | 8/3
12345.5 | 12,345.5 | 12{,}345.5 | 12,\!345.5 | 12\,345.5 | 12 345.5
1.5 \times 10^{-3} | 1.5e-3 | 1.5E-3 | 1.5\cdot10^{-3} | 1.5 x 10^{-3} | 0.0015 | 15 \times 10^{-4}
50\% | 50 | 50 \% | 50% | 50\text{ percent}
\$18.90 | 18.9 | \$ 18.90 | 18.90 \text{ dollars} | 18.9\text{ USD}
30^\circ | 30^{\circ} | 30° | 30\text{ degrees} | 30 ^\circ | 30
\sin 30^\circ | \frac{1}{2} | \cos 60^{\circ} | \sin\left(\frac{\pi}{6}\right)
\sin 30^\circ | \sin{(\frac{\pi}{6})}
15\text{ cm}^2 | 15 | 15 \mbox{ cm}^{2} | 15\ \text{square centimeters}
3 \text{ miles per hour} | 3 | 3 \text{ miles/hour}
4\sqrt{3} | \sqrt{48} | 4\sqrt3 | 4\cdot\sqrt{3} | \frac{12}{\sqrt{3}} | 4 * 3^{1/2} | 4√3
4\sqrt{3} | 4 sqrt(3)
10^{50} \sqrt{2} | \sqrt{2} \cdot 10^{50} | \sqrt{2 \times 10^{100}}
\sqrt[3]{-8} | -2 | (-8)^{1/3}
\sqrt{3+2\sqrt2} | 1+\sqrt{2} | \sqrt 2 + 1
(1+\sqrt2)(\sqrt2-1) | 1
5! | 120 | \binom{10}{3}
2^{4950} | 2^{4949} \cdot 2 | 4^{2475}
5 + xi | 5 + x i | ix + 5
5 \text{ sec} | 5 | 5\text{ seconds}
3 + 4i | 4i+3 | (2+i)^2 | 3+4\mathrm{i} | \frac{(3+4i)(1-i)}{1-i}
e^{i\pi} | -1 | i^2
\log_2 8 | 3 | \frac{\ln 8}{\ln 2} | \frac{\log 8}{\log 2}
\ln 2 | \log 2 | \frac{1}{2}\ln 4
\arctan 1 | \tan^{-1} 1 | \frac{\pi}{4} | \arcsin\frac{1}{\sqrt{2}}
\arctan 1 | \operatorname{atan}{\left(1\right)}
(x+1)^2 | x^2+2x+1 | (1 + x)(x + 1) | x \left(x + 2\right) + 1
\frac{1}{x-1} | -\frac{1}{1-x} | (x-1)^{-1}
\sin 2x | 2\sin x\cos x
36x\sqrt{35x} | 36\sqrt{35} x^{\frac{3}{2}} | 36 \sqrt{35x^3}
2^{n-1} | \frac{2^n}{2}
\frac{n!}{(n-2)!} | n(n-1) | n^2-n
\lfloor \frac{n}{2} \rfloor + 1 | 1 + \lfloor n/2 \rfloor
e^{2it} | \cos 2t + i\sin 2t
x^2+y^2=13 | 2x^2 + 2y^2 - 26 = 0 | 13 = y^2+x^2
y = 2x + 3 | 2x - y + 3 = 0 | 2x+3 = y
f(x) = x + 1 | x+1 | f(x)=1+x
x > 4 | 4 < x | (4,\infty) | x \in (4, +\infty) | +4 < x
-2 \le x < 7 | [-2,7) | 7 > x \geq -2 | x \in \left[-2, 7\right)
x \ne 2 | (-\infty,2) \cup (2,\infty) | (2,\infty)\cup(-\infty,2) | x < 2 \text{ or } x > 2
\mathbb{R} | (-\infty,\infty)
(\frac12, 3) | (0.5,3) | \left( \dfrac{1}{2},\,3 \right) | (x, y) = (\frac12, 3)
(\frac12, 3) | x = \frac12, y = 3
(\frac12, 3) | \langle 1/2, 3 \rangle
1, -2, 3 | 3,1,-2 | \{1, -2, 3\} | 1, -2, \text{ and } 3
1, -2, 3 | x = 1 \text{ or } x = -2 \text{ or } x = 3 | 1; -2; 3
120, 240 | 240,120 | \{120,240\}
3 \pm \sqrt{2} | 3+\sqrt2, 3-\sqrt2 | 3\mp\sqrt2
(1,2), (3,4) | (3,4),(1,2) | (1,2) \text{ and } (3,4)
\begin{pmatrix} 1 & 1/2 \\ -3 & 4 \end{pmatrix} | \begin{bmatrix}1&0.5\\-3&4\end{bmatrix}
\begin{pmatrix} 1 \\ 1/2 \end{pmatrix} | \left[\begin{array}{c} 1 \\ \frac12 \end{array}\right]
2516_8 | 2516_{8} | (2516)_8 | (2516)_{8}
152A_{11} | \text{152A}_{11} | 152A_{11}.
A | (A) | \text{A} | \text{(A)} | \textbf{(A)} | \mathrm{A} | A.
\text{Thursday} | Thursday | \text{ thursday } | \textbf{Thursday}
\text{May} | May
3:5 | 3 : 5 | 3\!:\!5
\text{A, B} | \text{B and A} | A, B
\infty | +\infty
\frac12 | ½ | {1 \over 2} | \displaystyle{\frac{1}{2}} | \color{red}{\frac12} | {\bf \frac12}
\frac12 | \text{one half}
x^4 | x⁴ | {\large x^4} | \bm{x}^4 | xx^3 | x ** 4
-7 | ‐7 | −7 | ＋7-14 | \mathbf{-7}
0.001 | 10⁻³ | 10^{-3} | 2.75 - 2¾ + 1/1000
\frac56 | 0.8\overline{3} | 0.8\bar{3} | \frac{5}{6}
\binom{5}{2} | {5 \choose 2} | 10
5000000 | 5 \text{ million} | 50 \text{ lakh} | 5,000 \text{ thousand}
\frac35 | 3 \text{ fifths} | three fifths | 6 \text{ tenths}
21 | twenty-one | \text{twenty-one} | \max(21, 3) | \gcd(42, 63)
4 | 4\mathrm{~m} | 4\,\mathrm{m} | 4 \text{ N} | 4 m/s | 4 \mathrm{~m/s^2} | 4 sec | €4 | £4 | 4'
60\text{ cm} | 0.6\text{ m} | 600\text{ mm}
90^\circ - x | 90 - x
\frac12 | P(X \ge 3) = \frac12 | P(A \cap B) = 1/2 | \lim_{x\to 0} f = \frac12 | \bar{x} = \frac12
5 | |AB| = 5 | \mathbb{E}[X] = 5 | f^{-1}(2) = 5 | f'(x) = 5
\frac{km}{k+m} | \frac{mk}{m+k} | \frac{m \cdot k}{k + m}
abcd | a \cdot b \cdot c \cdot d
mnpq + 1 | m \cdot n \cdot p \cdot q + 1
xy | yx | x \cdot y
Yes | yes | YES | \text{Yes}
odd | \text{Odd} | ODD
No | NO | \text{no}
(0,2) \cup (2,4) | (0,4) \setminus \{2\} | 0 < x < 4 \text{ and } x \ne 2
[2,5] | x >= 2 and x <= 5 | 5 \ge x \ge 2 | \{x : 2 \le x \le 5\}
x \ne 2 | \mathbb{R} \setminus \{2\} | \{x \in \mathbb{R} \mid x \ne 2\}
\mathbb{R} | \text{all real numbers} | all reals | (-\infty, \infty)
\emptyset | \{\} | \varnothing | \text{no solution} | x > 5 \text{ and } x < 1
\{1,2\},\{3,4\} | \{4,3\},\{2,1\}
(1,2) | x = 1, y = 2 | y = 2, x = 1 | (y, x) = (2, 1)
(\pm 3, \pm 4) | (3,4),(3,-4),(-3,4),(-3,-4)
3 \pmod{7} | 3 \pmod 7 | 3 (mod 7)
A | (A) 5 | A) 5 | \text{A: a longer option}
\text{20 June} | \text{June 20}
2^{10000} | 4^{5000} | 2 \cdot 2^{9999}
\frac{2}{3} | \frac{2}{3} \approx 0.667
"""

# no pair of a line is equal
DIFFERENT = r"""
5 | 6 | 5.5 | 55 | -5 | \frac15 | 5x | x | 5\pi | 5\sqrt2 | 5! | 5^2 | \text{answer} | \mathbb{R}
5 | [0, 100] | x > 4
5 | (5, 5)
5 | 5, 6 | 3 \text{ or } 5 | \text{5 or 6} | 5 \pm 100 | \{1,2,3,4,5\} | 1,2,3,4,5,6,7 | 5 6
5 | 5 \text{ not } 6
5 | 5, \text{ maybe } 6 | ? | 5? | \text{NaN} | 5\text{pi} | 5\text{i}
5 | \begin{cases} 5 \\ 6 \end{cases} | \max(6, 4)
5 | 5\ldots
6 | 5 = 6 | 5 \ne 6 | x = 5 = 6 | 5 \approx 6 | 2 + 3 = 6
0.5 | 50\% | \frac12\pi | 0.05
\frac13 | 0.333 | 0.333333333333333333333333333333 | \frac{333}{1000}
\pi | 3.14 | \frac{22}{7} | 3.14159265358979323846264338327950288419716939937510
\sqrt2 | 1.41421356 | 1.414213562373095048801688724209698078569671875376948 | 2 | \sqrt3
2^{4950} | 2^{4950} + 1 | 2^{4951} | -2^{4950}
2^{100000} | 2^{100000}+1 | 2^{100001}
\frac{1}{2^{98}} | \frac{1}{2^{97}} | 0 | \frac{1}{2^{99}}
0 | 1e-400 | 10^{-30} | \frac{0}{0}
10^{50} + \sqrt2 | 10^{50} + \sqrt3 | 10^{50}
10^{90} + \sqrt2 | 10^{90} + \sqrt3 | 10^{90}
\sqrt{10^{40}+1} | 10^{20}
5\text{ cm} | 5\text{ m} | 5\text{ cm}^2 | 6\text{ cm}
\$5 | 5\text{ cents} | 5\%
8\!:\!34 \text{ p.m.} | 8:34 \text{ a.m.} | 8:35 \text{ p.m.}
5 \text{ million} | 5 | 5 \text{ squared} | 5 \text{ and a half}
2\frac23 | 2 | \frac43 | \frac23 | 3\frac23
x^2 | x | x^3 | w^2 | -x^2 | (-x)^3
|x| | x | -x
a + b | a - b | a | ab
f(2) | 2f | f(3)
y = 2x+3 | y = 2x-3 | y = 3x+2 | y + 2x + 3 = 0
x = 5 | y = 5 | x = 6
x < 3 | x \le 3 | x > 3 | [3, \infty)
(1,2) | (2,1) | [1,2] | (1,2] | 1,2 | \{1,2\} | (1,2,0) | 12 | (1)
1,2 | 12 | 1,3 | 1,2,2 | 1
123,456 | 456,123 | 123.456
3 \pm \sqrt{2} | 3+\sqrt2 | 3
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{pmatrix} 1 & 2 \end{pmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{pmatrix} 1 & 2 & 3 & 4 \end{pmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}
52_8 | 52_9 | 42 | 52 | 53_8 | 89_8
A | B | A, B | \text{A or B} | a
\text{Thursday} | \text{Tuesday} | T
CBAD | ABCD | BADC
3:5 | 5:3 | 3:6 | 3 | \frac{3}{5}
\infty | -\infty | 10^{100}
1,2,3,\ldots | 1,2,3 | 1,2,3,4
12:00 | 1:00 | 12
dog | god | d o g s | Dogs
cat dog | dog cat | catdo
No | on | Yes
x = 2 | 2x + 3 = 7 | 2x = 4 | y = 2
x > 4 | x + 3 > 7 | 2x > 8
2 + 3 = 5 | x + k = 7 | y = 2x + 3 | 0 = x
(1,2) | y = 1, x = 2 | x = 2, y = 1
\{1,2\},\{3,4\} | \{1,3\},\{2,4\}
(-\infty,1) \cup (5,\infty) | x > 5 \text{ and } x < 1
5 | 5 \text{ thousands} | 5 \text{ dozens} | 5 \text{ halved} | 5 \text{ tenths}
5 | 5 \text{ less than } 6
5\text{ yards} | 5\text{ meters} | 5\text{ acres} | 5\text{ seconds}
A | A \text{ or } B | (A), (B) | B) 5 | -A
E | \text{C} \ldots \text{E} | -E
1 - \frac{1}{\mathrm{e}} | 1 + \frac{1}{\mathrm{e}} | 1
\ln 100 | 2
"""


def lines(table: str) -> list[list[str]]:
    """A table -> its lines, each a list of answers."""
    return [line.split(" | ") for line in table.strip().splitlines()]


@pytest.mark.parametrize("answers", lines(EQUAL), ids=lambda answers: answers[0])
def test_spellings_of_one_answer_are_equal(answers):
    wrong = [
        (a, b)
        for a in answers[:1]
        for b in answers
        if not (is_equivalent(a, b) and is_equivalent(b, a))
    ]
    assert not wrong


@pytest.mark.parametrize("answers", lines(DIFFERENT), ids=lambda answers: answers[0])
def test_different_answers_are_never_equal(answers):
    wrong = [
        (a, b)
        for a in answers[:1]
        for b in answers[1:]
        if is_equivalent(a, b) or is_equivalent(b, a)
    ]
    assert not wrong


def test_each_answer_equals_itself():
    wrong = [
        a for answers in lines(EQUAL) + lines(DIFFERENT) for a in answers if not is_equivalent(a, a)
    ]
    assert not wrong


@pytest.mark.parametrize(
    "response, answer",
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{4}, no: \boxed{5}", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed 5", "5"),
        (r"\boxed 3.5", "3.5"),
        (r"is \boxed{14}. I marked it with \boxed as asked.", "14"),
        (r"is \boxed{14}. (With \boxed as asked, since \frac{3}{4} is less.)", "14"),
        ("The answer is **146**.", "146"),
        ("**Final Answer: 146**", "146"),
        ("Final answer: `146`", "146"),
        ("The answer is 72. I am sure that this answer is right.", "72"),
        ("the answer is $$58$$", "58"),
        (r"\boxed{5} but \boxed{6", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"<think>\boxed{4}</think> \boxed{5}", "5"),
        (r"<think> </think> closes. \boxed{4} </think> \boxed{5}", "5"),
        ("The answer is 2.5 apples. Good.", "2.5 apples"),
        ("The final answer is $x=5$. I hope it is correct.", "$x=5$"),
        ("The answer is $1$ and $3$. Done.", "$1$ and $3$"),
        ("**Answer:** 5", "5"),
        ("6*7=42\n#### 42", "42"),
        ("<answer>5</answer>", "5"),
        (r"answer is \(5\).", "5"),
        ("I have 5 apples.", None),
        (r"\boxed{5", None),
        (r"<think>\boxed{5}", None),
        (r"<think>\boxed{5}</think> done.", None),
        (r"<think>a</think> <think>\boxed{5}", None),
        ("#### Step 2: add", None),
        ("", None),
    ],
)
def test_the_last_answer_after_the_thinking_counts(response, answer):
    assert extract_answer(response)[0] == answer


def test_reasons_are_a_closed_list():
    responses = {
        r"\boxed{5}": "correct",
        r"\boxed{6}": "wrong answer",
        r"\boxed{\int x}": "answer not understood",
        "5": "no boxed answer",
        r"\boxed{ }": "empty answer",
        r"<think>\boxed{5}": "unfinished thinking",
    }
    assert {response: verify(response, "5").reason for response in responses} == responses


def test_an_answer_that_repeats_the_prompt_earns_nothing():
    prompt = r"Evaluate $S = \frac{3}{4} + \frac{2}{3}$ and simplify."
    sum_of_two = r"\frac{3}{4} + \frac{2}{3}"
    for answer in (sum_of_two, f"S = {sum_of_two}", f"{sum_of_two} + 0"):
        verdict = verify(f"\\boxed{{{answer}}}", r"\frac{17}{12}", prompt=prompt)
        assert verdict == (False, False, answer, "restates the question")
    assert verify(r"\boxed{\frac{17}{12}}", r"\frac{17}{12}", prompt=prompt).correct
    larger = "Which is larger, $2^{10}$ or $10^3$?"  # the gold answer itself may be in the prompt
    assert verify(r"\boxed{2^{10}}", "2^{10}", prompt=larger).correct
    assert verify(r"\boxed{12}", "12.0", prompt="There are $12$ apples.").correct
    plain = verify(r"\boxed{3/4 + 2/3}", r"\frac{17}{12}", prompt="What is 3/4 + 2/3?")
    assert plain.reason == "restates the question"


def test_a_number_has_to_be_evaluated():
    assert verify(r"\boxed{1+2+3+4+5+6+7+8+9+10}", "55").reason == "not evaluated"
    assert verify(r"\boxed{1+2+3+4+5+6+7+8+9+10 = 55}", "55").correct
    assert verify(r"\boxed{\frac{99!}{97!}}", "9702").correct
    assert verify(r"\boxed{\frac{1+\sqrt{5}}{2}}", r"\frac{\sqrt5 + 1}{2}").correct


def test_gold_answers_that_are_none_are_known():
    assert not any(map(is_answer, ("", "  ", "proof", "None", "$$", "N/A")))
    assert all(map(is_answer, ("0", "no", r"\emptyset", "None of these")))
    assert not verify(r"\boxed{}", "").correct


@pytest.mark.parametrize(
    "response, gold, lenient",
    [
        (r"\boxed{0.33333}", r"\frac13", True),
        (r"\boxed{3.14159}", r"\pi", True),
        (r"\boxed{b}", "B", True),
        ("it is 42", "42", True),
        (r"<think>\boxed{5}", "5", True),
        (r"\boxed{10001}", "10000", False),
        (r"\boxed{0.33}", r"\frac13", False),
        (r"\boxed{3 or 4}", "3", False),
        ("5 or 6", "5", False),
    ],
)
def test_lenient_adds_tolerance_capitals_and_answers_outside_the_box(response, gold, lenient):
    assert verify(response, gold)[:2] == (False, lenient)


# ------------------------------------------------------------------------- generated pairs
def arithmetic(draw: random.Random, depth: int = 3) -> tuple[str, Fraction]:
    """A random expression over + - * / ^ and its value, computed beside it in fractions."""
    if depth == 0 or draw.random() < 0.2:
        n = draw.randint(0, 99)
        value = draw.choice([Fraction(n), Fraction(2 * n + 1, 2), Fraction(n, 7)])
        spelled = {1: f"{value.numerator}", 2: f"{n}.5", 7: f"\\frac{{{n}}}{{7}}"}
        return spelled[value.denominator], value
    (a, x), (b, y) = arithmetic(draw, depth - 1), arithmetic(draw, depth - 1)
    power = draw.randint(0, 3)
    pairs = [
        (f"{a} + {b}", x + y),
        (f"{a} - ({b})", x - y),
        (f"({a}) \\cdot ({b})", x * y),
        (f"({a})({b})", x * y),
        (f"({a})^{{{power}}}", x**power),
    ]
    return draw.choice(pairs + [(f"\\frac{{{a}}}{{{b}}}", x / y)] if y else pairs)


def polynomial(draw: random.Random) -> tuple[str, str, str]:
    """(a product, the same multiplied out, the same with one coefficient changed)"""
    a, b, c, d = (draw.randint(-9, 9) or 1 for _ in range(4))
    out = [a * c, a * d + b * c, b * d]
    other = list(out)
    other[draw.randrange(3)] += draw.choice([-1, 1])
    spelled = "{:d}x^2 + {:d}x + {:d}".format
    return f"({a}x + {b})({c}x + {d})", spelled(*out), spelled(*other)


def check_pairs(count: int, seed: int) -> None:
    """Integers, expressions and polynomials: equal exactly where they should be, in both orders."""
    draw = random.Random(seed)
    for _ in range(count):
        n = draw.randint(-(10 ** draw.randint(1, 40)), 10 ** draw.randint(1, 40))
        k = draw.choice([1, -1, 10**19, 2**61 - 1, draw.randint(1, 10**9)])
        assert is_equivalent(f"{n}", f"{n}.0") and not is_equivalent(f"{n}", f"{n + k}"), (n, k)
        assert not is_equivalent(f"{n + k}.0", f"{n}"), (n, k)
        text, value = arithmetic(draw)
        right, wrong = (
            f"{value.numerator}/{value.denominator}",
            f"{value.numerator + 1}/{value.denominator}",
        )
        assert is_equivalent(text, right) and is_equivalent(right, text), (text, right)
        assert not is_equivalent(text, wrong) and not is_equivalent(wrong, text), (text, wrong)
        product, out, other = polynomial(draw)
        assert is_equivalent(product, out) and is_equivalent(out, product), (product, out)
        assert not is_equivalent(product, other) and not is_equivalent(other, product), (
            product,
            other,
        )


def test_generated_pairs_are_equal_exactly_where_their_values_are():
    check_pairs(700, seed=1)


def test_a_surd_is_equal_to_no_decimal_however_long():
    for digits in (5, 20, 50, 80, 150, 400, 1000):
        decimal = str(math.isqrt(2 * 10 ** (2 * digits)))
        assert not is_equivalent("\\sqrt{2}", f"{decimal[0]}.{decimal[1:]}"), digits


# --------------------------------------------------------------------------- hostile input
BOMBS = (
    r"""
9^{9^{9^{9^{9}}}}; 10^{10^{10}}; 100000000!; 5!!!!!!
1e999999999; \frac{1}{10^{10^{10}}}; (x+1)^{10000000}
\sqrt[1000000007]{2^{1000000009}}; \sum_{k=1}^{10^9} k; \binom{10^9}{10^8}; \sin(10^{10^{5}})
2^{2^{2^{2^{2^{2}}}}}
e^{e^{e^{e^{e}}}}; 0^{-1}; 0^{\pi}; \ln 0; \tan 90^\circ; \sqrt[0]{5}
\log_1 5; x^{x^{x^{x^{x}}}}; \ln^{-1} 5
(-1)^{10^{1000}}; 2^{2^{12}\sqrt{2}}; \arcsin 10^{99}
""".replace("\n", "; ")
    .strip("; ")
    .split("; ")
    + [
        "1" * 2000,
        "1." + "3" * 2000,
        "1e999" * 100,
        r"\sin5 " * 300,
        r"\frac{e^{2it}}{2+2i}" * 30,
        r"\ln(\ln(i))" * 99,
        r"\arcsin(\arcsin(\arcsin(\arcsin(i+2))))" * 20,
        "+".join(r"\sqrt{%d}" % n for n in range(2, 150)),
    ]
)
REPEATED = (
    r"""
( { [ \{ \left( - 1+ 2^ 1, \frac{ \frac \sqrt \sqrt{ \text{ \boxed{ \sin
\begin{pmatrix} & \\ | 5! $ </think> \ 1,000 1.
= x \pm \cup ° √ é _ ^ "
""".split()
    + [" ", "\n", "1 ", "answer is ", "final answer is $", "\ud800"]
)
VOCABULARY = (
    BOMBS[:12]
    + REPEATED
    + r"""
} ) ] \} \right) \infty \pi i e 0 1 12 0.5 ... \ldots and or x= < \le \in
\mathbb{R} _8 _{8} \text{cm} % \% \$ \log \ln
\cos( \arcsin f( \lfloor \rfloor \end{pmatrix} \mathrm{e}
""".split()
)


def mutate(draw: random.Random, text: str, others: list[str]) -> str:
    """One to six insertions, replacements, deletions, repetitions, splices or rotations."""
    for _ in range(draw.randint(1, 6)):
        i = draw.randrange(len(text) + 1)
        j = min(len(text), i + draw.randint(1, 12))
        middle = draw.choice(
            [
                draw.choice(VOCABULARY) + text[i:j],
                draw.choice(VOCABULARY),
                "",
                text[i:j] * draw.choice([2, 5, 30]),
                draw.choice(others),
                None,
            ]
        )
        text = text[j:] + text[:j] if middle is None else text[:i] + middle + text[j:]
    return text


def check_mutations(count: int, seed: int) -> list[tuple[float, str, str]]:
    """Verify mutated answers: symmetric, without an exception. Returns (seconds, gold,
    response) of all, the slowest last."""
    draw = random.Random(seed)
    answers = [a for answers in lines(EQUAL) + lines(DIFFERENT) for a in answers]
    found: list[tuple[float, str, str]] = []
    for n in range(count):
        gold, answer = draw.choice(answers), mutate(draw, draw.choice(answers), answers)
        response = f"So \\boxed{{{answer}}}."
        if draw.random() < 0.2:
            response = mutate(draw, f"<think> a </think> the answer is {answer}", answers)
        start = time.process_time()
        verdict = verify(response, gold)
        found.append((time.process_time() - start, gold, response))
        assert verdict.lenient or not verdict.correct
        if n % 5 == 0:
            assert is_equivalent(gold, answer) == is_equivalent(answer, gold), (gold, answer)
    return sorted(found)


def loops(draw: random.Random, answers: list[str]) -> str:
    """What a sampler that repeats itself writes: a piece, many times, cut somewhere."""
    piece = draw.choice(answers + VOCABULARY)
    if draw.random() < 0.5:
        piece += draw.choice(["", " ", ", ", " = ", " + ", "\n", draw.choice(VOCABULARY)])
    text = (piece * draw.choice([10, 40, 150, 600, 2000]))[: draw.choice([300, 1200, 2400, 6000])]
    text = draw.choice(["", draw.choice(answers)]) + text + draw.choice(["", "5", "}", ")"])
    return draw.choice(["\\boxed{%s}", "the answer is %s", "<think> a </think> \\boxed{%s"]) % text


def check_loops(count: int, seed: int) -> list[float]:
    """Verify repetition loops: never an exception. Returns their CPU seconds, sorted."""
    draw = random.Random(seed)
    answers = [a for answers in lines(EQUAL) + lines(DIFFERENT) for a in answers]
    times = []
    for _ in range(count):
        response = loops(draw, answers)
        gold = draw.choice(answers)
        start = time.process_time()
        verify(response, gold)
        times.append(time.process_time() - start)
    return sorted(times)


def calls_made(response: str, gold: str) -> int:
    """Python and C calls of one verification: a count of its work that no clock disturbs."""
    count = 0

    def tally(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(tally)
    try:
        verify(response, gold)
    finally:
        sys.setprofile(None)
    return count


def test_mutated_answers_never_raise_and_are_symmetric():
    assert len(check_mutations(3000, seed=2)) == 3000


def test_repetition_loops_never_raise():
    assert len(check_loops(400, seed=3)) == 400


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb[:30])
def test_a_value_bomb_is_refused_within_the_budget(bomb):
    assert not verify(f"\\boxed{{{bomb}}}", "5").correct
    comparison = Comparison()
    try:
        comparison.same(read(bomb).tree or ("num", Fraction(1)), ("num", Fraction(5)))
    except Unread:
        pass
    assert (
        comparison.work <= 3 * MAX_WORK
    )  # what may be spent, and the one value that broke the budget
    assert calls_made(f"\\boxed{{{bomb}}}", "5") < 150_000


@pytest.mark.parametrize("piece", REPEATED, ids=ascii)
def test_work_does_not_grow_with_repetition(piece):
    few, many = (calls_made(f"so \\boxed{{{piece * n}5}}", "5") for n in (20_000, 200_000))
    assert many < 150_000 and many < few + 25_000
    assert calls_made(piece * 100_000, "5") < 150_000


def test_long_and_deep_answers_are_text_and_not_read():
    assert read("1" * (MAX_CHARS + 1)).tree is None
    assert read("(" * (MAX_DEPTH + 5) + "5" + ")" * (MAX_DEPTH + 5)).tree is None
    assert is_equivalent("(" * 30 + "5" + ")" * 30, "5")
    long = "1234567890" * 10_000
    assert is_equivalent(long, long) and not is_equivalent(long, long[:-1] + "1")


def test_nothing_in_an_answer_is_executed(tmp_path):
    marker = tmp_path / "marker"
    for code in (
        f"__import__('pathlib').Path('{marker}').touch()",
        f"open('{marker}','w').write('x')",
        "exit()",
        "raise SystemExit",
        "(lambda: 1/0)()",
        r"\input{/etc/passwd}",
    ):
        assert (
            not verify(f"\\boxed{{{code}}}", "5").correct
            and not verify(f"The answer is {code}", "5").correct
        )
    assert not marker.exists()


def test_threads_agree_with_one_thread():
    pairs = [
        (a, b) for answers in lines(EQUAL) + lines(DIFFERENT) for a in answers[:1] for b in answers
    ]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda pair: is_equivalent(*pair), pairs * 2))
    assert found == [is_equivalent(*pair) for pair in pairs * 2]


# ----------------------------------------------------------------------------------- trees
def test_a_tree_is_what_the_manual_says():
    tree = ("*", ("/", ("num", 1), ("num", 2)), ("^", ("sym", "x"), ("num", 2)))
    assert parse(tokenize(r"\frac{1}{2}x^2")) == tree
    assert evaluate(parse(tokenize("1/2 + 3^2")), {}, Comparison()) == Fraction(19, 2)


def test_what_has_no_value_is_refused_and_compared_as_text():
    for text in (
        r"\sum_{k=1}^n k",
        r"\int_0^1 x\,dx",
        r"\triangle ABC",
        r"\begin{cases} 1 \\ 2 \end{cases}",
        "1, 2, ...",
        r"\{x : x > 0 \mid x\}",
        "5 6",
        "a word or 5 6",
        r"\text{June 20}",
    ):
        assert read(text).tree is None and is_equivalent(text, text + " "), text


def test_a_hedge_is_not_an_answer():
    for gold, response in (
        ("5", "The answer is $5$ or $6$"),
        ("5", "The answer is $5$, or maybe $6$"),
        ("5", "The answer is $$5$$ or $$6$$"),
        ("5", r"The answer is \(5\) / \(6\)"),
        ("A", r"The answer is \(A\), \(B\)"),
        ("A", r"\boxed{A: 5, B: 6}"),
        ("A", r"\boxed{A) five; D. seven}"),
    ):
        assert not verify(response, gold).correct, response
    assert verify("The answer is $5$, which is prime.", "5").correct


# ---------------------------------------------------------------------- command line, pool
def test_one_answer_on_the_command_line(capsys):
    assert main([r"\frac{1}{2}", r"so \boxed{0.5}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"correct": True, "lenient": True, "extracted": "0.5", "reason": "correct"}


def test_a_file_of_rows_gets_its_verdicts(tmp_path):
    rows = [
        {"response": r"\boxed{5}", "gold": "5", "id": 7},
        {"prediction": "nothing", "gold": 5},
        {"response": r"\boxed{4+5}", "gold": "9", "prompt": "What is $4+8$?"},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, ROOT / "verify.py", "--in", source, "--out", target]
    done = subprocess.run(command, capture_output=True, text=True)
    out = rows_of(target)
    assert done.returncode == 0 and [row["correct"] for row in out] == [True, False, True]
    assert out == [verify_row(row) for row in rows]
    assert set(out[0]) == {"response", "gold", "id", "correct", "lenient", "extracted", "reason"}


def test_user_mistakes_are_one_line_and_exit_code_2(tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    for content, message in (('{"gold": "5"}\n', "a row needs gold"), ("{\n", "not JSON")):
        bad.write_text(content)
        assert main(["--in", str(bad), "--out", str(tmp_path / "out.jsonl")]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {bad}:1: {message}") and error.count("\n") == 1
    assert main(["--in", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "out.jsonl")]) == 2
    for argv in ([], ["5"], ["--in", "x"], ["5", "6", "--in", "x", "--out", "y"], ["--unknown"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2


def test_a_pool_gives_the_verdicts_of_one_process_and_ends_although_sigterm_is_caught():
    rows = [{"response": f"\\boxed{{{n % 7}}}", "gold": str(n % 5)} for n in range(6000)]
    before = signal.signal(
        signal.SIGTERM, lambda number, frame: None
    )  # as in a process that trains
    try:
        verdicts = [list(verify_rows(rows, workers=2)) for _ in range(5)]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert verdicts == [list(verify_rows(rows, workers=1))] * 5


def test_the_verifier_needs_only_the_standard_library():
    others = "{'torch', 'sympy', 'mpmath', 'numpy'}"
    check = f"import sys, verify; print(sorted({others} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


# -------------------------------------------------------------------------- labelled cases
def rows_of(path: Path) -> list[dict]:
    with open(
        path, encoding="utf-8"
    ) as lines:  # a problem may hold U+2028, at which splitlines would cut
        return [json.loads(line) for line in lines]


@needs_shared
def test_labelled_cases_are_judged_right():
    rows = rows_of(SHARED / "verify" / "cases.jsonl")
    verdicts = [verify(row["response"], row["gold"]).correct for row in rows]
    wrong = [row for row, verdict in zip(rows, verdicts) if verdict != row["expected"]]
    negatives = [row for row in rows if not row["expected"]]
    assert len(wrong) <= 0.0005 * len(rows)
    assert len(negatives) > 4000 and all(row["expected"] for row in wrong)


@needs_shared
def test_what_public_reports_found_is_judged_right():
    rows = rows_of(SHARED / "verify" / "reports.jsonl")
    right = [verify(row["response"], row["gold"]).correct == row["expected"] for row in rows]
    sure = [verdict for row, verdict in zip(rows, right) if row["confidence"] >= 0.8]
    assert sum(sure) >= 0.97 * len(sure) and sum(right) >= 0.92 * len(right)


@needs_shared
def test_labelled_responses_keep_their_verdicts():
    rows = rows_of(SHARED / "data" / "r1format_math.jsonl")
    rows = [row for row in rows if row["final_correct"] is not None]
    wrong = []
    for row in rows:
        verdict = verify(f"\\boxed{{{row['final']}}}", row["answer"], prompt=row["question"])
        if verdict.correct != row["final_correct"]:
            wrong.append(row["id"])
    assert len(rows) > 250 and not wrong


@needs_shared
def test_boxing_the_longest_formula_of_the_prompt_hardly_pays():
    formula = re.compile(r"\$\$?((?:\\.|[^$\\])+)\$\$?|\\\[(.+?)\\\]", re.DOTALL)
    rows = rows_of(SHARED / "data" / "math_train.jsonl")
    rows = [row for row in rows if is_answer(row["answer"])]
    paid = refused = 0
    for row in rows:
        prompt = row["question"]
        found = [(match[1] or match[2]).strip() for match in formula.finditer(prompt)]
        blind = max(found, key=len, default="")
        paid += verify(f"\\boxed{{{blind}}}", row["answer"], prompt=prompt).correct
        refused += not verify(f"\\boxed{{{row['answer']}}}", row["answer"], prompt=prompt).correct
    assert paid < 0.005 * len(rows) and refused <= 0.001 * len(rows)


@needs_shared
def test_every_gold_answer_equals_itself_and_its_box():
    golds = {row["gold"] for row in rows_of(SHARED / "verify" / "cases.jsonl")}
    for path in (SHARED / "data").glob("*.jsonl"):
        golds |= {row["answer"] for row in rows_of(path) if is_answer(row["answer"])}
    assert len(golds) > 3000
    assert not [gold for gold in golds if not is_equivalent(gold, gold)]
    assert not [gold for gold in golds if not verify(f"\\boxed{{{gold}}}", gold).correct]


@needs_shared
def test_hostile_strings_get_their_verdicts():
    wrong = []
    for row in rows_of(SHARED / "verify" / "adversarial.jsonl"):
        gold, response = (
            "".join(piece * count for piece, count in row[key])
            for key in ("gold_parts", "pred_parts")
        )
        verdict = verify(response, gold).correct  # null: any verdict will do
        if row["expected"] is not None and verdict != row["expected"]:
            wrong.append(row["id"])
    assert not wrong


def full() -> None:
    """The long form of the generated checks, with what they cost."""
    memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    check_mutations(10_000, seed=3)
    before = memory()
    times: list[float] = []
    slowest: list[tuple] = []
    for seed in range(4, 34):
        found = check_mutations(10_000, seed)
        times += [seconds for seconds, _, _ in found]
        slowest = sorted(slowest + found[-5:])[-5:]
    print(f"peak memory {before} MB after 10,000 mutations, {memory()} MB after 310,000")
    for name, spent in (("mutations", sorted(times)), ("loops", check_loops(30_000, seed=5))):
        spread = [spent[int(len(spent) * share)] * 1000 for share in (0.5, 0.99, 0.999)]
        print(
            f"{len(spent):,} {name}, CPU ms: median {spread[0]:.3f}, p99 {spread[1]:.2f}, ", end=""
        )
        print(f"p99.9 {spread[2]:.2f}, max {spent[-1] * 1000:.1f}")
    for seconds, gold, response in slowest:
        print(f"  slowest {seconds * 1000:.1f} ms: {ascii(gold)} | {ascii(response)[:120]}")
    start = time.process_time()
    check_pairs(34_000, seed=5)
    print(f"102,000 generated pairs hold, {time.process_time() - start:.0f} s")


if __name__ == "__main__":
    full() if sys.argv[1:] == ["--full"] else sys.exit(__doc__)
