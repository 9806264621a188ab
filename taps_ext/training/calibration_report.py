"""What a calibration is worth, measured on draws that were not fitted: likelihood, hits and reliability."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.formats import CalibrationRecord
from ..drafters.coupling import Calibration

NUM_CHILDREN = 10  # of a node, as a tree of the usual branching keeps them
COUPLED, UNCOUPLED, TOPK = "coupled", "uncoupled", "topk"  # rules, ways to score children: see `Cell`
BASELINES = (UNCOUPLED, TOPK)
NUM_BINS = 10  # of predicted probability, equally wide


@dataclass(frozen=True)
class Measures:
    """Sums over draws, for one way to score a node's children."""

    num_draws: int
    loss: float  # nats, -log of what the drawn tokens were given
    num_hits: int  # drawn tokens that are among the best children
    num_children: tuple[int, ...]  # by bin of the probability they are given
    predicted: tuple[float, ...]  # by bin: these probabilities, summed
    observed: tuple[int, ...]  # by bin: how many of the children were drawn

    @classmethod
    def total(cls, parts: Sequence[Measures]) -> Measures:
        """The sums over all parts, added in their order."""

        def total(name: str) -> Any:
            column = [getattr(part, name) for part in parts]
            return tuple(map(sum, zip(*column, strict=True))) if isinstance(column[0], tuple) else sum(column)

        return cls(**{field.name: total(field.name) for field in fields(cls)})

    @property
    def nats(self) -> float:
        """Nats a draw."""
        return self.loss / self.num_draws

    @property
    def hit_rate(self) -> float:
        """Share of the draws that are among the best children."""
        return self.num_hits / self.num_draws

    @property
    def calibration_error(self) -> float:
        """How much probability a draw stands in a wrong bin: |predicted - observed|, summed over the bins."""
        differences = (abs(p - o) for p, o in zip(self.predicted, self.observed, strict=True))
        return sum(differences) / self.num_draws

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        figures = {name: getattr(self, name) for name in ("nats", "hit_rate", "calibration_error")}
        return {
            "num_draws": self.num_draws,
            **figures,
            "bins": [*zip(self.num_children, self.predicted, self.observed, strict=True)],
        }


@dataclass(frozen=True)
class Cell:
    """One temperature and depth, by rule: `coupled`; `uncoupled`, beta 0 and its own alpha; `topk`, EAGLE-2's own
    scores: beta 0 and alpha = temperature."""

    temperature: float
    depth: int
    alpha: float
    beta: float
    uncoupled_alpha: float
    rules: dict[str, Measures]

    @property
    def coupled(self) -> Measures:
        """Of the calibrated drafter."""
        return self.rules[COUPLED]

    def gain_over(self, rule: str) -> float:
        """Nats a draw that the calibration gains over another rule."""
        return self.rules[rule].nats - self.coupled.nats


@dataclass(frozen=True)
class CalibrationReport:
    """A calibration and what it is worth on texts that were left out of the fit."""

    calibration: Calibration
    cells: tuple[Cell, ...]  # temperature by temperature, each from depth 1
    seed: int
    num_fitted: int  # places of the text
    num_held_out: int
    repeats: int  # draws at each place of the fit

    def at(self, temperature: float) -> list[Cell]:
        """The cells of a temperature, by depth."""
        return [cell for cell in self.cells if cell.temperature == temperature]

    def to_dict(self) -> dict[str, Any]:
        """JSON values: all that was measured."""
        cells = [
            {**{name: getattr(cell, name) for name in ("temperature", "depth", "alpha", "beta", "uncoupled_alpha")}}
            | {rule: measures.to_dict() for rule, measures in cell.rules.items()}
            for cell in self.cells
        ]
        return {**self.calibration.to_dict(), **self._facts(), "cells": cells}

    def record(self, facts: Mapping[str, Any]) -> CalibrationRecord:
        """What calibration.json holds; `facts` say of which target and text it is."""
        return CalibrationRecord(self.calibration, {**facts, **self._facts()})

    def _facts(self) -> dict[str, Any]:
        def table(figures: Iterable[float]) -> list[list[float]]:
            values = [round(figure, 4) for figure in figures]
            return [values[i : i + self.calibration.depth] for i in range(0, len(values), self.calibration.depth)]

        gains = {f"nats_over_{rule}": table(cell.gain_over(rule) for cell in self.cells) for rule in BASELINES}
        gains["calibration_error"] = table(cell.coupled.calibration_error for cell in self.cells)
        positions = {"fitted": self.num_fitted, "held_out": self.num_held_out, "draws_at_each": self.repeats}
        return {"seed": self.seed, "positions": positions, "held_out": gains}


def measure(scores: Tensor, drawn: Tensor) -> Measures:
    """The measures of logits float [S, V] and the drawn tokens int64 [S]."""
    logs = scores.log_softmax(-1)
    best, children = logs.topk(min(NUM_CHILDREN, logs.shape[-1]), dim=-1)
    predicted, is_drawn = best.double().exp(), children == drawn[:, None]
    bins = (predicted * NUM_BINS).long().clamp(max=NUM_BINS - 1).flatten()

    def by_bin(values: Tensor) -> tuple[Any, ...]:
        return tuple(torch.bincount(bins, values.flatten().double(), minlength=NUM_BINS).tolist())

    return Measures(
        num_draws=len(drawn),
        loss=-float(logs.gather(1, drawn[:, None]).double().sum()),
        num_hits=int(is_drawn.sum()),
        num_children=tuple(map(int, by_bin(torch.ones_like(predicted)))),
        predicted=by_bin(predicted),
        observed=tuple(map(int, by_bin(is_drawn))),
    )
