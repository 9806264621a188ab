"""The benchmark of coupled drafting and evidence: its figures are those of the decoder, its errors those of resampling,
and a run that was interrupted ends as one that was not."""

from __future__ import annotations

import json
import random
import shutil
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_beyond
import beyond_cells
import beyond_counts
import beyond_sample
from beyond_cells import Cell, Settings, World, domain_of, set_of
from beyond_sample import Difference, Sample

from taps_ext import SpeculativeDecoder, tiny
from taps_ext.tree import TreeShape

CALIBRATION = {"format": 1, "temperatures": [0.7, 1.0], "alpha": [[0.9], [1.1]], "beta": [[0.4], [0.5]]}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded models as a world of one set."""
    root: Path = tmp_path_factory.mktemp("world")
    (root / "target").symlink_to(tiny.assets() / "target")
    for domain, path in tiny.drafter_paths().items():
        shutil.copytree(path, root / "drafters" / "1" / domain)
        (root / "drafters" / "1" / domain / "calibration.json").write_text(json.dumps(CALIBRATION))
    return root


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, output: Path, *more: str) -> dict[str, Any]:
    monkeypatch.setattr(bench_beyond, "NODES", (8,))
    monkeypatch.setattr(bench_beyond, "SAMPLED", (1.0,))
    monkeypatch.setattr(bench_beyond, "QUICK", Settings(prompts=1, max_new_tokens=16))
    monkeypatch.setattr(beyond_cells, "SHARPNESSES", (2.0,))
    monkeypatch.setattr(beyond_cells, "TUNING_PROMPTS", 1)
    bench_beyond.main(["--seeds", str(folder), "--quick", "--output", str(output), *more])
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_an_interrupted_run_goes_on_and_ends_with_the_same_cells(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    whole = run(monkeypatch, folder, tmp_path / "whole.json", "--parts", "A")
    journal = (tmp_path / "whole.jsonl").read_bytes()
    assert len(journal.splitlines()) == 1 + len(whole["cells"])

    begun = b"".join(journal.splitlines(keepends=True)[:5])
    (tmp_path / "again.jsonl").write_bytes(begun + b'{"cell": {"wor')  # cut off while it wrote
    measured: list[str] = []
    measure = World.measure
    monkeypatch.setattr(World, "measure", lambda self, cell: measured.append(cell.key) or measure(self, cell))
    again = run(monkeypatch, folder, tmp_path / "again.json", "--parts", "A")
    assert len(measured) == len(whole["cells"]) - 4
    assert (tmp_path / "again.jsonl").read_bytes() == journal
    assert (again["cells"], again["claims"]) == (whole["cells"], whole["claims"])
    assert whole["claims"][0]["holds"], "every text is plain decoding's"


def test_a_journal_of_other_settings_is_refused(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompts":3}\n')
    with pytest.raises(SystemExit, match=r"other settings.*delete it"):
        run(monkeypatch, folder, tmp_path / "a.json", "--parts", "A")


def test_every_other_part_makes_its_tables(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_beyond, "DECAYS", (0.9,))
    monkeypatch.setattr(bench_beyond, "COMPOSED", (1.0,))
    monkeypatch.setattr(bench_beyond, "FILTERS", ((10, 1.0, 0.0),))
    found = run(monkeypatch, folder, tmp_path / "b.json", "--parts", "B", "C", "D", "E", "F")
    text = (tmp_path / "b.md").read_text()
    assert [text.count(f"\n## {part}.") for part in "ABCDEF"] == [0, 1, 1, 1, 1, 1]
    assert (tmp_path / "b.png").stat().st_size > 10_000
    (cost,) = (cost for cost in found["costs"] if cost["rows"] == 1)
    assert all(way["step_ms"]["median"] > way["drafting_ms"]["median"] > 0 for way in cost["ways"].values())


def test_a_world_without_calibrations_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "world", symlinks=True)
    (tmp_path / "world" / "drafters" / "1" / "chat" / "calibration.json").unlink()
    with pytest.raises(SystemExit, match=r"1/chat not calibrated"):
        World("seeds", tmp_path / "world", Settings(1, 8))


def test_a_cell_counts_what_the_decoder_counts(folder: Path) -> None:
    world = World("seeds", folder, Settings(2, 16))
    cell = Cell("seeds", ("1/math",), "single", "math", 1.0, nodes=16, draw=3)
    result = world.measure(cell)
    tokens, mask = world.encoded(world.prompts("math"))
    drafter = {"1/math": world.drafters["1/math"]}
    decoder = SpeculativeDecoder(world.target, drafter, "single", shape=TreeShape(max_nodes=16))
    stats = decoder.generate(tokens, mask, sampling=world.sampling(1.0, 3, 0, 2), max_new_tokens=16).stats
    assert Sample.of([(Cell("seeds", (), "", "math", 1.0), result)]).length == pytest.approx(stats.acceptance_length)
    assert result["identical"] == 2
    assert world.measure(replace(cell, rows=1))["accepted"] == result["accepted"], "a prompt's noise is its own"


def test_counting_leaves_the_library_as_it_was(folder: Path) -> None:
    owners = [(beyond_counts.EagleStack, "project"), (beyond_counts.ops, "expand_frontier")]
    owners += [(beyond_counts.GroupedDrafters, name) for name in ("propose", "observe")]
    before = [getattr(owner, name) for owner, name in owners]
    world = World("seeds", folder, Settings(1, 8))
    with beyond_counts.counting(world.target):
        assert all(getattr(owner, name) is not one for (owner, name), one in zip(owners, before, strict=True))
        assert world.target.lm_head._forward_pre_hooks
    assert [getattr(owner, name) for owner, name in owners] == before
    assert not world.target.lm_head._forward_pre_hooks


@pytest.mark.parametrize(
    ("way", "forwards", "decay"),
    [("single", 6, None), ("evidence", 7, 0.9), ("merged", 12, None), ("confidence", 12, None)],
)
def test_every_forward_of_every_drafter_counts(folder: Path, way: str, forwards: int, decay: float | None) -> None:
    """400 nodes take all six levels: the committed tokens by each drafter, and five levels by each that drafts."""
    world = World("seeds", folder, Settings(1, 12))
    drafters = ("1/math",) if way == "single" else ("1/math", "1/chat")
    decoder = world.decoder(Cell("seeds", drafters, way, "math", 1.0, nodes=400, decay=decay))
    tokens, mask = world.encoded(world.prompts("math"))
    sampling = world.sampling(1.0, 0, 0, 1)
    with beyond_counts.counting(world.target) as counts:
        stats = decoder.generate(tokens, mask, sampling=sampling, max_new_tokens=12, eos_token_id=()).stats
    assert stats.num_steps > 1
    assert counts.forwards == forwards * stats.num_steps
    assert counts.calls == counts.levels == 6 * stats.num_steps
    if decay is None:  # the root's row and five levels of ten nodes
        assert counts.head_rows == 51 * len(drafters) * stats.num_steps


def test_the_error_of_a_difference_is_that_of_resampled_prompts() -> None:
    rng = random.Random(0)

    def sample(gain: float) -> Sample:
        steps = {("math", i): rng.randrange(10, 40) for i in range(60)}
        hardness = random.Random(1)  # the same for both: they are paired
        rates = {prompt: 2 + 3 * hardness.random() + gain + 0.3 * rng.random() for prompt in steps}
        return Sample({prompt: round(rates[prompt] * count) for prompt, count in steps.items()}, steps)

    one, other = sample(0.5), sample(0.0)
    found = one - other
    resampled = []
    for _ in range(400):
        drawn = rng.choices(sorted(one.tokens), k=60)
        lengths = [sum(s.tokens[p] for p in drawn) / sum(s.steps[p] for p in drawn) for s in (one, other)]
        resampled.append(lengths[0] - lengths[1])
    assert found.value == pytest.approx(one.length - other.length)
    assert found.error == pytest.approx(statistics.stdev(resampled), rel=0.2)  # of 400: 4% is one standard deviation


def test_runs_of_one_prompt_are_one_cluster() -> None:
    cell, result = Cell("seeds", (), "", "math", 1.0), {"accepted": [3, 8], "steps": [2, 4]}
    once, thrice = Sample.of([(cell, result)]), Sample.of([(cell, result)] * 3)
    assert once.length == thrice.length == 17 / 6
    other = Sample.of([(cell, {"accepted": [1, 5], "steps": [2, 4]})])
    tripled = Sample.of([(cell, {"accepted": [1, 5], "steps": [2, 4]})] * 3)
    assert (once - other).error == pytest.approx((thrice - tripled).error)


def test_a_claim_fails_where_one_cell_does_and_names_the_worst() -> None:
    found = {("math", 1.0): Difference(0.3, 0.1), ("chat", 0.7): Difference(-0.2, 0.1)}
    told = beyond_sample.claim("above", found, lambda one: one.value > 0)
    assert told == {"claim": "above", "holds": False, "detail": "1 of 2; not -0.200 ± 0.100 at chat, T = 0.7"}


@pytest.mark.parametrize(
    ("name", "domain", "group"), [("1/math", "math", "1"), ("code", "code", ""), ("tables-hass", "tables", "hass")]
)
def test_a_drafters_name_says_its_domain_and_set(name: str, domain: str, group: str) -> None:
    assert (domain_of(name), set_of(name)) == (domain, group)
