"""The commands of training, run for real on the embedded target: what they say, write and leave."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from training_cases import write_conversations
from transformers import AutoConfig, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from taps_ext import cli
from taps_ext.cli import WORKER_PATIENCE_S
from taps_ext.tiny import resolve
from taps_ext.training.recipe import (
    DataConfig,
    FeatureConfig,
    ObjectiveConfig,
    Recipe,
    SourceConfig,
    TrainingConfig,
    VocabularyConfig,
)

DOCUMENT = Path(__file__).parent.parent / "docs" / "training.md"
NUM_STEPS = 8


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def run(*arguments: str) -> Done:
        with pytest.raises(SystemExit) as exit:
            cli.main(arguments)
        captured = capsys.readouterr()
        return Done(exit.value.code or 0, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short conversations, and one line that is none."""
    path = tmp_path_factory.mktemp("data") / "math.jsonl"
    write_conversations(path, 40)
    with path.open("a") as file:
        file.write("not JSON\n")
    return path


@pytest.fixture
def recipe(data: Path, tmp_path: Path) -> list[str]:
    """A whole run without a file: 8 steps, everything twice, no calibration."""
    arguments = ["target=tiny", f"output={tmp_path / 'run'}", f"data.sources=[{data}]", "data.max_length=96"]
    arguments += ["data.validation=4", f"training.steps={NUM_STEPS}", "training.batch_size=4", "training.log_every=1"]
    arguments += ["training.learning_rate=2e-3", "training.validate_every=4", "training.save_every=4"]
    return [*arguments, "training.calibrate=false"]


def everything_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_one_command_trains_and_says_what_it_read_how_it_went_and_what_to_do_next(run, recipe, tmp_path, data) -> None:
    done, output = run("train", *recipe), tmp_path / "run"
    assert done.code == 0, done.err
    assert f"eagle2 drafter for tiny, in {output}" in done.err
    assert f"{data}: 41 read, 1 dropped, 36 for training and 4 for validation" in done.err
    assert f"not JSON: 1 ({data}:41)" in done.err
    assert re.search("[1-9][0-9,]+ parameters, 8 steps", done.err)
    assert [f"step {n}/8  loss" in done.err for n in range(NUM_STEPS + 1)] == [False] + [True] * NUM_STEPS
    assert done.err.count("estimated acceptance length") == 2
    best, final = (re.search(rf"^{name} +(\d) .*%", done.out, re.M) for name in ("best", "final"))
    assert best and final and final[1] == "8"
    assert {path.name for path in output.iterdir()} >= {"best", "final", "log.jsonl", "training.png", "data.json"}
    commands = [shlex.split(line)[1:] for line in done.out.split("next:")[1].strip().splitlines()]
    assert [command[0] for command in commands] == ["validate", "generate"]
    for command in commands:
        assert run(*command, *(["--max-new-tokens", "4"] if command[0] == "generate" else [])).code == 0

    again = run("train", *recipe, "--json")
    told = json.loads(again.out)
    assert "is finished already" in again.err
    assert told["finished"] and told["step"] == told["num_steps"] == NUM_STEPS
    assert told["final"]["folder"] == str(output / "final")
    assert f"{told['best']['acceptance_length']:.2f}" in best[0]
    assert told["best"]["acceptance_length"] >= told["final"]["acceptance_length"] >= 1

    other = run("train", *recipe, "training.batch_size=2")
    assert other.code == 2 and "training.batch_size is 4 there and 2 here" in other.err


def test_a_drafter_of_gpt2_is_trained_and_decodes(run, recipe, tmp_path) -> None:
    """Whose config spells every size in its own way."""
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny"))
    sizes = {"vocab_size": AutoConfig.from_pretrained(resolve("tiny")).vocab_size, "n_positions": 512}
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, eos_token_id=tokenizer.eos_token_id, **sizes)
    for saved in (GPT2LMHeadModel(config), tokenizer):
        saved.save_pretrained(tmp_path / "gpt2")
    done = run("train", f"target={tmp_path / 'gpt2'}", *recipe[1:])
    assert done.code == 0, done.err
    arguments = [str(tmp_path / "run" / "final"), "--target", str(tmp_path / "gpt2")]
    validated = run("validate", *arguments)
    assert validated.code == 0, validated.out + validated.err


def test_a_dry_run_says_what_the_run_takes_and_leaves_nothing(run, recipe, tmp_path) -> None:
    done = run("train", *recipe, "--dry-run", "--json")
    facts = json.loads(done.out)
    assert done.code == 0 and "1 dropped" in done.err
    assert facts["num_steps"] == NUM_STEPS and facts["num_sequences"] == 36
    assert facts["checkpoint_bytes"] == 12 * facts["num_parameters"]
    assert facts["seconds_per_step"] > 0 and facts["hours"] == pytest.approx(8 * facts["seconds_per_step"] / 3600)
    for_people = run("train", *recipe, "--dry-run").out
    assert f"{facts['num_parameters']:,}" in for_people and "GiB" in for_people
    assert everything_in(tmp_path) == []


def test_a_stopped_run_says_so_with_its_own_exit_code_and_the_same_command_goes_on(run, recipe, tmp_path) -> None:
    recipe += ["training.steps=60", "training.save_every=60", "training.validate_every=60"]
    log = tmp_path / "run" / "log.jsonl"
    interrupting = threading.Thread(target=interrupt_when, args=[lambda: log.exists() and log.stat().st_size > 0])
    interrupting.start()
    done = run("train", *recipe, "--json")
    interrupting.join()
    step = json.loads(done.out)["step"]
    assert done.code == 130
    assert 0 < step < 60 and not json.loads(done.out)["finished"]
    assert f"stopped after step {step} of 60; run it again to go on from there" in done.err
    on = run("train", *recipe)
    assert on.code == 0
    assert f"resuming after step {step} of 60" in on.err
    assert f"step {step + 1:2}/60" in on.err and f"step {step:2}/60" not in on.err


def interrupt_when(is_time: Callable[[], bool]) -> None:
    """As Ctrl-C does, in this process."""
    while not is_time():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    "changes, said",
    [
        (["trainin.steps=3"], "trainin is not known; did you mean training?"),
        (["training.learning_rat=3"], "learning_rate"),
        (["trainin.steps=3", "outputt=runs"], "did you mean training?; outputt is not known"),
        (["training.steps=many"], "training.steps must be an integer or null, got 'many'"),
        (["training.steps=0"], "training.steps must be at least 1"),
        (["data.sources=[nowhere.jsonl]"], "there is no nowhere.jsonl"),
        (["data.sources=[{bad}]"], "no conversation is left to train on"),
        (["data.sources=[{bad}]"], "{bad}:1, {bad}:2"),
        (["target=/nowhere/at/all"], "/nowhere/at/all"),
        (["start=tiny/other"], "there is no embedded drafter tiny/other"),
        (["training.batch_size=64"], "more than the 36 training conversations"),
        (["features.mode=stored"], "run/features: there is no manifest.json; run `taps-ext features`"),
        (["features.mode=stored", "features.path={folder}"], "run `taps-ext features`"),
        (["--config", "nowhere.yaml"], "there is no recipe nowhere.yaml"),
    ],
)
def test_an_expected_error_is_one_sentence_and_no_output(run, recipe, tmp_path, changes, said) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"a": 1}\n[]\n')
    names = {"bad": bad, "folder": tmp_path / "features"}
    done = run("train", *recipe, *(change.format(**names) for change in changes))
    sentences = [line for line in done.err.splitlines() if line.startswith("taps-ext: ")]
    assert (done.code, done.out) == (2, "")
    assert len(sentences) == 1 and said.format(**names) in sentences[0], done.err
    assert everything_in(tmp_path) == [bad]


@pytest.mark.parametrize("package", ["accelerate", "omegaconf"])
def test_a_missing_package_of_training_is_named_with_its_extra(run, recipe, monkeypatch, package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    done = run("train", *recipe)
    assert done.code == 2
    assert re.search(rf"^taps-ext: .*{package}: pip install 'taps_ext\[train\]'$", done.err, re.M), done.err


def test_a_recipe_file_and_overrides_are_one_recipe(run, recipe, tmp_path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("objective: {name: hass}\ntraining: {steps: 3}\n")
    done = run("train", "--config", str(file), *recipe, "--dry-run", "--json")
    assert "hass drafter for tiny" in done.err
    assert json.loads(done.out)["num_steps"] == NUM_STEPS


def test_features_are_made_ahead_once_and_trained_from(run, recipe, tmp_path) -> None:
    folder = tmp_path / "features"
    recipe += ["features.mode=stored", f"features.path={folder}", "features.dtype=float32"]
    estimate = run("features", *recipe, "--dry-run")
    space = re.search(r"of (\d+) sequences \(([\d,]+) tokens x 768 bytes\)", estimate.out)
    assert estimate.code == 0 and space and space[1] == "40"
    assert everything_in(tmp_path) == []
    facts = json.loads(run("features", *recipe, "--dry-run", "--json").out)
    assert facts["num_bytes"] == 768 * int(space[2].replace(",", "")) and facts["folder"] == str(folder)
    assert everything_in(tmp_path) == []
    made = run("features", *recipe)
    assert made.code == 0, made.err
    assert space[0] in made.err and made.out.startswith(f"{folder} has them all; train with features.mode=stored")
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert num_bytes == pytest.approx(768 * int(space[2].replace(",", "")), rel=0.01)
    before = everything_in(folder)
    assert "of 0 sequences" in run("features", *recipe, "--json").err
    assert everything_in(folder) == before
    assert run("train", *recipe, "training.steps=2").code == 0
    recipe += ["features.path=null"]  # beside what the run writes
    assert run("features", *recipe, f"output={tmp_path / 'other'}").code == 0
    assert run("train", *recipe, f"output={tmp_path / 'other'}", "training.steps=2").code == 0


def test_regenerated_conversations_ask_the_same_and_can_be_trained_on(run, recipe, data, tmp_path) -> None:
    output = tmp_path / "own.jsonl"
    arguments = ("regenerate", "--target=tiny", f"--data={data}", "--count=8", "--max-new-tokens=80")
    made = run(*arguments, f"--output={output}")
    assert made.code == 0, made.err
    assert f"{data}: 8 usable conversations" in made.err
    own = [json.loads(line)["messages"] for line in output.read_text().splitlines()]
    asked = {json.loads(line)["messages"][0]["content"] for line in data.read_text().splitlines()[:-1]}
    assert f"wrote {len(own)} conversations" in made.out and 4 <= len(own) <= 8
    assert {messages[0]["content"] for messages in own} <= asked
    num_cut_off = sum("unfinished" in message for messages in own for message in messages)
    said = f"answers cut off after 80 tokens, of which no end is learned: {num_cut_off}"
    assert (said in made.err) == (num_cut_off > 0)
    told = json.loads(run(*arguments, "-o", str(tmp_path / "again.jsonl"), "--json").out)
    assert (
        told["num_unfinished"] == num_cut_off
        and told["num_written"] == len(own)
        and told["output"] == str(tmp_path / "again.jsonl")
    )
    assert run("train", *recipe, f"data.sources=[{output}]", "--dry-run").code == 0
    again = run("regenerate", "--target=tiny", f"--data={data}", f"--output={output}")
    assert again.code == 2 and f"{output} exists already" in again.err
    again = run("regenerate", "--target=tiny", f"--data={data}", f"--output={tmp_path / 'other.jsonl'}", "--count=41")
    assert again.code == 2 and "40 usable conversations, fewer than its count of 41" in again.err


def test_a_worker_fails_silently_with_the_main_process_and_speaks_when_it_fails_alone(run, monkeypatch) -> None:
    waited: list[float] = []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    done = run("train", "target=")
    assert done.code == 2 and done.err.startswith("taps-ext (process 3): ")
    assert waited == [WORKER_PATIENCE_S]


@pytest.fixture
def launched(recipe, tmp_path) -> Callable[..., Done]:
    """Runs `python -m taps_ext`, one command after the other, in two processes under torchrun."""

    def launched(commands: list[str], *changes: str) -> Done:
        script = tmp_path / "commands.py"
        script.write_text(
            "import runpy, sys\n"
            f"for command in {commands}:\n"
            f"    sys.argv = ['taps-ext', command, *{[*recipe, *changes]}]\n"
            "    try:\n"
            "        runpy.run_module('taps_ext', run_name='__main__')\n"
            "    except SystemExit as end:\n"
            "        if end.code:\n"
            "            raise\n"
        )
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(launcher, capture_output=True, text=True, timeout=120, env=environment, check=False)
        return Done(done.returncode, done.stdout, done.stderr)

    return launched


def test_the_processes_of_a_launch_share_the_work_and_one_of_them_speaks(launched, tmp_path) -> None:
    folder = tmp_path / "features"
    done = launched(["features", "train"], "features.mode=stored", f"features.path={folder}")
    assert done.code == 0, done.err
    assert done.out.count("has them all") == done.out.count("next:") == 1
    assert done.err.count("41 read, 1 dropped") == 2 and done.err.count("step 8/8  loss") == 1, "of each command"
    num_bytes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    num_tokens = int(re.search(r"([\d,]+) tokens x 384 bytes", done.err)[1].replace(",", ""))
    assert len(num_bytes) == 2
    assert sum(num_bytes) == pytest.approx(384 * num_tokens, rel=0.02), "each of them computed once"
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


@pytest.mark.long
def test_of_the_processes_of_a_launch_only_one_is_refused_aloud(launched) -> None:
    done = launched(["train"], "training.stepss=4")
    assert done.code != 0 and done.out == ""
    assert len(re.findall("taps-ext.*: training.stepss is not known", done.err)) == 1


# ---- the document


def recipe_keys() -> Iterator[tuple[str, str]]:
    """Every key of a recipe and its default, as the document writes them."""
    sections = {"": Recipe, "data.": DataConfig, "data.sources[].": SourceConfig, "features.": FeatureConfig}
    sections |= {"vocabulary.": VocabularyConfig, "objective.": ObjectiveConfig, "training.": TrainingConfig}
    for prefix, section in sections.items():
        for field in dataclasses.fields(section):
            if f"{prefix}{field.name}." not in sections and f"{prefix}{field.name}[]." not in sections:
                yield f"{prefix}{field.name}", as_documented(field.default)


def as_documented(default: Any) -> str:
    if default is dataclasses.MISSING:
        return "required"
    if default is None:
        return "none"
    return str(list(default)) if isinstance(default, tuple) else str(default).lower()


def test_the_document_has_every_key_of_a_recipe_with_its_default() -> None:
    table = DOCUMENT.read_text().split("## The recipe")[1]
    documented = re.findall(r"^\| `([\w.\[\]]+)` \| (.*?) \| .+ \|$", table, re.M)
    assert dict(documented) == dict(recipe_keys())
    assert len(documented) == len(dict(documented))
