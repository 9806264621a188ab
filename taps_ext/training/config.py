"""Every number that a drafter's training depends on, besides its data and its target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ObjectiveName = Literal["eagle2", "hass"]


@dataclass(frozen=True)
class TrainingConfig:
    """How a drafter is trained. The same config, data and target give the same weights on one machine.

    The published EAGLE-2 weights of the losses are 1.0 (feature) and 0.1 (distribution); HASS adds 1.0 (top tokens).
    """

    objective: ObjectiveName = "eagle2"
    steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    feature_weight: float = 1.0  # smooth L1 between the drafter's output and the target's next feature
    distribution_weight: float = 0.1  # cross-entropy against the target's whole distribution
    top_weight: float = 1.0  # hass: cross-entropy against the target's likeliest tokens
    num_top_tokens: int = 10  # hass
    alignment_passes: int = 3  # hass: the deepest pass sees two of its own features in a row
    noise: float = 0.1  # half the width of the uniform noise on input features, at 512 tokens (scaled by 512 / length)
    bf16_autocast: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in ("eagle2", "hass"):
            raise ValueError(f"objective must be 'eagle2' or 'hass', got {self.objective!r}")
        for name in ("steps", "batch_size", "alignment_passes", "num_top_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup_steps", "feature_weight", "distribution_weight", "top_weight", "noise", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
