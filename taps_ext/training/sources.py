"""Where conversations are read from: JSON files, folders, and Hugging Face data sets. Read by number, in any order."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from pathlib import Path
from typing import Any, Protocol

from .conversations import NOT_JSON, NOT_TEXT, BadRecord
from .recipe import SourceConfig

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
COMMIT = re.compile(r"^hf://datasets/[^@]+@([0-9a-f]{40})/")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Source(Protocol):
    """Records by number. Nothing of them stays in memory, so that a million of them may come."""

    @property
    def name(self) -> str:
        """The path without the folders of this machine."""
        ...

    @property
    def sha256(self) -> str | None:
        """Of the file; None for a data set."""
        ...

    @property
    def revision(self) -> str | None:
        """The commit of a data set on the hub."""
        ...

    def __len__(self) -> int: ...

    def origin(self, index: int) -> str:
        """Where a record stands, for people."""
        ...

    def record(self, index: int) -> object:
        """What is there, to be parsed; BadRecord if that cannot be read."""
        ...


class JsonLines:
    """A file with one JSON object a line. Blank lines do not count; the last line may lack its end."""

    revision = None

    def __init__(self, path: str) -> None:
        self.path, self.name = path, Path(path).name
        self._starts, self._lines = array("q"), array("q")
        digest, position = hashlib.sha256(), 0
        with Path(path).expanduser().open("rb") as file:
            for number, line in enumerate(file, 1):  # bytes: only \n ends a line, whatever the strings hold
                digest.update(line)
                if line.removeprefix(BYTE_ORDER_MARK).strip():
                    self._starts.append(position)
                    self._lines.append(number)
                position += len(line)
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._starts)

    def origin(self, index: int) -> str:
        """file:line, from 1."""
        return f"{self.path}:{self._lines[index]}"

    def record(self, index: int) -> object:
        """What a line holds, of those that are not blank, by its number from 0."""
        with Path(self.path).expanduser().open("rb") as file:
            file.seek(self._starts[index])
            return _from_json(file.readline())


class JsonArray:
    """A file that is one JSON array of objects, as ShareGPT and MathInstruct are published. It is kept in memory."""

    revision = None

    def __init__(self, path: str) -> None:
        content = Path(path).expanduser().read_bytes()
        self.path, self.name = path, Path(path).name
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self._records = _from_json(content)
        except BadRecord as error:
            raise ValueError(f"{path} begins like a JSON array but is {error}") from error

    def __len__(self) -> int:
        return len(self._records)

    def origin(self, index: int) -> str:
        """file[entry], from 0."""
        return f"{self.path}[{index}]"

    def record(self, index: int) -> object:
        """An entry."""
        return self._records[index]


class DataSet:
    """A split of a data set on the hub, or of a folder of parquet, JSON lines or other files that `datasets` reads."""

    sha256 = None

    def __init__(self, config: SourceConfig) -> None:
        self.path, self.split = config.path, config.split
        local = Path(config.path).expanduser()
        self.name = local.resolve().name if local.is_dir() else config.path
        self._rows = _load(str(local) if local.is_dir() else config.path, config)
        commits = map(COMMIT.match, self._rows.info.download_checksums or {})
        self.revision = next((match[1] for match in commits if match), None)

    def __len__(self) -> int:
        return len(self._rows)

    def origin(self, index: int) -> str:
        """name/split:row, from 0."""
        return f"{self.path}/{self.split}:{index}"

    def record(self, index: int) -> object:
        """A row."""
        return self._rows[index]


def open_source(config: SourceConfig) -> Source:
    """The conversations of a source; ValueError in one sentence when there is no such thing."""
    path = Path(config.path).expanduser()
    if path.is_file():
        return _open_file(path, config)
    if path.is_dir() or (HUB_NAME.fullmatch(config.path) and path.suffix not in (".json", ".jsonl")):
        return DataSet(config)
    raise ValueError(
        f"there is no {config.path}; give a .jsonl or .json file, a folder, or a data set of the hub as owner/name"
    )


def _open_file(path: Path, config: SourceConfig) -> Source:
    if path.suffix not in (".jsonl", ".json"):
        raise ValueError(
            f"{config.path} is neither .jsonl nor .json; give the folder that it is in to read other files"
        )
    if config.split != "train" or config.name is not None:
        raise ValueError(f"{config.path} is a file; split and name are for data sets, leave them out")
    return JsonArray(config.path) if path.suffix == ".json" and _begins_an_array(path) else JsonLines(config.path)


def _begins_an_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1024).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")


def _from_json(content: bytes) -> Any:
    try:
        return json.loads(content.removeprefix(BYTE_ORDER_MARK).decode())
    except UnicodeDecodeError:
        raise BadRecord(NOT_TEXT) from None
    except (ValueError, RecursionError):
        raise BadRecord(NOT_JSON) from None


def _load(path: str, config: SourceConfig) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError(f"reading {config.path} needs {error.name}: pip install 'taps_ext[train]'") from error
    try:
        return datasets.load_dataset(path, config.name, split=config.split)
    except Exception as error:  # hub, disk, format, configuration: each has exceptions of its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"data set {config.path} (split {config.split}) cannot be loaded: {reason}") from error
