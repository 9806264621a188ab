"""Verification: walk the tree with the target's own draws (house rule: sample, then match)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..sampling import SamplingRows
from ..tree import DraftTree


@dataclass(frozen=True)
class Acceptance:
    """What the target keeps of each tree, and the token that it adds."""

    path: Tensor  # int64 [B, N], the root and the accepted nodes, then -1
    num_accepted: Tensor  # int64 [B], accepted draft tokens
    tokens: Tensor  # int64 [B, N], the accepted tokens, the bonus token behind them, then -1
    bonus_tokens: Tensor  # int64 [B], -1 where a visited row of logits was invalid
    is_invalid: Tensor  # bool [B], a visited row held NaN or no finite maximum


def verify(logits: Tensor, tree: DraftTree, sampling: SamplingRows, positions: Tensor) -> Acceptance:
    """The accepted path and bonus token of each row; `positions` [B] is that of the token drawn at the root."""
    walk = ops.verify_tree(
        logits,
        tree,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        sampling.seeds,
        positions,
    )
    followers = torch.nn.functional.pad(walk.path[:, 1:], (0, 1), value=-1)
    tokens = torch.where(followers >= 0, tree.tokens.gather(1, followers.clamp_min(0)), -1)
    tokens = tokens.scatter(1, walk.num_accepted[:, None], walk.bonus_tokens[:, None])
    return Acceptance(walk.path, walk.num_accepted, tokens, walk.bonus_tokens, walk.status != 0)
