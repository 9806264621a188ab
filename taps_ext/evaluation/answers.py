"""The final answer in a worked solution, and whether two of them are equal: as numbers, or as LaTeX.

Solutions say what they come to in one of three ways, the strongest first: GSM8K's `#### 18`, MATH's `\\boxed{18}`, and
"the answer is 18" or "Answer: 18". What a model says last counts.
"""

from __future__ import annotations

import re
from fractions import Fraction

UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
NUMBER = re.compile(rf"(?:(?<![\w)])[-+])?(?:{UNSIGNED})(?:\s*/\s*\d+)?")
HASHES = re.compile(rf"^\s*####\s*([-+]?\$?\s*(?:{UNSIGNED})\s*%?(?:\s+[a-z]+)?)\s*\.?\s*$", re.MULTILINE)  # no heading
BOX = re.compile(r"\\(?:boxed|fbox)\s*")
SAID = re.compile(r"answer[*_\s]*(?:is[*_\s]*:?|:)[*_\s]*(.+?)(?:\.\s|\.?$)", re.IGNORECASE | re.MULTILINE)
FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
UNIT = re.compile(
    r"(?<=[\d}])(?:\s*\\(?:text|mbox|mathrm)\s*\{\s*[a-zA-Z][^{}]*\}(?:\^\{?\d\}?)?|(?:\s+[a-zA-Z]{3,})+)$"
)


def same_number(solution: str, reference: str) -> bool:
    """Whether two solutions come to the same number."""
    found = final_number(solution)
    return found is not None and found == final_number(reference)


def final_number(solution: str) -> Fraction | None:
    """The number that a solution comes to: where it says so, else the last one in it. None where there is none."""
    for said in (_last(HASHES, solution), last_box(solution), _last(SAID, solution)):
        if said is not None and (numbers := NUMBER.findall(_plain(said).rpartition("=")[2])):
            return number(numbers[0])
    numbers = NUMBER.findall(_plain(solution))
    return number(numbers[-1]) if numbers else None


def number(text: str) -> Fraction | None:
    """The value of a decimal number or a fraction of two, with thousands separators; None for anything else."""
    try:
        return Fraction(re.sub(r"[,\s]", "", text))
    except (ValueError, ZeroDivisionError):
        return None


def same_expression(solution: str, reference: str) -> bool:
    """Whether two solutions' final expressions are written alike, up to spelling, or are the same number."""
    found, expected = final_expression(solution), final_expression(reference)
    if found is None or expected is None:
        return False
    found, expected = normal(found), normal(expected)
    return found == expected or (_value(found) is not None and _value(found) == _value(expected))


def final_expression(solution: str) -> str | None:
    """What stands in a solution's last box, else where it says what the answer is; None where it says neither."""
    box = last_box(solution)
    return box if box is not None else _last(HASHES, solution) or _last(SAID, solution)


def last_box(solution: str) -> str | None:
    """What stands within the last `\\boxed{}` that is closed, or the one word behind a `\\boxed` without braces."""
    for found in reversed(list(BOX.finditer(solution))):
        if (inside := _braced(solution, found.end())) is not None:
            return inside
    return None


def normal(expression: str) -> str:
    """One spelling of a LaTeX expression: what changes nothing but the look of it is left out."""
    text = expression.strip().strip("*$").strip().rstrip(".")
    text = re.sub(r"(?<!\\)\\(?:[,!;:\s]|(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z]))", "", text)
    text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})", "", text)
    text = UNIT.sub("", text.replace("\\%", "").replace("\\$", "").replace("%", "").replace("$", "").strip())
    text = re.sub(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\s+", "", text)
    text = re.sub(r"(\\frac|\\sqrt)(\d)", r"\1{\2}", text)
    text = re.sub(r"(\\frac\{[^{}]*\})(\d)", r"\1{\2}", text)
    text = re.sub(r"_\{(\w)\}", r"_\1", text)
    text = re.sub(r"^[a-zA-Z](?:\\in|=)", "", text)
    text = re.sub(r"^\(([A-Z])\)$", r"\1", text)
    text = re.sub(r"(?<!\d)\.(?=\d)", "0.", text.replace("\u2212", "-").replace("{,}", ","))
    return re.sub(r"(\d),(?=\d{3}(?:\D|$))", r"\1", text)


def _plain(text: str) -> str:
    """Numbers in LaTeX and in dollars as plain ones."""
    text = re.sub(r"\\[,!]|[$\\*]", "", FRACTION.sub(r"\1/\2", text))
    return text.replace("{,}", ",").replace("\u2212", "-")


def _value(text: str) -> Fraction | None:
    if found := re.fullmatch(r"(-?)\\frac\{(-?\d+)\}\{(\d+)\}", text):
        return number(f"{found[1]}{found[2]}/{found[3]}".replace("--", ""))
    return number(text) if NUMBER.fullmatch(text) else None


def _last(mark: re.Pattern[str], solution: str) -> str | None:
    """What stands behind the last of the marks."""
    said = mark.findall(solution)
    return said[-1].strip() if said else None


def _braced(text: str, start: int) -> str | None:
    """What stands within the braces that open at `start`, or the one word there."""
    if text[start : start + 1] != "{":
        word = re.match(r"[^\s$.]+", text[start:])
        return word[0] if word else None
    depth = 0
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + 1 : place]
    return None
