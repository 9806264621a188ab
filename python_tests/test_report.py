"""The report: every number follows from the lines, wherever it stands, and nothing is written half."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_cases
from report_cases import DRAFTERS, SETTINGS, TASKS, VARIANTS, answer, read_tables, write_results
from scipy.stats import bootstrap

from taps_ext import cli
from taps_ext.evaluation import counts, figures, report
from taps_ext.evaluation.counts import View
from taps_ext.evaluation.figures import Table

FEW = {name: VARIANTS[name] for name in ("plain", "single:math", "single:chat")}
Tables = dict[str, list[dict[str, str]]]
DOCS = Path(__file__).parents[1] / "docs" / "evaluation.md"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two drafter seeds at temperature 0, of which the second has singles only; one at 1; another method."""
    folder = tmp_path_factory.mktemp("results")
    write_results(folder / "seed0", "EAGLE-2", seed=0)
    write_results(folder / "seed1", "EAGLE-2", seed=1, variants=FEW, temperatures=(0.0,))
    write_results(folder / "hass", "HASS", seed=2, variants=FEW, temperatures=(0.0,))
    return folder


@pytest.fixture(scope="module")
def tables(results: Path) -> Tables:
    """The tables of `results`, as their CSV files hold them."""
    return read_tables(results)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every section, on two tasks."""
    folder = tmp_path_factory.mktemp("report")
    results = write_results(folder / "results", tasks={"gsm8k": 6, "svamp": 5}, temperatures=(0.0,))
    _report(results, folder / "report")
    return folder / "report"


def _report(*arguments: object) -> None:
    *results, output = map(str, arguments)
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", *results, "-o", output])
    assert stop.value.code == 0


def _refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a refused report says; it must leave its output as it was."""
    *results, output = map(str, arguments)
    before = sorted(Path(output).rglob("*")) if Path(output).is_dir() else Path(output).exists()
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", *results, "-o", output])
    assert stop.value.code == 2
    assert before == (sorted(Path(output).rglob("*")) if Path(output).is_dir() else Path(output).exists())
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("**/answers-*.jsonl")):
        yield from map(json.loads, path.read_text().splitlines())


def _view(folder: Path, temperature: float = 0.0, label: str = "EAGLE-2") -> View:
    seen = counts.views(counts.read([folder]))
    return next(view for view in seen if (view.label, view.temperature) == (label, temperature))


def _row(rows: list[dict[str, str]], variant: str, **more: str) -> dict[str, str]:
    wanted = {"variant": variant, **more}
    return next(row for row in rows if wanted.items() <= row.items())


def _accepted(folder: Path, variant: str, task: str) -> dict[str, list[int]]:
    """By question the accepted draft tokens of every step at temperature 0."""
    found: dict[str, list[int]] = {}
    for line in _lines(folder):
        if (line["variant"], line["task"], line["temperature"]) == (variant, task, 0.0):
            steps = [count for turn in line["turns"] for count in turn["num_accepted"]]
            found.setdefault(line["question_id"], []).extend(steps)
    return found


def _steps(by_question: dict[str, list[int]]) -> list[int]:
    return [count for steps in by_question.values() for count in steps]


# ---- figures


def test_the_script_of_the_docs_makes_the_main_table_from_the_lines(
    results: Path, tables: Tables, tmp_path: Path
) -> None:
    script = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert script is not None and len(script[1].strip().splitlines()) <= 26
    folder = Path(shutil.copytree(results, tmp_path / "results"))
    with (folder / "hass" / "answers-0.jsonl").open("a") as file:
        file.write('{"variant":')  # as a killed run leaves it
    told = {
        temperature: subprocess.run(
            [sys.executable, "-c", script[1], str(folder), str(temperature)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for temperature in (0, 1)
    }
    for label, temperature in (("HASS", 0), ("EAGLE-2", 0), ("EAGLE-2", 1)):
        name = f"{label.lower()}-t{temperature}"
        lengths, speeds = tables[f"acceptance-{name}"], tables[f"tokens-per-second-{name}"]
        by_variant = {row["variant"]: row for row in lengths}, {row["variant"]: row for row in speeds}
        printed = [line.split("\t")[1:] for line in told[temperature].splitlines() if line.split("\t")[0] == label]
        for row, task, length, speed in printed:
            assert float(by_variant[1][row][task.upper()]) == pytest.approx(float(speed), abs=0.01)
            if row != "plain":
                assert float(by_variant[0][row][task.upper()]) == pytest.approx(float(length), abs=1e-4)
        assert len(printed) == 3 * len(speeds)


def test_intervals_are_scipys_percentile_bootstrap_of_the_questions(results: Path, tables: Tables) -> None:
    """Of the ratio of sums, and of the difference of two such ratios, paired by question."""
    one, other = (_accepted(results / "seed0", name, "gsm8k") for name in ("merged@60", "merged"))
    assert list(one) == list(other)
    sums = [np.array([f(steps) for steps in part.values()], dtype=float) for part in (one, other) for f in (sum, len)]
    settings: dict[str, Any] = {"paired": True, "method": "percentile", "n_resamples": 2000, "vectorized": True}

    def length(accepted: Any, steps: Any, axis: int = -1) -> Any:
        return 1 + accepted.sum(axis) / steps.sum(axis)

    def gap(first: Any, second: Any, third: Any, fourth: Any, axis: int = -1) -> Any:
        return length(first, second, axis) - length(third, fourth, axis)

    row = _row(tables["acceptance-eagle-2-t0"], "merged@60")
    found = figures.difference(_view(results), "merged@60", "merged", "gsm8k")
    assert found is not None
    ends = [(float(row["GSM8K low"]), float(row["GSM8K high"])), found.interval]
    for statistic, parts, (low, high) in zip((length, gap), (sums[:2], sums), ends, strict=True):
        expected = bootstrap(parts, statistic, rng=np.random.default_rng(1), **settings).confidence_interval
        width = expected.high - expected.low
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.1 * width)  # other draws
        assert 0.8 * width < high - low < 1.2 * width


def test_a_paired_difference_knows_that_hard_questions_are_hard_for_both() -> None:
    random = np.random.default_rng(2)
    hardness, ones = random.normal(3.0, 1.0, size=50), np.ones(50)
    one, other = (hardness + random.normal(shift, 0.05, size=50) for shift in (0.1, 0.0))
    paired, alone = figures.ratio("gsm8k", one, ones, other, ones), figures.ratio("gsm8k", one, ones)
    assert paired is not None and alone is not None
    (low, high), (least, most) = paired.interval, alone.interval
    assert 0.05 < low < high < 0.15 and most - least > 10 * (high - low)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """95% asked; 200 trials of 60 questions deviate by 1.5%, and the bootstrap holds a little less."""
    random = np.random.default_rng(1)
    found = [figures.ratio("gsm8k", random.gamma(2.0, 1.0, size=60), np.ones(60)) for _ in range(200)]
    held = np.mean([low <= 2.0 <= high for low, high in (one.interval for one in found if one is not None)])
    assert 0.89 <= held <= 0.985


def test_the_mean_over_tasks_counts_each_task_the_same_and_resamples_within_tasks() -> None:
    small, large = figures.ratio("a", np.ones(4), np.ones(4)), figures.ratio("b", np.arange(1.0, 101), np.ones(100))
    both = figures.mean_over([small, large])
    assert small is not None and large is not None
    assert both.value == pytest.approx((1 + 50.5) / 2)
    assert both.samples == pytest.approx((small.samples + large.samples) / 2)
    assert figures.mean_over([small, None]) is None and figures.mean_over([2.0, 4.0]) == 3.0


def test_a_figure_without_a_value_is_none_and_one_question_has_no_interval() -> None:
    assert figures.ratio("a", np.zeros(3), np.zeros(3)) is None and figures.ratio("a", [], []) is None
    one = figures.ratio("a", np.array([3.0]), np.array([2.0]))
    assert one is not None and one.value == 1.5 and np.isnan(one.interval).all()


def test_macro_is_the_mean_of_the_questions_own_lengths(results: Path, tables: Tables) -> None:
    own = [
        1 + np.mean([count for turn in line["turns"] for count in turn["num_accepted"]])
        for line in _lines(results / "hass")
        if (line["variant"], line["task"]) == ("single:chat", "mt_bench")
    ]
    row = next(row for row in tables["acceptance-macro-hass-t0"] if row["variant"] == "single:chat")
    assert float(row["MT_BENCH"]) == pytest.approx(np.mean(own), abs=1e-5)


def test_forwards_a_token_count_each_turns_prefill(results: Path, tables: Tables) -> None:
    lines = [
        line for line in _lines(results / "hass") if (line["variant"], line["task"]) == ("single:chat", "mt_bench")
    ]
    turns = [turn for line in lines for turn in line["turns"]]
    assert len(turns) == 2 * len(lines)
    forwards = sum(1 + len(turn["num_accepted"]) for turn in turns) / sum(len(turn["tokens"]) for turn in turns)
    row = next(row for row in tables["forwards-hass-t0"] if row["variant"] == "single:chat")
    assert float(row["MT_BENCH"]) == pytest.approx(forwards, abs=1e-5)


def test_replicates_are_pooled_by_question_and_their_range_is_told(results: Path, tables: Tables) -> None:
    row = next(row for row in tables["acceptance-eagle-2-t0"] if row["variant"] == "single:math")
    assert row["drafter seeds"] == "2"
    chosen = [
        (folder, [count for turn in line["turns"] for count in turn["num_accepted"]])
        for folder in ("seed0", "seed1")
        for line in _lines(results / folder)
        if (line["variant"], line["task"], line["temperature"]) == ("single:math", "gsm8k", 0.0)
    ]
    pooled = [count for _, counts in chosen for count in counts]
    assert float(row["GSM8K"]) == pytest.approx(1 + np.mean(pooled), abs=1e-5)
    merged = next(row for row in tables["acceptance-eagle-2-t0"] if row["variant"] == "merged")
    assert merged["drafter seeds"] == "1" and merged["range over seeds"] == ""
    low, high = map(float, row["range over seeds"].split(" to "))
    assert low < float(row["mean over tasks"]) < high


def test_differences_are_over_the_same_questions_and_drafter_seeds(results: Path, tables: Tables) -> None:
    """The second drafter seed has singles only; merged trees are compared with those of the first."""
    singles = {name: _accepted(results / "seed0", name, "gsm8k") for name in ("single:math", "single:chat")}
    merged = np.mean(_steps(_accepted(results / "seed0", "merged", "gsm8k")))
    best = max(np.mean(_steps(steps)) for steps in singles.values())
    row = _row(tables["against-best-single-eagle-2-t0"], "merged")
    assert float(row["GSM8K"]) == pytest.approx(merged - best, abs=1e-5)
    itself = figures.difference(_view(results), "merged", "merged", "gsm8k")
    assert itself is not None and (itself.samples == 0).all()


def test_a_variant_with_fewer_questions_is_compared_on_those_and_the_note_names_it(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "results", variants=FEW, tasks={"gsm8k": 12}, temperatures=(0.0,))
    for path in folder.glob("answers-*.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if not ("single:chat" in line and '"gsm8k-11"' in line)))
    cells = _view(folder, label="").aligned(["single:math", "single:chat"], "gsm8k")
    assert cells is not None and all(len(cell) == 11 and "gsm8k-11" not in cell.index for cell in cells)
    tables = [table for section in report.sections(counts.read([folder])) for table in section.tables]
    note = next(table.note for table in tables if table.name == "acceptance-t0")
    assert note.endswith("Incomplete: GSM8K, fewest 11 of 12 (single:chat).")


def test_a_torn_line_is_left_out_and_the_order_of_lines_changes_no_figure(tmp_path: Path) -> None:
    one = write_results(tmp_path / "one", variants=FEW, temperatures=(0.0,))
    other = write_results(tmp_path / "other", variants=FEW, temperatures=(0.0,))
    texts = [line for path in sorted(other.glob("*.jsonl")) for line in path.read_text().splitlines(keepends=True)]
    for path in other.glob("*.jsonl"):
        path.unlink()
    (other / "answers-0.jsonl").write_text("".join(reversed(texts)) + texts[0][:-40])
    found = [_row(read_tables(folder)["acceptance-t0"], "single:math")["GSM8K"] for folder in (one, other)]
    assert found[0] == found[1]


def test_acceptance_by_depth_is_conditional() -> None:
    steps = [20.0, 30.0, 0.0, 50.0]  # 100 steps: 80 accept one token or more, 50 two, and these three
    assert report.conditional(steps) == pytest.approx([0.8, 50 / 80, 1.0])
    assert report.conditional([90.0, 5.0, 5.0]) == [0.1, None]  # 10 steps are too few to say
    assert report.conditional([50.0, 30.0, 40.0, 0, 0]) == pytest.approx([70 / 120, 40 / 70, 0.0, None])


def test_acceptance_by_depth_is_counted_from_the_steps(results: Path, tables: Tables) -> None:
    steps = _steps(_accepted(results / "hass", "single:chat", "mt_bench"))
    reached = [sum(count >= depth for count in steps) for depth in range(7)]
    row = _row(tables["depth-hass-t0"], "single:chat", task="MT_BENCH")
    for depth in range(1, 7):
        share = reached[depth] / reached[depth - 1] if reached[depth - 1] >= 20 else None
        assert row[f"depth {depth}"] == "" if share is None else float(row[f"depth {depth}"]) == pytest.approx(share)


def test_merging_counts_proposers_and_the_nodes_it_saved(results: Path, tables: Tables) -> None:
    masks = [
        mask
        for line in _lines(results / "seed0")
        if (line["variant"], line["task"], line["temperature"]) == ("merged@60", "svamp", 0.0)
        for turn in line["turns"]
        for step in turn["proposers"]
        for mask in step
    ]
    rows = tables["merging-eagle-2-t0"]
    row = next(row for row in rows if (row["variant"], row["task"]) == ("merged@60", "SVAMP"))
    for bit, name in enumerate(DRAFTERS):
        assert float(row[f"{name} alone"]) == pytest.approx(masks.count(1 << bit) / len(masks), abs=1e-5)
    assert float(row["several"]) == pytest.approx(masks.count(3) / len(masks), abs=1e-5)
    assert float(row["nodes saved per step"]) == pytest.approx(15)  # 74 proposed, 59 kept beside the root
    assert float(row["share saved"]) == pytest.approx(15 / 74, abs=1e-5)


def test_routing_counts_the_steps_of_each_drafter(results: Path, tables: Tables) -> None:
    steps = [
        name
        for line in _lines(results / "seed0")
        if (line["variant"], line["task"], line["temperature"]) == ("entropy", "gsm8k", 0.0)
        for turn in line["turns"]
        for name in turn["chosen"]
    ]
    row = _row(tables["routing-eagle-2-t0"], "entropy", task="GSM8K")
    assert float(row["math"]) == pytest.approx(steps.count("math") / len(steps), abs=1e-5)
    assert float(row["math"]) + float(row["chat"]) == pytest.approx(1)
    assert {row["variant"] for row in tables["routing-eagle-2-t0"]} == {"confidence", "entropy", "evidence"}


def test_texts_and_answers_are_counted_by_turn(results: Path, tables: Tables) -> None:
    turns = [
        turn
        for folder in ("seed0", "seed1")
        for line in _lines(results / folder)
        if (line["variant"], line["task"], line["temperature"]) == ("single:math", "gsm8k", 0.0)
        for turn in line["turns"]
    ]
    for name, field in (("equal-to-plain", "equals_plain"), ("accuracy", "is_right")):
        row = _row(tables[f"{name}-eagle-2-t0"], "single:math")
        assert float(row["GSM8K"]) == pytest.approx(np.mean([turn[field] for turn in turns]), abs=1e-5)
    assert "MT_BENCH" not in tables["accuracy-eagle-2-t0"][0]  # has no references


def test_speed_is_over_plain_decoding_of_the_same_runs(tmp_path: Path) -> None:
    """More variants of the same drafters in another run, made when the machine was seven times slower."""
    chosen = {name: {kept: VARIANTS[kept] for kept in ("plain", name)} for name in ("single:math", "single:chat")}
    rates = {}
    for name, variants in chosen.items():
        folder = write_results(tmp_path / name, variants=variants, tasks={"gsm8k": 6}, temperatures=(0.0,))
        for path in folder.glob("answers-*.jsonl"):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            for line in lines if name == "single:chat" else ():
                line["choices"][0]["wall_time"] = [7 * seconds for seconds in line["choices"][0]["wall_time"]]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        for variant in ("plain", name):
            lines = [line for line in _lines(folder) if line["variant"] == variant]
            tokens = sum(line["choices"][0]["new_tokens"][0] for line in lines)
            rates[name, variant] = tokens / sum(line["choices"][0]["wall_time"][0] / line["rows"] for line in lines)
    view, tables = _view(tmp_path, label=""), read_tables(tmp_path)
    assert view.seeds("plain", "gsm8k") == [0] == view.seeds("single:chat", "gsm8k")
    for name in chosen:
        ratio = rates[name, name] / rates[name, "plain"]
        assert float(_row(tables["speed-up-t0"], name)["GSM8K"]) == pytest.approx(ratio, rel=1e-5)
    best = max(chosen, key=lambda name: rates[name, name] / rates[name, "plain"])
    own, plain = rates[best, best], rates[best, "plain"]
    said = f"T = 0: {best} is the fastest: {own / plain:.2f} times plain decoding's tokens per second"
    first, last = report.answers(counts.read([tmp_path]))
    assert first.startswith(f"{said} ({own:.1f} against {plain:.1f})") and "of 12 turns equal" in last


def test_figures_that_a_clock_made_have_no_interval(tables: Tables) -> None:
    for name in ("speed-up", "tokens-per-second", "forwards"):
        assert set(tables[f"{name}-eagle-2-t0"][0]) == {"variant", "GSM8K", "MT_BENCH", "SVAMP", "mean over tasks"}


def test_the_same_drafters_are_one_seed_whatever_else_was_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that adds the drafter `half` is of the seed of math and chat, and may not answer for them again."""
    one = write_results(tmp_path / "one", variants=FEW, tasks={"gsm8k": 3}, temperatures=(0.0,))
    more = {"plain": FEW["plain"], "single:half": report_cases.variant("single", ("half",))}
    other = write_results(tmp_path / "other", variants=more, tasks={"gsm8k": 3}, temperatures=(0.0,))
    run = json.loads((other / "run.json").read_text())
    run["drafters"]["half"] = {"name": "half", "sha256": "half"}
    (other / "run.json").write_text(json.dumps(run))
    view = _view(tmp_path, label="")
    assert view.seeds("single:half", "gsm8k") == [0] == view.seeds("single:math", "gsm8k")
    assert figures.difference(view, "single:half", "single:math", "gsm8k") is not None
    third = Path(shutil.copytree(one, tmp_path / "third"))
    run["variants"] = FEW
    (third / "run.json").write_text(json.dumps(run))
    assert "answer question 'gsm8k-" in _refusal(capsys, one, third, tmp_path / "report")


# ---- tables and the page


def test_csv_json_and_markdown_hold_the_same_figures(written: Path) -> None:
    """Markdown rounds what the CSV files and report.json hold to six digits."""
    saved = {table["name"]: table for table in json.loads((written / "report.json").read_text())["tables"]}
    page = (written / "report.md").read_text()
    names = {path.stem for path in (written / "tables").iterdir()}
    assert names == saved.keys() and len(names) == 13
    for name in names:
        rows = report_cases.read_csv(written / "tables" / f"{name}.csv")
        texts = [["" if value is None else str(value) for value in row.values()] for row in saved[name]["rows"]]
        assert [list(row.values()) for row in rows] == texts, name
    for row in saved["acceptance-t0"]["rows"]:
        low, high = row["GSM8K low"], row["GSM8K high"]
        assert f"| {row['GSM8K']:.2f} ({low:.2f} to {high:.2f}) |" in page
    heads, row = saved["depth-t0"]["rows"][0].keys(), saved["depth-t0"]["rows"][0]
    cells = [f"{row[head]:.1%}" if isinstance(row[head], float) else row[head] or "\u2013" for head in heads]
    assert f"| {' | '.join(cells)} |" in page


def test_a_table_writes_signs_intervals_and_nothing() -> None:
    rows = [{"a|b": "x<y", "length": 2.0, "length low": 1.5, "length high": 2.5,
             "gap": -0.01, "gap low": -0.02, "gap high": 0.0001}, {"a|b": "z", "length": 3.0}]  # fmt: skip
    table = Table.of("name", "Title", "Note.", rows, {"a|b": "", "length": ".2f", "gap": "+.1%"})
    lines = table.markdown.splitlines()
    assert lines[:5] == ["### Title", "", "Note.", "", "| a\\|b | length | gap |"]
    assert lines[6:] == ["| x<y | 2.00 (1.50 to 2.50) | \u22121.0% (\u22122.0 to 0.0) |", "| z | 3.00 | \u2013 |"]
    assert table.csv.splitlines() == ["a|b,length,length low,length high,gap,gap low,gap high",
                                      "x<y,2.0,1.5,2.5,-0.01,-0.02,0.0001", "z,3.0,,,,,"]  # fmt: skip


def test_an_interval_without_0_does_not_end_in_one() -> None:
    ends = ((0.01, 0.001, 0.03), (-0.01, -0.03, -0.0004), (0.01, -0.001, 0.03))
    rows = [{"gap": value, "gap low": low, "gap high": high} for value, low, high in ends]
    text = Table.of("name", "", "", rows, {"gap": "+.2f"}).markdown
    assert "+0.010 (+0.001 to +0.030)" in text and "+0.01 (0.00 to +0.03)" in text
    assert "\u22120.0100 (\u22120.0300 to \u22120.0004)" in text


def test_the_page_begins_with_seconds_and_asks_the_network_for_nothing(written: Path) -> None:
    page = (written / "index.html").read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == ["Seconds", "Acceptance length", "Acceptance by depth", "Routing and proposers", "Losslessness",
                      "Provenance"]  # fmt: skip
    answer = re.search(r"<li>(.*?)</li>", page)
    assert answer is not None and "times plain decoding&#39;s tokens per second" in answer[1]
    assert page.index(answer[0]) < page.index("<h2>") < page.index("Speed-up over plain decoding: T = 0")
    asked = re.findall(r'(?:src|href|action|srcset)="([^"]*)"|url\(([^)]*)\)|@import', page)
    assert all(target.startswith(("#", "data:")) for pair in asked for target in pair if target)
    assert "<script" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {target[1:] for pair in asked for target in pair if target.startswith("#")} <= set(ids)
    assert page.count("<img ") == len(list((written / "pictures").glob("*.png"))) == 5
    assert page.count("<table>") == 13


def test_what_stands_in_a_name_is_no_markup(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "results", "<b>&", variants=FEW, tasks={"gsm8k": 3}, temperatures=(0.0,))
    results = counts.read([folder])
    page = report.make(results, report.sections(results))["index.html"].decode()
    assert "&lt;b&gt;&amp;" in page and "<b>" not in page


def test_a_section_is_there_only_where_the_results_have_what_it_needs(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "few", variants=FEW, temperatures=(0.0,))
    titles = [section.title for section in report.sections(counts.read([folder]))]
    assert "Routing and proposers" not in titles and titles[0] == "Seconds"


# ---- files


def test_a_report_of_its_own_json_is_the_same_byte_for_byte(written: Path, tmp_path: Path) -> None:
    _report(written / "report.json", tmp_path / "again")
    names = sorted(str(path.relative_to(written)) for path in written.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(tmp_path / "again")) for path in (tmp_path / "again").rglob("*.*"))
    assert not [name for name in names if (written / name).read_bytes() != (tmp_path / "again" / name).read_bytes()]


def test_report_json_keeps_every_count(results: Path, tmp_path: Path) -> None:
    read = counts.read([results])
    (tmp_path / "report.json").write_text(counts.to_json(read, []))
    again = counts.read([tmp_path / "report.json"])
    assert counts.to_json(again, []) == counts.to_json(read, [])
    assert len(read.questions) == 3 * sum(TASKS.values()) * 2 + (2 * len(VARIANTS) - 1) * sum(TASKS.values())


def test_results_that_cannot_be_reported_are_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report"
    (tmp_path / "empty").mkdir()
    assert "does not exist" in _refusal(capsys, tmp_path / "nowhere", output)
    assert "holds no results" in _refusal(capsys, tmp_path / "empty", output)
    folder = write_results(tmp_path / "results", variants=FEW, temperatures=(0.0,))
    answers = folder / "answers-0.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    for broken, said in (
        ("not json\n", "answers-0.jsonl, line 3: no answer"),
        (
            lines[0].replace('"turns"', '"turn"'),
            "'gsm8k-0' of gsm8k was not written by taps-ext evaluate: 'turns' is missing",
        ),
        (lines[0].replace('"single:math"', '"unknown"').replace('"plain"', '"unknown"'), "no variant 'unknown'"),
        ("[]\n", "line 3: no answer"),
    ):
        answers.write_text("".join([*lines[:2], broken, *lines[2:]]))
        assert said in _refusal(capsys, folder, output)
    answers.unlink()
    (folder / "answers-1.jsonl").write_text("")
    assert "no answers yet" in _refusal(capsys, folder, output)
    run = json.loads((folder / "run.json").read_text())
    del run["settings"]
    (folder / "run.json").write_text(json.dumps(run))
    assert "run.json lacks settings" in _refusal(capsys, folder, output)
    (folder / "run.json").write_text("{")
    assert "run.json is not the JSON object" in _refusal(capsys, folder, output)


def test_a_report_json_of_another_kind_or_version_is_refused(
    tmp_path: Path, written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, output = tmp_path / "report.json", tmp_path / "report"
    text = (written / "report.json").read_text()
    other.write_text(text.replace('"version": 2', '"version": 7'))
    assert "has version 7 of its format, and this taps_ext reads version 2" in _refusal(capsys, other, output)
    other.write_text("{}")
    assert "is not a report.json of taps-ext" in _refusal(capsys, other, output)
    other.write_text(text.replace('"turns": [1, ', '"turns": [', 1))
    assert "is damaged" in _refusal(capsys, other, output)


def test_an_output_that_is_no_report_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_results(tmp_path / "results", variants=FEW, tasks={"gsm8k": 3}, temperatures=(0.0,))
    (tmp_path / "file").write_text("mine")
    assert "is a file" in _refusal(capsys, folder, tmp_path / "file")
    (tmp_path / "own" / "tables").mkdir(parents=True)
    refusal = f"{tmp_path / 'own' / 'tables'} was not written by `taps-ext report`; choose another --output directory"
    assert refusal in _refusal(capsys, folder, tmp_path / "own")


def test_a_report_replaces_a_report_and_nothing_else(written: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(written, tmp_path / "report"))
    (output / "findings.md").write_text("mine")
    (output / "tables" / "old.csv").write_text("stale")
    _report(written / "report.json", output)
    assert (output / "findings.md").read_text() == "mine" and not (output / "tables" / "old.csv").exists()
    assert sorted(path.name for path in output.iterdir()) == sorted([*report.PARTS, "findings.md"])


def test_runs_that_asked_something_else_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_results(tmp_path / "one", variants=FEW, tasks={"gsm8k": 3}, temperatures=(0.0,))
    deep = {**SETTINGS, "depth": 8}
    other = write_results(tmp_path / "other", seed=1, variants=FEW, tasks={"gsm8k": 3}, settings=deep)
    assert "differ in settings.depth (6 and 8)" in _refusal(capsys, one, other, tmp_path / "report")
    run = json.loads((one / "run.json").read_text())
    run["tasks"]["gsm8k"] |= {"sha256": "other", "num_questions": 4}
    run["drafters"]["math"]["sha256"] = "of another seed"
    asked = Path(shutil.copytree(one, tmp_path / "asked"))
    (asked / "run.json").write_text(json.dumps(run))
    assert "differ in the questions of gsm8k (3 of checksum gsm8k and 4" in _refusal(
        capsys, one, asked, tmp_path / "report"
    )
    dotted, dashed = (
        write_results(tmp_path / label, label, variants=FEW, tasks={"gsm8k": 3}) for label in ("a.b", "a-b")
    )
    assert "would have the same file names" in _refusal(capsys, dotted, dashed, tmp_path / "report")
    assert "answer question 'gsm8k-" in _refusal(capsys, one, one, tmp_path / "report")


def test_a_folder_of_results_may_hold_others(tmp_path: Path) -> None:
    write_results(tmp_path / "results", "one", variants=FEW, tasks={"gsm8k": 3}, temperatures=(0.0,))
    write_results(tmp_path / "results" / "seed0", "other", variants=FEW, tasks={"gsm8k": 3}, temperatures=(0.0,))
    assert [run["label"] for run in counts.read([tmp_path / "results"]).runs] == ["one", "other"]


@pytest.mark.parametrize("case", ["one question", "plain alone", "plain so far at 1", "no decode step"])
def test_results_with_little_to_draw_make_a_report(tmp_path: Path, case: str) -> None:
    variants = {"plain": VARIANTS["plain"]} if case == "plain alone" else VARIANTS
    temperatures = (0.0, 1.0) if case == "plain so far at 1" else (0.0,)
    folder = write_results(tmp_path / "results", variants=variants, tasks={"gsm8k": 1}, temperatures=temperatures)
    for path in folder.glob("answers-*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for turn in (turn for line in lines for turn in line["turns"] if case == "no decode step"):
            turn |= {name: [] for name in ("num_accepted", "num_nodes", "num_proposed", "chosen", "proposers")}
        kept = [line for line in lines if line["temperature"] == 0 or line["variant"] == "plain"]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    _report(folder, tmp_path / "report")
    assert not re.search(r"\bnan\b", (tmp_path / "report" / "report.md").read_text())


def test_made_up_lines_have_the_fields_of_real_ones() -> None:
    """So that the other tests are of the runner's format: `record.py` is what it writes."""
    from taps_ext.evaluation import record

    line = answer(np.random.default_rng(0), "merged", VARIANTS["merged"], "gsm8k", 0.0, "gsm8k-0")
    told = str(record.__doc__)
    assert not [name for name in (*line, *line["turns"][0], *line["choices"][0]) if name not in told]


def test_a_run_that_an_installed_package_resumed_is_reported(tmp_path: Path) -> None:
    """Outside a checkout there is no commit."""
    folder = write_results(tmp_path / "results", variants=FEW, temperatures=(0.0,))
    run = json.loads((folder / "run.json").read_text())
    run["provenance"]["resumed"] = [{"date": "2026-01-02", "taps_ext": "0.1.0"}]
    (folder / "run.json").write_text(json.dumps(run))
    facts = {row["fact"]: row["run 1"] for row in read_tables(folder)["provenance"]}
    assert facts["resumed"] == "2026-01-02 at 0.1.0" and facts["target.fingerprint"] == "0" * 12


def test_without_pandas_the_command_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("counts", "figures", "report"):
        monkeypatch.delitem(sys.modules, f"taps_ext.evaluation.{name}")
        monkeypatch.delattr(f"taps_ext.evaluation.{name}")
    monkeypatch.setitem(sys.modules, "pandas", None)
    said = _refusal(capsys, tmp_path, tmp_path / "report")
    assert said == "taps-ext: the report needs pandas: pip install 'taps_ext[cli,eval]'\n"
