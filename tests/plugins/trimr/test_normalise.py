from fractions import Fraction

import pytest

from jettison.plugins.trimr.normalise import parse_answer
from jettison.plugins.trimr.normalise_same import context_of, same

# Pairs by hand: equal, different, and open (may be either: only True is wrong).
EQUAL = r"""
1/2 | 0.5                       | \frac{1}{2} | 0.5                 | \frac12 | 1/2
\dfrac{3}{4} | 0.75             | \tfrac{3}{4} | 3/4                | -\frac{1}{2} | -0.5
-1/2 | \frac{-1}{2}             | 2/4 | 1/2                         | 0.50 | .5
1,000 | 1000                    | 12,345,678 | 12345678             | 1{,}000 | 1000
10\,000 | 10000                 | 1e3 | 1000                        | 1.2\times 10^5 | 120000
1.2e5 | 120,000                 | 2^{10} | 1024                     | 2^10 | 1024
2**10 | 1024                    | 10^{-2} | 0.01                    | 5! | 120
3! | 6                          | 1 1/2 | 3/2                       | 1\frac{1}{2} | 1.5
2½ | 2.5                        | ½ | 1/2                           | ¾ | 0.75
twelve | 12                     | Twelve | 12                       | 70 | 70.0
\boxed{12} | 12                 | $12$ | 12                         | \(12\) | 12.
**12** | 12                     | \text{12} | 12                    | 12 | = 12
\boxed{\frac{1}{2}} | 0.5       | \left(3\right) | 3                | +5 | 5
−5 | -5                         | ５ | 5                             | 3 × 4 | 12
3 \cdot 4 | 12                  | 12 ÷ 4 | 3                        | (2+3)*4 | 20
2 + 3 | 5                       | 2-x | -x+2                        | 2^{-1} | 1/2
\sqrt{16} | 4                   | \sqrt{8} | 2\sqrt{2}              | \sqrt{2}/2 | 1/\sqrt{2}
\frac{1}{\sqrt{2}} | \frac{\sqrt{2}}{2} | \sqrt{12} | 2\sqrt{3}     | \sqrt[3]{8} | 2
1/(1+\sqrt{2}) | \sqrt{2}-1     | (1+\sqrt{2})^2 | 3+2\sqrt{2}      | \sqrt{2}\sqrt{3} | \sqrt{6}
√16 | 4                         | sqrt(9) | 3                       | \sqrt2 | 2^{1/2}
\frac{\pi}{2} | \pi/2           | 2\pi | \pi*2                      | π/2 | 0.5\pi
sin(pi/6) | 1/2                 | \cos(\pi) | -1                    | \tan{\frac{\pi}{4}} | 1
ln(1) | 0                       | \exp(0) | 1                       | \frac{4\pi}{6} | \frac{2\pi}{3}
2x | x+x                        | x^2+2x+1 | (x+1)^2                | x(x+1) | x^2+x
(x-1)(x+1) | x^2-1              | 3x^2y | 3yx^2                     | \frac{x^2-1}{x-1} | x+1
a+b | b+a                       | 2(a+b) | 2a+2b                     | x_1+x_2 | x_2+x_1
x² | x^2                        | 6x/3 | 2*x                         | \frac{x}{2} | 0.5x
x=5 | 5                         | x = 5 | x=5                       | y=\frac{1}{2} | 0.5
f(x)=2x+2 | 2(x+1)              | n = 1,000 | 1000                  | \theta = \pi/2 | \pi/2
50% | 0.5                       | 50\% | 50%                        | 50 percent | 1/2
12.5% | 1/8                     | 100% | 1                          | 0.5% | 0.005
5 m | 500 cm                    | 5 km | 5000 m                     | 1 hour | 60 minutes
90 min | 1.5 h                  | 2 kg | 2000 g                      | 18 dollars | $18
\$18 | 18 dollars               | 50 cents | 0.5 dollars             | 12 inches | 1 foot
3 feet | 1 yard                 | 90^\circ | 90 degrees              | 45° | 45 degrees
12 cm^2 | 12 square centimeters | 1 m^2 | 10000 cm^2                | 3 m^3 | 3 cubic meters
36 km/h | 10 m/s                | 60 mph | 60 miles per hour         | 1 week | 7 days
12 apples | 12 apple            | 2 million | 2000000               | 3 dozen | 36
1.5 thousand dollars | 1500 dollars | 2 years | 24 months           | 5 liters | 5000 ml
{1,2} | {2,1}                   | \{1,2,3\} | {3, 1, 2}             | {1/2, 0.25} | {\frac14, 0.5}
x=1 or x=2 | {2, 1}             | \pm 3 | {3,-3}                    | ±2 | \{-2, 2\}
x = \pm 3 | x=3 or x=-3         | \emptyset | {}                     | ∅ | \varnothing
(1,2) | (1, 2)                  | (1/2, 3) | (0.5, 3)               | [1,2) | [1, 2)
[1,2) | 1 \le x < 2             | x>3 | (3,\infty)                  | x \geq 3 | [3, \infty)
3 < x | x > 3                   | x<=2 | (-\infty, 2]               | 0<x<1 | (0,1)
(0,1)\cup(2,3) | (2,3)\cup(0,1) | \infty | +\infty                   | -\infty | -∞
1, 2 | 1,2                      | 1 and 2 | 1, 2                    | 2, 3, and 5 | 2, 3, 5
B | (B)                         | (b) | B                           | option C | C
B. 12 | B                       | (D) | D.                          | 选项B | B
Paris | paris                   | the Nile | Nile                   | yes | Yes.
True | true                     | 是 | yes                           | Alice and Bob | Alice and Bob
y = x+1 | y = 1+x               | x+y=2 | y+x=2                     | x+y=2 | 2=x+y
"""
DIFFERENT = r"""
12 | 21                         | 1/2 | 1/3                         | 0.5 | 5
1/2 | 2                         | -5 | 5                            | 1,000 | 1
100 | 1000                      | 2^{10} | 10^2                     | 3! | 3
\frac{2}{3} | \frac{3}{2}       | 1 1/2 | 1/2                       | 1\frac{1}{2} | 1/2
\sqrt{2} | 2                    | \sqrt{8} | 2\sqrt{3}              | \sqrt{4} | -2
\pi | 3                         | 2\pi | \pi                        | \sin(\pi/6) | \cos(\pi/6)
2x | x^2                        | x^2+1 | (x+1)^2                   | x+y | x-y
3x | 3                          | x^2-1 | 1-x^2                     | x_1 | x_2
x=5 | 6                         | 50% | 40%                         | 5 m | 5 cm
5 kg | 6 kg                     | 1 hour | 100 minutes              | 12 cm^2 | 12 cm
$5 | $6                         | 90 degrees | 45 degrees           | 1 week | 7 hours
{1,2} | {1,3}                   | {1,2} | {1,2,3}                   | \{1\} | \emptyset
(1,2) | (2,1)                   | (1,2) | [1,2]                     | [1,2) | (1,2]
x>3 | x<3                       | x>3 | x>=3                        | (1,2,3) | (1,2)
(0,1) | (0,2)                   | \infty | -\infty                  | 1, 2 | 1, 3
B | C                           | (A) | (D)                         | yes | no
true | false                    | 2 million | 2 thousand            | 1e3 | 1e-3
0.1 | 0.01                      | 10^{-2} | 10^2                    | 7/8 | 0.7
"""
OPEN = r"""
50% | 50                        | 0.333 | 1/3                       | 3.14 | \pi
1.41 | \sqrt{2}                 | 12 apples | 12 oranges            | AB | BA
1/2x | x/2                      | 1/2x | 1/(2x)                     | x^23 | x^{23}
3:4 | 6:8                       | 3:30 | 1:10                       | 3,14 | 3.14
1,234 | {1,234}                 | (1,234) | (1, 234)                | {1,234} | {1, 234}
log(100) | 2                    | \log 100 | 2                       | f(2) | 2f
f(x+1) | fx+f                   | 5 m | 5                           | 5m | 5 m
12 | twelve dozen               | B | 12                            | A | a
x=5 | y=5                       | x | y                             | 101_2 | 5
10 | 10_2                       | 3 no | 3 on                       | 2 score | 2
5 pounds | 5 dollars            | 5 pounds | £5                      | 5 degrees C | 5 degrees F
1, 2 | 2, 1                     | 1 or 2 | 1                        | 12 or 13 | 12
not 12 | 12                     | 12? | 12                          | -12 | 12
2\frac{1}{2} | 1                | 2 1/2 | 1                         | 1 000 | 1
0.1 | .01                       | e | 2.718                         | i^2 | -1
\frac{0}{0} | 0                 | 1/0 | 1                           | 0^0 | 1
0/0 | 1                         | \infty-\infty | 0                 | \infty+1 | \infty
|x| | x                         | \sqrt{x^2} | x                    | \sqrt{-4} | 2
\sqrt{-4} | -2                  | (-8)^{1/3} | -2                   | (-8)^{1/3} | 2
x/x | 0                         | \frac{x}{x} | x                   | \sin x | sin*x
sinx | xsin                     | 5!! | 120                         | 5!! | 15
3 4/5 | 3*4/5                   | 1 2/3 | 12/3                      | 34 | 3 4
7/8 | 0.9                        | 5 a.m. | 5 p.m.                   | 5 am | 5
12 cm | 12 in                   | 3/4 | 3 4                         | 1/2/2 | 1
two | to                        | one half | 1                      | half | 1/2
2^3^2 | 64                      | -2^2 | 4                          | (1,2) | 1,2
{1,1,2} | {1,2}                 | [1,2] | 1,2                       | x+y=2 | x+y=3
\binom{4}{2} | 4/2              | 4 choose 2 | 4                    | 12_3 | 12
a | the a                       | A | A minor                       | C | 100
none | no                       | no solution | no                  | 0 | no
II | 11                         | IV | 4                            | 1l | 11
O | 0                           | l | 1                             | 1O | 10
007 | 7                         | 2-3 | -1                          | 3-1 | 4-2
2020-01-02 | 2020-02-01         | 1/2/2020 | 2/4/2020               | 12.1.2020 | 1.12.2020
5 Mg | 5 mg                     | 5 MW | 5 mW                       | 5 Mb/s | 5 MB/s
Aa | aa                         | Aabb | aabb                       | TtRr | ttrr
CO | Co                         | DNA | dna                         | H2O | 2HO
0 K | 0 C                       | 0K | 0C                           | 0 K | 0
0 A | 0 V                       | 0 oranges | 0 apples              | 5A | 5a
about 3 | 3                     | 555-1234 | 1234-555               | 0101 | 101
10:30 | 10.30                   | 1.2.3 | 1.23                      | 0x10 | 10
5 K | 5                         | 5k | 5000                         | 2M | 2000000
"""


def pairs(table):
    cells = [cell.strip() for line in table.strip().splitlines() for cell in split_cells(line)]
    assert len(cells) % 2 == 0
    return list(zip(cells[::2], cells[1::2], strict=True))


def split_cells(line):
    line = line.replace("|x|", "\0")
    return [cell.replace("\0", "|x|") for cell in line.split("|")]


def verdict(first, second, context=None):
    one, two = parse_answer(first), parse_answer(second)
    if one is None or two is None:
        return None
    return same(one, two, context) if context is not None else same(one, two)


def test_t4_there_are_two_hundred_pairs():
    assert sum(len(pairs(table)) for table in (EQUAL, DIFFERENT, OPEN)) >= 200


@pytest.mark.parametrize(("first", "second"), pairs(EQUAL))
def test_t4_equal_answers_are_equal_both_ways(first, second):
    assert verdict(first, second) is True, f"{parse_answer(first)} and {parse_answer(second)}"
    assert verdict(second, first) is True, f"{second} and {first}"


@pytest.mark.parametrize(("first", "second"), pairs(DIFFERENT))
def test_t4_different_answers_are_different_both_ways(first, second):
    assert verdict(first, second) is False, f"{parse_answer(first)} and {parse_answer(second)}"
    assert verdict(second, first) is False, f"{second} and {first}"


@pytest.mark.parametrize(("first", "second"), pairs(OPEN))
def test_t4_what_may_be_two_values_is_never_called_equal(first, second):
    assert verdict(first, second) is not True, f"{parse_answer(first)} and {parse_answer(second)}"
    assert verdict(second, first) is not True, f"{second} and {first}"


def test_t4_no_false_equality_among_all_pairs_of_unequal_values():
    """Every answer against every answer whose value, worked out apart, is another."""
    values = {}
    for number in [Fraction(n, d) for n in range(-5, 7) for d in (1, 2, 3, 4, 7, 10)]:
        top, bottom = number.numerator, number.denominator
        spellings = [
            f"{top}/{bottom}",
            rf"\frac{{{top}}}{{{bottom}}}",
            f"x = {top}/{bottom}",
            rf"\boxed{{{top}/{bottom}}}",
        ]
        if 100 % bottom == 0:
            spellings.append(str(float(number)))
            spellings.append(f"{float(number * 100):g}%")
        for spelling in spellings:
            values[spelling] = number
    names = sorted(values)
    for first in names:
        for second in names:
            found = verdict(first, second)
            equal = values[first] == values[second]
            assert found is not (not equal), f"{first} and {second}: {found}"
            if equal and "x" not in first + second:
                assert found is True, f"{first} and {second}: {found}"


def test_t4_the_question_names_options_and_units():
    context = context_of("How many apples are left? (A) 12 (B) 13 (C) 14")
    assert verdict("B", "13", context) is True
    assert verdict("13", "(B)", context) is True
    assert verdict("B", "12", context) is False
    assert verdict("D", "12", context) is not True
    assert verdict("12", "12 apples", context) is True
    assert verdict("12", "12 oranges", context) is not True
    assert context_of("Pick: A. Paris\nB. Rome\nC. Oslo").options == {"A": "Paris", "B": "Rome", "C": "Oslo"}
    asked = context_of("What is the distance in meters?")
    assert verdict("5", "500 cm", asked) is True
    assert verdict("5", "5 cm", asked) is False
    both = context_of("How many meters are 500 cm, and what is it in feet?")
    assert verdict("5", "5 m", both) is None
    same_text = context_of("Which? (A) 12 (B) 12.0 (C) 3")
    assert verdict("A", "12", same_text) is None
