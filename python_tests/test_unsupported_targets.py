"""Targets that trees cannot score: each is refused by name, with a way out that works, and none writes other text."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from small_models import EOS, HIDDEN, MLP, PAD, SIZES, VOCAB, new_model, new_target, prompts, trained_drafters
from small_models import trained_target as target_of_tests
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import taps_ext as taps
from taps_ext.drafters.eagle import EagleConfig, EagleNetwork
from taps_ext.drafters.network import rope_of
from taps_ext.target.support import refuse_long_text

IS_5 = transformers.__version__ >= "5"
BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "pad_token_id": 0}
COUNTING = ["Bart", "MBart", "PLBart", "Marian", "Pegasus", "Blenderbot", "BlenderbotSmall"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_plain_is_stock(model: Any, generate: Any = None) -> None:
    """Plain decoding of ragged prompts is the model's own greedy generation."""
    ids, mask = prompts(3)
    stock = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=16, pad_token_id=PAD)
    model.generation_config.pad_token_id = PAD
    assert torch.equal(taps.plain_generate(model, ids, mask, max_new_tokens=16).sequences, stock)


# --- ropes -----------------------------------------------------------------------------------------------------------

ROPES = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4,
        "long_factor": [8.0] * 4,
    },
}


@pytest.mark.skipif(not IS_5, reason="transformers 4 has one rope per model")
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family, model_class", [("Gemma3Text", "Gemma3ForCausalLM"), ("ModernBertDecoder", None)])
def test_a_rope_of_one_layer_type_that_changes_with_the_length_is_refused(
    family: str, model_class: str | None, rope: str
) -> None:
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64, "local_attention": 128}
    ropes = {"full_attention": {**ROPES[rope]}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    length = {"max_position_embeddings": 16 if rope == "dynamic" else 256}
    heads = {"head_dim": 8, "num_key_value_heads": 4}
    model = new_model(family, model_class, **{**SIZES, **MLP, **heads, **layers, **length}, rope_parameters=ropes)
    decoder = taps.SpeculativeDecoder(
        model, {"text": taps.LookupDrafter(VOCAB, "text")}, shape=taps.TreeShape(4, 3, 20)
    )
    ids, mask = torch.tensor([[5, 6, 7, 8, 9]]), None
    stock = model.generate(ids, do_sample=False, max_new_tokens=11)
    assert torch.equal(decoder.generate(ids, mask, max_new_tokens=11).sequences, stock)
    with pytest.raises(ValueError, match=r"changes its rotary frequencies beyond 16 tokens, but .* can reach 17"):
        decoder.generate(ids, mask, max_new_tokens=12)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": {"rope_type": "dynamic"}},
        {"rope_parameters": {"full_attention": None, "sliding_attention": {"rope_type": "longrope"}}},
        {"rope_parameters": {"main": {"rope_type": "yarn"}, "compress": {"rope_type": "dynamic_yarn"}}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"full_attention": {"type": "longrope"}}, "rope_parameters": None},
        {
            "rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 40},
            "max_position_embeddings": 80,
        },
        {
            "original_max_position_embeddings": 40,
            "max_position_embeddings": 80,
            "rope_parameters": {"type": "longrope"},
        },
    ],
)
def test_every_spelling_of_a_changing_rope_is_read(config: dict[str, Any]) -> None:
    text_config = SimpleNamespace(**{"max_position_embeddings": 40, **config})
    model: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text_config))
    refuse_long_text(model, 40)
    with pytest.raises(ValueError, match="changes its rotary frequencies beyond 40 tokens"):
        refuse_long_text(model, 41)


# --- positions -------------------------------------------------------------------------------------------------------


def with_small_positions(model: Any, factor: float) -> Any:
    """The model with position embeddings so small that in half precision no probe of its logits shows them."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "embed_positions" in name or "wpe" in name:
                tensor.mul_(factor)
    return model


@pytest.mark.parametrize("factor", [1.0, 0.02])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", COUNTING)
def test_a_decoder_that_counts_positions_from_its_cache_is_refused_and_left_as_it_was(
    family: str, dtype: torch.dtype, factor: float
) -> None:
    model = with_small_positions(new_model(family, dtype=dtype, **BART), factor)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=r"its decoder takes no position_ids and counts positions from the cache; dec"):
        taps.TargetModel(model)
    assert model.config._attn_implementation == before != "taps_tree"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family, model_class", [("OPT", None), ("GPT2", "GPT2LMHeadModel")])
def test_a_decoder_that_takes_positions_is_accepted_however_small_they_are(
    family: str, model_class: str | None, dtype: torch.dtype
) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "ffn_dim": 48, "word_embed_proj_dim": 32, "n_positions": 128}
    model = with_small_positions(new_model(family, model_class, dtype, **{**SIZES, **sizes}), 0.02)
    try:
        target = taps.TargetModel(model)
    except ValueError as error:
        if IS_5 or "AttentionInterface" not in str(error):
            raise
        pytest.skip(str(error))
    ids = torch.tensor([[5, 6, 7]])
    stock = model.generate(ids, do_sample=False, max_new_tokens=12)
    decoder = taps.SpeculativeDecoder(
        target, {"text": taps.LookupDrafter(VOCAB, "text")}, shape=taps.TreeShape(4, 3, 20)
    )
    if dtype == torch.float32:  # half precision rounds otherwise in batches of another shape
        assert torch.equal(decoder.generate(ids, max_new_tokens=12).sequences, stock)


@pytest.mark.parametrize("family", ["Roberta", "Camembert"])
def test_positions_that_count_otherwise_when_none_are_given_are_named_as_the_reason(family: str) -> None:
    model = new_model(family, **{**SIZES, **MLP}, is_decoder=True)
    with pytest.raises(ValueError, match=r"it does not count them from 0, like RoBERTa; decode it|AttentionInterface"):
        taps.TargetModel(model)
    assert_plain_is_stock(model)


# --- plain decoding, the way out -------------------------------------------------------------------------------------

GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
MOE = {"num_local_experts": 2, "num_key_value_heads": 2, "head_dim": 8}
PLAIN: dict[str, tuple[str | None, dict[str, Any]]] = {
    "Mamba": (None, {"state_size": 8, "hidden_size": 32, "num_hidden_layers": 2}),
    "FalconMamba": (None, {"state_size": 8, "hidden_size": 32, "num_hidden_layers": 2}),
    "Rwkv": (None, {"attention_hidden_size": 32, "hidden_size": 32, "num_hidden_layers": 2}),
    "Lfm2": (None, {**SIZES, **MLP, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}),
    "MiniMax": (None, {**SIZES, **MLP, **MOE}),
    "OpenAIGPT": ("OpenAIGPTLMHeadModel", GPT),
    "Bart": (None, BART),
    "XLMRobertaXL": (None, {**SIZES, **MLP, "is_decoder": True}),
    "Doge": (None, {**SIZES, **MLP, "num_key_value_heads": 2}),
}


@pytest.mark.parametrize("family", PLAIN)
def test_what_is_refused_as_a_target_is_decoded_plainly_as_by_its_own_generate(family: str) -> None:
    model_class, config = PLAIN[family]
    model = new_model(family, model_class, **{"eos_token_id": EOS, **config})
    assert_plain_is_stock(model)
    with pytest.raises(ValueError, match="target .*" + type(model).__name__):
        taps.TargetModel(model)


def test_plain_decoding_of_a_recurrent_model_draws_with_the_requests_noise() -> None:
    model, (ids, mask) = new_model("Mamba", **PLAIN["Mamba"][1]), prompts(2)
    texts = {
        seed: taps.plain_generate(model, ids, mask, sampling=taps.SamplingParams(1.0, seed=seed), max_new_tokens=8)
        for seed in (1, 1 + 2**40, 2)
    }
    again = taps.plain_generate(model, ids, mask, sampling=taps.SamplingParams(1.0, seed=1), max_new_tokens=8)
    assert again.new_tokens == texts[1].new_tokens != texts[2].new_tokens
    assert again.num_target_forwards == 8


@pytest.mark.filterwarnings("ignore")  # of PEFT's own calls of transformers
@pytest.mark.parametrize("method", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_learned_prompts_are_part_of_the_plain_text(method: str) -> None:
    import peft

    base = deepcopy(target_of_tests())
    ids, mask = prompts(3)
    without = base.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=16)
    torch.manual_seed(0)
    config = getattr(peft, method)(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prompt_encoder" in name:
                parameter.normal_(std=4.0)
    stock = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=16)
    if method == "PromptTuningConfig":  # transformers 5.24 ignores the cache that PEFT fills with a prefix
        assert not torch.equal(stock, without), "the learned prompt changes the text"
    assert torch.equal(taps.plain_generate(model, ids, mask, max_new_tokens=16).sequences, stock)
    with pytest.raises(ValueError, match=r"learns prompts or prefixes, .* decode it with taps_ext\.plain_generate"):
        taps.TargetModel(model)


# --- training mode ---------------------------------------------------------------------------------------------------


def lora_with_dropout() -> Any:
    """Adapters on an eval-mode model, never put into eval mode: PEFT leaves what it adds in training mode."""
    import peft

    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.05, init_lora_weights=False)
    return peft.get_peft_model(deepcopy(target_of_tests()), lora)


def layer_in_training() -> Any:
    model: Any = deepcopy(target_of_tests())
    model.model.layers[1].self_attn.attention_dropout = 0.01
    model.model.layers[1].train()
    return model


@pytest.mark.parametrize("make", [lora_with_dropout, layer_in_training, lambda: new_target().train()])
def test_a_part_in_training_mode_is_noticed_at_every_door(make: Any) -> None:
    model, (ids, mask) = make(), prompts(2)
    said = r"is in training mode, in which dropout makes the target's text random; call model\.eval\(\) on all of it"
    with pytest.raises(ValueError, match=said):
        taps.TargetModel(model)
    with pytest.raises(ValueError, match=said):
        taps.plain_generate(model, ids, mask, max_new_tokens=2)
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    modes = [(part, part.training) for part in model.modules()]
    decoder = taps.SpeculativeDecoder(model.eval(), trained_drafters())
    decoder.generate(ids, mask, max_new_tokens=2)
    for part, mode in modes:
        part.training = mode
    arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 2}
    for door in (decoder.generate, lambda **more: inside.generate(**more, custom_generate=decoder)):
        with pytest.raises(ValueError, match=said):
            door(**arguments)


def test_a_new_part_without_anything_random_may_be_in_training_mode() -> None:
    model, (ids, mask) = deepcopy(target_of_tests()), prompts(2)
    model.set_output_embeddings(nn.Linear(HIDDEN, VOCAB, bias=False).requires_grad_(False))
    model.model.layers[0].mlp = nn.Sequential(nn.Dropout(0.0), model.model.layers[0].mlp)
    stock = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8)
    decoder = taps.SpeculativeDecoder(model, trained_drafters(), shape=taps.TreeShape(4, 3, 20))
    assert torch.equal(decoder.generate(ids, mask, max_new_tokens=8).sequences, stock)
    assert torch.equal(taps.plain_generate(model, ids, mask, max_new_tokens=8).sequences, stock)


# --- what is given as a target ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, said",
    [
        (lambda: "gpt2", "a transformers model with an LM head, got str; load one with AutoModelForCausalLM"),
        (lambda: None, "a transformers model with an LM head, got NoneType; load one"),
        (lambda: nn.Linear(2, 2), "a transformers model with an LM head, got Linear; load one"),
        (lambda: nn.DataParallel(new_target()), "got DataParallel; give its .module"),
        (lambda: new_target().get_decoder(), "target LlamaModel has no LM head; load it as AutoModelForCausalLM"),
    ],
)
def test_what_is_no_target_is_refused_in_one_sentence_at_every_door(given: Any, said: str, tmp_path: Path) -> None:
    doors = (
        taps.TargetModel,
        lambda model: taps.SpeculativeDecoder(model, trained_drafters()),
        lambda model: taps.plain_generate(model, torch.tensor([[5, 6]])),
        lambda model: taps.load_drafters({"math": tmp_path}, model),
    )
    for door in doors:
        with pytest.raises(ValueError, match=said):
            door(given())


def test_a_compiled_wrapper_is_the_model_inside() -> None:
    model: Any = deepcopy(target_of_tests())
    compiled, (ids, mask) = torch.compile(model, backend="eager"), prompts(2)
    decoder = taps.SpeculativeDecoder(compiled, trained_drafters(), shape=taps.TreeShape(4, 3, 20))
    assert decoder.target.model is model
    arguments = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 8}
    stock = model.generate(ids, **arguments)
    assert torch.equal(compiled.generate(ids, **arguments, custom_generate=decoder), stock)
    assert torch.equal(taps.plain_generate(compiled, ids, mask, max_new_tokens=8).sequences, stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_that_was_converted_behind_the_decoders_back_is_noticed(dtype: torch.dtype) -> None:
    model, (ids, mask) = deepcopy(target_of_tests()), prompts(2)
    decoder = taps.SpeculativeDecoder(model, trained_drafters(), shape=taps.TreeShape(4, 3, 20))
    events = decoder.stream(ids, mask, max_new_tokens=20)
    next(events)
    model.to(dtype)
    said = rf"was in torch.float32 on cpu when .* now computes in {dtype} on cpu; make a new TargetModel"
    for run in (lambda: decoder.generate(ids, mask, max_new_tokens=4), lambda: list(events)):
        with pytest.raises(ValueError, match=said):
            run()
    if dtype == torch.float64:
        with pytest.raises(
            ValueError, match=r"must be float32, bfloat16 or float16, got torch\.float64; call model\.f"
        ):
            taps.TargetModel(model)
    else:
        taps.TargetModel(model)


# --- families --------------------------------------------------------------------------------------------------------


def llama4(**config: Any) -> Any:
    sizes = {"num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8, "num_key_value_heads": 2}
    return new_model("Llama4Text", "Llama4ForCausalLM", **{**SIZES, **MLP, **sizes, "num_hidden_layers": 4, **config})


def test_llama4_whose_stack_is_the_base_of_no_other_model_is_decoded() -> None:
    model, (ids, mask) = llama4(), prompts(2)
    decoder = taps.SpeculativeDecoder(
        model, {"text": taps.LookupDrafter(VOCAB, "text")}, shape=taps.TreeShape(4, 3, 20)
    )
    assert type(decoder.target.decoder_stack).__name__ == "Llama4TextModel"
    stock = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=16)
    assert torch.equal(decoder.generate(ids, mask, max_new_tokens=16).sequences, stock)


def test_llama4_is_refused_where_it_would_scale_queries_by_a_trees_columns() -> None:
    decoder = taps.SpeculativeDecoder(llama4(floor_scale=1064), {"text": taps.LookupDrafter(VOCAB, "text")})
    with pytest.raises(ValueError, match=r"texts may have 39 tokens, but prompt and new tokens can reach 40"):
        decoder.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=37)


@pytest.mark.parametrize(
    "kinds, said",
    [
        (["heavily_compressed_attention"], r"sparse attention \(heavily_compressed_attention\): its layers select or"),
        (
            ["hybrid", "hybrid_sliding"],
            r"has hybrid, hybrid_sliding with a running state \(recurrent, or a convolution",
        ),
        (["linear_attention", "mlp"], r"has linear_attention with a running state"),
        (["conv", "indexed_attention"], r"has conv with a running state"),
    ],
)
def test_layers_are_called_what_they_are(kinds: list[str], said: str) -> None:
    model = new_target()
    model._is_stateful = True
    model.config.layer_types = ["full_attention", *kinds]
    with pytest.raises(ValueError, match=said):
        taps.TargetModel(model)


@pytest.mark.parametrize("family", ["Beam", "Cohere2Moe"])
def test_a_drafter_fits_targets_whose_config_leaves_settings_out(family: str) -> None:
    """Beam has no positions in its layers of full attention, Cohere2Moe no eps of an RMS norm."""
    if (config_class := getattr(transformers, f"{family}Config", None)) is None:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    config = EagleConfig.for_target(config_class(**{**SIZES, **MLP, "num_key_value_heads": 2, "vocab_size": VOCAB}))
    assert config.rms_norm_eps > 0 and config.rope_theta > 0 and config.rope_scaling is None
    EagleNetwork(config)


def test_the_rope_of_full_attention_is_taken_or_else_the_first() -> None:
    fast, slow = {"rope_type": "default", "rope_theta": 5e5}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    linear = {"rope_type": "linear", "factor": 2.0}
    assert rope_of({"rope_parameters": {"sliding_attention": fast, "full_attention": slow}}) == (1e4, linear)
    assert rope_of({"rope_parameters": {"sliding_attention": fast, "full_attention": None}}) == (5e5, None)
    assert rope_of({"rope_parameters": {"main": slow, "compress": fast}}) == (1e4, linear)
    assert rope_of({"rope_theta": 1e6, "rope_parameters": {"full_attention": None}}) == (1e6, None)


def test_gpt2_is_still_taken_whatever_reaches_its_decoder_by_name() -> None:
    config = GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=HIDDEN, n_layer=1, n_head=4, eos_token_id=EOS)
    assert taps.TargetModel(GPT2LMHeadModel(config).eval()).hidden_size == HIDDEN
