"""What a person sees of a run: lines, a bar, and the picture."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
from training_cases import Watcher, curve, small_trainer

from taps_ext.cli.terminal import TimedLines
from taps_ext.cli.train import Screen, draw_picture, save_picture, screen
from taps_ext.training import trainer
from taps_ext.training.trainer import Pace, UpdateRecord, ValidationRecord, mean_record

PNG = b"\x89PNG\r\n\x1a\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step(number: int, loss: float = 2.0, accuracy: tuple[float, ...] = (0.5, 0.25)) -> UpdateRecord:
    return UpdateRecord(number, number / 10, loss, accuracy, 1e-3, 0.7, 1234.0, 60.0 * (100 - number))


def validation(number: int, length: float = 2.5, is_best: bool = True) -> ValidationRecord:
    return ValidationRecord(number, 1.5, (0.8, 0.75, 0.5), length, is_best)


def test_console_and_log_show_the_same_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The means since the line before, whatever the steps between were."""
    with screen() as observer:
        small_trainer(tmp_path, observer, log_every=5, save_every=3).train()
    shown = [re.search(r"^step +(\d+)/12  loss +([\d.]+)", line) for line in capsys.readouterr().err.splitlines()]
    records = [record for record in curve(tmp_path) if record["kind"] == "step"]
    assert [(m[1], m[2]) for m in shown if m] == [(f"{r['step']}", f"{r['loss']:.4f}") for r in records]
    single = small_trainer(tmp_path / "single", watcher := Watcher()).train()
    assert single.is_finished and [record["step"] for record in records] == [5, 10, 12]
    losses = [record.loss for record in watcher.steps]
    assert [r["loss"] for r in records] == pytest.approx(
        [sum(losses[a:b]) / (b - a) for a, b in ((0, 5), (5, 10), (10, 12))]
    )


def test_a_record_is_the_mean_of_the_updates_since_the_last_one() -> None:
    record = mean_record([step(n, loss=n, accuracy=(n / 10, 0.0)) for n in (1, 2, 6)])
    assert (record.step, record.loss, record.accuracy) == (6, 3.0, pytest.approx((0.3, 0.0)))
    assert record.seconds_left == step(6).seconds_left


def test_the_time_left_is_that_of_the_current_epochs_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now, pace = [1000.0], Pace()
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    pace.start(0)
    left = []
    for number in range(1, 31):  # epochs of 10 updates, of which the first is slow
        now[0] += 9.0 if number <= 10 else 1.0
        left.append(pace.seconds_left(number, 30, is_new_epoch=number % 10 == 0))
    assert left[:10] == pytest.approx([9.0 * (30 - n) for n in range(1, 11)])
    assert left[10:] == pytest.approx([1.0 * (30 - n) for n in range(11, 31)])


def test_without_a_terminal_a_line_comes_every_half_minute(capsys: pytest.CaptureFixture[str]) -> None:
    now = [1000.0]
    observer = Screen(lambda what, done, total: None, has_bar=False, clock=lambda: now[0])
    observer.start(0, 100)
    for number in range(1, 21):
        now[0] += 10.0
        observer.step(step(number), is_logged=number == 20)
    lines = capsys.readouterr().err.splitlines()
    assert [int(re.match(r"step +(\d+)/100", line)[1]) for line in lines] == [3, 6, 9, 12, 15, 18, 20]
    assert lines[0].endswith("1,234 tokens/s  1 h 37 min left")


def test_a_validation_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    observer = Screen(lambda what, done, total: None, has_bar=False)
    observer.start(0, 9)
    observer.validated(validation(4))
    observer.validated(ValidationRecord(5, 1.5, (1.0, 0.25, float("nan")), 2.25, False))
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("accuracy by depth  80%  75%  50%  estimated acceptance length 2.50, the best so far")
    assert second.endswith("accuracy by depth 100%  25%    -  estimated acceptance length 2.25")


def test_lines_of_long_work_come_every_half_minute_with_the_time_left_at_the_present_speed() -> None:
    lines, now = list[str](), [1000.0]
    tell = TimedLines(lines.append, clock=lambda: now[0])
    tell("texts", 400, 1000)  # of a run that was stopped
    for done in range(401, 461):
        now[0] += 1.0
        tell("texts", done, 1000)
    for done in range(0, 31, 10):  # the next stage
        now[0] += 10.0
        tell("sweep", done, 100)
    left = ["texts: 430 of 1,000, 10 min left", "texts: 460 of 1,000, 9 min left", "sweep: 20 of 100, 80 s left"]
    assert lines == left
    now[0] += 19.0
    tell("sweep", 100, 100)
    assert len(lines) == 3, "work that ends soon after a line says no more"


@pytest.mark.parametrize("first", [0, 20, 30])
def test_a_resumed_run_says_after_which_step(first: int, capsys: pytest.CaptureFixture[str]) -> None:
    Screen(lambda what, done, total: None, has_bar=False).start(first, 30)
    assert capsys.readouterr().err == ("resuming after step 20 of 30\n" if first == 20 else "")


def test_a_terminal_gets_a_bar_with_a_line_above_it_for_each_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    with screen() as observer:
        observer.start(0, 40)
        for number in range(1, 41):
            observer.step(step(number), is_logged=number % 10 == 0)
            if number % 20 == 0:
                observer.validated(validation(number))
        observer.note("a note with [brackets]")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert text.count("step 20/40  held out") == text.count("step 40/40  held out") == 1
    assert "a note with [brackets]" in text and "loss 2.0000, 50% 25%, 60 min left" in text


@pytest.fixture
def log(tmp_path: Path) -> Path:
    lines = [{"kind": "step", "step": n, "loss": 5 / n} for n in range(1, 41)]
    lines += [{"kind": "validation", "step": n, "loss": 5 / n, "acceptance_length": n / 10} for n in (20, 40)]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_picture_is_a_function_of_the_log_and_is_written_whole(log: Path) -> None:
    drawn = draw_picture(log)
    assert save_picture(log).read_bytes() == drawn
    assert drawn.startswith(PNG)
    assert sorted(path.name for path in log.parent.iterdir()) == ["log.jsonl", "training.png"]
    log.write_text(log.read_text() + '{"kind": "step", "st')
    assert draw_picture(log) == drawn, "a torn last line is left out"
    log.write_text(log.read_text().replace("2.0", "3.0"))
    assert draw_picture(log) != drawn


def test_without_held_out_conversations_there_is_still_a_picture(log: Path) -> None:
    log.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if "step" in line[:20]))
    assert draw_picture(log).startswith(PNG)


def test_without_matplotlib_the_picture_names_what_to_install(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'taps_ext\[cli\]'"):
        save_picture(log)
    assert list(log.parent.iterdir()) == [log]
