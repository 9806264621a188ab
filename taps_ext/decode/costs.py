"""Measure what the parts of a decode step cost on this machine, and keep the figures in a file.

A table belongs to one target, its drafters, a batch size, a device and a number of threads: their fingerprint names the
file. Only shapes and settings count, so that a retrained drafter needs no new measurement. All parts are measured in
turn, several times, and the least time counts: what else runs on the machine only ever adds to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..checkpoints.files import json_text, replacing
from ..tree import DraftTree, TreeShape
from .budget import CostTable, HostOutlook, Outlook, StepPlan, TreeBudget
from .step import DecodeStep

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # nodes per row
SIZES_ON_DEVICE = (1, 4, 8, 16, 32, 64)
MOST = 8.0  # times the cost of one node: larger trees cannot pay
MIN_ROUNDS, SECONDS = 3, 2.0  # of measuring
LENGTHS = ((128, 64), (24, 24), (4, 4))  # of prompt and new tokens
WIDTHS = (2, 4, 10)
DEPTHS = (1, 3)
FREE = 1.25  # a branching is free while a level costs at most this much more than the narrowest


def load_or_measure(step: DecodeStep, names: Sequence[str], start: Start, batch_size: int, anew: bool) -> CostTable:
    """Return the costs of a step of `batch_size` rows, from the file of an earlier measurement unless `anew`."""
    group = _processes_of(step)
    if group is not None:  # they must take the same trees: the table of the first one is that of all
        tables = [measure_costs(step, names, start, batch_size, is_timed=False)]
        torch.distributed.broadcast_object_list(tables, group=group, group_src=0)
        return tables[0]
    path = cache_directory() / f"{_table_name(step, names, batch_size)}.json"
    if not anew:
        try:
            return CostTable.from_dict(json.loads(path.read_text()))
        except (OSError, ValueError):
            pass  # never measured, or not readable
    table = measure_costs(step, names, start, batch_size)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json_text(table.to_dict()))
    except OSError:
        pass  # a read-only home costs a measurement per process
    return table


def cache_directory() -> Path:
    """Return the directory of measured tables: `$XDG_CACHE_HOME/taps_ext/costs`, by default below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "taps_ext" / "costs"


def _table_name(step: DecodeStep, names: Sequence[str], batch_size: int) -> str:
    """Return a name for everything that a table depends on."""
    model, device = step.target.model, step.target.device
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    facts = {
        "target": model.config.to_dict(),
        "dtype": str(model.dtype),
        "drafters": [[name, *_facts(drafter)] for name, drafter in zip(names, step.drafters, strict=True)],
        "batch_size": batch_size,
        "machine": [platform.node(), processor, torch.get_num_threads()],
        "versions": [torch.__version__, transformers.__version__],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


_Setting = tuple[int, int | None, int, int]  # nodes, the drafter that drafts (None: nobody), its depth and branching
PLAIN: _Setting = (1, None, 1, 1)
FIRST_LEVEL = (0, 1, WIDTHS[0])  # the least that a drafter does


class ForcedBudget(TreeBudget):
    """Force what a step does, in place of a budget: who drafts, and a random tree of some size."""

    def __init__(self, step: DecodeStep, batch_size: int) -> None:
        names = [str(index) for index in range(len(step.drafters))]
        free = CostTable((1,), (1.0,), dict.fromkeys(names, (0.0, 0.0)), 1)
        super().__init__(free, TreeShape.auto(), names, batch_size)
        self.vocab_size = step.target.vocab_size
        self.size, self.forced = 1, StepPlan(self.shape, (False,) * len(names))

    def force(self, size: int, drafter: int | None, depth: int, branching: int) -> None:
        """Let the coming steps verify `size` nodes, and let one drafter draft (None: nobody, and no tree is made)."""
        drafts = tuple(index == drafter for index in range(len(self.draft_ms)))
        self.size, self.forced = size, StepPlan(TreeShape(depth, branching, SIZES[-1]), drafts)

    def plan(self) -> StepPlan:
        """See `TreeBudget.plan`."""
        return self.forced

    def is_concerned(self, tree: DraftTree, is_costly: bool) -> bool:
        """See `TreeBudget.is_concerned`: a step that is to draft verifies the forced tree."""
        return any(self.forced.drafts)

    def cut(self, tree: DraftTree, active: Tensor) -> tuple[DraftTree, Outlook]:
        """See `TreeBudget.cut`: as much work, and the forced tree."""
        kept, outlook = super().cut(tree, active)
        return random_tree(kept.tokens[:, 0], self.size, self.vocab_size), outlook

    def record(
        self, outlook: HostOutlook | None, num_accepted: Sequence[int | None], proposers: Sequence[Sequence[int]]
    ) -> None:
        """See `TreeBudget.record`."""


Start = Callable[[Tensor, int, ForcedBudget], Callable[[], object]]


def measure_costs(
    step: DecodeStep, names: Sequence[str], start: Start, batch_size: int, is_timed: bool = True
) -> CostTable:
    """Return the measured costs, in milliseconds.

    `start` begins a call on prompts int64 [B, P] for a number of new tokens, with a forced budget, and returns what
    runs one step of it. Without `is_timed` the number of steps does not depend on a clock.
    """
    device, sizes = step.target.device, SIZES if step.target.device.type == "cpu" else SIZES_ON_DEVICE
    probe, (prompt_length, new_tokens) = ForcedBudget(step, batch_size), _text_lengths(step)
    every = range(len(step.drafters))
    drafting = [(1, index, depth, width) for index in every for depth in DEPTHS for width in WIDTHS]
    settings: list[_Setting] = [PLAIN, *((size, *FIRST_LEVEL) for size in sizes), *drafting]
    least: dict[_Setting, float] = {}
    # With one thread, processor time: what else runs on the machine does not count.
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    began, rounds = clock(), 0
    while rounds < MIN_ROUNDS or (is_timed and clock() - began < SECONDS):
        run = start(_random_tokens(step, batch_size, prompt_length).to(device), new_tokens, probe)
        for warming in (PLAIN, (sizes[-1], *FIRST_LEVEL)):  # what a call does once, such as checking packed weights
            probe.force(*warming)
            run()
        for setting in settings:
            if is_timed and rounds > 1 and least[setting] > 2 * MOST * least[PLAIN]:
                continue
            probe.force(*setting)
            if setting in drafting:
                run()  # lets a drafter observe what it was not shown yet
            started = clock()
            run()  # ends with a step's one read, so that a device has finished too
            ms = 1e3 * (clock() - started)
            least[setting] = min(least.get(setting, ms), ms)
        rounds += 1
    return _table(sizes, least, names)


def _table(sizes: Sequence[int], least: dict[_Setting, float], names: Sequence[str]) -> CostTable:
    """Return the table of the least times of all settings: no setting costs more than one that does more."""
    least = {one: min(ms for more, ms in least.items() if _does_no_more(one, more)) for one in least}
    every, plain = range(len(names)), least[PLAIN]
    verified = [plain + least[(size, *FIRST_LEVEL)] - least[(1, *FIRST_LEVEL)] for size in sizes]
    step_ms = [max(plain, ms) for ms in verified]
    num_sizes = sum(ms <= MOST * plain for ms in step_ms)

    def more(d: int, width: int) -> float:  # of a further level
        return max(0.0, least[1, d, DEPTHS[1], width] - least[1, d, DEPTHS[0], width]) / (DEPTHS[1] - DEPTHS[0])

    slack = 0.01 * plain  # of timing
    free = [width for width in WIDTHS if all(more(d, width) <= FREE * more(d, WIDTHS[0]) + slack for d in every)]
    branching = max(free)
    draft_ms = {name: (max(0.0, least[1, d, 1, branching] - plain), more(d, branching)) for d, name in enumerate(names)}
    return CostTable(tuple(sizes[:num_sizes]), tuple(step_ms[:num_sizes]), draft_ms, branching)


def _does_no_more(one: _Setting, other: _Setting) -> bool:
    """Return whether a step with one setting does nothing that it does not do with the other one."""
    (size, drafter, depth, width), (other_size, other_drafter, other_depth, other_width) = one, other
    is_smaller = size <= other_size and depth <= other_depth and width <= other_width
    return is_smaller and drafter in (None, other_drafter)


def random_tree(roots: Tensor, size: int, vocab_size: int) -> DraftTree:
    """Return trees of `size` nodes: chains, half as long, with a sibling beside each of their nodes."""
    batch_size, device = len(roots), roots.device
    parents = torch.tensor([-1, *(max(0, 2 * ((node - 1) // 2) - 1) for node in range(1, size))], device=device)
    scores = -torch.arange(size, device=device).float()
    tokens = torch.cat(
        [roots[:, None], (torch.arange(1, size, device=device) % vocab_size).expand(batch_size, -1)], dim=1
    )
    count, bits = torch.full((batch_size,), size, device=device), torch.zeros_like(tokens)
    return DraftTree(tokens, parents.expand(batch_size, -1), scores.expand(batch_size, -1), count, proposers=bits)


def _text_lengths(step: DecodeStep) -> tuple[int, int]:
    """Return the numbers of prompt and new tokens to measure with: the most that the target's context takes."""
    context = getattr(step.target.config, "max_position_embeddings", None) or sum(LENGTHS[0])
    for prompt, new in LENGTHS:
        try:
            step.target.refuse_longer_than_exact(prompt + new)
        except ValueError:
            continue
        if prompt + new <= context:
            return prompt, new
    return 1, 1


def _random_tokens(step: DecodeStep, batch_size: int, length: int) -> Tensor:
    return torch.randint(step.target.vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(0))


def _processes_of(step: DecodeStep) -> Any:
    """Return the group of processes that the target's weights are sharded over; None for a target of one process."""
    for parameter in step.target.model.parameters():
        if isinstance(parameter, DTensor) and parameter.device_mesh.size() > 1:
            return parameter.device_mesh.get_group()
    return None


def _facts(drafter: Any) -> list[Any]:
    parameters = [list(one.shape) for one in getattr(getattr(drafter, "network", None), "parameters", list)()]
    return [type(drafter).__name__, parameters, getattr(drafter, "dtype", None)]


def _processor() -> str:
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()
