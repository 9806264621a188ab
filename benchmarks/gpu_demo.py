"""The embedded models on a GPU, in float32: every variant's text must be plain decoding's, and the CPU's.

    python benchmarks/gpu_demo.py [--device cuda] [--prompts 4]

Its last line says how many texts agree, and how fast each variant was; exit code 1 when one differs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from taps_ext import tiny
from taps_ext.checkpoints import load_drafters
from taps_ext.decode.decoder import SpeculativeDecoder
from taps_ext.decode.plain import plain_generate
from taps_ext.sampling import SamplingParams
from taps_ext.tree import TreeShape

NEW_TOKENS = 64
Generate = Callable[[Tensor, SamplingParams], list[list[int]]]


def generators(device: str) -> dict[str, Generate]:
    """Plain decoding, a single drafter and two compositions, on the device."""
    model = tiny.load_target()[0].to(device)
    drafters = load_drafters({name: str(path) for name, path in tiny.drafter_paths().items()}, model)
    decoders = {
        f"single {next(iter(drafters))}": SpeculativeDecoder(
            model, drafters, "single", drafter=next(iter(drafters)), shape=TreeShape()
        ),
        "confidence": SpeculativeDecoder(model, drafters, "confidence", shape=TreeShape()),
        "merged": SpeculativeDecoder(model, drafters, "merged", shape=TreeShape()),
    }

    def plain(input_ids: Tensor, sampling: SamplingParams) -> list[list[int]]:
        tokens: list[list[int]] = plain_generate(
            model, input_ids.to(device), sampling=sampling, max_new_tokens=NEW_TOKENS
        ).new_tokens
        return tokens

    def speculative(decoder: SpeculativeDecoder) -> Generate:
        return lambda input_ids, sampling: (
            decoder.generate(input_ids.to(device), sampling=sampling, max_new_tokens=NEW_TOKENS).new_tokens
        )

    return {"plain": plain, **{name: speculative(decoder) for name, decoder in decoders.items()}}


def prompts(count: int) -> list[Tensor]:
    _, tokenizer = tiny.load_target()
    conversations = [prompt for domain in tiny.DOMAINS for prompt in tiny.prompts(domain, count, 0)]
    given = [tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in conversations]
    return [tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"] for text in given]


def texts(device: str, inputs: list[Tensor]) -> dict[str, list[list[int]]]:
    """Each variant's texts, greedy and sampled; prints how long they took."""
    found: dict[str, list[list[int]]] = {}
    for name, generate in generators(device).items():
        generate(inputs[0], SamplingParams())  # warm
        started, found[name] = time.perf_counter(), []
        for row, input_ids in enumerate(inputs):
            for temperature in (0.0, 1.0):
                found[name] += generate(input_ids, SamplingParams(temperature, seed=row))
        seconds, tokens = time.perf_counter() - started, sum(map(len, found[name]))
        print(f"{device:8} {name:16} {tokens:6} tokens {tokens / seconds:8.0f} a second", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the texts of the embedded models on a GPU and on the CPU.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompts", type=int, default=4, help="of each domain")
    options = parser.parse_args()
    torch.set_num_threads(1)
    inputs = prompts(options.prompts)
    there, here = texts(options.device, inputs), texts("cpu", inputs)
    expected = here["plain"]
    compared = [(name, text == right) for name in there for text, right in zip(there[name], expected, strict=True)]
    differing = sorted({name for name, is_equal in compared if not is_equal})
    equal = sum(is_equal for _, is_equal in compared)
    print(f"{equal} of {len(compared)} texts on {options.device} are those of plain decoding on the CPU", *differing)
    return 0 if equal == len(compared) else 1


if __name__ == "__main__":
    sys.exit(main())
