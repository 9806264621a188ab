"""taps-ext evaluate, run for real on the embedded models: what it prints and refuses, killed, and in two processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from taps_ext import tiny
from taps_ext.cli import evaluate as evaluation
from taps_ext.cli import main
from taps_ext.evaluation import results

SHORT = ("--limit=2", "--max-new-tokens=5", "--variant=merged", "--variant=single:math")


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Runs `taps-ext evaluate` in this process, into tmp_path/results."""

    def evaluate(*arguments: str, output: Path = tmp_path / "results") -> Done:
        with pytest.raises(SystemExit) as exit:
            main(["evaluate", *arguments, "-o", str(output)])
        captured = capsys.readouterr()
        return Done(exit.value.code or 0, captured.out, captured.err)

    return evaluate


def timeless(folder: Path) -> list[str]:
    """The lines of a folder in one order, without what may differ from run to run."""
    lines = list(results.read_lines(folder))
    for line in lines:
        del line["tstamp"], line["choices"][0]["wall_time"]
    return sorted(json.dumps(line, sort_keys=True) for line in lines)


# ---- what it prints


def test_without_tasks_it_evaluates_the_tiny_world_and_shows_a_table(evaluate, tmp_path: Path, capsys) -> None:
    done = evaluate(*SHORT)
    assert done.code == 0, done.err
    assert "tiny_math" in done.out and "tiny_chat" in done.out and "T = 0" in done.out and "T = 1" in done.out
    rows = {line.split()[0]: line.split()[1:] for line in done.out.splitlines() if line.strip()}
    assert len(rows["merged"]) == 5 and rows["merged"][-1] == rows["single:math"][-1] == "8/8"
    assert all(1 <= float(length) <= 7 for length in rows["merged"][:-1]) and "plain" not in rows
    assert "All 16 answers equal plain decoding's, token by token." in done.out
    assert f"taps-ext report {tmp_path / 'results'}" in done.out
    report = ["report", str(tmp_path / "results"), "-o", str(tmp_path / "report"), "--json"]
    with pytest.raises(SystemExit) as exit:
        main(report)
    told = json.loads(capsys.readouterr().out)
    assert not exit.value.code and told["output"] == str(tmp_path / "report")
    assert {str(tmp_path / "report" / name) for name in ("report.md", "index.html", "report.json")} <= {*told["files"]}
    assert all(Path(path).is_file() for path in told["files"])
    provenance = json.loads((tmp_path / "results" / "run.json").read_text())["provenance"]
    assert {"command", "commit", "versions", "device", "date"} <= provenance.keys()


def test_look_ups_are_evaluated_beside_files(evaluate, tmp_path: Path) -> None:
    """They have no weights: nothing of them is averaged."""
    drafters = ("--drafter=lookup", "--drafter=tiny/math")
    done = evaluate(*drafters, "--limit=1", "--max-new-tokens=5", "--variant=merged", "--variant=single:lookup")
    assert done.code == 0, done.err
    assert "single:lookup" in done.out and "All 8 answers equal plain decoding's" in done.out
    configuration = json.loads((tmp_path / "results" / "run.json").read_text())
    assert configuration["drafters"]["lookup"] == {"name": "lookup", "sha256": ""}
    refused = evaluate(*drafters, "--variant=average:lookup+math", output=tmp_path / "other")
    assert refused.code == 2 and "there is no drafter 'lookup'; there are math" in refused.err


def test_look_ups_alone_with_trees_that_adapt_and_continue_the_text(evaluate, tmp_path: Path) -> None:
    done = evaluate("--drafter=lookup", "--variant=single:lookup,auto", "--limit=1", "--max-new-tokens=9", "--extend")
    assert done.code == 0 and "All 4 answers equal plain decoding's" in done.out
    settings = json.loads((tmp_path / "results" / "run.json").read_text())
    assert settings["settings"]["extend"] and "lookup" in settings["costs"]["draft_ms"]
    costs = f"--costs={tmp_path / 'results' / 'run.json'}"
    refused = evaluate("--variant=merged,auto", costs, output=tmp_path / "other")
    assert refused.code == 2 and "the table of costs lacks drafter 'chat'; give one measured with" in refused.err
    assert not (tmp_path / "other").exists()


def test_json_is_one_object_with_the_same_figures(evaluate, tmp_path: Path) -> None:
    prompts = tmp_path / "mine.jsonl"
    prompts.write_text('{"prompt": "Why should I label the cables?"}\n{"prompt": "How do I sort 12 boxes?"}\n')
    arguments = (f"--prompts={prompts}", "--variant=merged", "--temperature=0", "--max-new-tokens=5", "--json")
    done = evaluate(*arguments, "--label=a")
    told = json.loads(done.out)
    (cell,) = told["cells"]
    assert (cell["variant"], cell["task"], cell["temperature"], told["label"]) == ("merged", "prompts", 0.0, "a")
    lines = [line for line in results.read_lines(tmp_path / "results") if line["variant"] == "merged"]
    counts = [count for line in lines for count in line["turns"][0]["num_accepted"]]
    assert cell["acceptance_length"] == pytest.approx(sum(counts) / len(counts) + 1)
    assert cell["num_questions"] == cell["num_equal"] == told["num_texts"] == 2 and told["num_different"] == 0
    run = json.loads((tmp_path / "results" / "run.json").read_text())
    assert run["tasks"]["prompts"]["source"] == "mine.jsonl" and run["settings"]["dtype"] == "float32"


def test_the_command_is_kept_without_the_places_of_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "here" / "math").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    arguments = ["evaluate", "--target", "someone/Llama", "--drafter=math=tiny/math", "--drafter", "b=here/math"]
    arguments += [f"--task=gsm8k={tmp_path}/gsm8k.jsonl", "--system-prompt", "Yes/no, then why.", "-o/home/me/results"]
    monkeypatch.setattr(sys, "argv", ["taps-ext", *arguments, "--prompts", "~/mine.jsonl"])
    assert evaluation._command() == (
        "taps-ext evaluate --target someone/Llama --drafter=math=tiny/math --drafter b=math --task=gsm8k=gsm8k.jsonl "
        "--system-prompt 'Yes/no, then why.' -oresults --prompts mine.jsonl"
    )


def test_texts_that_differ_in_float32_fail_the_command(evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taps_ext.evaluation.summary.Summary.num_different", 1)
    done = evaluate(*SHORT, "--temperature=0", "--task=tiny_math")
    assert done.code == 1 and "A BUG, PLEASE REPORT IT" in done.out


# ---- what it refuses, before the target is loaded


@pytest.fixture
def no_target(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_target(*_: Any) -> None:
        raise AssertionError("the target was loaded")

    monkeypatch.setattr(evaluation, "load_target_and_tokenizer", load_target)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--task=mt_bensh"],
            "task must be one of mt_bench, gsm8k, math500, svamp, tiny_math, tiny_chat, got 'mt_bensh'",
        ),
        (["--task=gsm8k="], "a task is NAME or NAME=FILE"),
        (["--task=tiny_math", "--task=tiny_math"], "the task 'tiny_math' is given twice"),
        (["--task=gsm8k={folder}/bad.jsonl"], "bad.jsonl, line 2: not JSON"),
        (["--task=gsm8k={folder}/none.jsonl"], "none.jsonl is no file"),
        (["--prompts={folder}/bad.jsonl"], "bad.jsonl, line 2: not JSON"),
        (["--variant=dual"], "variant 'dual': "),
        (["--variant=single:code"], "no drafter 'code'; there are math, chat"),
        (["--variant=merged", "--variant=u=merged"], "are the same"),
        (["--temperature=-1"], "temperature must be finite and at least 0"),
        (["--temperature=nan"], "temperature must be finite and at least 0"),
        (["--temperature=1", "--temperature=1"], "a temperature is given twice"),
        (["--batch-size=0"], "batch_size must be at least 1"),
        (["--max-new-tokens=1"], "max_new_tokens must be at least 2"),
        (["--seed=99999999999999999999"], "seed"),
        (["--variant=merged@٣"], "@ is followed by the nodes of a tree"),
        (["--drafter=average=tiny/math"], "'average' is that of averaged weights"),
        (["--max-nodes=0"], "max_nodes must be"),
        (
            ["--costs={folder}/none.json"],
            "none.json holds no costs (No such file or directory); give a file of taps-ext",
        ),
        (["--costs={folder}/bad.jsonl"], "bad.jsonl holds no costs (Extra data"),
        (["--costs={folder}/other/config.json"], "config.json holds no costs (a cost table needs sizes, step_ms"),
        (["--device=tpu"], "device must be cpu"),
        (["--drafter=math=tiny/math", "--drafter=math=tiny/chat"], "given twice"),
        (
            ["--target={folder}/none", "--drafter=math=tiny/math", "--task=tiny_math"],
            "none: it is neither a directory with config.json nor a hub id",
        ),
        (["--drafter=a=nowhere/at/all"], "drafter 'a': no drafter at nowhere/at/all"),
        (["--drafter=a=tiny/math", "--drafter=b={folder}/other"], "drafter 'b': drafter vocabulary 1000 differs"),
        (["--target={folder}/target", "--drafter=math=tiny/math"], "give at least one --task"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_sentence(
    evaluate, no_target: None, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "fine"}\n{"prompt": \n')
    config = json.loads(
        shutil.copytree(tiny.drafter_paths()["math"], tmp_path / "other").joinpath("config.json").read_text()
    )
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    done = evaluate(*(argument.format(folder=tmp_path) for argument in arguments))
    assert done.code == 2 and done.out == "" and len(done.err.splitlines()) == 1
    assert sentence in done.err
    assert not (tmp_path / "results").exists()


def test_an_output_that_is_a_file_is_refused(evaluate, no_target: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    done = evaluate(*SHORT, output=tmp_path / "file")
    assert done.code == 2 and "cannot be a directory" in done.err and (tmp_path / "file").read_text() == "mine"


def test_results_of_another_configuration_are_refused_before_the_target_is_loaded(
    evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = (*SHORT, "--task=tiny_math", "--temperature=0")
    assert evaluate(*short).code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "load_target_and_tokenizer", lambda *_: pytest.fail("the target was loaded"))
        for change in ("--seed=1", "--depth=5", "--label=b", "--system-prompt=x", "--task=tiny_chat", "--limit=1"):
            done = evaluate(*short, change)
            assert done.code == 2 and "another configuration: " in done.err, change
    assert evaluate(*short).code == 0, "the same goes on"
    assert {path.name: path.read_bytes() for path in (tmp_path / "results").iterdir()} == before


def test_a_drafter_of_another_target_is_refused_with_nothing_written(evaluate, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny.drafter_paths()["math"], tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["taps"]["target"] = {"name": "Llama", "fingerprint": "0"}
    (other / "config.json").write_text(json.dumps(config))
    done = evaluate(f"--drafter=b={other}")
    assert done.code == 2 and "drafter 'b' is of another target, Llama" in done.err
    assert not (tmp_path / "results").exists()


# ---- killed, interrupted, in several processes

LONGER = (*SHORT[2:], "--limit=5", "--batch-size=2", "--max-new-tokens=12", "--task=tiny_math", "--temperature=1")


def start(folder: Path, *launcher: str, arguments: Sequence[str] = LONGER) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, "-m", "taps_ext", "evaluate", *arguments, "-o", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_lines(folder: Path, count: int) -> None:
    file, until = folder / "answers-0.jsonl", time.monotonic() + 100
    while not (file.exists() and file.read_bytes().count(b"\n") >= count):
        assert time.monotonic() < until, "no lines came"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The lines of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.raises(SystemExit) as exit:
        main(["evaluate", *LONGER, "-o", str(folder)])
    assert not exit.value.code
    return timeless(folder)


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_lines(
    evaluate, tmp_path: Path, uninterrupted: list[str]
) -> None:
    process = start(tmp_path / "results")
    wait_for_lines(tmp_path / "results", 4)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    there = timeless(tmp_path / "results")
    assert 4 <= len(there) < len(uninterrupted) and set(there) < set(uninterrupted)
    with (tmp_path / "results" / "answers-0.jsonl").open("ab") as file:
        file.write(b'{"question_id":"tiny_ma')
    assert evaluate(*LONGER).code == 0
    assert timeless(tmp_path / "results") == uninterrupted


def test_an_interrupted_run_says_that_it_goes_on_and_does(
    evaluate, tmp_path: Path, uninterrupted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add, seen = results.Answers.add, []

    def interrupt_the_fourth(answers: results.Answers, lines: Any) -> None:
        seen.append(lines)
        if len(seen) == 4:
            signal.raise_signal(signal.SIGINT)
        add(answers, lines)

    with monkeypatch.context() as patched:
        patched.setattr(results.Answers, "add", interrupt_the_fourth)
        done = evaluate(*LONGER)
    assert done.code == 130 and done.err == "stopped; the same command resumes it\n"
    assert len(timeless(tmp_path / "results")) == 6, "three batches of two"
    assert evaluate(*LONGER).code == 0
    assert timeless(tmp_path / "results") == uninterrupted


def test_two_processes_share_the_batches_and_one_table_of_costs(evaluate, tmp_path: Path) -> None:
    """What they measured gives the same lines in one process."""
    pytest.importorskip("accelerate")
    folder, adapting = tmp_path / "shared", ("--variant=merged,auto", "--variant=single:math@8,auto", *LONGER[2:])
    process = start(folder, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", arguments=adapting)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert out.count("as plain") == 1, "one of them speaks"
    counts = [len(path.read_text().splitlines()) for path in sorted(folder.glob("answers-*.jsonl"))]
    assert counts == [3 * 3, 3 * 2], "three variants of the first and last of three batches, and of the second"
    assert evaluate(*adapting, f"--costs={folder / 'run.json'}").code == 0
    assert timeless(folder) == timeless(tmp_path / "results")
