"""The tiny target: a Llama of 1.6 million parameters, trained from nothing on both domains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from ..training.dataset import BatchOrder, TokenBatch, TokenDataset


@dataclass(frozen=True)
class PretrainingConfig:
    """How the target is trained. Matrices of the layers learn with Muon, the rest with AdamW."""

    steps: int = 3200
    batch_size: int = 8
    matrix_learning_rate: float = 0.01
    other_learning_rate: float = 0.01
    warmup_steps: int = 40
    question_weight: float = 0.2  # of the loss on what the user says; the assistant's tokens weigh 1
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    bf16_autocast: bool = False
    seed: int = 0


def new_target(tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """An untrained target for the tokenizer, initialised from the seed."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        **special,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=128, **special)
    return model


def pretrain(
    model: LlamaForCausalLM, dataset: TokenDataset, config: PretrainingConfig, report: Callable[[int, float], None]
) -> float:
    """Train in place; returns the smoothed final loss on the assistant's tokens (nats). `report(step, loss)` a step."""
    optimizers = _optimizers(model, config)
    model.train()
    smoothed = math.log(model.config.vocab_size)
    for step, batch in _steps(dataset, config):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * _schedule(step, config)
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16_autocast):
            logits = model(batch.tokens, use_cache=False).logits
        loss, answer_loss = _losses(logits.float(), batch, config.question_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
        smoothed += 0.05 * (answer_loss - smoothed)
        report(step + 1, smoothed)
    model.eval()
    return smoothed


def _steps(dataset: TokenDataset, config: PretrainingConfig) -> Iterator[tuple[int, TokenBatch]]:
    order = BatchOrder(dataset, config.batch_size, config.seed)
    return ((step, dataset.batch(order[step])) for step in range(config.steps))


def _optimizers(model: LlamaForCausalLM, config: PretrainingConfig) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name]
    matrix_ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in matrix_ids]
    decay = config.weight_decay
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, config.matrix_learning_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, config.other_learning_rate, betas=(0.9, 0.95), weight_decay=decay, fused=True),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def _schedule(step: int, config: PretrainingConfig) -> float:
    """Linear warm-up, then half a cosine down to a fiftieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return min(1.0, (step + 1) / config.warmup_steps) * (0.02 + 0.98 * cosine)


def _losses(logits: Tensor, batch: TokenBatch, question_weight: float) -> tuple[Tensor, float]:
    """The weighted loss to minimise, and the plain mean over the assistant's tokens."""
    targets = batch.tokens[:, 1:]
    loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    real = torch.arange(1, batch.tokens.shape[1]) < batch.lengths[:, None]
    answers = batch.loss_mask[:, 1:]
    weights = torch.where(answers, 1.0, question_weight) * real
    answer_loss = float(loss.detach()[answers].mean())
    return (loss * weights).sum() / weights.sum(), answer_loss
