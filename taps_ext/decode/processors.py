"""transformers' logits processors on a draft tree: which of them can run there, and running them.

Each node of a tree has its own prefix, so they run in Python, node by node. Temperature, top-k, top-p and min-p are no
processors here: `ops.verify_tree` applies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from ..tree import DraftTree

# Processors that cannot run per node, and why.
UNSUPPORTED_PROCESSORS = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "it runs the model itself along one sequence",
    "WatermarkLogitsProcessor": "it draws from a generator in sequence order",
    "SynthIDTextWatermarkLogitsProcessor": "it keeps a state along one sequence",
}
# Applied behind the temperature by transformers, beside top-k, top-p and min-p; verification has no such filter.
WARPERS_WITHOUT_OP = ("TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "TopHLogitsWarper")
WARPER_PARAMETERS: dict[Any, str] = {
    logits_process.TemperatureLogitsWarper: "temperature",
    logits_process.TopKLogitsWarper: "top_k",
    logits_process.TopPLogitsWarper: "top_p",
    logits_process.MinPLogitsWarper: "min_p",
}
WARPERS_WITH_OP = tuple(warper.__name__ for warper in WARPER_PARAMETERS)


def checked_processors(processors: Any) -> LogitsProcessorList:
    """Return a call's own logits processors; raise ValueError unless they are a list of what can run on a tree."""
    listed = [] if processors is None else processors
    strange = [one for one in listed if not callable(one)] if isinstance(listed, Sequence) else [listed]
    if strange:
        raise ValueError(
            f"logits_processor must be a list of logits processors, got {strange[0]!r}"
            f"{' in it' if isinstance(listed, Sequence) else '; put it in a list'}"
        )
    refuse_processors(LogitsProcessorList(listed))
    return LogitsProcessorList(listed)


def refuse_processors(processors: LogitsProcessorList) -> None:
    """Raise ValueError for a processor that would not mean on a tree what it means on a text."""
    for processor in processors:
        for name in (kind.__name__ for kind in type(processor).__mro__):
            if name in WARPERS_WITH_OP:
                raise ValueError(f"{name} is a sampling parameter; set it in SamplingParams")
            if name in WARPERS_WITHOUT_OP:
                raise ValueError(
                    f"{name} works behind the temperature, where only top-k, top-p and min-p are supported"
                )
            if name in UNSUPPORTED_PROCESSORS:
                raise ValueError(f"{name} cannot run on a tree: {UNSUPPORTED_PROCESSORS[name]}; decode plainly with it")


def process_logits(
    processors: LogitsProcessorList, logits: Tensor, tree: DraftTree, prefixes: Sequence[list[int]]
) -> Tensor:
    """Return the logits [B, N, V], processed for each node with its own text: the row's prefix, then root to node.

    `prefixes[b]` ends with the row's root token (for the prefill: with the prompt). Some processors hold a value per
    row of the batch, so each is given the node's text in every row, and the node's own row is taken.
    """
    processed = logits.to(torch.float32, copy=True)
    batch_size = len(prefixes)
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    for row, (prefix, count) in enumerate(zip(prefixes, tree.num_nodes.tolist(), strict=True)):
        texts: list[list[int]] = []
        for node in range(count):
            texts.append(prefix if node == 0 else texts[parents[row][node]] + [tokens[row][node]])
            ids = torch.tensor([texts[node]], device=logits.device).repeat(batch_size, 1)
            processed[row, node] = processors(cast(Any, ids), cast(Any, processed[row, node].repeat(batch_size, 1)))[
                row
            ]
    return processed


def split_warpers(processors: LogitsProcessorList, keep_others: bool) -> tuple[dict[str, float], LogitsProcessorList]:
    """Split transformers' prepared list into temperature, top_k, top_p, min_p and the processors before them.

    Without `keep_others`, warpers that verification has no filter for are left out, too.
    """
    parameters: dict[str, float] = {}
    rest = LogitsProcessorList()
    for processor in processors:
        for warper, name in WARPER_PARAMETERS.items():
            if isinstance(processor, warper):
                if name in parameters:
                    raise ValueError(f"{warper.__name__} is given twice; {name} can be set once")
                parameters[name] = getattr(processor, name)
                break
        else:
            if keep_others or type(processor).__name__ not in WARPERS_WITHOUT_OP:
                rest.append(processor)
    return {"temperature": 1.0, **parameters}, rest
