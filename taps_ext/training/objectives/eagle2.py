"""EAGLE-2's part: the noise on the features that its one pass reads, so that its own imperfect ones are no surprise.

Source: EAGLE (arXiv 2401.15077), section 4.2; EAGLE-2 (arXiv 2406.16858) trains the same network.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ..features import DraftBatch

NOISE_LENGTH = 512  # tokens, the text length at which `ObjectiveConfig.noise` is the half width


def noisy(batch: DraftBatch, noise: float, seed: int) -> Tensor:
    """The batch's features [B, T, H] plus uniform noise of half width `noise` * 512 / tokens of the row.

    A row's noise is a function of the seed, its id and its length only: the same in any batch, and behind any padding.
    CPU and CUDA draw different noise from one seed.
    """
    noised = batch.features.clone()
    for row, (length, row_id) in enumerate(zip(batch.lengths.tolist(), batch.ids, strict=True)):
        half_width = noise * NOISE_LENGTH / (length + 1)
        generator = torch.Generator(noised.device).manual_seed(_row_seed(seed, row_id))
        uniform = torch.rand(length, noised.shape[-1], generator=generator, device=noised.device)
        noised[row, :length] += ((uniform - 0.5) * (2 * half_width)).to(noised.dtype)
    return noised


def _row_seed(seed: int, row_id: int) -> int:
    """64 well mixed bits: the CPU's generator reads only the low half of its seed."""
    digest = hashlib.blake2b(f"{seed}/{row_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
