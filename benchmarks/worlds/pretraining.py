"""Train a small target from nothing, its tokenizer first: the embedded one is a Llama of 1.6 million parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from taps_ext.checkpoints.files import sync
from taps_ext.training.masks import TokenBatch, TokenDataset
from taps_ext.training.trainer import BatchOrder

HEAD_SIZE = 32
CHECKPOINT_STEPS = 100
VOCAB_SIZE = 1024
PAD, BEGIN, USER, ASSISTANT, SYSTEM, END = "<|pad|>", "<|begin|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"

# The newline handling of Jinja is avoided: one line, and `{% generation %}` marks what the assistant says.
CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


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


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocab_size` tokens learned from the texts; the same texts give the same one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r" ?[0-9]"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BEGIN, USER, ASSISTANT, SYSTEM, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the tokenizer under the class name that transformers 4.57 and 5.x both know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def new_target(
    tokenizer: PreTrainedTokenizerBase, seed: int, hidden_size: int = 192, num_layers: int = 3
) -> LlamaForCausalLM:
    """An untrained target for the tokenizer, initialised from the seed; `hidden_size` is a multiple of 64."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3 // HEAD_SIZE * HEAD_SIZE,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // HEAD_SIZE,
        num_key_value_heads=2,
        head_dim=HEAD_SIZE,
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
    model: LlamaForCausalLM,
    dataset: TokenDataset,
    config: PretrainingConfig,
    report: Callable[[int, float], None],
    checkpoint: Path | None = None,
) -> float:
    """Train in place, where the model is; returns the smoothed final loss on the assistant's tokens (nats).

    `report(step, loss)` is called each step. With a `checkpoint`, a file, training that was stopped goes on from it;
    ValueError if it is of another configuration, model or dataset.
    """
    identity = {"training": asdict(config), "model": model.config.to_diff_dict(), "data": dataset.checksum}
    optimizers = _optimizers(model, config)
    model.train()
    start, smoothed = 0, math.log(model.config.vocab_size)
    if checkpoint is not None and checkpoint.exists():
        start, smoothed = _restore(checkpoint, model, optimizers, identity)
    for step, batch in _steps(dataset, config, start, model.device):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * _schedule(step, config)
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=config.bf16_autocast):
            logits = model(batch.tokens, use_cache=False).logits
        loss, answer_loss = _losses(logits.float(), batch, config.question_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
        smoothed += 0.05 * (answer_loss - smoothed)
        report(step + 1, smoothed)
        if checkpoint is not None and (step + 1) % CHECKPOINT_STEPS == 0:
            states = [optimizer.state_dict() for optimizer in optimizers]
            progress = {"step": step + 1, "loss": smoothed, "model": model.state_dict(), "optimizers": states}
            _save(checkpoint, {**progress, "identity": json.dumps(identity)})
    model.eval()
    return smoothed


def _steps(
    dataset: TokenDataset, config: PretrainingConfig, start: int, device: torch.device
) -> Iterator[tuple[int, TokenBatch]]:
    order = BatchOrder(dataset, config.batch_size, config.seed)
    return ((step, dataset.batch(order[step]).to(device)) for step in range(start, config.steps))


def _save(path: Path, values: dict[str, Any]) -> None:
    fresh = path.with_name(f"{path.name}.tmp")
    torch.save(values, fresh)
    sync(fresh)
    fresh.replace(path)


def _restore(path: Path, model: LlamaForCausalLM, optimizers: list[Any], identity: dict[str, Any]) -> tuple[int, float]:
    saved = torch.load(path, map_location=model.device, weights_only=True)
    if saved["identity"] != json.dumps(identity):
        raise ValueError(f"{path} is of another training: other settings, sizes or data; delete it to begin anew")
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return saved["step"], saved["loss"]


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
    real = torch.arange(1, batch.tokens.shape[1], device=targets.device) < batch.lengths[:, None]
    answers = batch.loss_mask[:, 1:]
    weights = torch.where(answers, 1.0, question_weight) * real
    answer_loss = float(loss.detach()[answers].mean())
    return (loss * weights).sum() / weights.sum(), answer_loss
