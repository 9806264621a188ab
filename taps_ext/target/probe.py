"""The probe: a small branched tree, whose logits must be those of the same texts one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..tree import DraftTree
from .support import PLAINLY, name_of

SPECIAL_TOKENS = ("token_id", "token_ids", "token_index")  # ends of the names under which configs keep them
# Allowed differences between logits of a tree and of a text, per standard deviation of the text's logits: the largest
# one in float32 (wrong positions give 0.01 and more); the median in half precision (0.02 is usual), and where the shape
# of a batch moves logits as much, as with quantised activations.
EXACT_ERROR, ROUNDED_ERROR = 1e-3, 0.1


@dataclass(frozen=True)
class Probe:
    """Hold two prompts of different lengths, a branched tree behind each, and the texts of the trees' leaves.

    A node's column in its tree is not its depth beside the first path: decoders that count positions from the cache,
    or that let nodes see whatever comes before them, score those nodes otherwise.
    """

    prefixes: Tensor  # int64 [2, P]
    tree: DraftTree  # [2, N]
    texts: Tensor  # int64 [R, longest]: prefix and path of each leaf, repeating its last token behind the end
    places: Tensor  # int64 [2, N, 2]: the row of `texts` with a node's path, and the node's column there

    lengths = (3, 2)
    parents = ((-1, 0, 1, 0, 3, 4, 3), (-1, 0, 0, 1, 2, 4, 1))

    @classmethod
    def of(cls, model: PreTrainedModel, device: torch.device) -> Probe:
        """Return the probe over tokens spread over the model's vocabulary."""
        num_nodes, longest = len(cls.parents[0]), max(cls.lengths)
        tokens = cls.tokens(model, 2 * (num_nodes + longest)).view(2, -1)
        texts: list[list[int]] = []
        places = torch.zeros(2, num_nodes, 2, dtype=torch.int64)
        for row, parents in enumerate(cls.parents):
            prefix, nodes = tokens[row, : cls.lengths[row]].tolist(), tokens[row, longest:].tolist()
            for leaf in set(range(num_nodes)) - set(parents):
                path = [leaf]
                while parents[path[0]] >= 0:
                    path.insert(0, parents[path[0]])
                for depth, node in enumerate(path):
                    places[row, node] = torch.tensor([len(texts), len(prefix) + depth])
                texts.append(prefix + [nodes[node] for node in path])
        width = max(len(text) for text in texts)
        padded = torch.tensor([text + text[-1:] * (width - len(text)) for text in texts])
        count = torch.full((2,), num_nodes, device=device)
        drafted = tokens[:, longest:].to(device)
        scores = torch.zeros(drafted.shape, device=device)
        tree = DraftTree(drafted, torch.tensor(cls.parents, device=device), scores, count)
        return cls(tokens[:, :longest].to(device), tree, padded.to(device), places.to(device))

    @property
    def longest(self) -> int:
        """Number of tokens of the longest text."""
        return self.texts.shape[1]

    @staticmethod
    def tokens(model: PreTrainedModel, count: int) -> Tensor:
        """Return int64 [count], tokens spread over the vocabulary, none of which a config gives a meaning of its own.

        One token would hide much: row 0 of the embedding is often zero.
        """
        config = model.config.get_text_config()
        special, size = _special_tokens(model.config) | _special_tokens(config), int(config.vocab_size)
        plain = [token for token in range(size) if token not in special] or list(range(size))
        return torch.tensor([plain[(2 * i + 1) * len(plain) // (2 * count)] for i in range(count)])


def refuse_other_logits(
    model: PreTrainedModel,
    probe: Probe,
    given: tuple[Tensor, Tensor],
    stock: Tensor,
    alone: Tensor,
    numbered: Callable[[], Tensor],
) -> None:
    """Raise ValueError if trees are scored otherwise than the same texts, and name the difference.

    Args:
        given: the logits behind each prefix, [2, 1, V], and those of the tree's nodes, [2, N, V].
        stock: [R, longest, V], the model's own logits of `probe.texts`.
        alone: [1, longest, V], the model's own logits of the first of them: how much the shape of a batch moves them.
        numbered: returns the same with the position ids 0, 1, 2, ..., to find the reason of a difference.
    """
    rows, columns = probe.places.unbind(-1)
    expected = torch.cat([stock[rows[:, :1], columns[:, :1] - 1], stock[rows, columns]], dim=1)
    is_exact = model.dtype == stock.dtype == torch.float32
    is_exact = is_exact and float(_errors(alone, stock[:1], by_largest=True).max()) <= EXACT_ERROR
    errors = _errors(torch.cat(given, dim=1), expected, is_exact)  # [2, 1 + N]
    depths = columns - columns[:, :1]
    is_plain = pad(depths == torch.arange(depths.shape[1], device=depths.device), (1, 0), value=True)
    # Not the largest error of a node where numbers are rounded: near-ties may send a node to other experts.
    plain, branched = (
        float(part.max() if is_exact else part.median()) for part in (errors[is_plain], errors[~is_plain])
    )
    limit = EXACT_ERROR if is_exact else ROUNDED_ERROR
    if max(plain, branched) <= limit:
        return
    what = "the branches of a tree" if plain <= limit else "a text in the decoder's own cache"
    counts_otherwise = float(_errors(numbered(), alone, by_largest=False).median()) > limit
    reason = ": where it is given no positions, it does not count them from 0, like RoBERTa" if counts_otherwise else ""
    raise ValueError(
        f"target {name_of(model)} gives {what} other logits than its own forward gives the same tokens (by "
        f"{max(plain, branched):.2g} of their standard deviation, allowed {limit:g}){reason}; {PLAINLY}"
    )


def _errors(given: Tensor, expected: Tensor, by_largest: bool) -> Tensor:
    """Return the difference per row [..., V], in standard deviations of `expected`: the largest one or the median.

    Rows that hold NaN in `expected` have no difference: nothing is drawn from them.
    """
    given, expected = given.float(), expected.float()
    apart = torch.where(given == expected, 0, given - expected).abs().nan_to_num(nan=torch.inf)
    finite = expected.nan_to_num(0, 0, 0)
    error = apart.amax(-1) if by_largest else apart.median(-1).values
    error = error / (finite.std(-1) + 1e-6 * finite.abs().amax(-1) + torch.finfo(torch.float32).tiny)
    return torch.where(expected.isnan().any(-1), 0, error)


def _special_tokens(config: Any) -> set[int]:
    values = [value for name, value in vars(config).items() if name.endswith(SPECIAL_TOKENS)]
    lists = [value if isinstance(value, (list, tuple)) else [value] for value in values]
    return {value for part in lists for value in part if isinstance(value, int)}
