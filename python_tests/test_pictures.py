"""Targets that take pictures: the text is transformers' own for each picture, or the call is refused by name."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_models import EOS, PAD, VOCAB
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import taps_ext as taps
from taps_ext.checkpoints import save_drafter
from taps_ext.drafters.eagle import EagleConfig, EagleDrafter, EagleNetwork

PICTURE, BEGIN, END, NUM_PLACES = 60, 62, 63, 4  # tokens around a picture, and how many stand for it
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
IS_5 = int(transformers.__version__.split(".")[0]) >= 5
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3]}
# Family: vision config, text config, further fields of the config, and what a row's picture is made of.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "Llava": (
        {**VISION, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, "projection_dim": 32},
        {"model_type": "llama"},
        {"image_token_index": PICTURE, "vision_feature_layer": -1},
    ),
    "Idefics3": ({**VISION, "image_size": 32, "patch_size": 8}, {"model_type": "llama"}, {"scale_factor": 2}),
    "Gemma3": (
        {**VISION, "image_size": 16, "patch_size": 4},
        {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"]},
        {"mm_tokens_per_image": NUM_PLACES, "boi_token_index": BEGIN, "eoi_token_index": END},
    ),
    "Qwen2VL": (
        {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
        {"rope_parameters": {**ROPE, "rope_theta": 10000.0}} if IS_5 else {"rope_scaling": {**ROPE, "type": "mrope"}},
        {"video_token_id": 61, "vision_start_token_id": BEGIN, "vision_end_token_id": END},
    ),
}


@cache
def target_of(family: str) -> Any:
    """A small model with random weights, loud enough that another picture gives another text."""
    vision, text, more = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(
        vision_config=vision, text_config={**TEXT, **text}, image_token_id=PICTURE, pad_token_id=PAD, **more
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            is_scaled = family == "Gemma3" and "embed_tokens" in name
            torch.nn.init.normal_(weight.data, std=0.1 if is_scaled else 2 * weight[0].numel() ** -0.5)
    return model.eval().requires_grad_(False)


@cache
def decoder_of(family: str) -> taps.SpeculativeDecoder:
    """With drafters as wide as the vocabulary, of which some tokens are accepted by chance."""
    model = target_of(family)
    torch.manual_seed(1)
    network = EagleNetwork(EagleConfig.for_target(model.config)).requires_grad_(False).eval()
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    drafters = {"any": EagleDrafter(network, *ends, "any")}
    return taps.SpeculativeDecoder(model, drafters, shape=taps.TreeShape(depth=3, branching=24, max_nodes=100))


def inputs_of(family: str, pictures: list[int], lengths: list[int]) -> dict[str, Any]:
    """What a processor makes of one text a row, left-padded, each with one picture, which a seed describes."""
    words = torch.randint(4, 50, (9,), generator=torch.Generator().manual_seed(3)).tolist()
    texts = [[*words[:2], BEGIN, *[PICTURE] * NUM_PLACES, END, *words[2 : 2 + length]] for length in lengths]
    longest = max(len(text) for text in texts)
    ids = torch.tensor([[PAD] * (longest - len(text)) + text for text in texts])
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    shape = {"Llava": (3, 16, 16), "Idefics3": (1, 3, 32, 32), "Gemma3": (3, 16, 16), "Qwen2VL": (16, 96)}[family]
    values = [2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in pictures]
    places = (ids == PICTURE).long()
    if family == "Qwen2VL":
        inputs |= {"pixel_values": torch.cat(values), "image_grid_thw": torch.tensor([[1, 4, 4]] * len(texts))}
        return inputs | ({"mm_token_type_ids": places} if IS_5 else {})
    inputs["pixel_values"] = torch.stack(values)
    if family == "Idefics3":
        inputs["pixel_attention_mask"] = torch.ones(len(texts), 1, 32, 32, dtype=torch.int64)
    return inputs | ({"token_type_ids": places} if family == "Gemma3" else {})


def texts_of(family: str, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, float]:
    """The text by transformers alone and with the decoder, and the decoder's acceptance length."""
    call = {**inputs, "do_sample": False, "max_new_tokens": 20}
    stock = target_of(family).generate(**call)
    found = target_of(family).generate(**call, custom_generate=decoder_of(family), return_dict_in_generate=True)
    return stock, found.sequences, found.stats.acceptance_length


@pytest.mark.parametrize("family", FAMILIES)
def test_each_picture_gives_the_text_that_transformers_gives_it(family: str) -> None:
    texts, lengths = [], []
    for picture in range(4):
        stock, found, acceptance_length = texts_of(family, inputs_of(family, [picture], [5]))
        assert torch.equal(found, stock), picture
        texts.append(tuple(found[0].tolist()))
        lengths.append(acceptance_length)
    assert len(set(texts)) > 2
    assert max(lengths) > 1.05  # else no drafted token stood behind a picture


@pytest.mark.parametrize("lengths", [[5, 5, 5], [3, 7, 4]], ids=["even", "ragged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_rows_of_a_batch_see_their_own_pictures(family: str, lengths: list[int]) -> None:
    stock, found, _ = texts_of(family, inputs_of(family, [7, 8, 9], lengths))
    assert torch.equal(found, stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_without_pictures_goes_through_transformers_door(family: str) -> None:
    ids = torch.tensor([[5, 0, 7, 8], [9, 10, 11, 12]])
    stock, found, _ = texts_of(family, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert torch.equal(found, stock)


def test_drafters_are_saved_and_loaded_for_a_target_that_takes_pictures(tmp_path: Path) -> None:
    model = target_of("Qwen2VL")
    network = EagleNetwork(EagleConfig.for_target(model.config))
    save_drafter(network, tmp_path / "d", embedding=model.get_input_embeddings(), target_config=model.config)
    assert taps.load_drafters({"d": tmp_path / "d"}, model)["d"].hidden_size == 64


def test_inputs_that_take_part_in_every_step_or_in_none_are_refused_by_name() -> None:
    torch.manual_seed(0)
    target = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=64, n_layer=2, n_head=4)).eval()
    network = EagleNetwork(EagleConfig.for_target(target.config)).requires_grad_(False).eval()
    ends = target.get_input_embeddings(), target.get_output_embeddings()
    decoder = taps.SpeculativeDecoder(target, {"any": EagleDrafter(network, *ends, "any")})
    ids = torch.tensor([[5, 6, 7]])
    for name in ("token_type_ids", "labels"):
        with pytest.raises(ValueError, match=f"does not use {name}"):
            target.generate(ids, custom_generate=decoder, max_new_tokens=4, **{name: torch.ones_like(ids)})


def test_a_prompt_that_ends_with_a_picture_is_refused_where_positions_have_axes() -> None:
    inputs = inputs_of("Qwen2VL", [1], [5])
    inputs = {
        name: value[:, :-6] if len(value) == 1 and name != "image_grid_thw" else value for name, value in inputs.items()
    }
    assert inputs["input_ids"][0, -1] == PICTURE
    with pytest.raises(ValueError, match="a prompt ends with a picture or video; put text behind it"):
        target_of("Qwen2VL").generate(**inputs, custom_generate=decoder_of("Qwen2VL"), max_new_tokens=4)


def test_a_target_that_hides_its_positions_is_refused_with_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """As some families' prefill makes positions that depend on the pictures, and says nothing of them."""
    model = target_of("Llava")
    prepare = model.prepare_inputs_for_generation
    hiding = lambda *args, **kwargs: {**prepare(*args, **kwargs), "position_ids": None}  # noqa: E731
    monkeypatch.setattr(model, "prepare_inputs_for_generation", hiding)
    with pytest.raises(ValueError, match=r"makes the positions behind .* inside its own forward"):
        model.generate(**inputs_of("Llava", [1], [5]), custom_generate=decoder_of("Llava"), max_new_tokens=4)


def test_a_target_that_widens_its_prompt_is_refused() -> None:
    """As older models put a picture's places in for one token."""
    model = target_of("Llava")

    def widen(stack: Any, arguments: Any, kwargs: dict[str, Any]) -> Any:
        embeds = kwargs["inputs_embeds"]
        counted_anew = dict.fromkeys(kwargs.keys() & {"position_ids", "cache_position", "attention_mask"})
        return arguments, {**kwargs, "inputs_embeds": torch.cat([embeds, embeds], dim=1), **counted_anew}

    hook = model.get_decoder().register_forward_pre_hook(widen, with_kwargs=True)
    try:
        with pytest.raises(ValueError, match="makes 26 places of a prompt of 13 tokens"):
            model.generate(**inputs_of("Llava", [1], [5]), custom_generate=decoder_of("Llava"), max_new_tokens=4)
    finally:
        hook.remove()
