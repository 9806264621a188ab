"""Files of tensors, read and written one tensor at a time: safetensors, and .bin without running anything in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The names that the safetensors format has for the dtypes a checkpoint of a model may use.
DTYPE_CODES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
READABLE_CODES = {
    **{code: dtype for dtype, code in DTYPE_CODES.items()},
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
HASHED_BYTES = 1 << 22  # of a file at a time


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is not in memory yet: what it looks like, where it is, and how to get it (on the CPU)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    name: str = ""  # in its file; empty for one that comes from no file
    file: Path | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> StoredTensor:
        """One that is in memory, to be written with others."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor.detach().cpu())

    @property
    def num_bytes(self) -> int:
        """Its size, in memory and in a file."""
        return prod(self.shape) * self.dtype.itemsize

    def cast(self, dtype: torch.dtype) -> StoredTensor:
        """The same values in another dtype; reading raises ValueError where they do not fit into it."""
        return self if dtype == self.dtype else replace(self, dtype=dtype, read=lambda: _cast(self, dtype))


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name, none of them read yet. Raises ValueError, in a sentence."""
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_bin(path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, in a sentence."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def shard_map(index_file: Path) -> dict[str, str]:
    """Tensor name to file name, of an index of shards; all of them files beside it."""
    shards = read_json(index_file).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"{index_file} has no weight_map of tensor names to files; fetch it again")
    if any(Path(shard).name != shard for shard in shards.values()):
        raise ValueError(f"{index_file} names shards outside of its folder; it is not read")
    return shards


def write_safetensors(path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> str:
    """The SHA-256 of the file written; one tensor is in memory at a time, equal tensors give equal bytes."""
    # The largest elements first, so that every tensor starts at a multiple of its element's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].num_bytes
        code = DTYPE_CODES[tensors[name].dtype]
        header[name] = {"dtype": code, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            file.write(part)
        for name in names:
            content = _bytes(name, tensors[name])
            digest.update(content)
            file.write(content)
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(HASHED_BYTES):
            digest.update(part)
    return digest.hexdigest()


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, "pt")
        tensors = {name: _stored(path, file, name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        raise _unreadable(path, error) from error
    return tensors


def _stored(path: Path, file: Any, name: str) -> StoredTensor:
    described = file.get_slice(name)
    if (code := described.get_dtype()) not in READABLE_CODES:
        raise ValueError(f"{name} in {path} is of dtype {code}, which no drafter or target has; fetch the file again")
    shape = tuple(described.get_shape())
    return StoredTensor(READABLE_CODES[code], shape, lambda: file.get_tensor(name), name, path)


def _open_bin(path: Path) -> dict[str, StoredTensor]:
    tensors = _load_bin(path)
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} must hold a dict of tensors; save the drafter's state_dict() there")
    return {str(name): replace(StoredTensor.of(value), name=str(name), file=path) for name, value in tensors.items()}


def _load_bin(path: Path) -> Any:
    """What `torch.load` reads as tensors and plain values; bytes stay in the file until they are used.

    Files of torch before 1.6 are no archives and cannot stay: they are read whole.
    """
    import zipfile

    with path.open("rb") as file:  # and let a file that cannot be opened say so
        is_archive = zipfile.is_zipfile(file)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:  # a damaged file raises whatever its bytes happen to say
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(
        f"{path} cannot be read as tensors and nothing else ({reason}); "
        f"fetch it again, or save the drafter's state_dict() as model.safetensors"
    )


def _cast(stored: StoredTensor, dtype: torch.dtype) -> Tensor:
    tensor = stored.read()
    cast = tensor.to(dtype)
    if not torch.equal(torch.isfinite(cast), torch.isfinite(tensor)):
        raise ValueError(f"{stored.name} holds values that {str(dtype).removeprefix('torch.')} cannot; use bfloat16")
    return cast


def _bytes(name: str, stored: StoredTensor) -> memoryview:
    """The tensor as the file holds it, without a copy where it can be."""
    tensor = stored.read()
    if tensor.dtype != stored.dtype or tuple(tensor.shape) != stored.shape:
        raise AssertionError(f"{name} must be {stored.dtype} {stored.shape}, got {tensor.dtype} {tensor.shape}")
    content: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(content)
