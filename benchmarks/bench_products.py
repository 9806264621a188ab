"""What packed weights save on a CPU: each kind of product of a target, and its whole forward over a tree.

    python benchmarks/bench_products.py path/to/target --output results.json     also writes results.md beside it

Packed and stock products take turns in one process on one thread (`timing.compare`), in processor time. Weights are
the target's own, one after the other as in a forward, so that caches hold what they would. A forward scores a chain of
nodes behind a prefix. Below 4 rows and beyond 128 both sides run the same code. The script prints the table and, as
its last line, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from provenance import provenance, write_json
from timing import Comparison, compare
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from taps_ext.checkpoints.files import write_text
from taps_ext.products import PackedForward, PackedProducts
from taps_ext.target.model import TargetModel
from taps_ext.tree import DraftTree, Lengths

ROWS = (1, 2, 4, 8, 12, 16, 32, 60, 120)


def packed_linears(model: nn.Module) -> dict[tuple[int, int], list[nn.Linear]]:
    """Return the modules that may use packed weights, by [out, in]."""
    kinds: dict[tuple[int, int], list[nn.Linear]] = defaultdict(list)
    for module in model.modules():
        if isinstance(module, nn.Linear) and isinstance(vars(module).get("forward"), PackedForward):
            kinds[module.out_features, module.in_features].append(module)
    return kinds


def in_turns(run: Callable[[], object], num_pairs: int) -> Comparison:
    """Time a callable with packed weights and without, inside one call and outside of any."""
    call = PackedProducts()

    def packed() -> object:
        with call.running():
            return run()

    return compare(packed, run, pairs=num_pairs, clock="thread")


def product_times(linears: list[nn.Linear], num_rows: int, num_pairs: int) -> Comparison:
    """Time all modules of one shape, one after the other."""
    x = torch.randn(num_rows, linears[0].in_features)
    return in_turns(lambda: [linear(x) for linear in linears], num_pairs)


def forward_times(target: TargetModel, num_nodes: int, prefix_length: int, num_pairs: int) -> Comparison:
    """Time the target's forward over a chain of nodes behind a random prefix."""
    tokens = torch.randint(target.vocab_size, (1, prefix_length + num_nodes))
    kv = target.new_cache(1)
    target.prefill(tokens[:, :prefix_length], Lengths.of([prefix_length]), kv)
    parents = torch.arange(-1, num_nodes - 1)[None]
    tree = DraftTree(tokens[:, prefix_length:], parents, torch.zeros(1, num_nodes), torch.tensor([num_nodes]))
    call, stock = kv.products, _Stock()

    def scored(products: Any) -> Tensor:
        kv.products = products
        return target.score(tree, kv).logits

    return compare(lambda: scored(call), lambda: scored(stock), pairs=num_pairs, clock="thread")


class _Stock:
    """Stand in for `PackedProducts` and use none."""

    running = nullcontext


def one_time_costs(linears: list[nn.Linear]) -> dict[str, float]:
    """Return what packing all weights takes, and what a later call's comparison of all of them takes."""
    costs = {"packed_mb": sum(linear.weight.nbytes for linear in linears) / 1e6}
    for linear in linears:
        vars(linear)["forward"] = PackedForward(linear)  # unpacked
    for name in ("pack_ms", "compare_ms"):
        start, call = time.process_time(), PackedProducts()
        with call.running():
            for linear in linears:
                forward = vars(linear)["forward"]
                assert forward._current(linear.weight, call) is not None, "no memory left for packed weights"
        costs[name] = 1e3 * (time.process_time() - start)
    return {name: round(cost, 1) for name, cost in costs.items()}


def cell(what: str, num_rows: int, times: Comparison) -> dict[str, Any]:
    print(
        f"{what:>16} {num_rows:4} rows: {times.plain_us.median / 1e3:8.2f} ms as is, "
        f"{times.ours_us.median / 1e3:8.2f} packed, ratio {times.ratio.median:.2f}",
        flush=True,
    )
    return {"what": what, "rows": num_rows, **times.as_json()}


def as_markdown(payload: dict[str, Any]) -> str:
    """Return the table for people."""
    costs = payload["costs"]
    lines = [
        "# Packed weights on a CPU",
        "",
        f"`{payload['provenance']['command']}`, {payload['provenance']['device']['cpu']}, "
        f"{payload['provenance']['device']['vector_instructions']}, one thread, processor time.",
        f"They take {costs['packed_mb']:.0f} MB. Packing takes {costs['pack_ms']:.0f} ms, once; "
        f"comparing them with the model's weights takes {costs['compare_ms']:.0f} ms in each call that uses them all.",
        "",
        "| what | rows | as is, ms | packed, ms | as is / packed (quartiles) |",
        "|---|---|---|---|---|",
    ]
    for one in payload["cells"]:
        ratio = one["ratio"]
        lines.append(
            f"| {one['what']} | {one['rows']} | {one['plain_us']['median'] / 1e3:.3g} | "
            f"{one['ours_us']['median'] / 1e3:.3g} | {ratio['median']:.2f} "
            f"({ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f}) |"
        )
    return "\n".join(lines) + "\n"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="a directory or hub id of a causal language model")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--prefix", type=int, default=200, help="tokens before the tree")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode(False):
        target = TargetModel(AutoModelForCausalLM.from_pretrained(options.target, dtype=torch.float32).eval())
    kinds = packed_linears(target.model)
    if not kinds:
        parser.error(f"{options.target} has no weight that would be packed on this processor")
    costs = one_time_costs([linear for kind in kinds.values() for linear in kind])
    cells = []
    for (out, size), linears in kinds.items():
        for num_rows in options.rows:
            times = product_times(linears, num_rows, options.pairs)
            cells.append(cell(f"{len(linears)} x [{out}, {size}]", num_rows, times))
    for num_rows in options.rows:
        cells.append(cell("forward", num_rows, forward_times(target, num_rows, options.prefix, options.pairs)))
    payload = {"provenance": provenance(), "costs": costs, "cells": cells}
    if options.output is not None:
        write_json(options.output, payload)
        write_text(options.output.with_suffix(".md"), as_markdown(payload))
    print(json.dumps(payload))


if __name__ == "__main__":
    main()
