"""The EAGLE-2 drafter by the book, for tests: no cache, no mask, every node's whole context computed anew in float64.

Beside it the drafters and texts that it is compared over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from taps_ext.decode.step import draft, draft_chosen, group_drafters
from taps_ext.drafters import Drafter, EagleConfig, EagleDrafter, EagleNetwork
from taps_ext.drafters.coupling import Calibration
from taps_ext.reference import gumbel_noise
from taps_ext.tree import DraftTree, Lengths, TreeShape

V, H = 61, 32
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@cache
def new_target() -> LlamaForCausalLM:
    """A small target of random weights, larger than usual: peaked distributions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=H,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=V,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def make_drafter(
    target: LlamaForCausalLM, seed: int = 1, calibration: Calibration | None = None, **overrides: Any
) -> EagleDrafter:
    torch.manual_seed(seed)
    network = EagleNetwork(EagleConfig.for_target(target.config, **overrides))
    for parameter in network.parameters():  # larger than torch's defaults: peaked distributions, visible differences
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    network.requires_grad_(False).double()  # what is compared is the algorithm, not the rounding of float32
    return EagleDrafter(network, target.get_input_embeddings(), target.get_output_embeddings(), "test", calibration)


class LoneDrafter(EagleDrafter):
    """One that may draft otherwise than its class: it is left alone."""


class Text:
    """Rows of random text with the target's true features, fed to a drafter piece by piece."""

    def __init__(self, target: LlamaForCausalLM, batch_size: int, length: int, seed: int = 5) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, V, (batch_size, length), generator=generator)
        with torch.no_grad():
            self.features = target.model(self.tokens).last_hidden_state
        self.fed = [0] * batch_size

    def feed(self, drafter: EagleDrafter, state: Any, counts: list[int], padding: int = 2) -> None:
        """Observe the next counts[b] slots of each row."""
        drafter.observe(state, *self.block(counts, padding))

    def block(self, counts: list[int], padding: int = 2) -> tuple[Tensor, Tensor, Lengths]:
        """Features, next tokens and counts of the next counts[b] slots of each row; behind each row's end garbage."""
        size = max(counts) + padding
        features = torch.full((len(counts), size, H), math.nan)
        next_tokens = torch.full((len(counts), size), -7)
        for b, (start, count) in enumerate(zip(self.fed, counts, strict=True)):
            features[b, :count] = self.features[b, start : start + count]
            next_tokens[b, :count] = self.tokens[b, start + 1 : start + 1 + count]
            self.fed[b] += count
        return features, next_tokens, Lengths.of(counts)

    def roots(self) -> Tensor:
        return torch.stack([self.tokens[b, fed] for b, fed in enumerate(self.fed)])

    def propose(
        self, drafter: EagleDrafter, state: Any, shape: TreeShape, active: list[bool] | None = None
    ) -> DraftTree:
        return drafter.propose(state, self.roots(), shape, torch.tensor(active or [True] * len(self.fed)))


class Together:
    """Several drafters, run as a decode step runs them."""

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        self.drafters = drafters
        self.groups = group_drafters(drafters)

    def reset(self, batch_size: int, sampling: Any = None, decay: float | None = None) -> list[Any]:
        return [drafter.reset(batch_size, sampling, decay) for drafter in self.drafters]

    def observe(self, states: list[Any], features: Tensor, next_tokens: Tensor, num_tokens: Lengths) -> None:
        for drafter, state in zip(self.drafters, states, strict=True):
            drafter.observe(state, features, next_tokens, num_tokens)

    def propose(
        self, states: list[Any], roots: Tensor, shape: TreeShape, active: Tensor, chosen: list[int] | None = None
    ) -> list[DraftTree]:
        if chosen is None:
            trees = draft(self.drafters, self.groups, states, roots, shape, active)
            return [trees[index] for index in range(len(self.drafters))]
        return draft_chosen(self.drafters, chosen, states, roots, shape, active)

    def evidence(self, states: list[Any]) -> Tensor:
        return torch.stack([state.evidence for state in states])


# ---- the literal drafter


def literal_layer(drafter: EagleDrafter, features: Tensor, tokens: Tensor) -> Tensor:
    """float64 [T, H]: the network over slots 0..T-1, from the weights and the formulas alone."""
    config = drafter.network.config
    weights = {name: weight.double() for name, weight in drafter.network.state_dict().items()}
    attention = {part: weights[f"layers.0.self_attn.{part}_proj.weight"] for part in "qkvo"}
    x = torch.cat((drafter.embedding.weight[tokens].double(), features), -1) @ weights["fc.weight"].T
    if "fc.bias" in weights:
        x = x + weights["fc.bias"]
    length, size = x.shape[0], config.head_dim
    angles = torch.outer(torch.arange(length).float(), drafter.network.rotary.inv_freq).repeat(1, 2)
    cos, sin = angles.cos().double(), angles.sin().double()  # float32 angles are part of the definition

    def heads(part: str, rotate: bool) -> Tensor:
        y = (x @ attention[part].T).view(length, -1, size).transpose(0, 1)
        if rotate:
            y = y * cos + torch.cat((-y[..., size // 2 :], y[..., : size // 2]), -1) * sin
        return y.repeat_interleave(config.num_attention_heads // y.shape[0], 0)

    scores = heads("q", True) @ heads("k", True).transpose(1, 2) / math.sqrt(size)
    future = torch.ones(length, length).triu(1).bool()
    read = scores.masked_fill(future, -math.inf).softmax(-1) @ heads("v", False)
    h = x + read.transpose(0, 1).reshape(length, -1) @ attention["o"].T
    norm = h / (h.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
    norm = norm * weights["layers.0.post_attention_layernorm.weight"]
    gate, up, down = (weights[f"layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return h + (torch.nn.functional.silu(norm @ gate.T) * (norm @ up.T)) @ down.T


def literal_output(drafter: EagleDrafter, features: Tensor, tokens: Tensor, path: list[int]) -> Tensor:
    """The output behind the drafted tokens `path`: its slots take the outputs before them as features."""
    features, tokens = features.double(), tokens.clone()
    for token in path:
        guess = literal_layer(drafter, features, tokens)[-1:]
        features, tokens = torch.cat((features, guess)), torch.cat((tokens, torch.tensor([token])))
    return literal_layer(drafter, features, tokens)[-1]


class Draw(NamedTuple):
    """How the target will draw, as coupled drafting knows it."""

    seed: int
    temperature: float


def coupled_logits(drafter: EagleDrafter, logits: Tensor, draw: Draw | None, depth: int, position: int) -> Tensor:
    """alpha * log q / T + beta * noise, of the children of depth `depth` that would stand at `position`."""
    if draw is None or draw.temperature == 0 or drafter.calibration is None:
        return logits
    known = drafter.calibration
    place = min(depth, known.depth) - 1
    alpha, beta = (
        float(np.interp(draw.temperature, (0, *known.temperatures), [0, *(row[place] for row in table)]))
        for table in (known.alpha, known.beta)
    )
    return alpha * logits / draw.temperature + beta * gumbel_noise(draw.seed, position, V)


def literal_tree(
    drafter: EagleDrafter, features: Tensor, tokens: Tensor, shape: TreeShape, draw: Draw | None = None
) -> list[tuple[Any, ...]]:
    """EAGLE-2 by the book: (path, score, entropy) of the kept nodes in level order, the root left out."""
    pool: list[tuple[list[int], float, float]] = []
    frontier: list[tuple[list[int], float]] = [([], 0.0)]
    for depth in range(1, shape.depth + 1):
        level = []
        for path, score in frontier:
            logits = drafter.lm_head.weight.double() @ literal_output(drafter, features, tokens, path)
            position = len(tokens) + depth  # the text is one token longer than `tokens`: its first is in no slot
            log_probs = coupled_logits(drafter, logits, draw, depth, position).log_softmax(-1)
            entropy = float(-(log_probs.exp() * log_probs).sum())
            best = log_probs.topk(min(shape.branching, V))
            for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                level.append(([*path, token], score + value, entropy))
        pool += level
        frontier = [node[:2] for node in sorted(level, key=lambda node: -node[1])[: shape.branching]]
    least = -math.inf if shape.min_score is None else shape.min_score
    pool = [node for node in pool if node[1] >= least]
    kept = sorted(range(len(pool)), key=lambda i: -pool[i][1])[: shape.max_nodes - 1]
    return [pool[i] for i in sorted(kept)]


def paths_of(tree: DraftTree, row: int) -> list[tuple[list[int], float, float]]:
    tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
    paths: list[list[int]] = [[]]
    for node in range(1, int(tree.num_nodes[row])):
        paths.append([*paths[parents[node]], tokens[node]])
    assert tree.entropies is not None
    return [(paths[i], float(tree.scores[row, i]), float(tree.entropies[row, i])) for i in range(1, len(paths))]


def assert_same_tree(found: list[tuple[Any, ...]], expected: list[tuple[Any, ...]]) -> None:
    assert [node[0] for node in found] == [node[0] for node in expected]
    for position in (1, 2):  # scores and entropies
        numbers = torch.tensor([[node[position] for node in nodes] for nodes in (found, expected)])
        torch.testing.assert_close(numbers[0], numbers[1], atol=1e-5, rtol=1e-5)


def assert_same_bits(found: DraftTree, expected: DraftTree, row: int) -> None:
    assert found.num_nodes[row] == expected.num_nodes[row]
    for name in ("tokens", "parents", "scores", "entropies"):
        assert getattr(found, name)[row].equal(getattr(expected, name)[row]), name
