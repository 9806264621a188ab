"""What a person sees of a run: lines, a bar, and the picture."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest

from taps_ext.training import picture
from taps_ext.training.progress import BarObserver, LineObserver, Observer, StepRecord, ValidationRecord, choose

PNG = b"\x89PNG\r\n\x1a\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step(number: int, loss: float = 2.0, accuracy: tuple[float, ...] = (0.5, 0.25)) -> StepRecord:
    return StepRecord(number, number / 10, loss, accuracy, 1e-3, 0.7, 1234.0)


def validation(number: int, length: float = 2.5, is_best: bool = True) -> ValidationRecord:
    return ValidationRecord(number, 1.5, (0.8, 0.75, 0.5), length, is_best)


def run(observer: Observer, first: int, last: int, validate_every: int) -> None:
    observer.start(first, last)
    for number in range(first + 1, last + 1):
        observer.step(step(number, loss=number))
        if number % validate_every == 0:
            observer.validated(validation(number))
    observer.stop()


def test_lines_come_every_few_steps_at_the_end_and_with_each_validation() -> None:
    stream = io.StringIO()
    run(LineObserver(10, stream), 0, 35, validate_every=20)
    lines = stream.getvalue().splitlines()
    assert [line.split("/")[0] for line in lines] == [f"step {n}" for n in (10, 20, 20, 30, 35)]
    assert ["held out" in line for line in lines] == [False, False, True, False, False]
    assert "accuracy by depth  80%  75%  50%  estimated acceptance length 2.50, the best so far" in lines[2]


def test_a_long_preparation_says_now_and_then_how_far_it_is() -> None:
    stream, seconds = io.StringIO(), iter(range(100))
    observer = LineObserver(10, stream, clock=lambda: next(seconds) / 2)
    for done in range(1, 41):
        observer.preparing(done, None if done <= 20 else 1000)
    lines = stream.getvalue().splitlines()
    assert lines == ["conversations: 20", "conversations: 40 of 1,000"]


def test_on_a_terminal_the_preparation_is_one_line_that_ends_with_the_next_sentence() -> None:
    stream = Terminal()
    observer = BarObserver(10, stream)
    for done in range(1, 301):
        observer.preparing(done, None)
    observer.note("all is read")
    run(observer, 0, 5, validate_every=5)
    assert "conversations: 300" in stream.getvalue()
    assert stream.getvalue().index("all is read") > stream.getvalue().index("conversations: 300")


def test_a_share_of_nothing_is_a_dash() -> None:
    stream = io.StringIO()
    observer = LineObserver(1, stream)
    observer.start(0, 9)
    observer.validated(ValidationRecord(1, 1.5, (1.0, 0.25, float("nan")), 2.25, False))
    assert "accuracy by depth 100%  25%    -  estimated acceptance length 2.25\n" in stream.getvalue()


def test_lines_of_one_run_have_their_columns_under_each_other() -> None:
    stream = io.StringIO()
    observer = LineObserver(1, stream)
    observer.start(0, 1000)
    for number, loss, share in ((1, 12.3456, 0.0), (99, 3.2, 0.071), (1000, 0.01, 1.0)):
        observer.step(step(number, loss, (share, 1 - share)))
    columns = [[match.start() for match in re.finditer("loss|accuracy|/1000", line)] for line in stream_lines(stream)]
    assert len({tuple(column) for column in columns}) == 1
    assert len({len(line.split(" tokens/s")[0]) for line in stream_lines(stream)}) == 1


def plain(stream: io.StringIO) -> str:
    """What is printed, without colours and moves of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())


def stream_lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_the_loss_shown_is_the_mean_since_the_last_line() -> None:
    stream = io.StringIO()
    run(LineObserver(10, stream), 0, 20, validate_every=100)
    assert [re.search(r"loss +([\d.]+)", line)[1] for line in stream_lines(stream)] == ["5.5000", "15.5000"]


@pytest.mark.parametrize(
    "first, last, seconds_a_step, left",
    [(0, 40, 3.0, "2 min"), (100, 140, 3.0, "2 min"), (0, 40, 1.0, "30 s"), (0, 130, 120.0, "4 h 0 min")],
)
def test_the_time_left_is_that_of_the_steps_of_this_run(
    first: int, last: int, seconds_a_step: float, left: str
) -> None:
    now, stream = [1000.0], io.StringIO()
    observer = LineObserver(10, stream, clock=lambda: now[0])
    observer.start(first, last)
    for number in range(first + 1, first + 11):
        now[0] += seconds_a_step
        observer.step(step(number))
    said = stream_lines(stream)[-1].split("tokens/s")[1].strip()
    assert said == f"{left} left"


@pytest.mark.parametrize("kind", [LineObserver, BarObserver])
def test_a_resumed_run_says_after_which_step_and_a_fresh_or_finished_one_does_not(kind: type) -> None:
    said = {}
    for first in (0, 20, 30):
        stream = Terminal()
        run(kind(10, stream), first, 30, validate_every=100)
        said[first] = "resuming" in stream.getvalue()
        assert first != 20 or "resuming after step 20 of 30" in stream.getvalue()
        assert kind is LineObserver or f"step {first}/30 " in plain(stream), "where the bar begins"
    assert said == {0: False, 20: True, 30: False}


def test_a_terminal_gets_a_bar_with_a_line_above_it_for_each_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    observer = choose(10, stream)
    assert isinstance(observer, BarObserver)
    run(observer, 0, 40, validate_every=20)
    observer.note("a note with [brackets]")
    text = plain(stream)
    assert text.count("step 20  held out") == text.count("step 40  held out") == 1
    assert re.search(r"step 40/40 .*loss 35.500, 50% 25%, acceptance length 2.50 \d", text)
    assert "a note with [brackets]\n" in text


def test_what_is_no_terminal_or_has_no_rich_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(choose(10, io.StringIO()), LineObserver)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert isinstance(choose(10, Terminal()), LineObserver)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    lines = [{"kind": "step", "step": n, "loss": 5 / n} for n in range(1, 41)]
    lines += [{"kind": "validation", "step": n, "loss": 5 / n, "acceptance_length": n / 10} for n in (20, 40)]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_picture_is_a_function_of_the_log_and_is_written_whole(log: Path) -> None:
    drawn = picture.draw(log)
    assert picture.save(log).read_bytes() == drawn
    assert drawn.startswith(PNG)
    assert sorted(path.name for path in log.parent.iterdir()) == ["log.jsonl", "training.png"]
    log.write_text(log.read_text() + '{"kind": "step", "st')
    assert picture.draw(log) == drawn, "a torn last line is left out"
    log.write_text(log.read_text().replace("2.0", "3.0"))
    assert picture.draw(log) != drawn


def test_without_held_out_conversations_there_is_still_a_picture(log: Path) -> None:
    log.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if "step" in line[:20]))
    assert picture.draw(log).startswith(PNG)


def test_without_matplotlib_the_picture_names_what_to_install(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'taps_ext\[cli\]'"):
        picture.save(log)
    assert list(log.parent.iterdir()) == [log]
