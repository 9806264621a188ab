"""Claims about files that are written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from taps_ext.checkpoints.disk import check_writable, write_text, write_whole, written


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
    with pytest.raises(OSError, match=reason) as caught, written("the drafter", tmp_path, "give another folder"):
        raise error
    told = str(caught.value)
    assert told.startswith(f"the drafter could not be written to {tmp_path} (") and told.endswith(
        "; give another folder"
    )
    assert "\n" not in told


def test_a_folder_that_cannot_be_is_refused_before_any_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "deeper")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"cannot be a folder, as .*/file is a file; give another one"):
        check_writable(tmp_path / "file" / "new")
