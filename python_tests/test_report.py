"""The report: every number follows from the lines, wherever it stands, and nothing is written half."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_cases
from report_cases import DRAFTERS, SETTINGS, TASKS, VARIANTS, answer, read_tables, variant, write_results

from taps_ext import cli
from taps_ext.evaluation.report import files, reading, saved
from taps_ext.evaluation.report.figures import View, tokens_per_second, views
from taps_ext.evaluation.report.page import inline
from taps_ext.evaluation.report.pictures import Line, Panel, Picture, Style, draw, spread
from taps_ext.evaluation.report.sections import Section, paper, sections
from taps_ext.evaluation.report.sections.base import style
from taps_ext.evaluation.report.sections.depth import conditional
from taps_ext.evaluation.report.sections.differences import comparisons
from taps_ext.evaluation.report.statistics import Estimate
from taps_ext.evaluation.report.tables import Column, Table, as_csv, as_html, markdown

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
    """The tables of `results`, as their CSV files say them."""
    return read_tables(results)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every section but the published figures, on one task."""
    folder = tmp_path_factory.mktemp("report")
    results = write_results(folder / "results", tasks={"gsm8k": 6}, temperatures=(0.0,))
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
    seen = views(reading.read([folder]))
    return next(view for view in seen if (view.label, view.temperature) == (label, temperature))


def _section(folder: Path, name: str) -> Section | None:
    found = [one for one in sections(views(reading.read([folder]))) if one.name == name]
    return found[0] if found else None


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


def test_a_report_of_its_own_json_is_the_same_byte_for_byte(report: Path, tmp_path: Path) -> None:
    _report(report / "report.json", tmp_path / "again")
    names = sorted(str(path.relative_to(report)) for path in report.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(tmp_path / "again")) for path in (tmp_path / "again").rglob("*.*"))
    assert not [name for name in names if (report / name).read_bytes() != (tmp_path / "again" / name).read_bytes()]
    tables = [table for one in sections(views(saved.load(report / "report.json"))) for table in one.tables]
    assert len(tables) == len(list((report / "tables").iterdir()))
    assert not [table.name for table in tables if as_csv(table) != (report / f"tables/{table.name}.csv").read_text()]


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


def test_differences_are_over_the_same_questions_and_drafter_seeds(results: Path) -> None:
    view = _view(results)
    found = view.difference("merged", "single:math", "gsm8k")
    cells = {
        name: [
            line
            for line in _lines(results / "seed0")  # the only seed that merged was run with
            if (line["variant"], line["task"], line["temperature"]) == (name, "gsm8k", 0.0)
        ]
        for name in ("merged", "single:math")
    }
    lengths = {
        name: np.mean([count for line in lines for turn in line["turns"] for count in turn["num_accepted"]])
        for name, lines in cells.items()
    }
    assert found is not None and found.value == pytest.approx(lengths["merged"] - lengths["single:math"])
    same = view.difference("merged", "merged", "gsm8k")
    assert same is not None and (same.samples == 0).all()


def test_a_variant_with_fewer_questions_is_compared_on_those_and_said_to_be_incomplete(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "results", variants=FEW, tasks={"gsm8k": 12}, temperatures=(0.0,))
    for path in folder.glob("answers-*.jsonl"):
        kept = [
            line
            for line in path.read_text().splitlines(keepends=True)
            if not ("single:chat" in line and '"gsm8k-11"' in line)
        ]
        path.write_text("".join(kept))
    view = _view(folder, label="")
    cells = view.aligned(["single:math", "single:chat"], "gsm8k")
    assert cells is not None and all(len(cell.ids) == 11 and "gsm8k-11" not in cell.ids for cell in cells)
    assert cells[0].ids == cells[1].ids
    section = _section(folder, "acceptance")
    assert section is not None and "GSM8K, fewest 11 of 12 (single:chat)." in section.tables[0].note


def test_a_torn_line_is_left_out_and_the_order_of_lines_changes_no_figure(tmp_path: Path) -> None:
    one = write_results(tmp_path / "one", variants=FEW, temperatures=(0.0,))
    other = write_results(tmp_path / "other", variants=FEW, temperatures=(0.0,))
    texts = [line for path in sorted(other.glob("*.jsonl")) for line in path.read_text().splitlines(keepends=True)]
    for path in other.glob("*.jsonl"):
        path.unlink()
    (other / "answers-0.jsonl").write_text("".join(reversed(texts)) + texts[0][:-40])
    figures = [_view(folder, label="").value("single:math", "gsm8k", _tau) for folder in (one, other)]
    assert figures[0] is not None and figures[1] is not None and figures[0].value == figures[1].value


def _tau(cell: Any) -> tuple[Any, Any]:
    return cell.num_accepted + cell.num_steps, cell.num_steps


def test_acceptance_by_depth_is_conditional() -> None:
    steps = np.array([20.0, 30.0, 0.0, 50.0])  # 100 steps: 80 accept one node or more, 50 two, and these three
    assert conditional(steps, 3) == pytest.approx([0.8, 50 / 80, 1.0])
    assert conditional(np.array([90.0, 5.0, 5.0]), 2) == [0.1, None]  # 10 steps are too few to say
    assert conditional(np.array([50.0, 30.0, 40.0]), 4) == pytest.approx([70 / 120, 40 / 70, 0.0, None])


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
    assert float(row["nodes saved a step"]) == pytest.approx(15)  # 74 proposed, 59 kept beside the root
    assert float(row["share saved"]) == pytest.approx(15 / 74, abs=1e-5)


def test_routing_is_told_by_step_and_by_majority_and_right_is_the_better_single(results: Path, tables: Tables) -> None:
    lines = [line for line in _lines(results / "seed0") if (line["task"], line["temperature"]) == ("gsm8k", 0.0)]
    chosen = {line["question_id"]: line["turns"][0]["chosen"] for line in lines if line["variant"] == "entropy"}
    lengths = {
        name: {
            line["question_id"]: np.mean(line["turns"][0]["num_accepted"]) for line in lines if line["variant"] == name
        }
        for name in ("single:math", "single:chat")
    }
    steps = [name for names in chosen.values() for name in names]
    ties = {question: np.sign(names.count("math") - names.count("chat")) for question, names in chosen.items()}
    truth = {one: np.sign(lengths["single:math"][one] - lengths["single:chat"][one]) for one in chosen}
    row = next(row for row in tables["routing-eagle-2-t0"] if (row["variant"], row["task"]) == ("entropy", "GSM8K"))
    assert float(row["steps: math"]) == pytest.approx(steps.count("math") / len(steps), abs=1e-5)
    assert float(row["questions: math"]) == pytest.approx(np.mean([(1 + tie) / 2 for tie in ties.values()]), abs=1e-5)
    right = [(1 + ties[one] * truth[one]) / 2 for one in chosen]
    assert float(row["right"]) == pytest.approx(np.mean(right), abs=1e-5)


def test_signals_are_oriented_so_that_more_is_better(tables: Tables) -> None:
    """Made-up accepted nodes have the higher confidence and the lower entropy, nearly always, of one seed or of two."""
    for row in tables["signals-hass-t0"] + tables["signals-eagle-2-t0"]:
        assert float(row["confidence: accepted"]) > float(row["confidence: rejected"])
        assert float(row["entropy: accepted"]) < float(row["entropy: rejected"])
        for name in ("confidence", "entropy"):
            assert float(row[f"{name}: AUC"]) > 0.85
            assert float(row[f"{name}: AUC within questions"]) == pytest.approx(float(row[f"{name}: AUC"]), abs=0.02)


def test_a_section_is_there_only_where_the_results_have_what_it_needs(tmp_path: Path, results: Path) -> None:
    folder = write_results(tmp_path / "few", variants=FEW, temperatures=(0.0,))
    names = [section.name for section in sections(views(reading.read([folder])))]
    assert names == ["acceptance", "differences", "plain", "depth", "signals", "provenance"]
    every = [section.name for section in sections(views(reading.read([results])))]
    assert {"averaging", "routing", "merging", "budget", "published"}.issubset(every)


def test_published_figures_stand_beside_the_row_that_does_the_same_and_are_marked(
    results: Path, tables: Tables
) -> None:
    rows = {row["published row"]: row for row in tables["published-eagle-2-t1"]}
    assert rows["MathInstruct"]["row here"] == "single:math,topk"  # the paper drafts top-k
    assert rows["Merged trees"]["row here"] == "merged (coupled)" and rows["Averaged"]["row here"] == "average"
    assert float(rows["ShareGPT"]["MT_BENCH, published"]) == 3.38
    hass = {row["published row"] for row in tables["published-hass-t0"]}
    assert hass == {"MathInstruct", "ShareGPT"}
    section = _section(results, "published")
    assert section is not None and paper.SOURCE in section.text


def test_the_page_asks_the_network_for_nothing_and_its_ids_are_its_own(report: Path) -> None:
    page = (report / "index.html").read_text()
    asked = re.findall(r'(?:src|href|action|srcset)="([^"]*)"|url\(([^)]*)\)|@import', page)
    assert all(target.startswith(("#", "data:")) for pair in asked for target in pair if target)
    assert "<script" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {target[1:] for pair in asked for target in pair if target.startswith("#")} <= set(ids)
    assert page.count("<svg ") == len(list((report / "pictures").glob("*.svg"))) == 8


def test_an_inlined_picture_takes_the_pages_colours() -> None:
    svg = (
        '<?xml?><svg><metadata>x</metadata><g id="a" style="fill: #1b1f24"/><use href="#a" clip-path="url(#a)"/></svg>'
    )
    shown = inline(svg, "one", "title")
    assert shown.startswith("<svg")
    assert 'id="one-a"' in shown and 'href="#one-a"' in shown and "url(#one-a)" in shown
    assert "fill: var(--ink)" in shown and "metadata" not in shown


def test_names_beside_lines_do_not_overlap() -> None:
    for heights in ([0.1, 0.11, 0.12], [0.97, 0.98, 0.99, 1.0], [0.0, 0.5, 1.0]):
        places = spread(heights, 0.07)
        assert all(high - low >= 0.07 - 1e-9 for low, high in pairwise(places))
        assert max(places) <= 1.0 + 1e-9


def test_a_table_says_the_same_in_markdown_csv_and_html() -> None:
    columns = (Column("a|b"), Column("length", ".2f"), Column("gap", "+.1%"))
    rows = (("x<y", Estimate(2.0, 1.5, 2.5), Estimate(-0.01, -0.02, 0.0001)), ("z", 3, None))
    table = Table("name", "Title", "", columns, rows)
    assert "| x<y | 2.00 (1.50 to 2.50) | \u22121.0% (\u22122.0 to 0.0) |" in markdown(table)
    assert "| z | 3.00 | \u2013 |" in markdown(table) and "a\\|b" in markdown(table)
    assert as_csv(table).splitlines() == ["a|b,length,length low,length high,gap,gap low,gap high",
                                          "x<y,2,1.5,2.5,-0.01,-0.02,0.0001", "z,3,,,,,"]  # fmt: skip
    assert "x&lt;y" in as_html(table) and "<td>3.00</td>" in as_html(table)


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
        (lines[0].replace('"turns"', '"turn"'), "'gsm8k-0' of gsm8k is none as taps-ext evaluate writes them: 'turns'"),
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
    assert "run.json is no JSON object" in _refusal(capsys, folder, output)


def test_a_report_json_of_another_kind_or_version_is_refused(
    tmp_path: Path, report: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, output = tmp_path / "report.json", tmp_path / "report"
    text = (report / "report.json").read_text()
    other.write_text(text.replace('"version": 1', '"version": 7'))
    assert "has version 7 of its format, this taps_ext reads version 1" in _refusal(capsys, other, output)
    other.write_text("{}")
    assert "is no report.json of taps-ext" in _refusal(capsys, other, output)
    other.write_text(text.replace('"turns":[1,', '"turns":[', 1))
    assert "is damaged" in _refusal(capsys, other, output)


def test_an_output_that_is_no_report_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_results(tmp_path / "results", variants=FEW, tasks={"gsm8k": 3}, temperatures=(0.0,))
    (tmp_path / "file").write_text("mine")
    assert "is a file" in _refusal(capsys, folder, tmp_path / "file")
    (tmp_path / "own" / "tables").mkdir(parents=True)
    assert "has a tables that is of no report" in _refusal(capsys, folder, tmp_path / "own")


def test_a_report_replaces_a_report_and_nothing_else(report: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(report, tmp_path / "report"))
    (output / "findings.md").write_text("mine")
    (output / "tables" / "old.csv").write_text("stale")
    _report(report / "report.json", output)
    assert (output / "findings.md").read_text() == "mine" and not (output / "tables" / "old.csv").exists()
    assert sorted(path.name for path in output.iterdir()) == sorted([*files.PARTS, "findings.md"])


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
    assert "answer question 'gsm8k-0' of gsm8k" in _refusal(capsys, one, one, tmp_path / "report")


def test_more_variants_of_the_same_drafters_are_of_one_replicate_and_sped_up_over_their_own_plain(
    tmp_path: Path,
) -> None:
    chosen = {name: {kept: VARIANTS[kept] for kept in ("plain", name)} for name in ("single:math", "single:chat")}
    for name, variants in chosen.items():
        folder = write_results(tmp_path / name, variants=variants, tasks={"gsm8k": 6}, temperatures=(0.0,))
        for path in folder.glob("answers-*.jsonl"):  # on the second day the machine was slower
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            for line in lines if name == "single:chat" else ():
                line["choices"][0]["wall_time"] = [7 * seconds for seconds in line["choices"][0]["wall_time"]]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    view = _view(tmp_path, label="")
    assert view.replicates("plain", "gsm8k") == [0] == view.replicates("single:chat", "gsm8k")
    assert view.difference("single:math", "single:chat", "gsm8k") is not None
    for name in chosen:
        lines = list(_lines(tmp_path / name))
        rate = {
            variant: sum(line["choices"][0]["new_tokens"][0] for line in lines if line["variant"] == variant)
            / sum(line["choices"][0]["wall_time"][0] / line["rows"] for line in lines if line["variant"] == variant)
            for variant in ("plain", name)
        }
        found = view.quotient(name, "plain", "gsm8k", tokens_per_second)
        assert found is not None and found.value == pytest.approx(rate[name] / rate["plain"])


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
    assert view.replicates("single:half", "gsm8k") == [0] == view.replicates("single:math", "gsm8k")
    assert view.difference("single:half", "single:math", "gsm8k") is not None
    third = Path(shutil.copytree(one, tmp_path / "third"))
    run["variants"] = FEW
    (third / "run.json").write_text(json.dumps(run))
    assert "answer question 'gsm8k-0' of gsm8k" in _refusal(capsys, one, third, tmp_path / "report")


def test_a_folder_of_results_may_hold_others(tmp_path: Path) -> None:
    write_results(tmp_path / "results", "one", variants=FEW, tasks={"gsm8k": 3}, temperatures=(0.0,))
    write_results(tmp_path / "results" / "seed0", "other", variants=FEW, tasks={"gsm8k": 3}, temperatures=(0.0,))
    assert [run.label for run in reading.read([tmp_path / "results"])] == ["one", "other"]


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


def test_signals_above_temperature_0_are_of_top_k_runs_and_others_are_marked(tables: Tables, results: Path) -> None:
    assert {row["variant"] for row in tables["signals-eagle-2-t1"]} == {"single:math,topk", "single:chat (coupled)"}
    assert {row["variant"] for row in tables["signals-eagle-2-t0"]} == {"single:math", "single:chat"}
    section = _section(results, "signals")
    assert section is not None
    notes = {table.name: table.note for table in section.tables}
    assert "of the noised distribution, not the paper's signal" in notes["signals-eagle-2-t1"]
    assert notes["signals-eagle-2-t0"] == "" and "noised" in notes["signal-routing-math-chat-eagle-2-t1"]


def test_the_union_and_the_equal_budget_are_told_apart(results: Path) -> None:
    view = _view(results)
    told = {name: view.told(name) for name in ("merged", "merged@60", "merged@20", "single:math")}
    assert told == {"merged": "merged (union)", "merged@60": "merged@60 (equal budget)",
                    "merged@20": "merged@20", "single:math": "single:math"}  # fmt: skip
    assert style(view, "merged") != style(view, "merged@60") != style(view, "merged@60,evidence=0")


def test_figures_that_a_clock_made_have_no_interval(tables: Tables) -> None:
    for name in ("speed-up", "tokens-per-second"):
        assert set(tables[f"{name}-eagle-2-t0"][0]) == {"variant", "GSM8K", "MT_BENCH", "SVAMP", "mean over tasks"}


def test_an_interval_without_0_does_not_end_in_one() -> None:
    columns = (Column("gap", "+.2f"),)
    ends = ((0.01, 0.001, 0.03), (-0.01, -0.03, -0.0004), (0.01, -0.001, 0.03))
    text = markdown(Table("name", "", "", columns, tuple((Estimate(*figures),) for figures in ends)))
    assert "+0.010 (+0.001 to +0.030)" in text and "+0.01 (0.00 to +0.03)" in text
    assert "\u22120.0100 (\u22120.0300 to \u22120.0004)" in text


def test_a_line_that_the_last_panel_lacks_is_named_too() -> None:
    panels = (Panel("", (Line("only here", [1], [0.5], Style()),)), Panel("", (Line("there", [1], [0.4], Style()),)))
    _, svg = draw(Picture("name", "", "", (panels,)))
    assert svg.count("<!-- only here -->") == 1 == svg.count("<!-- there -->")


def test_variants_are_compared_with_drafters_that_draft_as_they_do(tmp_path: Path) -> None:
    variants = {**VARIANTS, "single:chat,topk": variant("single", ("chat",), drafting="topk")}
    view = _view(write_results(tmp_path / "results", variants=variants, temperatures=(1.0,)), 1.0, label="")
    found = {one.words: {(one.one(task), one.other(task)) for task in view.tasks} for one in comparisons(view)}
    assert {other for _, other in found["average vs worst specialist"]} == {"single:math,topk", "single:chat,topk"}
    assert {other for _, other in found["evidence vs best specialist"]} == {"single:math", "single:chat"}
    for pairs in found.values():
        for one, other in pairs:
            if view.specs[one].composition != view.specs[other].composition:
                assert view.is_coupled(one) == view.is_coupled(other), (one, other)


def test_report_json_keeps_every_count(results: Path, tmp_path: Path) -> None:
    runs = reading.read([results])
    (tmp_path / "report.json").write_text(saved.dump(runs))
    assert saved.dump(saved.load(tmp_path / "report.json")) == saved.dump(runs)
    assert [len(run.cells) for run in runs] == [9, len(VARIANTS) * 6 - 3, 9]  # no top-k row at temperature 0
    assert sum(TASKS.values()) * 3 == sum(len(cell.ids) for cell in runs[0].cells.values())


def test_made_up_lines_have_the_fields_of_real_ones() -> None:
    """So that the other tests are of the runner's format: `record.py` is what it writes."""
    from taps_ext.evaluation import record

    line = answer(np.random.default_rng(0), "merged", VARIANTS["merged"], "gsm8k", 0.0, "gsm8k-0")
    told = str(record.__doc__)
    assert not [name for name in (*line, *line["turns"][0], *line["choices"][0]) if name not in told]


def test_a_run_that_an_installed_package_resumed_is_reported(tmp_path: Path) -> None:
    """Outside a checkout there is no commit to tell."""
    folder = write_results(tmp_path / "results", variants=FEW, temperatures=(0.0,))
    run = json.loads((folder / "run.json").read_text())
    run["provenance"]["resumed"] = [{"date": "2026-01-02", "taps_ext": "0.1.0"}]
    (folder / "run.json").write_text(json.dumps(run))
    table = next(table for table in _section(folder, "provenance").tables if table.name == "provenance")
    assert "resumed,2026-01-02 at 0.1.0" in as_csv(table)


PUBLISHED = Path(__file__).parents[1] / "benchmarks" / "results" / "real_text"


def test_the_published_tables_are_those_of_their_json() -> None:
    """Whoever changes what a table says makes the published report again."""
    parts = sections(views(saved.load(PUBLISHED / "report.json")))
    made = {table.name: as_csv(table) for part in parts for table in part.tables}
    published = {path.stem: path.read_text(encoding="utf-8") for path in (PUBLISHED / "tables").glob("*.csv")}
    assert made == published


def test_every_interval_of_the_findings_is_in_a_published_table() -> None:
    interval = re.compile(r"(?<= )\S+ \(\S+ to \S+\)")
    told, known = (
        interval.findall(" ".join((PUBLISHED / name).read_text(encoding="utf-8").split()))
        for name in ("findings.md", "report.md")
    )
    assert len(told) > 200 and not set(told) - set(known)
