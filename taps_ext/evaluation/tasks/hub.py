"""Questions of a data set on the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .questions import Question

Record = Mapping[str, Any]


@dataclass(frozen=True)
class HubSet:
    """A split of a data set on the hub, and what a row of it, by its number, asks."""

    path: str
    config: str | None
    split: str
    of_hub: Callable[[int, Record], Question]

    def __str__(self) -> str:
        return f"{self.path}, {self.split}"

    def questions(self) -> list[Question]:
        """All of them, in order; ValueError, in a sentence, where `datasets` is missing or the hub cannot be read."""
        instead = f"or give a local file of JSON lines in place of {self.path}"
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise ValueError(
                f"a task of the hub needs {error.name}: pip install 'taps_ext[eval]', {instead}"
            ) from error
        try:
            rows = datasets.load_dataset(self.path, self.config, split=self.split)
        except Exception as error:  # hub, disk, format: each has exceptions of its own
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{self.path} cannot be read from the hub ({reason}); mend that, {instead}") from error
        return self.of_rows(rows)

    def of_rows(self, rows: Any) -> list[Question]:
        """The questions in a data set's rows; ValueError where its columns have changed."""
        try:
            return [self.of_hub(number, row) for number, row in enumerate(rows)]
        except KeyError as error:
            raise ValueError(
                f"{self.path} no longer has the column {error}; give a local file of JSON lines in place of it"
            ) from error


def label(text: str) -> str:
    """A category as our files spell it: Number Theory is number_theory."""
    return "_".join(text.lower().replace("&", "and").split())
