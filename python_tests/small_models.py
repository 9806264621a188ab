"""Small real models, made and trained on the spot in a few seconds: targets of four families, drafters that accept.

The text is a two-domain Markov language over 64 tokens: each token has four likely successors, and the domain (told by
the first token) decides which. A drafter is an EAGLE network trained on the target's features over one domain, so that
it accepts some of its own domain and little of the other: with random drafters losslessness would prove nothing. It is
calibrated, so that it drafts coupled above temperature 0.

As a script under torchrun (`small_models.py TARGET DRAFTERS... FILE`) it decodes with a target whose weights are split
over the processes, and saves the text.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import taps_ext as taps
from taps_ext.drafters.coupling import Calibration
from taps_ext.drafters.eagle import EagleConfig, EagleDrafter, EagleNetwork

VOCAB, HIDDEN, PAD, EOS = 64, 64, 0, 1
DOMAIN_TOKENS = {"math": 2, "chat": 3}
FIRST_WORD = 4
SUCCESSOR_PROBABILITIES = (0.62, 0.23, 0.1, 0.05)
# About what a fit gives; unlike one another, so that a drafter, depth or temperature taken for another shows.
CALIBRATIONS = {
    "math": Calibration((0.5, 1.0), alpha=((1.2, 1.1), (1.4, 1.2)), beta=((0.8, 0.7), (1.1, 0.9))),
    "chat": Calibration((0.7,), alpha=((1.3,),), beta=((1.0,),)),
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
}


def new_target(family: str = "llama", **overrides: Any) -> PreTrainedModel:
    """An untrained target of the family: 2 layers, hidden 64, 4 heads over 2 key-value heads."""
    config_class, model_class, extra = FAMILIES[family]
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }
    model: PreTrainedModel = model_class(config_class(**{**sizes, **extra, **overrides}))
    return model.eval()


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0, "eos_token_id": 1}
MLP = {"intermediate_size": 48}
BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "pad_token_id": 0}


def new_model(family: str, model_class: str | None = None, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A small model of a transformers family with random weights, large enough that positions and caps show."""
    config_class = getattr(transformers, f"{family}Config", None)
    if config_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    torch.manual_seed(0)
    made = config_class(**{"vocab_size": VOCAB, "max_position_embeddings": 128, **config})
    model = getattr(transformers, model_class or f"{family}ForCausalLM")(made)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.to(dtype).eval()


def sentences(domain: str, count: int, length: int, seed: int) -> Tensor:
    """int64 [count, length]: the domain's token, then words of its Markov chain; EOS now and then."""
    generator = torch.Generator().manual_seed(seed)
    tables = torch.Generator().manual_seed(DOMAIN_TOKENS[domain])
    successors = torch.stack(
        [FIRST_WORD + torch.randperm(VOCAB - FIRST_WORD, generator=tables)[:4] for _ in range(VOCAB)]
    )
    text = torch.empty(count, length, dtype=torch.int64)
    text[:, 0] = DOMAIN_TOKENS[domain]
    text[:, 1] = torch.randint(FIRST_WORD, VOCAB, (count,), generator=generator)
    for column in range(2, length):
        pick = torch.multinomial(torch.tensor(SUCCESSOR_PROBABILITIES), count, replacement=True, generator=generator)
        text[:, column] = successors[text[:, column - 1], pick]
        ends = torch.rand(count, generator=generator) < 0.01
        text[ends, column] = EOS
    return text


def prompts(count: int, longest: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Left-padded prompts of both domains in turn, of different lengths: input_ids and mask [count, longest]."""
    rows = [
        sentences(("math", "chat")[row % 2], 1, longest - 2 * (row % 5), seed=1000 + seed + row) for row in range(count)
    ]
    ids = torch.full((count, longest), PAD)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(rows):
        ids[row, longest - text.shape[1] :] = text[0]
        mask[row, longest - text.shape[1] :] = 1
    return ids, mask


@cache
@torch.inference_mode(False)
@torch.enable_grad()
def trained_target(family: str = "llama") -> PreTrainedModel:
    """A target that has learnt the language of both domains."""
    torch.manual_seed(0)
    model = new_target(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(90):
        batch = torch.cat([sentences(domain, 12, 40, seed=step) for domain in DOMAIN_TOKENS])
        logits = model(input_ids=batch[:, :-1]).logits
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


@cache
def trained_drafters(family: str = "llama") -> dict[str, EagleDrafter]:
    """A specialist a domain for `trained_target(family)`."""
    return {domain: _train_drafter(trained_target(family), domain, seed) for seed, domain in enumerate(DOMAIN_TOKENS)}


@torch.inference_mode(False)
@torch.enable_grad()
def _train_drafter(target: PreTrainedModel, domain: str, seed: int) -> EagleDrafter:
    torch.manual_seed(100 + seed)
    network = EagleNetwork(EagleConfig.for_target(target.config))
    embedding, lm_head = target.get_input_embeddings(), target.get_output_embeddings()
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for step in range(45):
        tokens = sentences(domain, 12, 40, seed=5000 + step)
        features = target.get_decoder()(input_ids=tokens).last_hidden_state
        positions = torch.arange(tokens.shape[1] - 1)[None]
        output = network(embedding(tokens[:, 1:]), features[:, :-1], positions)
        soft = lm_head(features[:, 1:]).softmax(-1)
        loss = F.smooth_l1_loss(output, features[:, 1:]) - (soft * lm_head(output).log_softmax(-1)).sum(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return EagleDrafter(network.requires_grad_(False).eval(), embedding, lm_head, domain, CALIBRATIONS[domain])


def _decode_in_parallel(target: str, *drafters: str, out: str) -> None:
    torch.distributed.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(target, tp_plan="auto").eval()
    split = [name for name, weight in model.named_parameters() if hasattr(weight, "full_tensor")]
    assert "model.layers.0.self_attn.q_proj.weight" in split, split  # transformers 5 splits the embedding too
    loaded, (ids, mask) = taps.load_drafters({Path(one).name: one for one in drafters}, model), prompts(2)
    result = taps.SpeculativeDecoder(model, loaded, shape=taps.TreeShape()).generate(ids, mask, max_new_tokens=24)
    adapting = taps.SpeculativeDecoder(model, loaded).generate(ids, mask, max_new_tokens=24)  # by costs of each process
    assert torch.equal(adapting.sequences, result.sequences)
    if torch.distributed.get_rank() == 0:
        torch.save((result.sequences, result.stats.acceptance_length), out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    _decode_in_parallel(*sys.argv[1:-1], out=sys.argv[-1])
