"""The final answer in a worked solution, and whether two of them are equal: as numbers, or as LaTeX.

Solutions say what they come to in one of three ways, the strongest first: GSM8K's `#### 18`, MATH's `\\boxed{18}`, and
"the answer is 18" or "Answer: 18". What a model says last counts.
"""

from __future__ import annotations

import re
from fractions import Fraction

UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
NUMBER = re.compile(  # a power is matched, so that its base is no number
    rf"(?:(?<![\w)])[-+])?(?:{UNSIGNED})(?:\s*/\s*\d+|\s*\^\s*\{{?-?\d+)?"
)
HASHES = re.compile(rf"^\s*####\s*([-+]?\$?\s*(?:{UNSIGNED})\s*%?(?:\s+[a-z]+)?)\s*\.?\s*$", re.MULTILINE)  # no heading
BOX = re.compile(r"\\(?:boxed|fbox)\s*")
# Where a reason begins: at a word for it, or at a parenthesis with a word or an equation in it.
ASIDE = r"[,;]?\s+(?:\((?=[^()]*(?:=|(?<![\\a-zA-Z])[a-zA-Z]{3}))|(?:since|because|as|for|which)\b)"
SAID = re.compile(rf"answer[*_\s]*(?:is[*_\s]*:?|:)[*_\s]*(.+?)(?:\.\s|\.?$|{ASIDE})", re.IGNORECASE | re.MULTILINE)
PART = r"\s*(?:\{\s*(-?\d{1,99})\s*\}|(\d))"  # of a fraction
FRACTION = re.compile(rf"(-?)\\[dt]?frac{PART}{PART}")
MIXED = re.compile(r"(?<![\d.,/^])(\d{1,99}) +(\d{1,99}) */ *(\d{1,99})(?!\d)")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
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
    text = re.sub(r"\{,\}|,\\!\s*|(?<!\\)\\(?:[,!]|(?:left|right|displaystyle)(?![a-zA-Z]))", "", text)
    text = re.sub(r"(?<!\\)\\(?:[;:\s]|q?quad(?![a-zA-Z]))", " ", text)
    text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})", "", text)
    text = UNIT.sub("", text.replace("\\%", "").replace("\\$", "").replace("%", "").replace("$", "").strip())
    text = re.sub(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    if not re.search(r"[(\[]|\\\{", text):  # where commas stand between elements
        text = THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)
    text = re.sub(r"(?<!\d) | (?!\d)", "", re.sub(r"\s+", " ", text))  # 1 2 is not 12
    text = re.sub(r"(\\frac|\\sqrt)(\d)", r"\1{\2}", text)
    text = re.sub(r"(\\frac\{[^{}]*\}) ?(\d)", r"\1{\2}", text)
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    text = re.sub(r"^[a-zA-Z](?:\\in|=)", "", text)
    text = re.sub(r"^\(([A-Z])\)$", r"\1", text)
    return re.sub(r"(?<!\d)\.(?=\d)", "0.", text.replace("\u2212", "-"))


def _plain(text: str) -> str:
    """Numbers in LaTeX and in dollars as plain ones."""
    text = re.sub(r"\\[,!]|[$\\*]", "", _slashed(text))
    return text.replace("{,}", ",").replace("\u2212", "-")


def _value(text: str) -> Fraction | None:
    """Of a normal expression, where commas are no separators of thousands."""
    text = _slashed(text)
    return number(text) if NUMBER.fullmatch(text) and "," not in text else None


def _slashed(text: str) -> str:
    """Fractions of whole numbers as -1/2, and mixed numbers as fractions: 1\\frac12 as 3/2."""

    def fraction(found: re.Match[str]) -> str:
        sign, *parts = found.groups()
        top, bottom = (int(braced or digit) for braced, digit in (parts[:2], parts[2:]))
        is_negative = (sign == "-") ^ (top < 0) ^ (bottom < 0)
        return f"{'-' if is_negative else '+' if sign else ''}{abs(top)}/{abs(bottom)}"

    text = FRACTION.sub(fraction, re.sub(r"(?<=\d)\s*(?=\\[dt]?frac)", " ", text))
    return MIXED.sub(lambda found: f"{int(found[1]) * int(found[3]) + int(found[2])}/{found[3]}", text)


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
