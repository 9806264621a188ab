"""Unsupported targets: every refusal says what was given, why it is not supported, and the way out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..native import refuse_without_ops

ATTENDING_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
LARGEST_TREE = 1024  # nodes: room behind a text where a model counts the nodes of a tree as positions
LAYERS_WITHOUT_TIME = ("mlp", "moe")  # they see one token, and hold nothing of those before
PLAINLY = "decode it with taps_ext.plain_generate"  # the way out: it runs transformers' own decoding loop
# Parts of the names under which modules keep what is random in training mode, such as lora_dropout or jitter_noise.
RANDOM_IN_TRAINING = ("drop", "jitter", "noise")
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
    if model.dtype == torch.float64:
        refuse_logits_dtype(model.dtype)
    if not getattr(model, "_supports_sdpa", False):
        raise ValueError(f"target {name} does not support SDPA attention, which tree scoring needs")
    if model.get_output_embeddings() is None:
        raise ValueError(f"target {name} has no LM head that can be found (get_output_embeddings() is None); {PLAINLY}")
    stack = decoder_stack(model)
    if "position_ids" not in inspect.signature(getattr(stack, "_orig_mod", stack).forward).parameters:
        raise ValueError(
            f"target {name} cannot be told the positions of a tree's nodes: its decoder takes no position_ids and "
            f"counts positions from the cache; {PLAINLY}"
        )


def _refuse_layers(model: PreTrainedModel) -> None:
    name, kinds = name_of(model), set(_layer_types(model.config.get_text_config()))
    other = sorted(kinds.difference(ATTENDING_LAYERS, LAYERS_WITHOUT_TIME))
    sparse = [kind for kind in other if "attention" in kind and "linear" not in kind]
    running = [kind for kind in other if kind not in sparse]
    if running or (getattr(model, "_is_stateful", False) and not sparse):
        raise ValueError(
            f"target {name} has {', '.join(running) or 'layers'} with a running state (recurrent, or a convolution's), "
            f"which cannot go back to an accepted branch of a tree; use a model with attention only, or {PLAINLY}"
        )
    if sparse:
        raise ValueError(
            f"target {name} has sparse attention ({', '.join(sparse)}): its layers select or compress the tokens that "
            f"they see, which tree attention does not support; use a model whose layers see every token, or {PLAINLY}"
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


def transformers_model(model: Any) -> Any:
    """Return the transformers model inside the wrappers of `torch.compile` and PEFT; raise ValueError if there is none.

    `generate` of a wrapper hands the inner model to a custom generate function.
    """
    inner = getattr(model, "_orig_mod", model)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    inner = getattr(inner, "_orig_mod", inner)
    if isinstance(inner, PreTrainedModel) and not inner.can_generate():
        raise ValueError(f"target {name_of(inner)} has no LM head; load it as AutoModelForCausalLM")
    if not isinstance(inner, PreTrainedModel):
        inside = isinstance(getattr(model, "module", None), PreTrainedModel)
        raise ValueError(
            f"the target must be a transformers model with an LM head, got {type(model).__name__}; "
            + ("give its .module" if inside else "load one with AutoModelForCausalLM.from_pretrained(...)")
        )
    return inner


def unwrapped(model: Any) -> Any:
    """Return the transformers model inside wrappers, whose layers carry the adapters of a PeftModel.

    They do not carry the virtual tokens of prompt learning, which therefore is refused.
    """
    inner, wrapper = transformers_model(model), getattr(model, "_orig_mod", model)
    if getattr(getattr(wrapper, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"target {name_of(wrapper)} learns prompts or prefixes, which are no part of its layers; use adapters in "
            f"the layers (such as LoRA), or {PLAINLY}"
        )
    return inner


def decoder_stack(model: PreTrainedModel) -> Any:
    """Return the model without its LM head; of a model that takes pictures, its language model.

    Some families' `get_decoder` returns the whole model, or the last matrix of the LM head; in transformers 4 that of
    Idefics3 returns the vision model, too. Llama4's `base_model` is the whole model as well, and its language model has
    the LM head inside.
    """
    stack: Any = model.get_decoder()
    if not isinstance(stack, PreTrainedModel) or stack is model:
        stack = model.base_model
    stack = getattr(stack, "text_model", stack)
    if stack is model or (isinstance(stack, PreTrainedModel) and stack.get_output_embeddings() is not None):
        embedding = model.get_input_embeddings()
        parts = [part for part in stack.children() if isinstance(part, PreTrainedModel)]
        stack = next((part for part in parts if any(one is embedding for one in part.modules())), stack)
    return stack


def refuse_training_mode(model: Any) -> None:
    """Raise ValueError for a model in training mode, or with a part in it that has dropout: its text would be random.

    A part without anything random may be in training mode, as new modules are until `model.eval()`.
    """
    parts = (name for name, part in model.named_modules() if part.training and _is_random_in_training(part))
    if model.training or (part := next(parts, None)) is not None:
        what = f"target {name_of(model)}" if model.training else f"{part} of target {name_of(model)}"
        raise ValueError(
            f"{what} is in training mode, in which dropout makes the target's text random; call model.eval() on all "
            "of it"
        )


def _is_random_in_training(module: torch.nn.Module) -> bool:
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        return True
    numbers = {name: value for name, value in vars(module).items() if isinstance(value, (int, float))}
    return any(value > 0 for name, value in numbers.items() if any(word in name for word in RANDOM_IN_TRAINING))


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
            f"target {name_of(model)} fails in {what} ({type(error).__name__}: {reason}); {PLAINLY}"
        ) from error


def refuse_logits_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError for logits that verification does not take."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"target logits must be float32, bfloat16 or float16, got {dtype}; call model.float()")


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


def refuse_long_text(model: PreTrainedModel, longest: int) -> None:
    """Raise ValueError if a text of `longest` tokens (prompt and new tokens) leaves the range where a tree is exact.

    A tree attends to everything, so a window must hold the whole text; and rotary frequencies that change with the
    length (`dynamic`, `longrope`) would change too early for a tree, as would the scale of Llama4's queries.
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
    scaled = getattr(config, "floor_scale", None) if getattr(config, "attn_temperature_tuning", False) else None
    if scaled is not None and longest + LARGEST_TREE >= scaled:
        raise ValueError(
            f"target {name} scales its queries from token {scaled} on and counts a tree's nodes as tokens, so that "
            f"texts may have {max(scaled - LARGEST_TREE - 1, 0)} tokens, but prompt and new tokens can reach {longest}"
            "; shorten the prompt or max_new_tokens"
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
            f"support; {PLAINLY}"
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
    """Return the length up to which the rotary frequencies stay the same in all layers; None if they never change."""
    lengths: list[int] = []
    for rope in _ropes(getattr(config, "rope_parameters", None)) + _ropes(getattr(config, "rope_scaling", None)):
        kind = str(rope.get("rope_type") or rope.get("type"))
        if "dynamic" in kind or kind == "longrope":
            name = "original_max_position_embeddings"
            known = (rope.get(name), getattr(config, name, None), getattr(config, "max_position_embeddings", None))
            lengths.extend(int(length) for length in known if length)
    return min(lengths, default=None)


def _ropes(parameters: Any) -> list[dict[str, Any]]:
    """Return the settings of every rope in a config's dict: one, or several by layer type, of which some are None."""
    if not isinstance(parameters, dict):
        return []
    return [parameters] + [rope for nested in parameters.values() for rope in _ropes(nested)]
