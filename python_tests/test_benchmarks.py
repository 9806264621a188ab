"""The plain way that the benchmarks measure against computes the same answers as the specification."""

from __future__ import annotations

import dataclasses
import importlib
import json
import platform
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_decode
import bench_gpu
import cases
import gpu_report
import plain
import provenance
import sides
import timing
from transformers import TopPLogitsWarper

from taps_ext import ops, reference
from taps_ext.sampling import SamplingParams
from taps_ext.tree import DraftTree

SIZES = (1, 2, 26, 60, 119, 512)
SEEDS = (0, 1, 2)


def _pruned(num_nodes: int, seed: int) -> tuple[plain.Pool, DraftTree]:
    pool = cases.grow_pool(seed, cases.branching_for(num_nodes))
    return pool, reference.prune_tree(cases.as_tree(pool), num_nodes)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_nodes", SIZES)
def test_plain_pruning_keeps_the_same_tokens_and_parents(num_nodes: int, seed: int) -> None:
    pool, expected = _pruned(num_nodes, seed)
    tokens, parents = plain.prune(pool, num_nodes)
    assert tokens.tolist() == expected.tokens[0].tolist()
    assert parents == expected.parents[0].tolist()


def leaf_paths(tree: DraftTree) -> list[list[int]]:
    """Return the path from the root to each leaf of a single tree, in ascending leaf order, padded with -1."""
    parents = tree.parents[0, : int(tree.num_nodes)].tolist()
    paths: list[list[int]] = []
    for node in set(range(len(parents))) - set(parents):
        path = [node]
        while path[0] != 0:
            path.insert(0, parents[path[0]])
        paths.append(path)
    longest = max(map(len, paths))
    return [path + [-1] * (longest - len(path)) for path in sorted(paths, key=lambda path: path[-1])]


@pytest.mark.parametrize("method", [plain.tree_work, plain.tree_work_by_index, plain.tree_work_lean])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_nodes", SIZES)
def test_plain_tree_work_gives_the_same_mask_depths_and_paths(num_nodes: int, seed: int, method: object) -> None:
    pool, tree = _pruned(num_nodes, seed)
    tokens, mask, depths, paths = method(pool, num_nodes, 5)  # type: ignore[operator]
    assert torch.equal(tokens, tree.tokens[0])
    assert torch.equal(mask, reference.tree_attention_mask(tree.parents, tree.num_nodes, torch.tensor([5]), 5))
    assert torch.equal(depths, reference.tree_depths(tree.parents, tree.num_nodes)[0])
    assert paths.tolist() == leaf_paths(tree)


@pytest.mark.parametrize("seed", SEEDS)
def test_plain_merging_gives_the_same_union(seed: int) -> None:
    trees = [reference.prune_tree(cases.as_tree(cases.grow_pool(s, 10, vocabulary=12)), 60) for s in (seed, seed + 10)]
    stacked = [torch.stack([getattr(tree, name)[0] for tree in trees]) for name in ("tokens", "parents", "scores")]
    expected = reference.merge_trees(*(field[None] for field in stacked), torch.full((1, 2), 60)).tree
    tokens, parents, proposers = plain.merge(stacked[0], stacked[1])
    count = int(expected.num_nodes)
    assert 60 < count < 119
    assert tokens == expected.tokens[0, :count].tolist()
    assert parents == expected.parents[0, :count].tolist()
    assert expected.proposers is not None
    assert proposers == expected.proposers[0, :count].tolist()


def test_plain_expansion_gives_the_same_children() -> None:
    logits, scores = cases.random_logits(1, 10, 1000, torch.float32), torch.linspace(-0.1, -3, 10)[None]
    expected = reference.expand_frontier(logits, scores, 10)
    tokens, cumulative, frontier, entropies = plain.expand(logits[0], scores[0], 10)
    assert torch.equal(tokens, expected.tokens[0])
    assert torch.equal(frontier, expected.frontier[0])
    # float32 sums of 1,000 terms against float64
    torch.testing.assert_close(cumulative, expected.scores[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropies, expected.entropies[0], rtol=1e-4, atol=1e-4)


def test_plain_coupled_expansion_gives_the_same_children() -> None:
    built = sides.expand_coupled(1000, torch.float32, 2)
    ours, expected = built.ours(), built.plain()
    assert torch.equal(ours.tokens, expected[0])  # type: ignore[attr-defined]
    assert torch.equal(ours.frontier, expected[2])  # type: ignore[attr-defined]
    for i in (1, 3):  # float32 sums, and noise to 2e-6
        torch.testing.assert_close(ours[i], expected[i], rtol=1e-4, atol=1e-4)  # type: ignore[index]


@pytest.mark.parametrize("rows", [1, 2, 4, 7])
def test_plain_greedy_verification_accepts_the_same_path(rows: int) -> None:
    case = cases.verify_case(cases.random_logits(1, 60, 500, torch.float32), rows, SamplingParams(temperature=0.0))
    s = case.sampling
    parameters = (s.temperature, s.top_k, s.top_p, s.min_p, s.seeds, case.positions)
    expected = reference.verify_tree(case.logits, case.tree, *parameters)
    path, bonus = plain.verify_greedy(case.logits[0], case.tree.tokens[0], torch.tensor(leaf_paths(case.tree)))
    assert path == case.path == expected.path[0, :rows].tolist()
    assert bonus == int(expected.bonus_tokens)


@pytest.mark.parametrize("method", [plain.verify_sampled, plain.verify_sampled_lazily])
@pytest.mark.parametrize("rows", [1, 4, 7])
def test_both_sides_of_the_sampling_benchmark_visit_the_rows_that_it_names(rows: int, method: object) -> None:
    case = cases.verify_case(cases.random_logits(2, 60, 500, torch.float32), rows)
    ours = case.ours()
    for row in range(2):
        assert ours.path[row, :rows].tolist() == case.path
        assert int(ours.num_accepted[row]) == rows - 1
        tokens, parents = case.tree.tokens[row].tolist(), case.tree.parents[row].tolist()
        buffer = torch.empty_like(case.logits[row])
        path, _ = method(case.logits[row], tokens, parents, 1.0, case.uniforms(), buffer)  # type: ignore[operator]
        assert path == case.path


@pytest.mark.parametrize("method", [plain.verify_sampled, plain.verify_sampled_lazily])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_plain_sampling_is_lossless(method: object, dtype: torch.dtype, temperature: float) -> None:
    """The first emitted token follows the target's distribution: chi-square with 7 degrees of freedom."""
    draws, logits = 4000, torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = torch.softmax(logits[0].float() / temperature, -1) * draws
    tokens, parents = [0, 3, 5, 1], [-1, 0, 0, 1]
    uniform, counts, buffer = random.Random(0).random, torch.zeros(8), torch.empty(4, 8)
    for _ in range(draws):
        path, bonus = method(logits, tokens, parents, temperature, uniform, buffer)  # type: ignore[operator]
        counts[tokens[path[1]] if len(path) > 1 else bonus] += 1
    assert float(((counts - expected) ** 2 / expected).sum()) < 24.3  # exceeded once in a thousand seeds


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_plain_top_p_cuts_what_transformers_cuts(top_p: float) -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 2
    expected = TopPLogitsWarper(top_p)(torch.empty(6, 0, dtype=torch.int64), logits)
    assert torch.equal(plain._cut_top_p(logits, top_p), expected)


def test_plain_expansion_takes_a_batch_at_once() -> None:
    logits, scores = cases.random_logits(3, 4, 100, torch.float32), torch.linspace(-0.1, -3, 12).view(3, 4)
    together = plain.expand(logits, scores, 5)
    for row in range(3):
        for one, other in zip(plain.expand(logits[row], scores[row], 5), together, strict=True):
            torch.testing.assert_close(other[row], one)


def test_plain_compaction_moves_the_same_rows() -> None:
    kv = torch.randn(4, 2, 3, 12, 5, generator=torch.Generator().manual_seed(0))
    expected, path = kv.clone(), torch.tensor([[0, 2, 4, -1, -1], [0, 1, -1, -1, -1]])
    reference.compact_kv(expected, path, torch.tensor([2, 1]), torch.tensor([3, 6]), 6)
    plain.compact(kv, [0, 2, 4], 3, 6, row=0)
    plain.compact(kv, [0, 1], 6, 6, row=1)
    assert torch.equal(kv, expected)


def test_comparison_alternates_its_sides_on_one_thread() -> None:
    calls: list[str] = []
    threads = torch.get_num_threads()
    comparison = timing.compare(
        lambda: calls.append(f"ours {torch.get_num_threads()}"),
        lambda: calls.append(f"plain {torch.get_num_threads()}"),
        pairs=3,
    )
    runs = [call for call, before in zip(calls, [None, *calls], strict=False) if call != before]
    assert runs == ["ours 1", "plain 1"] * 4  # the warm-up, then three pairs
    assert comparison.ratio.count == 3
    assert torch.get_num_threads() == threads


def test_section_time_excludes_the_sections_inside_it() -> None:
    clock = bench_decode.SectionClock()
    with clock.section("outer"):
        time.sleep(0.01)
        clock.timed("inner", time.sleep)(0.03)
        time.sleep(0.01)
    taken = clock.take()
    assert 0.03 <= taken["inner"] < 0.2  # a sleep may be long on a busy machine, but never short
    assert 0.02 <= taken["outer"] < 0.2
    assert clock.take() == {}


def test_instrumenting_a_decode_step_leaves_the_library_as_it_was() -> None:
    before = [getattr(ops, name) for name in bench_decode.OPS]
    with bench_decode.instrumented(bench_decode.SectionClock()):
        assert all(getattr(ops, name) is not op for name, op in zip(bench_decode.OPS, before, strict=True))
    assert [getattr(ops, name) for name in bench_decode.OPS] == before


def test_spread_gives_median_and_quartiles() -> None:
    assert timing.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == timing.Spread(3.0, 2.0, 4.0, 5)


def test_provenance_names_no_path_and_no_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "bench_ops.py"), "--output", str(tmp_path / "ops.json")])
    found = provenance.provenance()
    text = json.dumps(found)
    assert found["command"] == "python benchmarks/bench_ops.py --output ops.json"
    for private in (str(tmp_path), str(Path.home()), str(provenance.ROOT), platform.node()):
        assert private not in text


def test_results_are_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "results" / "ops.json"
    provenance.write_json(target, {"a": 1})
    with pytest.raises(TypeError):
        provenance.write_json(target, {"a": object()})
    assert json.loads(target.read_text()) == {"a": 1}
    assert list(target.parent.iterdir()) == [target]


# ---- on a GPU


def test_the_cases_of_a_gpu_begin_with_those_of_its_goals() -> None:
    """A run that is cut short lacks what matters least."""
    found = [vars(case) for case in bench_gpu.every_case()]
    for goal in gpu_report.GOALS:
        places = [i for i, case in enumerate(found) if goal.shape.items() <= case.items()]
        assert places and places[0] < 100, goal
    assert all(case["batch"] * (case["nodes"] or 10) * (case["vocabulary"] or 0) * 2 <= 20 << 30 for case in found)


def test_the_cases_of_a_gpu_agree_with_themselves_on_the_cpu() -> None:
    """The script whole, without its clocks: small cases of every op, results compared."""
    meter = bench_gpu.Meter("cpu")
    small = [bench_gpu.Case(case.op, 1, case.nodes, 500 if case.vocabulary else None, case.sampling)
             for case in bench_gpu.dry_cases()]  # fmt: skip
    rows = [meter.row(case) for case in small]
    assert len(rows) == 12
    assert all(row["agrees_with_cpu"] for row in rows)


def test_a_wrong_result_does_not_agree() -> None:
    tree = reference.prune_tree(cases.as_tree(cases.grow_pool(0, 10)), 20)
    tree = dataclasses.replace(tree, tokens=tree.tokens + 1_000_000)
    wrong = dataclasses.replace(tree, tokens=tree.tokens + (torch.arange(20) == 7))
    assert bench_gpu.agree((tree, tree.scores), (tree, tree.scores + 1e-7))
    assert not bench_gpu.agree(wrong, tree)


def row_of(shape: dict[str, object], **measured: float) -> dict[str, object]:
    times = {
        name: {"median": value, "lower_quartile": value, "upper_quartile": value} for name, value in measured.items()
    }
    floors = {f"{state}_floor_us": 2.0 for state in ("warm", "cold")}
    return {**shape, **times, **floors}


def test_goals_are_met_missed_or_not_measured() -> None:
    rows = [
        row_of(gpu_report._verify(1, "1"), warm_us=14.0, cold_us=16.0, plain_us=200.0),
        row_of(gpu_report._verify(64, "0"), warm_us=5.0, cold_us=6.0),
        row_of({**gpu_report.EXPANSION, "batch": 1}, warm_us=5.9, cold_us=13.0, eager_us=9.0, plain_us=40.0),
        {**gpu_report._verify(1, "0"), "error": "out of memory"},
    ]
    found = {(goal["shape"], goal["unit"]): goal for goal in gpu_report.goals(rows)}
    assert found["verify_tree B=1 N=60 V=128256 T=1", "us"]["met"] is True
    in_floors = found["verify_tree B=64 N=60 V=128256 T=0", "x floor"]
    assert (in_floors["limit"], in_floors["warm"], in_floors["cold"], in_floors["met"]) == (2, 2.5, 3.0, False)
    assert found["expand_frontier B=1 V=128256", "of 2 x floor or 6 us"]["met"] is True
    assert found["expand_frontier B=1 V=128256", "of the plain way, both eager"]["met"] is False
    assert found["verify_tree B=1 N=60 V=128256 T=0", "us"]["met"] is None


def test_the_report_shows_every_row_and_every_goal() -> None:
    rows = [
        row_of(gpu_report._verify(1, "1"), warm_us=14.0, cold_us=16.0),
        {**gpu_report.EXPANSION, "error": "no room"},
    ]
    result = {
        "provenance": {"date": "2026-11-23"},
        "copy_gb_per_s": 3000.0,
        "empty_launch_us": {"warm": 1.5, "cold": 2.5},
        "rows": rows,
        "goals": gpu_report.goals(rows),
        "cases_left_out": 3,
    }
    text = gpu_report.markdown(result)
    assert "| B=1 N=60 V=128256 T=1 | 14 (14 - 14) | 16 (16 - 16) | 7 | 8 | 2 |" in text
    assert "| B=1 V=128256 | no room |" in text
    tables = [line for line in text.splitlines() if line.startswith("| B=")]
    assert {line.count("|") for line in tables} == {gpu_report.HEADER.count("|")}
    assert "3 left out for time, 1 errors" in gpu_report.summary(result)


# ---- every script

FOLDER = provenance.ROOT / "benchmarks"
MODULES = [path.relative_to(FOLDER).with_suffix("").parts for path in sorted(FOLDER.rglob("*.py"))]


@pytest.mark.parametrize("module", MODULES, ids="/".join)
def test_every_script_finds_what_it_imports(module: tuple[str, ...]) -> None:
    """Those that need a GPU or further packages to run do without them until they do."""
    found = importlib.import_module(".".join(module))
    assert Path(str(found.__file__)) == FOLDER.joinpath(*module).with_suffix(".py")


@pytest.mark.parametrize("script", sorted((FOLDER / "runs").glob("*.sh")), ids=lambda path: path.name)
def test_run_scripts_are_well_formed(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
