"""Claims about files and directories that are written whole or not at all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from taps_ext.checkpoints.files import check_writable, replacing, write_text, write_whole, written


def test_a_write_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    for content in ("old and long", "new"):
        write_text(path, content)
        assert path.read_text() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield b"new"
        raise OSError(28, "No space left on device")

    path = tmp_path / "figures.json"
    write_text(path, "old")
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, parts())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


LETTERS, LENGTH, PARTS = "on", 300_000, ("a", "b", "c")


def write_for_ever(folder: Path) -> None:
    while True:
        for letter in LETTERS:
            write_whole(folder / "file", (letter.encode() * LENGTH for _ in PARTS))
            with replacing(folder / "directory") as fresh:
                fresh.mkdir()
                for part in PARTS:
                    (fresh / part).write_text(letter * LENGTH)


def is_whole(path: Path) -> bool:
    """The old one or the new one, and nothing between."""
    if path.is_file():
        return path.read_text() in [letter * LENGTH * len(PARTS) for letter in LETTERS]
    contents = {part.name: part.read_text() for part in path.iterdir()}
    return contents in [dict.fromkeys(PARTS, letter * LENGTH) for letter in LETTERS]


def test_a_process_killed_while_it_writes_leaves_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    random, names = Random(2), ("file", "directory")
    for _ in range(15):
        writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(tmp_path,))
        writer.start()
        while not all((tmp_path / name).exists() for name in names):
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.02))
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert [is_whole(tmp_path / name) for name in names] == [True, True]
    assert len([*tmp_path.iterdir()]) > len(names), "no kill came while something was being written"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can swap two directories")
def test_there_is_one_at_any_moment_while_another_takes_its_place(tmp_path: Path) -> None:
    writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(tmp_path,))
    writer.start()
    try:
        while not (tmp_path / "directory").exists():
            time.sleep(0.001)
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            assert (tmp_path / "directory").exists() and (tmp_path / "file").exists()
    finally:
        writer.kill()
        writer.join()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device", "/a/b"), "No space left on device"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), "the disk took a part"),
        (RuntimeError("first line\nsecond line"), r"first line;"),
    ],
)
def test_what_could_not_be_written_is_one_sentence_whoever_failed(
    error: Exception, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match=reason) as caught, written("the drafter", tmp_path, "give another directory"):
        raise error
    told = str(caught.value)
    assert told.startswith(f"the drafter could not be written to {tmp_path} (") and told.endswith(
        "; give another directory"
    )
    assert "\n" not in told


def test_a_directory_that_cannot_be_is_refused_before_any_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "deeper")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"cannot be a directory, as .*/file is a file; give another one"):
        check_writable(tmp_path / "file" / "new")
