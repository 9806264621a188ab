"""How often the first tokens come, against the target's own probabilities: a chi-square test.

The probabilities are of stock forwards and PyTorch's softmax, so that nothing of ours stands on both sides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Text = tuple[int, ...]
LEAST_COUNT = 20.0  # expected of a cell; the usual 5 is for p-values near 0.05, not for those of a millionth


@dataclass(frozen=True)
class ChiSquare:
    """How far counts are from what is expected; by chance they would be as far in a share `p_value` of all cases."""

    statistic: float
    num_cells: int
    num_tokens: int  # of the longest text that has a cell of its own
    p_value: float


@torch.inference_mode()
def last_logits(model: Any, **inputs: Any) -> Tensor:
    """The logits [B, V] behind each text, float64 on the CPU, of a stock forward that makes no others if it can."""
    last_only = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    logits: Tensor = model(**inputs, use_cache=False, **last_only).logits[:, -1].double().cpu()
    return logits


@torch.inference_mode()
def common_beginnings(
    model: Any, prompt: Sequence[int], temperature: float, num_tokens: int, least: float, batch_size: int
) -> dict[Text, float]:
    """The texts of up to `num_tokens` tokens that follow a prompt with a probability of at least `least`, with it."""
    found: dict[Text, float] = {(): 1.0}
    longest: list[Text] = [()]
    for _ in range(num_tokens):
        texts, longest = longest, []
        for start in range(0, len(texts), batch_size):
            rows = texts[start : start + batch_size]
            ids = torch.tensor([[*prompt, *row] for row in rows], device=model.device)
            next_token = (last_logits(model, input_ids=ids) / temperature).softmax(-1)
            joint = torch.tensor([found[row] for row in rows], dtype=torch.float64)[:, None] * next_token
            for row, token in (joint >= least).nonzero().tolist():
                longest.append((*rows[row], token))
                found[longest[-1]] = float(joint[row, token])
    return found


def chi_square(texts: Sequence[Sequence[int]], beginnings: Mapping[Text, float]) -> ChiSquare:
    """The test of drawn texts against `common_beginnings`.

    A text is counted at the longest of the beginnings that it has. Where fewer than 20 texts are expected, cells are
    pooled; a pool of fewer than 20 is added to the smallest cell.
    """
    counts = Counter(_cell(text, beginnings) for text in texts)
    expected = {text: share * len(texts) for text, share in _own_shares(beginnings).items()}
    is_pooled = {text: count < LEAST_COUNT for text, count in expected.items()}
    cells = sorted((expected[text], counts[text]) for text in expected if not is_pooled[text])
    pool = [sum(of[text] for text in expected if is_pooled[text]) for of in (expected, counts)]
    if cells and pool[0] < LEAST_COUNT:
        cells[0] = (cells[0][0] + pool[0], cells[0][1] + int(pool[1]))
    else:
        cells.append((pool[0], int(pool[1])))
    statistic = sum((count - mean) ** 2 / mean for mean, count in cells)
    longest = max((len(text) for text in expected if not is_pooled[text]), default=0)
    return ChiSquare(statistic, len(cells), longest, _p_value(statistic, len(cells) - 1))


def _own_shares(beginnings: Mapping[Text, float]) -> dict[Text, float]:
    """What of each beginning is in no longer one."""
    shares = dict(beginnings)
    for text, probability in beginnings.items():
        if text:
            shares[text[:-1]] -= probability
    return {text: max(share, 0.0) for text, share in shares.items()}


def _cell(text: Sequence[int], beginnings: Mapping[Text, float]) -> Text:
    length = 0
    while length < len(text) and tuple(text[: length + 1]) in beginnings:
        length += 1
    return tuple(text[:length])


def _p_value(statistic: float, degrees: int) -> float:
    """The upper tail of the chi-square distribution; 1 where nothing is free."""
    if degrees == 0:
        return 1.0
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
