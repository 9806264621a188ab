"""Unsupported targets: every refusal says what was given, why it is not supported, and the way out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..native import refuse_without_ops
from ..tree import DraftTree

ATTENDING_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
SPECIAL_TOKENS = ("token_id", "token_ids", "token_index")  # ends of the names under which configs keep them
# Allowed differences between logits of a tree and of a text, per standard deviation of the text's logits: the largest
# one in float32 (wrong positions give 0.01 and more); the median in half precision (0.02 is usual), and where the shape
# of a batch moves logits as much, as with quantised activations.
EXACT_ERROR, ROUNDED_ERROR = 1e-3, 0.1
# Arguments that some models give their attention function and that tree attention does not support.
UNSUPPORTED_ATTENTION = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a position bias",
}


def name_of(model: PreTrainedModel) -> str:
    """Return the name of the model's class, for messages."""
    return type(model).__name__


def refuse_unsupported_model(model: PreTrainedModel) -> None:
    """Raise ValueError for a model that cannot score trees, as far as its config, weights and devices tell."""
    name = name_of(model)
    if model.config.is_encoder_decoder:
        raise ValueError(f"target {name} is an encoder-decoder; tree verification needs a decoder-only model")
    _refuse_layers(model)
    _refuse_devices(model)
    refuse_training_mode(model)
    if not getattr(model, "_supports_sdpa", False):
        raise ValueError(f"target {name} does not support SDPA attention, which tree scoring needs")
    if model.get_output_embeddings() is None:
        raise ValueError(f"target {name} has no LM head; load it as AutoModelForCausalLM")


def _refuse_layers(model: PreTrainedModel) -> None:
    name, other = name_of(model), sorted(set(_layer_types(model.config.get_text_config())) - set(ATTENDING_LAYERS))
    sparse = [kind for kind in other if "attention" in kind and "linear" not in kind]
    if getattr(model, "_is_stateful", False) or len(other) > len(sparse):
        kinds = ", ".join(other) or "layers with a state"
        raise ValueError(
            f"target {name} has {kinds}: a recurrent state cannot go back to an accepted branch of a tree; "
            "use a model with attention layers only"
        )
    if sparse:
        raise ValueError(
            f"target {name} has sparse attention ({', '.join(sparse)}): its layers select or compress the tokens that "
            "they see, which tree attention does not support; use a model whose layers see every token"
        )


def _refuse_devices(model: PreTrainedModel) -> None:
    name, devices = name_of(model), {parameter.device.type for parameter in model.parameters()}
    if "meta" in devices:
        raise ValueError(f"target {name} has weights that are not in memory (offloaded or not loaded); load all")
    if devices - {"cpu", "cuda"} or len(devices) > 1:
        raise ValueError(
            f"target {name} is on {', '.join(sorted(devices))}; put all of it on the CPU, or on CUDA devices"
        )
    if devices == {"cuda"}:
        refuse_without_ops(f"target {name} on {next(model.parameters()).device}")


def unwrapped(model: Any) -> Any:
    """Return the transformers model inside a PeftModel; any other model as it is.

    `peft_model.generate` hands the inner model to a custom generate function. Its layers carry the adapters, but not
    the virtual tokens of prompt learning, which therefore is refused.
    """
    if not hasattr(model, "get_base_model"):
        return model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"target {name_of(model)} learns prompts or prefixes, which are no part of its layers; use adapters in the "
            "layers (such as LoRA), or decode it with its own generate"
        )
    return model.get_base_model()


def decoder_stack(model: PreTrainedModel) -> Any:
    """Return the model without its LM head; of a model that takes pictures, its language model.

    Some families' `get_decoder` returns the whole model, or the last matrix of the LM head; in transformers 4 that of
    Idefics3 returns the vision model, too.
    """
    stack: Any = model.get_decoder()
    if not isinstance(stack, PreTrainedModel) or stack is model:
        stack = model.base_model
    return getattr(stack, "text_model", stack)


def refuse_training_mode(model: Any) -> None:
    """Raise ValueError for a model in training mode, whose dropout makes its text random."""
    if model.training:
        raise ValueError(
            f"target {name_of(model)} is in training mode, in which dropout makes its text random; call model.eval()"
        )


def attention_settings(model: Any) -> list[tuple[Any, Any]]:
    """Return each config of the model and its parts with the name of its attention, the outer ones first."""
    configs: dict[int, Any] = {}
    waiting: list[Any] = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while waiting:
        config = waiting.pop(0)
        if config is not None and id(config) not in configs:
            configs[id(config)] = config
            waiting.extend(getattr(config, name, None) for name in config.sub_configs)
    return [(config, config._attn_implementation) for config in configs.values()]


@contextmanager
def refusing_failures(model: PreTrainedModel, what: str) -> Iterator[None]:
    """Raise ValueError where the model's own code fails in `what`; running out of memory stays what it is."""
    try:
        yield
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"target {name_of(model)} fails in {what} ({type(error).__name__}: {reason}); decode it plainly"
        ) from error


def refuse_logits_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError for logits that verification does not take."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"target logits must be float32, bfloat16 or float16, got {dtype}; convert the model")


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
    model: PreTrainedModel, probe: Probe, given: tuple[Tensor, Tensor], stock: Tensor, alone: Tensor
) -> None:
    """Raise ValueError if trees are scored otherwise than the same texts, and name the difference.

    Args:
        given: the logits behind each prefix, [2, 1, V], and those of the tree's nodes, [2, N, V].
        stock: [R, longest, V], the model's own logits of `probe.texts`.
        alone: [1, longest, V], the model's own logits of the first of them: how much the shape of a batch moves them.
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
    counts = "position_ids" not in inspect.signature(model.get_decoder().forward).parameters
    reason = ": its decoder takes no position_ids and counts positions from the cache" if counts else ""
    raise ValueError(
        f"target {name_of(model)} gives {what} other logits than its own forward gives the same tokens (by "
        f"{max(plain, branched):.2g} of their standard deviation, allowed {limit:g}){reason}; decode it plainly"
    )


def refuse_other_length(model: PreTrainedModel, num_tokens: int, num_features: int) -> None:
    """Raise ValueError if a model made another number of places of a prompt than it has tokens."""
    if num_features != num_tokens:
        raise ValueError(
            f"target {name_of(model)} makes {num_features} places of a prompt of {num_tokens} tokens; give one "
            "placeholder token for each place of a picture, as its processor does"
        )


def refuse_other_head(model: PreTrainedModel, head: Tensor, logits: Tensor) -> None:
    """Raise ValueError unless a drafter's head made the model's own logits (both [..., V]) of the same features."""
    head, rounding = head.to(logits.device), 1e-4 if logits.dtype == head.dtype == torch.float32 else 2e-2
    spread = float(logits.float().std())
    if not torch.allclose(head.float(), logits.float(), rtol=rounding, atol=rounding * spread, equal_nan=True):
        raise ValueError(
            f"target {name_of(model)} changes the LM head's product in a way that drafters do not repeat (neither a "
            "known scale nor soft-capping); use drafters with a target whose logits are lm_head(features)"
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


def refuse_long_text(model: PreTrainedModel, longest: int) -> None:
    """Raise ValueError if a text of `longest` tokens (prompt and new tokens) leaves the range where a tree is exact.

    A tree attends to everything, so a window must hold the whole text; and rotary frequencies that change with the
    length (`dynamic`, `longrope`) would change too early for a tree.
    """
    config, name = model.config.get_text_config(), name_of(model)
    window, rope_length = _attention_window(config), _changing_rope_length(config)
    if window is not None and longest > window:
        raise ValueError(
            f"target {name} has layers that see {window} tokens only, but prompt and new tokens can "
            f"reach {longest}; shorten the prompt or max_new_tokens"
        )
    if rope_length is not None and longest > rope_length:
        raise ValueError(
            f"target {name} changes its rotary frequencies beyond {rope_length} tokens, but prompt "
            f"and new tokens can reach {longest}; shorten the prompt or max_new_tokens"
        )


def refuse_attention_arguments(
    module: torch.nn.Module, mask: Tensor | None, expected: Tensor, kwargs: dict[str, Any]
) -> None:
    """Raise ValueError if an attention layer asks for more than tree attention does; `expected` is the tree's mask."""
    asked = {what for name, what in UNSUPPORTED_ATTENTION.items() if kwargs.get(name) is not None}
    if mask is None or mask.dtype != torch.bool or mask.shape != expected.shape:
        asked.add("an attention mask of its own")
    if asked:
        raise ValueError(
            f"the target's {type(module).__name__} asks for {', '.join(sorted(asked))}, which tree attention does not "
            "support; decode it plainly"
        )


def _layer_types(config: Any) -> Sequence[str]:
    return getattr(config, "layer_types", None) or ()


def _attention_window(config: Any) -> int | None:
    """Return the smallest window within which any layer attends, or None if all layers see everything."""
    kinds = _layer_types(config)
    windows = []
    if not kinds or "sliding_attention" in kinds:
        windows.append(getattr(config, "sliding_window", None))
    if "chunked_attention" in kinds:
        windows.append(getattr(config, "attention_chunk_size", None))
    return min((int(window) for window in windows if window), default=None)


def _changing_rope_length(config: Any) -> int | None:
    """Return the length up to which the rotary frequencies stay the same; None if they never change."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) not in ("dynamic", "longrope"):
        return None
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(original or config.max_position_embeddings)
