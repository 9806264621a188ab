"""Training drafters: conversations as token sequences, the target's features of them, and what is learned."""

from __future__ import annotations

from .masks import Example, TokenBatch, TokenDataset

__all__ = ["Example", "TokenBatch", "TokenDataset"]
