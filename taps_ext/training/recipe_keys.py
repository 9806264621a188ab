"""The keys of a recipe, read off its dataclasses: which there are, of what type, and which one was probably meant."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from .config import Recipe, SourceConfig

SHORT_COUNT = re.compile(r"(\d+)(?:\.(\d+))?([km])", re.IGNORECASE)  # 35k, 1.5m
THOUSANDS = {"k": 3, "m": 6}


@cache
def fields_of(section: type) -> dict[str, Any]:
    """The types of a section's fields, by name."""
    return get_type_hints(section)


def type_at(path: tuple[str, ...], kind: Any = Recipe) -> Any:
    """The type of what is at a dotted path; None if there is no such key."""
    for key in path:
        if dataclasses.is_dataclass(kind):
            kind = fields_of(kind).get(key)  # type: ignore[arg-type]
        else:
            kind = get_args(kind)[0] if get_origin(kind) is tuple and key.isdigit() else None
    return kind


def is_text(kind: Any) -> bool:
    """Whether a field holds free text."""
    return kind is str or (str in get_args(kind) and NoneType in get_args(kind))


def normalised(value: Any, kind: Any = Recipe) -> Any:
    """The tree with short forms written out: 35k, a source that is only a path, a section without content."""
    if dataclasses.is_dataclass(kind):
        if kind is SourceConfig and isinstance(value, str):
            return {"path": value}
        value = {} if value is None else value
    if isinstance(value, dict):
        return {key: normalised(item, type_at((str(key),), kind)) for key, item in value.items()}
    if isinstance(value, list):
        return [normalised(item, type_at(("0",), kind)) for item in value]
    return _integer(value) if kind is int or int in get_args(kind) else value


def _integer(value: Any) -> Any:
    """35k as 35000 and 1e3 as 1000; what is no whole number stays as it is, and is refused later."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and (match := SHORT_COUNT.fullmatch(value)):
        whole, decimals, unit = match[1], (match[2] or "").rstrip("0"), THOUSANDS[match[3].lower()]
        if len(decimals) <= unit:
            return int(whole + decimals.ljust(unit, "0"))
    return value


def unknown_keys(tree: Any, kind: Any = Recipe, path: tuple[str, ...] = ()) -> Iterator[str]:
    """A sentence for each key that no section has, with the key that was probably meant."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        here = (*path, str(key))
        child = type_at((str(key),), kind)
        if child is not None:
            yield from unknown_keys(value, child, here)
        elif dataclasses.is_dataclass(kind):
            yield f"{'.'.join(here)} is not known; {_advice(here, kind)}"


def _advice(path: tuple[str, ...], section: Any) -> str:
    prefix, key = path[:-1], path[-1]
    siblings = list(fields_of(section))
    meant = [full for full in _leaves() if full[-1] == key]
    if not meant:
        meant = [(*prefix, name) for name in get_close_matches(key, siblings, 1)]
    if not meant:
        near = get_close_matches(key, [full[-1] for full in _leaves()], 1)
        meant = [full for full in _leaves() if full[-1] in near]
    if meant:
        return f"did you mean {' or '.join('.'.join(full) for full in meant)}?"
    return f"{'.'.join(prefix) or 'a recipe'} has {', '.join(siblings)}"


def _leaves(kind: Any = Recipe, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all keys that hold no section, with 0 for the number of a source."""
    if get_origin(kind) is tuple and dataclasses.is_dataclass(get_args(kind)[0]):
        kind, path = get_args(kind)[0], (*path, "0")
    if not dataclasses.is_dataclass(kind):
        return [path]
    return [leaf for name, child in fields_of(kind).items() for leaf in _leaves(child, (*path, name))]  # type: ignore[arg-type]
