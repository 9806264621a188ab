"""Trains a small target on real conversations, from its tokenizer on: the first stage of runs/real_text.sh.

    python benchmarks/real_text_target.py math.jsonl chat.jsonl --output out/real_text/target

A byte-pair tokenizer and a Llama, `--steps` updates. Goes on where it was stopped. Beside the target
it writes target.json: what it was made of and how well it learned.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from provenance import provenance, write_json
from worlds.pretraining import PretrainingConfig, new_target, pretrain, save_tokenizer, train_tokenizer

from taps_ext.training import TokenDataset
from taps_ext.training.data import Message, read_sources
from taps_ext.training.masks import ChatFormat
from taps_ext.training.recipe import DataConfig, SourceConfig

REPORT_STEPS = 25


def main() -> None:
    options = _options()
    if (options.output / "target.json").exists():
        print(f"{options.output} is there already")
        return
    if options.output.exists():
        raise SystemExit(f"{options.output} is there and holds no target of this script; give another --output")
    torch.set_num_threads(options.threads)
    sources = read_sources(DataConfig([SourceConfig(str(path)) for path in options.data]))
    conversations = [one.messages for source in sources for one in source]
    tokenizer = train_tokenizer((message["content"] for one in conversations for message in one), options.vocab_size)
    dataset = _tokens(conversations, tokenizer, options.max_length)
    model: Any = new_target(tokenizer, options.seed, options.hidden_size, options.layers).to(options.device)
    config = PretrainingConfig(
        steps=options.steps,
        batch_size=options.batch_size,
        other_learning_rate=0.005,
        bf16_autocast=True,
        seed=options.seed,
    )
    fresh = options.output.with_name(f".{options.output.name}.unfinished")
    fresh.mkdir(parents=True, exist_ok=True)
    checkpoint = fresh / "checkpoint.pt"
    loss = pretrain(model, dataset, config, _say, checkpoint)
    model.cpu().save_pretrained(fresh)
    save_tokenizer(tokenizer, fresh)
    facts = {
        "config": asdict(config),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocab_size": len(tokenizer),
        "data": [path.name for path in options.data],
        "num_conversations": len(dataset),
        "num_tokens": dataset.num_tokens,
        "final_loss_nats": round(loss, 4),
        "provenance": provenance(),
    }
    write_json(fresh / "target.json", facts)
    checkpoint.unlink(missing_ok=True)
    fresh.rename(options.output)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path, help="conversations, JSON lines")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--max-length", type=int, default=512, help="longer conversations are cut")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def _tokens(conversations: list[tuple[Message, ...]], tokenizer: Any, max_length: int) -> TokenDataset:
    chat_format = ChatFormat(tokenizer)
    cut = (chat_format.encode(messages).cut(max_length) for messages in conversations)
    return TokenDataset(example for example in cut if example.num_learned)


def _say(step: int, loss: float) -> None:
    if step % REPORT_STEPS == 0:
        print(f"step {step}  loss {loss:.3f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
