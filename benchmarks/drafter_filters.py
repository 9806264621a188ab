"""The request's filters on the drafter's side, from outside the library: what was tried and is not in it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from taps_ext import ops, reference


@contextmanager
def filtering_drafters(top_k: int, top_p: float, min_p: float) -> Iterator[None]:
    """Tokens that the filters would drop from what a drafter expects of the target are not proposed above T = 0.

    It expects the softmax of `alpha * log q / T`.
    """
    expand = ops.expand_frontier

    def filtered(
        logits: Tensor, scores: Tensor, branching: int, coupling: Any = None, token_ids: Tensor | None = None
    ) -> ops.ExpandedFrontier:
        if coupling is None:
            return expand(logits, scores, branching, None, token_ids)
        masked = logits.clone()
        numbers = zip(coupling.temperature.tolist(), coupling.alpha.tolist(), strict=True)
        for row, (temperature, alpha) in zip(masked, numbers, strict=True):
            for node in row if temperature > 0 else ():
                kept = reference.kept_tokens(node, reference.Filters(temperature / alpha, top_k, top_p, min_p))
                node.masked_fill_(~kept, -math.inf)
        return expand(masked, scores, branching, coupling, token_ids)

    with mock.patch.object(ops, "expand_frontier", filtered), torch.inference_mode():
        yield
