"""The paper's sections of a report, recomputed from the lines; its own figures, by the averages that it prints."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_cases import DRAFTERS, VARIANTS, as_read, variant, write_results

from taps_ext.evaluation import counts

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from paper import comparisons, drafting, published, signals
from paper.__main__ import main, sections

PUBLISHED = Path(__file__).parents[1] / "benchmarks" / "results" / "real_text"

SEEDED = {name: VARIANTS[name] for name in ("plain", "single:math", "single:chat")}  # that both drafter seeds have
SINGLES = [f"single:{name}" for name in DRAFTERS]
BOTH = ("seed0", "seed1")


def read_tables(path: Path) -> dict[str, list[dict[str, str]]]:
    """The tables of a folder's or a report.json's report."""
    return as_read([table for section in sections(*signals.add(counts.read([path]))) for table in section.tables])


class Lines:
    """The answers of a folder of results, and figures of some: of gsm8k at T = 0, where nothing else is said."""

    def __init__(self, folder: Path) -> None:
        self._lines = [
            (path.parent.name, json.loads(line))
            for path in sorted(folder.glob("*/answers-*.jsonl"))
            for line in path.read_text().splitlines()
        ]

    def of(
        self, variant: str, task: str = "gsm8k", temperature: float = 0.0, seeds: tuple[str, ...] = BOTH[:1]
    ) -> list[dict[str, Any]]:
        which = (variant, task, temperature)
        found = [
            line
            for seed, line in self._lines
            if seed in seeds and (line["variant"], line["task"], line["temperature"]) == which
        ]
        assert found
        return found

    def by_question(self, variant: str, seeds: tuple[str, ...]) -> list[list[dict[str, Any]]]:
        lines = self.of(variant, seeds=seeds)
        return [
            [line for line in lines if line["question_id"] == one] for one in sorted({q["question_id"] for q in lines})
        ]

    def tau(self, *which: Any, **more: Any) -> float:
        return _tau(self.of(*which, **more))

    def mean_tau(self, variant: str, seeds: tuple[str, ...] = BOTH[:1]) -> float:
        """Over the tasks."""
        return float(np.mean([self.tau(variant, task, seeds=seeds) for task in ("gsm8k", "mt_bench", "svamp")]))

    def turns(self, *which: Any, **more: Any) -> list[dict[str, Any]]:
        return [turn for line in self.of(*which, **more) for turn in line["turns"]]

    def tokens_per_second(self, variant: str) -> float:
        choices = [(line["choices"][0], line["rows"]) for line in self.of(variant, seeds=BOTH)]
        return sum(sum(one["new_tokens"]) for one, _ in choices) / sum(sum(one["wall_time"]) / n for one, n in choices)

    def math_is_better(self, seed: str) -> np.ndarray:
        """By question 1, 0.5 or 0."""
        lengths = [[_tau(lines) for lines in self.by_question(name, (seed,))] for name in SINGLES]
        return np.asarray((1 + np.sign(np.subtract(*lengths))) / 2)

    def fixed(self, seeds: tuple[str, ...] = BOTH[:1]) -> float:
        share = float(np.mean([self.math_is_better(seed) for seed in seeds]))
        assert share != 0.5
        return max(share, 1 - share)

    def hits(self, signal: str, sign: int, seeds: tuple[str, ...] = BOTH[:1]) -> float:
        """How often the drafter of the higher (1) or lower (-1) mean signal is the better one, seed by seed."""
        found = []
        for seed in seeds:
            means = [[_mean_signal(lines, signal) for lines in self.by_question(name, (seed,))] for name in SINGLES]
            is_better = self.math_is_better(seed)
            found.append(np.where(sign * np.subtract(*means) > 0, is_better, 1 - is_better))
        return float(np.mean(found))

    def majority_is_right(self, variant: str, seeds: tuple[str, ...]) -> float:
        """How often the drafter that is chosen in most steps of a question is the better one, seed by seed."""
        found = []
        for seed in seeds:
            chosen = [
                [name for line in lines for turn in line["turns"] for name in turn["chosen"]]
                for lines in self.by_question(variant, (seed,))
            ]
            sides = np.array([(1 + np.sign(names.count("math") - names.count("chat"))) / 2 for names in chosen])
            is_better = self.math_is_better(seed)
            found.append(sides * is_better + (1 - sides) * (1 - is_better))
        return float(np.mean(found))


def _tau(lines: list[dict[str, Any]]) -> float:
    return 1 + float(np.mean([count for line in lines for turn in line["turns"] for count in turn["num_accepted"]]))


def _mean_signal(lines: list[dict[str, Any]], signal: str) -> float:
    sides = [side for line in lines for side in line["signals"][line["drafters"][0]][signal].values()]
    return float(sum(side["sum"] for side in sides) / sum(side["count"] for side in sides))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two drafter seeds at temperature 0, of which the second has singles only, and one at 1."""
    folder = tmp_path_factory.mktemp("results")
    write_results(folder / "seed0", "EAGLE-2", seed=0)
    write_results(folder / "seed1", "EAGLE-2", seed=1, variants=SEEDED, temperatures=(0.0,))
    return folder


@pytest.fixture(scope="module")
def tables(results: Path) -> dict[str, list[dict[str, str]]]:
    """As their CSV files hold them."""
    return read_tables(results)


@pytest.fixture(scope="module")
def lines(results: Path) -> Lines:
    """Every answer."""
    return Lines(results)


def _proposed_by_math(lines: Lines) -> float:
    masks = [mask for turn in lines.turns("merged@60") for step in turn["proposers"] for mask in step]
    return float(np.mean([mask & 1 for mask in masks]))


Expected = Callable[[Lines], float]
CELLS: list[tuple[str, tuple[str, ...], str, Expected]] = [
    ("acceptance-t0", ("single:math",), "GSM8K", lambda all: all.tau("single:math", seeds=BOTH)),
    ("acceptance-t1", ("merged",), "SVAMP", lambda all: all.tau("merged", "svamp", 1.0)),
    # a sweep is of the seeds that all its points have, an end of the drafter that it names
    ("averaging-math-chat-t0", ("single:math", "1.0"), "GSM8K", lambda all: all.tau("single:math")),
    ("averaging-math-chat-t0", ("single:chat", "0.0"), "GSM8K", lambda all: all.tau("single:chat")),
    ("averaging-math-chat-t0", ("average:math+chat,weight=0.25", "0.25"), "SVAMP",
     lambda all: all.tau("average:math+chat,weight=0.25", "svamp")),
    ("averaging-math-chat-t1", ("single:math,topk", "1.0"), "GSM8K",
     lambda all: all.tau("single:math,topk", "gsm8k", 1.0)),
    ("budget-t0", ("single:math", "GSM8K"), "acceptance length", lambda all: all.tau("single:math")),
    ("budget-t0", ("single:math@20", "GSM8K"), "acceptance length", lambda all: all.tau("single:math@20")),
    ("signal-routing-math-chat-t0", ("lower mean entropy",), "GSM8K", lambda all: all.hits("entropy", -1)),
    ("signal-routing-math-chat-t0", ("higher mean confidence",), "GSM8K", lambda all: all.hits("confidence", 1)),
    ("signal-routing-math-chat-t0", ("one fixed drafter",), "GSM8K", lambda all: all.fixed()),
    ("comparisons-t0", ("single:math vs single:chat",), "GSM8K",
     lambda all: all.tau("single:math", seeds=BOTH) - all.tau("single:chat", seeds=BOTH)),
    ("comparisons-t0", ("average vs best specialist",), "GSM8K",
     lambda all: all.tau("average") - max(map(all.tau, SINGLES))),
    ("comparisons-t0", ("average vs worst specialist",), "GSM8K",
     lambda all: all.tau("average") - min(map(all.tau, SINGLES))),
    ("comparisons-t0", ("merged (union, at most 119 nodes) vs best specialist (60 nodes)",), "GSM8K",
     lambda all: all.tau("merged") - max(map(all.tau, SINGLES))),
    ("comparisons-t0", ("merged@60 (equal budget) vs best specialist (60 nodes)",), "GSM8K",
     lambda all: all.tau("merged@60") - max(map(all.tau, SINGLES))),
    ("comparisons-t0", ("merged@20 vs best specialist (20 nodes)",), "GSM8K",
     lambda all: all.tau("merged@20") - max(all.tau(f"{one}@20") for one in SINGLES)),
    ("against-best-single-t1", ("single:math,topk",), "GSM8K",
     lambda all: all.tau("single:math,topk", "gsm8k", 1.0)
     - max(all.tau(one, "gsm8k", 1.0) for one in (*SINGLES, "single:math,topk"))),
    ("equal-to-plain-t0", ("single:math",), "MT_BENCH",
     lambda all: float(np.mean([turn["equals_plain"] for turn in all.turns("single:math", "mt_bench", seeds=BOTH)]))),
    ("accuracy-t0", ("merged",), "GSM8K",
     lambda all: float(np.mean([turn["is_right"] for turn in all.turns("merged")]))),
    ("speed-up-t0", ("single:math",), "GSM8K",
     lambda all: all.tokens_per_second("single:math") / all.tokens_per_second("plain")),
    ("merging-t0", ("merged@60", "GSM8K"), "math", _proposed_by_math),
    ("published-t0", ("MathInstruct", "single:math"), "GSM8K, published", lambda all: 5.04),
    ("published-t0", ("MathInstruct", "single:math"), "SVAMP, published", lambda all: 4.81),
    ("published-t0", ("MathInstruct", "single:math"), "GSM8K, here", lambda all: all.tau("single:math")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("table", "row", "column", "expected"), CELLS, ids=lambda part: None if callable(part) else str(part)[:40]
)
def test_a_cell_is_what_the_lines_say(
    tables: dict[str, list[dict[str, str]]],
    lines: Lines,
    table: str,
    row: tuple[str, ...],
    column: str,
    expected: Expected,
) -> None:
    name = "-".join([*table.split("-")[:-1], "eagle-2", table.split("-")[-1]])
    found = [one for one in tables[name] if tuple(one.values())[: len(row)] == row]
    assert len(found) == 1
    assert float(found[0][column]) == pytest.approx(expected(lines), abs=1e-5)


def test_routing_is_counted_seed_by_seed(tmp_path: Path) -> None:
    """Of both drafter seeds, where everything was run with both: with these a majority over the two is another one."""
    variants = {name: VARIANTS[name] for name in ("plain", *SINGLES, "entropy")}
    for seed, label in zip((0, 4), BOTH, strict=True):
        write_results(tmp_path / label, "EAGLE-2", seed=seed, variants=variants, temperatures=(0.0,))
    tables, lines = read_tables(tmp_path), Lines(tmp_path)
    by_signal = {row["signal"]: float(row["GSM8K"]) for row in tables["signal-routing-math-chat-eagle-2-t0"]}
    assert by_signal["higher mean confidence"] == pytest.approx(lines.hits("confidence", 1, BOTH), abs=1e-5)
    assert by_signal["lower mean entropy"] == pytest.approx(lines.hits("entropy", -1, BOTH), abs=1e-5)
    assert by_signal["one fixed drafter"] == pytest.approx(lines.fixed(BOTH), abs=1e-5)
    right = lines.majority_is_right("entropy", BOTH)
    assert by_signal["majority of entropy, routed"] == pytest.approx(right, abs=1e-5)


AVERAGES = {  # that the paper prints behind each row
    0.0: {"eagle": (4.42, 3.70, 4.02, 4.48, 2.42, 4.63, 5.02), "hass": (4.10, 4.12, 4.47, 5.18, 2.59, 4.80, 5.11)},
    1.0: {"eagle": (4.07, 3.54, 3.81, 3.26, 2.34, 4.27, 4.57), "hass": (3.54, 3.77, 4.29, 3.69, 2.62, 4.37, 4.75)},
}


@pytest.mark.parametrize("temperature", AVERAGES)
def test_published_rows_have_the_averages_that_the_paper_prints(temperature: float) -> None:
    for name, rows in (("eagle", published.EAGLE_2), ("hass", published.HASS)):
        means = [np.mean(row) for row in rows[temperature].values()]
        assert means == pytest.approx(
            AVERAGES[temperature][name], abs=0.013
        )  # one average there is 5.02 where its row's is 5.0325


@pytest.mark.parametrize(
    ("label", "rows"),
    [("EAGLE-2", published.EAGLE_2), ("eagle2, again", published.EAGLE_2), ("HASS", published.HASS),
     ("hass-1", published.HASS), ("EAGLE-3", {}), ("EAGLE", {}), ("EAGLE-20", {}), ("mine", {})],
)  # fmt: skip
def test_published_rows_are_of_the_method_that_a_label_names(label: str, rows: Any) -> None:
    assert published.of_label(label, 0.0) == rows.get(0.0, {})


def test_signals_are_oriented_so_that_more_is_better(tables: dict[str, list[dict[str, str]]]) -> None:
    """Made-up accepted nodes have the higher confidence and the lower entropy, nearly always, of one seed or of two."""
    for row in tables["signals-eagle-2-t0"]:
        assert float(row["confidence: accepted"]) > float(row["confidence: rejected"])
        assert float(row["entropy: accepted"]) < float(row["entropy: rejected"])
        for name in ("confidence", "entropy"):
            assert float(row[f"{name}: AUC"]) > 0.85
            assert float(row[f"{name}: AUC within questions"]) == pytest.approx(float(row[f"{name}: AUC"]), abs=0.02)


def test_signals_above_temperature_0_are_of_top_k_runs_and_others_are_marked(
    tables: dict[str, list[dict[str, str]]], results: Path
) -> None:
    assert {row["variant"] for row in tables["signals-eagle-2-t1"]} == {"single:math,topk", "single:chat (coupled)"}
    assert {row["variant"] for row in tables["signals-eagle-2-t0"]} == {"single:math", "single:chat"}
    found = [table for section in sections(*signals.add(counts.read([results]))) for table in section.tables]
    notes = {table.name: table.note for table in found}
    assert "of the noised distribution, not the paper's signal" in notes["signals-eagle-2-t1"]
    assert notes["signals-eagle-2-t0"] == "" and "noised" in notes["signal-routing-math-chat-eagle-2-t1"]


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_share_of_pairs_in_order_with_ties_half(seed: int) -> None:
    random = np.random.default_rng(seed)
    high, low = random.integers(0, 20, size=12), random.integers(0, 50, size=12)
    first, second = (np.repeat(np.arange(12), part) for part in (high, low))
    order = np.sign(first[:, None] - second[None, :])
    assert signals.auc(high, low) == pytest.approx(((order + 1) / 2).mean(), abs=1e-12)
    assert signals.auc(high, low) + signals.auc(low, high) == pytest.approx(1.0, abs=1e-12)
    assert np.isnan(signals.auc(high, np.zeros(12)))


def test_variants_are_compared_with_drafters_that_draft_as_they_do(tmp_path: Path) -> None:
    variants = {**VARIANTS, "single:chat,topk": variant("single", ("chat",), drafting="topk")}
    folder = write_results(tmp_path / "results", variants=variants, temperatures=(1.0,))
    (view,) = counts.views(counts.read([folder]))
    found = {one.words: {(one.one, one.other(task)) for task in view.tasks} for one in comparisons.comparisons(view)}
    assert {other for _, other in found["average vs worst specialist"]} == {"single:math,topk", "single:chat,topk"}
    assert {other for _, other in found["evidence vs best specialist"]} == {"single:math", "single:chat"}
    for one, other in (pair for pairs in found.values() for pair in pairs):
        if view.specs[one].composition != view.specs[other].composition:
            assert drafting.is_coupled(view, one) == drafting.is_coupled(view, other), (one, other)


def test_published_figures_stand_beside_the_row_that_does_the_same(tables: dict[str, list[dict[str, str]]]) -> None:
    rows = {row["published row"]: row for row in tables["published-eagle-2-t1"]}
    assert rows["MathInstruct"]["row here"] == "single:math,topk"  # the paper drafts top-k
    assert rows["Merged trees"]["row here"] == "merged (coupled)" and rows["Averaged"]["row here"] == "average"
    assert float(rows["ShareGPT"]["MT_BENCH, published"]) == 3.38
    assert published.SOURCE in published.TEXT


def test_a_report_of_its_own_json_is_the_same_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The histograms of signals come from signals.json beside it; a second run joins them from its lines."""
    write_results(tmp_path / "one", "one", tasks={"gsm8k": 4}, temperatures=(0.0,))
    again, first = tmp_path / "again", tmp_path / "first"
    other = write_results(tmp_path / "other", "two", tasks={"gsm8k": 4}, temperatures=(0.0,))
    for given, output in (([tmp_path / "one"], first), ([first / "report.json"], again)):
        monkeypatch.setattr(sys, "argv", ["paper", *map(str, given), "-o", str(output)])
        main()
    names = sorted(str(path.relative_to(first)) for path in first.rglob("*") if path.is_file())
    assert "signals.json" in names and "tables/signals-one-t0.csv" in names
    assert not [name for name in names if (first / name).read_bytes() != (again / name).read_bytes()]
    results, histograms = signals.add(counts.read([first / "report.json", other]))
    alone = signals.add(counts.read([other]))[1]
    assert {key[0] for key in histograms} == {0, 1}
    assert all((histograms[1, *key[1:]][name] == bins[name]).all() for key, bins in alone.items() for name in bins)
    sections(results, histograms)


@pytest.mark.parametrize("label", ["HASS", pytest.param("EAGLE-2", marks=pytest.mark.long)])
def test_the_published_tables_are_those_of_their_json(label: str) -> None:
    """Whoever changes what a table holds makes the published report again."""
    results, histograms = signals.add(counts.read([PUBLISHED / "report.json"]))
    results = replace(results, questions=results.questions[results.questions["label"] == label])
    found = [table for section in sections(results, histograms) for table in section.tables]
    kept = {path.stem: path.read_text(encoding="utf-8") for path in (PUBLISHED / "tables").glob("*.csv")}
    names = {name for name in kept if f"-{label.lower()}-t" in name} | {"provenance", "variants"}
    assert {table.name: table.csv for table in found} == {name: kept[name] for name in names}


def test_every_interval_of_the_findings_is_in_a_published_table() -> None:
    interval = re.compile(r"(?<= )\S+ \(\S+ to \S+\)")
    told, known = (
        interval.findall(" ".join((PUBLISHED / name).read_text(encoding="utf-8").split()))
        for name in ("findings.md", "report.md")
    )
    assert len(told) > 200 and not set(told) - set(known)
