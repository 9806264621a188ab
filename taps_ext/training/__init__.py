"""Training drafters: a dataset with loss masks, features from the target as they are needed, two objectives."""

from __future__ import annotations

from .config import TrainingConfig
from .dataset import Example, TokenBatch, TokenDataset, chat_sequence
from .trainer import Trainer, TrainingResult, train_drafter

__all__ = ["Example", "TokenBatch", "TokenDataset", "Trainer", "TrainingConfig", "TrainingResult", "chat_sequence"]
__all__ += ["train_drafter"]
