"""What `check-lossless` is asked, what it found, and what to make of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ..sampling import SamplingParams
from ..tree import TreeShape
from .divergence import Divergence
from .frequencies import LEAST_COUNT, ChiSquare

TEMPERATURES = (0.0, 0.5, 1.0)
# A p-value below it is no chance: that happens in 1 of 80,000 tables at most. It is more than a millionth because the
# chi-square distribution is an approximation: two cells, of which 20 draws are expected in one, are the worst case.
SIGNIFICANCE = 1e-6
LEAST_DRAWS = 100  # fewer leave no two cells to compare
FEW = 1.2  # an acceptance length below it: hardly any verified draft was accepted


@dataclass(frozen=True)
class LosslessSettings:
    """How much is checked."""

    temperatures: tuple[float, ...] = TEMPERATURES
    max_new_tokens: int = 32  # of the longest rows; those beside them end sooner
    batch_size: int = 8
    num_draws: int = 1000  # for the frequencies, at the highest temperature; 0 leaves them out
    num_first_tokens: int = 3
    draws_together: int = 64
    seed: int = 0
    shape: TreeShape = field(default_factory=TreeShape)

    def __post_init__(self) -> None:
        # A text of one token is the prompt's: no draft would be verified.
        for name, least in (("max_new_tokens", 2), ("batch_size", 1), ("num_draws", 0), ("draws_together", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if 0 < self.num_draws < LEAST_DRAWS:
            raise ValueError(f"num_draws must be 0 or at least {LEAST_DRAWS}, got {self.num_draws}")
        if not self.temperatures or len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError(f"give one or more different temperatures, got {list(self.temperatures)}")
        for temperature in self.temperatures:
            SamplingParams(temperature, seed=self.seed)

    @property
    def draws(self) -> bool:
        """Whether frequencies are compared."""
        return self.num_draws > 0 and max(self.temperatures) > 0


@dataclass(frozen=True)
class TextCheck:
    """A way's texts at one temperature beside the plain ones."""

    way: str
    temperature: float
    num_texts: int
    acceptance_length: float  # nan: there was no decode step
    divergences: list[Divergence]

    @property
    def verdict(self) -> str:
        """equal, near-ties or different."""
        if not self.divergences:
            return "equal"
        return "near-ties" if all(one.is_near_tie for one in self.divergences) else "different"


@dataclass(frozen=True)
class FrequencyCheck:
    """The first tokens of a way's draws beside the target's probabilities."""

    way: str
    temperature: float
    num_draws: int
    test: ChiSquare

    @property
    def verdict(self) -> str:
        """as expected or not as expected."""
        return "as expected" if self.test.p_value >= SIGNIFICANCE else "not as expected"


@dataclass(frozen=True)
class LosslessReport:
    """All that was found."""

    dtype: str
    settings: LosslessSettings
    texts: list[TextCheck]
    frequencies: list[FrequencyCheck]

    @property
    def passed(self) -> bool:
        """Whether drafts were verified, and nothing found but equal texts, near-ties and expected frequencies."""
        return not self._has_faults and self._has_steps

    @property
    def _has_faults(self) -> bool:
        verdicts = {check.verdict for check in self.texts} | {check.verdict for check in self.frequencies}
        return bool(verdicts & {"different", "not as expected"})

    @property
    def _has_steps(self) -> bool:
        return not all(math.isnan(check.acceptance_length) for check in self.texts)

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self._has_faults:
            return "not lossless"
        if not self._has_steps:
            return "nothing was checked: every text ended with its first token, and no draft was verified"
        if any(check.verdict == "near-ties" for check in self.texts):
            return f"lossless, up to near-ties of {self.dtype}"
        return "lossless"

    @property
    def notes(self) -> list[str]:
        """What takes weight from the verdict."""
        return [*self._text_notes(), *self._frequency_notes()]

    def _text_notes(self) -> Iterator[str]:
        if idle := dict.fromkeys(f"{one.temperature:g}" for one in self.texts if math.isnan(one.acceptance_length)):
            yield f"no draft was verified at T = {', '.join(idle)}: every text ended with its first token"
        steps = [one for one in self.texts if one.acceptance_length < FEW]
        lowest = {one.way: one for one in sorted(steps, key=lambda one: -one.acceptance_length)}
        if few := [f"{one.acceptance_length:.2f} of {way} at T = {one.temperature:g}" for way, one in lowest.items()]:
            yield f"hardly any draft token was accepted (acceptance length {', '.join(few)}): equal texts prove little"

    def _frequency_notes(self) -> Iterator[str]:
        if not self.frequencies:
            yield "the frequencies of the first tokens were not checked"
            return
        one = self.frequencies[0]  # what is expected is the same for all
        rare, advice = f"is expected {LEAST_COUNT:g} times in {one.num_draws} draws", "try more draws or other prompts"
        if one.test.num_cells < 2:
            yield f"no second beginning of a text {rare}: frequencies prove nothing; {advice}"
        elif one.test.num_tokens < 2:
            yield f"no beginning of two or more tokens {rare}: frequencies tested no tree step; {advice}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        texts = [
            {**asdict(check), "verdict": check.verdict, "divergences": [_as_dict(one) for one in check.divergences]}
            for check in self.texts
        ]
        frequencies = [{**asdict(check), "verdict": check.verdict} for check in self.frequencies]
        head = {"verdict": self.verdict, "passed": self.passed, "notes": self.notes, "dtype": self.dtype}
        return {**head, "settings": asdict(self.settings), "texts": texts, "frequencies": frequencies}


def _as_dict(divergence: Divergence) -> dict[str, Any]:
    return {**asdict(divergence), "is_near_tie": divergence.is_near_tie}
