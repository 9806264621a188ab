"""Final answers: what a solution comes to, and which are the same."""

from __future__ import annotations

from fractions import Fraction

import pytest

from taps_ext.evaluation.answers import final_expression, final_number, same_expression, same_number

NUMBERS = {
    "6 crates hold 6 * 7 = 42 plums.\n#### 42": 42,
    "#### 1,250": 1250,
    "#### -3.5": Fraction(-7, 2),
    "#### $18 dollars": 18,
    "#### Step 2: add\n3 + 4 = 7": 7,
    "#### 1. First\nWe add.\nThe answer is 9.": 9,
    "So the total is \\boxed{24} tiles, as 4 * 6 = 24; check: 24 / 6 = 4": 24,
    "\\boxed{\\frac{3}{4}} of 80": Fraction(3, 4),
    "\\boxed{12\\text{ cm}} and 7": 12,
    "The answer is 140 screws. There were 3 boxes.": 140,
    "The answer is **3.5**. Then 8.": Fraction(7, 2),
    "**Answer:** 116 bricks in 4 rows": 116,
    "The answer is: 5 * 3 = 15.": 15,
    "the answer is 18 because 9 times 2 is 18, not 20": 18,
    "The answer is 4.\nNo, wait. The answer is 5.": 5,
    "The answer is as follows.\nThere are 12 pens": 12,
    "She pays $1,234.50 in all.": Fraction(2469, 2),
    "It falls to -$7": -7,
    "a change of \u22127": -7,
    "That is 10-3": 3,
    "between 3-4": 4,
    "1{,}000 steps": 1000,
    "pairs such as 1, 2, 3": 3,
    "1/2 of them": Fraction(1, 2),
    "\\frac{1}{2}": Fraction(1, 2),
    ".5": Fraction(1, 2),
    "25%": 25,
    "so \\boxed{1\\frac{1}{2}} of it": Fraction(3, 2),
    "so \\boxed{-2 \\dfrac34}": Fraction(-11, 4),
    "The answer is 1 1/2 cups": Fraction(3, 2),
    "\\boxed{\\frac{1}{-2}}": Fraction(-1, 2),
    "\\boxed{-\\frac{-1}{2}}": Fraction(1, 2),
    "The answer is 20 (since 4 * 6 = 24, 24 - 4)": 20,
    "The answer is **20** (4 * 6 = 24, less 4)": 20,
    "The answer is 20 pens, because 4 * 6 = 24 and 4 are lost": 20,
    "The answer is 20 pens (24 - 4 = 20, and 24 were 4 * 6)": 20,
    "The answer is 5 * (2 + 1) = 15": 15,
    "The answer is 10^3": None,
    "\\boxed{10^{3}}": None,
    "\\boxed{45^\\circ}": 45,
    "divide by 5/0": None,
    "there is no number": None,
    "": None,
}


@pytest.mark.parametrize("solution", NUMBERS)
def test_the_number_is_the_one_that_the_solution_says_it_comes_to(solution: str) -> None:
    assert final_number(solution) == NUMBERS[solution]


@pytest.mark.parametrize(
    ("solution", "reference", "is_same"),
    [
        ("It is 8.0", "8", True),
        ("so 2,000 in all", "a sum\n#### 2000", True),
        ("That makes 0.25", "1/4", True),
        ("That makes 7", "8", False),
        ("I do not know", "8", False),
        ("I do not know", "nobody does", False),
    ],
)
def test_numbers_are_compared_by_value(solution: str, reference: str, is_same: bool) -> None:
    assert same_number(solution, reference) is is_same


EXPRESSIONS = {
    "then \\boxed{3}, no: \\boxed{\\frac{a}{b + \\sqrt{c}}}.": "\\frac{a}{b + \\sqrt{c}}",
    "\\fbox{7}": "7",
    "$\\boxed 7$": "7",
    "\\boxed{5} and cut off in \\boxed{\\frac{1": "5",
    "The answer is $x + 1$. And more.": "$x + 1$",
    "The answer is $x (x + 1)$ (by symmetry).": "$x (x + 1)$",
    "The answer is $2 (\\sqrt{3} + 1)$, since 2 = 2": "$2 (\\sqrt{3} + 1)$",
    "x + 1": None,
}


@pytest.mark.parametrize("solution", EXPRESSIONS)
def test_the_expression_is_in_the_last_box_that_is_closed(solution: str) -> None:
    assert final_expression(solution) == EXPRESSIONS[solution]


SAME = [
    ("\\dfrac12", "\\frac{1}{2}"),
    ("\\frac{1}2", "\\tfrac{1}{2}"),
    ("-\\frac{1}{2}", "\\frac{-1}{2}"),
    ("0.5", "\\frac{1}{2}"),
    ("1/2", ".5"),
    ("5.00", "5"),
    ("12\\,500", "12,500"),
    ("3,\\!000", "3{,}000"),
    ("\\left( 2, -\\frac{\\pi}{3} \\right)", "(2,-\\frac{\\pi}{3})"),
    ("x \\in [0,4)", "[0, 4)"),
    ("x=9", "9"),
    ("45^\\circ", "45"),
    ("45^{\\circ}", "45 degrees"),
    ("3 \\text{ cm}^2", "3"),
    ("3 square inches", "3\\mbox{ square inches}"),
    ("\\text{west}", "west"),
    ("\\text{(B)}", "B"),
    ("\\$6.20", "6.2"),
    ("30\\%", "30"),
    ("a\\sqrt3", "a\\sqrt{3}"),
    ("201_{4}", "201_4"),
    ("\\begin{pmatrix} 1 \\\\ -2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\-2\\end{pmatrix}"),
    ("\u22124", "-4"),
    ("11,\\! 111,\\! 100", "11111100"),
    ("x^{2}", "x^2"),
    ("\\frac{1}{-2}", "-0.5"),
    ("1\\frac12", "3/2"),
    ("1 \\frac{1}{2}", "1.5"),
    ("-\\frac{-1}{2}", "0.5"),
    ("\\frac 1 2", "\\frac12"),
    ("(1{,}000, 2)", "(1000,2)"),
    ("2 x y", "2xy"),
    ("100, 200", "100,\\ 200"),
]
DIFFERENT = [
    ("2x", "2"),
    ("\\frac{1}{2}", "\\frac{1}{3}"),
    ("\\frac{2}{1}", "\\frac{1}{2}"),
    ("(1,2)", "(2,1)"),
    ("\\sqrt{2}", "2"),
    ("[0,1)", "[0,1]"),
    ("-5", "5"),
    ("1,2", "12"),
    ("1 1", "11"),
    ("1 2", "12"),
    ("1\\quad 2", "12"),
    ("1\\ 2", "12"),
    ("100, 200", "100200"),
    ("(100,200)", "(100200)"),
    ("\\{1,200\\}", "\\{1200\\}"),
    ("\\left[1,200\\right]", "[1200]"),
    ("1\\frac12", "11/2"),
    ("10^3", "10"),
    ("x^{23}", "x^23"),
    ("\\text{west}", "\\text{east}"),
    ("3\\pi", "3"),
    ("x + 1", "x - 1"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_two_spellings_of_an_expression_are_the_same(one: str, other: str) -> None:
    assert same_expression(f"so $\\boxed{{{one}}}$.", f"\\boxed{{{other}}}")
    assert same_expression(f"\\boxed{{{other}}}", f"\\boxed{{{one}}}")


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_expressions_are_not(one: str, other: str) -> None:
    assert not same_expression(f"\\boxed{{{one}}}", f"\\boxed{{{other}}}")


def test_an_endless_number_is_no_number() -> None:
    digits = "1" * 5000
    for text in (digits, f"\\frac{{{digits}}}{{2}}", f"1 {digits}/2"):
        final_number(f"\\boxed{{{text}}}")
        assert not same_expression(f"\\boxed{{{text}}}", "\\boxed{1}")


def test_a_solution_that_says_no_answer_is_wrong() -> None:
    assert not same_expression("it is 3", "\\boxed{3}")
    assert not same_expression("it is 3", "it is 3")
    assert same_expression("The answer is $3$.", "\\boxed{3}")
    assert same_expression("#### 3", "\\boxed{3}")
