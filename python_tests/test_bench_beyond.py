"""The benchmark of coupled drafting and evidence: its figures are those of the decoder, its errors those of resampling,
its claims and tables those of the cells that they name, and a run that was interrupted ends as one that was not."""

from __future__ import annotations

import json
import random
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from beyond_cells import REJECTION, SUM, SWITCHING, TUNED, Cell, Settings, World, domain_of, is_peer, set_of
from beyond_report import LOSS, Report
from beyond_sample import Difference, Sample

from taps_ext import SpeculativeDecoder, tiny
from taps_ext.composition import EVIDENCE_DECAY
from taps_ext.tree import TreeShape

CALIBRATION = {"format": 1, "temperatures": [0.7, 1.0], "alpha": [[0.9], [1.1]], "beta": [[0.4], [0.5]]}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def lay_out(root: Path, *sets: str) -> Path:
    """The embedded models as a world, the same in each set; a set says how its drafters are called."""
    (root / "target").symlink_to(tiny.assets() / "target")
    for one in sets:
        for domain, path in tiny.drafter_paths().items():
            shutil.copytree(path, root / "drafters" / one.format(domain))
            (root / "drafters" / one.format(domain) / "calibration.json").write_text(json.dumps(CALIBRATION))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp("world"), "1/{}")


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


@pytest.mark.long
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
    owners = [(beyond_counts.EagleNetwork, "extend"), (beyond_counts.ops, "expand_frontier")]
    owners += [(beyond_counts.DecodeStep, name) for name in ("propose", "observe")]
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
    assert counts.levels == 6 * stats.num_steps
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


# ---- what is said of given results

STEPS = 200  # of each of a cell's two prompts
Change = tuple[Mapping[str, Any], float, float]  # of cells with these fields: how much longer, how far apart prompts
Make = Callable[..., Report]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> list[World]:
    """Two drafters from two training seeds, and two that are four with those of another set."""
    sets = {"seeds": ("1/{}", "2/{}"), "four": ("{}", "{}-hass")}
    folders = {name: lay_out(tmp_path_factory.mktemp(name), *own) for name, own in sets.items()}
    return [World(name, folder, Settings(1, 8)) for name, folder in folders.items()]


@pytest.fixture
def report(worlds: list[World], monkeypatch: pytest.MonkeyPatch) -> Make:
    """A report on a part as it is planned, of acceptance lengths that a function gives."""
    monkeypatch.setattr(bench_beyond, "NODES", (8, 60))
    monkeypatch.setattr(bench_beyond, "DECAYS", (0.7, 0.9))
    monkeypatch.setattr(bench_beyond, "PROMPT_WEIGHTS", (1.0, 0.5))

    def result(cell: Cell, length: float, spread: float) -> dict[str, Any]:
        return {
            "accepted": [round(STEPS * (length + way * spread - 1)) for way in (1, -1)],
            "steps": [STEPS, STEPS],
            "identical": None if is_peer(cell) or cell.places is not None else 2,
            "nodes": 2 * STEPS * (58 if cell.budget else 100 if cell.way == "merged" else 60),
            "levels": round(2 * STEPS * levels_of(cell)),
            "chosen": {},
        }

    def make(part: str, length_of: Callable[[Cell], float], changes: Sequence[Change] = ()) -> Report:
        cells, done = bench_beyond.plan(*worlds, [part]), {}
        for cell in cells[part]:
            assert isinstance(cell, Cell)
            length, spread = length_of(cell), 0.0
            for where, more, apart in changes:
                if all(getattr(cell, name) == value for name, value in where.items()):
                    length, spread = length + more, apart
            done[cell.key] = result(cell, length, spread)
        return Report(cells, done)

    return make


def table_of(lines: Sequence[str], keys: int) -> dict[Any, dict[str, str]]:
    """By the first `keys` entries of a row: the others, by their column's name."""
    header, _, *rows = ([entry.strip() for entry in line.split("|")[1:-1]] for line in lines)
    by_row = {tuple(row[:keys]): dict(zip(header[keys:], row[keys:], strict=True)) for row in rows}
    return by_row if keys > 1 else {key: row for (key,), row in by_row.items()}


def failing(claims: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {claim["claim"]: claim["detail"] for claim in claims if not claim["holds"]}


def coupled_length(cell: Cell) -> float:
    """Of part A and F, where every claim holds."""
    way = cell.drafting if cell.way == "single" else cell.way
    length = {"coupled": 3.3, "topk": 2.5, REJECTION: 2.6, TUNED: 2.8}[way] if cell.temperature else 3.0
    if cell.places is not None:
        length += 0.45 if cell.temperature else 0.5
    length += 0.2 * (cell.nodes == 60) + 0.1 * (cell.temperature == 0.7) + 1.0 * (cell.domain == "chat")
    return length + 0.04 * (cell.draw - 0.5) + 0.3 * cell.filters_drafter + cell.filters[2]


COMPOSED = {  # by row of the table: way, budget, decay, drafting and nodes of its cells, and their length
    "evidence": ("evidence", None, EVIDENCE_DECAY, "coupled", 60, 2.98),
    "merged, 60 nodes, evidence": ("merged", 60, EVIDENCE_DECAY, "coupled", 60, 3.06),
    "merged, 60 nodes": ("merged", 60, None, "coupled", 60, 2.9),
    "merged, union": ("merged", None, None, "coupled", 60, 3.2),
    "confidence": ("confidence", None, None, "coupled", 60, 2.7),
    "entropy": ("entropy", None, None, "coupled", 60, 2.6),
    "merged by sum, 60 nodes, evidence": (SUM, 60, EVIDENCE_DECAY, "coupled", 60, 2.85),
    "merged by sum, 60 nodes": (SUM, 60, None, "coupled", 60, 2.8),
    "confidence, top-k": ("confidence", None, None, "topk", 60, 2.3),
    "merged, 60 nodes, top-k": ("merged", 60, None, "topk", 60, 2.4),
    "the paper's routing": ("the paper's routing", None, None, "coupled", 60, 2.35),
    "the paper's merging, 60 nodes": ("the paper's merging", None, None, "coupled", 60, 2.45),
    "the paper's merging, 119 nodes": ("the paper's merging", None, None, "coupled", 119, 2.55),
}
SINGLE = {  # by the drafter's domain and the text's
    "math": {"math": 3.0, "chat": 2.7, SWITCHING: 2.4},
    "chat": {"math": 2.1, "chat": 3.5, SWITCHING: 2.5},
}


def composed_length(cell: Cell) -> float:
    """Of part B, where every claim holds; the second set drafts better."""
    if cell.way == "single":
        length = SINGLE[domain_of(cell.drafters[0])][cell.domain]
    else:
        how = (cell.way, cell.budget, cell.decay, cell.drafting, cell.nodes)
        (length,) = (own[-1] for own in COMPOSED.values() if own[:-1] == how)
        length += {"math": 0.0, "chat": 0.5, SWITCHING: -0.4}[cell.domain]
    return length - 0.1 * cell.temperature + 0.2 * any(set_of(name) in ("2", "hass") for name in cell.drafters)


def levels_of(cell: Cell) -> float:
    return (5.4 if cell.nodes == 60 else 3.0) + 0.3 * cell.temperature - 0.6 * (cell.domain == "chat")


SEEDS_TOGETHER = "coupled is above top-k, all drafter seeds together"
EVERY_SEED = "coupled is above top-k with every drafter seed"
GREEDY = "coupled at T = 1 and 60 nodes is at the level of T = 0, less one standard error"
GREEDY_AT_PLACES = f"{GREEDY}, at the same places of the same texts"
PEER = f"coupled is above {REJECTION}, sharpened or not"
AT_ONE_CELL = {"domain": "math", "temperature": 0.7, "nodes": 8, "drafting": "topk"}
AT_ZERO = {"domain": "math", "temperature": 0.0, "nodes": 60, "places": None}
AT_PLACES = {"domain": "chat", "temperature": 0.0, "places": 1.0}


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        pytest.param(({}, 0.0, 0.0), {}, id="nothing"),
        pytest.param(
            (AT_ONE_CELL, 0.9, 0.0),
            {
                SEEDS_TOGETHER: "7 of 8; not -0.100 ± 0.000 at math, T = 0.7, 8",
                EVERY_SEED: "14 of 16; "
                "not -0.100 ± 0.000 at math, T = 0.7, 8, 0; -0.100 ± 0.000 at math, T = 0.7, 8, 1",
            },
            id="top-k",
        ),
        pytest.param(
            ({**AT_ONE_CELL, "draw": 1}, 1.0, 0.1),
            {EVERY_SEED: "15 of 16; not -0.200 ± 0.100 at math, T = 0.7, 8, 1"},
            id="top-k of one seed",
        ),
        pytest.param((AT_ZERO, 0.5, 0.25), {}, id="T = 0, within the error"),
        pytest.param((AT_ZERO, 0.5, 0.15), {GREEDY: "1 of 2; not -0.200 ± 0.150 at math"}, id="T = 0"),
        pytest.param(({**AT_ZERO, "nodes": 8}, 0.5, 0.0), {}, id="T = 0, few nodes"),
        pytest.param((AT_PLACES, 0.4, 0.2), {}, id="places, within the error"),
        pytest.param((AT_PLACES, 0.4, 0.1), {GREEDY_AT_PLACES: "1 of 2; not -0.150 ± 0.100 at chat"}, id="places"),
        pytest.param(({**AT_PLACES, "temperature": 1.0, "drafting": "topk"}, 1.0, 0.0), {}, id="places, top-k"),
        pytest.param(
            ({"domain": "math", "temperature": 1.0, "nodes": 60, "way": TUNED}, 0.6, 0.0),
            {PEER: "7 of 8; not -0.100 ± 0.000 at math, T = 1, 60"},
            id="the sharpened peer",
        ),
        pytest.param(
            ({"domain": "chat", "temperature": 0.7, "nodes": 60, "way": REJECTION}, 0.8, 0.0),
            {PEER: "7 of 8; not -0.100 ± 0.000 at chat, T = 0.7, 60"},
            id="the published peer",
        ),
    ],
)
def test_a_claim_of_coupled_drafting_fails_where_its_own_cells_do(
    report: Make, change: Change, failed: dict[str, str]
) -> None:
    claims = report("A", coupled_length, [change]).coupled_claims()
    assert [claim["claim"] for claim in claims] == [SEEDS_TOGETHER, EVERY_SEED, GREEDY, GREEDY_AT_PLACES, PEER]
    assert failing(claims) == failed


ROUTED = f"evidence is within {LOSS} of the matched specialist"
WEIGHTED = "merged with evidence is not below the matched specialist by more than one standard error"
ABOVE = "merged with evidence is above every single drafter on mixtures"
BY_SEEDS, TWO, FOUR = "2 drafters (seeds, 2 training seeds): ", "2 drafters (four): ", "4 drafters (four): "
EVIDENCE = {"world": "seeds", "way": "evidence", "domain": "chat", "temperature": 1.0}
MERGED = {
    "world": "seeds",
    "way": "merged",
    "budget": 60,
    "decay": EVIDENCE_DECAY,
    "domain": "math",
    "temperature": 0.0,
}
SPECIALIST = {"world": "four", "way": "single", "domain": "math", "temperature": 0.0}
PAIR = ("math", "chat")


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        pytest.param(({}, 0.0, 0.0), {}, id="nothing"),
        pytest.param((EVIDENCE, -0.02, 0.0), {}, id="evidence, within the loss"),
        pytest.param(
            (EVIDENCE, -0.04, 0.0), {BY_SEEDS + ROUTED: "3 of 4; not -0.060 ± 0.000 at chat, T = 1"}, id="evidence"
        ),
        pytest.param((MERGED, -0.2, 0.2), {}, id="merged, within the error"),
        pytest.param(
            (MERGED, -0.2, 0.1), {BY_SEEDS + WEIGHTED: "3 of 4; not -0.140 ± 0.100 at math, T = 0"}, id="merged"
        ),
        pytest.param(({**MERGED, "decay": None}, -1.0, 0.0), {}, id="merged, without evidence"),
        pytest.param(({"way": "confidence"}, -1.0, 0.0), {}, id="confidence"),
        pytest.param(
            ({**MERGED, "world": "four", "drafters": PAIR, "domain": SWITCHING, "temperature": 1.0}, -0.2, 0.0),
            {TWO + ABOVE: "5 of 6; not -0.040 ± 0.000 at switching, T = 1"},
            id="merged, below one of two drafters",
        ),
        pytest.param(
            ({"world": "four", "drafters": ("math",), "domain": "chat", "temperature": 1.0}, 1.0, 0.0),
            {TWO + ABOVE: "5 of 6; not -0.040 ± 0.058 at mixture, T = 1"},
            id="a stranger, best of the mixture",
        ),
        pytest.param(({**SPECIALIST, "drafters": ("math-hass",)}, -0.5, 0.0), {}, id="the better specialist, worse"),
        pytest.param(
            ({**SPECIALIST, "drafters": ("math",)}, 0.3, 0.0),
            {
                TWO + ROUTED: "3 of 4; not -0.320 ± 0.000 at math, T = 0",
                TWO + WEIGHTED: "3 of 4; not -0.240 ± 0.000 at math, T = 0",
                FOUR + ROUTED: "3 of 4; not -0.120 ± 0.000 at math, T = 0",
                FOUR + WEIGHTED: "3 of 4; not -0.040 ± 0.000 at math, T = 0",
            },
            id="the other specialist, better",
        ),
    ],
)
def test_a_claim_of_compositions_fails_where_its_own_cells_do(
    report: Make, change: Change, failed: dict[str, str]
) -> None:
    made = report("B", composed_length, [change])
    claims = [claim for panel in made.panels() for claim in made.composed_claims(panel)]
    assert [claim["claim"] for claim in claims] == [
        title + claim for title in (BY_SEEDS, TWO, FOUR) for claim in (ROUTED, WEIGHTED, ABOVE)
    ]
    assert failing(claims) == failed


def test_texts_that_are_not_plain_decodings_are_counted(report: Make) -> None:
    made = report("A", coupled_length)
    told = made.text_claim()
    assert (told["holds"], told["detail"]) == (True, "80 of 80 texts in 40 cells"), "a peer's are its own"
    (cell, *_) = made.every()
    made.done[cell.key]["identical"] = 1  # type: ignore[index]
    told = made.text_claim()
    assert (told["holds"], told["detail"]) == (False, "79 of 80 texts in 40 cells")


def test_the_table_of_one_drafter_has_each_way_in_its_column(report: Make) -> None:
    """The peer that coupled drafting is held against is the better one, whichever that is."""
    better = {"domain": "chat", "temperature": 0.7, "nodes": 8, "way": REJECTION}
    found = table_of(report("A", coupled_length, [(better, 0.4, 0.1)]).coupled_table(), keys=3)
    assert len(found) == 8
    assert found["math", "1", "60"] == {
        "top-k": "2.70",
        "coupled": "**3.50**",
        "coupled - top-k": "+0.80 ± 0.00",
        REJECTION: "2.80",
        "sharpened": "3.00",
        "coupled - the better": "+0.50 ± 0.00",
        "T = 0": "3.20",
        "coupled - T = 0": "+0.30 ± 0.00",
    }
    assert found["chat", "0.7", "8"] == {
        "top-k": "3.60",
        "coupled": "**4.40**",
        "coupled - top-k": "+0.80 ± 0.00",
        REJECTION: "4.10",
        "sharpened": "3.90",
        "coupled - the better": "+0.30 ± 0.10",
        "T = 0": "4.00",
        "coupled - T = 0": "+0.40 ± 0.00",
    }


def test_the_table_of_places_has_none_of_the_whole_texts(report: Make) -> None:
    found = table_of(report("A", coupled_length, [({"places": None}, 7.0, 0.0)]).places_table(), keys=1)
    assert list(found) == ["math", "chat"]
    assert found["chat"] == {
        "top-k, T = 1": "4.15",
        "coupled, T = 1": "**4.95**",
        "coupled - top-k": "+0.80 ± 0.00",
        "T = 0": "4.70",
        "coupled - T = 0": "+0.25 ± 0.00",
    }


def test_the_table_of_compositions_has_each_way_in_its_row(report: Make) -> None:
    made = report("B", composed_length)
    by_seeds, two, four = made.panels()
    found = table_of(made.composed_table(two, 1.0), keys=1)
    singles = ["single, math", "single, chat", "*best single there*"]
    assert list(found) == [*singles, *COMPOSED]
    assert {name: found[name]["math"].split()[0] for name in COMPOSED} == {
        name: f"{own[-1] - 0.1:.2f}" for name, own in COMPOSED.items()
    }
    rows = [found[name] for name in (*singles, "evidence", "merged, union")]
    assert [[row[column] for row in rows] for column in ("nodes a step", "math", "chat")] == [
        ["", "", "60", "60", "100"],
        ["2.90", "2.00", "2.90", "2.88 (-0.02 ± 0.00)", "3.10 (+0.20 ± 0.00)"],
        ["2.60", "3.40", "3.40", "3.38 (-0.02 ± 0.00)", "3.60 (+0.20 ± 0.00)"],
    ]
    assert [[row[column] for row in rows] for column in ("mixture", SWITCHING)] == [
        ["2.75", "2.70", "2.75", "3.13 (+0.38 ± 0.23)", "3.35 (+0.60 ± 0.23)"],
        ["2.30", "2.40", "2.40", "2.48 (+0.08 ± 0.00)", "2.70 (+0.30 ± 0.00)"],
    ]
    of_four = table_of(made.composed_table(four, 0.0), keys=1)
    assert [of_four[name]["math"] for name in ("single, math", "single, math-hass")] == ["3.00", "3.20"]
    assert of_four["evidence"]["math"] == "3.18 (-0.02 ± 0.00)"
    of_seeds = table_of(made.composed_table(by_seeds, 0.0), keys=1)  # between its two seeds
    assert list(of_seeds["evidence"]) == ["nodes a step", "math", "chat", "mixture"]
    assert [of_seeds[name]["math"] for name in ("single, math", "evidence")] == ["3.10", "3.08 (-0.02 ± 0.00)"]


def test_the_table_of_the_stop_rule_says_what_is_saved(report: Make) -> None:
    found = table_of(report("D", coupled_length).stop_table(), keys=2)
    assert len(found) == 6
    assert found["math", "0"] == {"8 nodes": "3.00 (50% saved)", "60 nodes": "5.40 (10% saved)"}
    assert found["chat", "1"] == {"8 nodes": "2.70 (55% saved)", "60 nodes": "5.10 (15% saved)"}


def test_the_table_of_evidence_has_its_constants_in_their_rows(report: Make) -> None:
    def length(cell: Cell) -> float:
        by_domain = {"math": 2.0, "chat": 3.0, SWITCHING: 4.0}
        return by_domain[cell.domain] + (cell.decay or 0) + 0.1 * cell.prompt_weight - 0.2 * cell.temperature

    made = report("E", length)
    (panel,) = made.panels("E")
    found = table_of(made.evidence_table(panel), keys=3)
    assert len(found) == 8
    assert found["1", "0.9", "0.5"] == {"math": "2.75", "chat": "3.75", SWITCHING: "4.75"}
    assert found["0", "0.7", "1"] == {"math": "2.80", "chat": "3.80", SWITCHING: "4.80"}


def test_the_table_of_filters_has_each_way_in_its_column(report: Make) -> None:
    filtered = {"filters_drafter": True, "domain": "math"}
    found = table_of(report("F", coupled_length, [(filtered, 0.1, 0.2)]).filter_table(), keys=2)
    assert len(found) == 2 * len(bench_beyond.FILTERS)
    assert found["math", "top-k 10, top-p 1, min-p 0"] == {
        "top-k drafting": "2.68",
        "coupled": "3.48",
        "coupled, drafter filtered": "3.88",
        "gained": "+0.40 ± 0.20",
    }
    assert found["chat", "top-k 0, top-p 1, min-p 0.1"] == {
        "top-k drafting": "3.78",
        "coupled": "4.58",
        "coupled, drafter filtered": "4.88",
        "gained": "+0.30 ± 0.00",
    }
