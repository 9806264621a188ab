"""Recipes as YAML files and `key=value` overrides: read with types checked, and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from .config import Recipe
from .recipe_keys import is_text, normalised, type_at, unknown_keys
from .recipe_yaml import read_yaml, write_yaml

EITHER = ("steps", "epochs")  # of training: who gives one later takes back the other
EXAMPLES = {
    "target": "target=meta-llama/Meta-Llama-3-8B-Instruct",
    "output": "output=drafters/mine",
    "data": "data.sources=[conversations.jsonl]",
    "data.sources": "data.sources=[conversations.jsonl]",
    "training": "training.steps=10000 or training.epochs=20",
}
EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dataclass_type": "a section of keys and values",
}


def load_recipe(paths: Sequence[Path], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of YAML files, later ones over earlier ones, and of overrides such as `training.learning_rate=5e-5`.

    Sections are merged key by key, lists are replaced; `data.sources.0.count=35k` reaches into a list. Of training's
    steps and epochs the one that was given last holds. A chat template that a file names is looked for beside it.
    ValueError: a sentence on each line for each thing wrong.
    """
    tree: dict[str, Any] = {}
    for path in paths:
        tree = _overlaid(tree, _beside(path, normalised(_read(path))))
    changes: Any = {}
    for override in overrides:
        changes = _merged(changes, normalised(_parsed(override)))
    tree = _overlaid(tree, changes)
    if wrong := list(unknown_keys(tree)):
        raise ValueError("\n".join(wrong))
    return _typed(tree)


def dump_recipe(recipe: Recipe) -> str:
    """YAML with every key of the recipe, which `load_recipe` reads as an equal one."""
    return write_yaml(as_tree(recipe))


def as_tree(recipe: Recipe) -> dict[str, Any]:
    """The recipe as dicts, lists and plain values, as YAML and JSON have them."""
    return {name: _plain(value) for name, value in dataclasses.asdict(recipe).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _read(path: Path) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"there is no recipe {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the recipe {path} cannot be read: {error}") from error
    tree = read_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold keys and values, such as target: FOLDER, got {type(tree).__name__}")
    return tree


def _beside(path: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """The tree of a file, whose chat template is named from the file's own folder."""
    data = tree.get("data")
    name = data.get("chat_template") if isinstance(data, dict) else None
    if not isinstance(name, str) or not (file := Path(path).parent / name).is_file():
        return tree
    return {**tree, "data": {**tree["data"], "chat_template": str(file)}}


def _parsed(override: str) -> Any:
    """`a.b=c` as the tree {a: {b: c}}."""
    key, sign, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not sign or not all(path):
        raise ValueError(f"{override!r} is no override; write key=value, such as training.learning_rate=5e-5")
    value: Any = text
    if not is_text(type_at(path)) or text.strip()[:1] in ("", "'", '"', "~") or text.strip() == "null":
        value = read_yaml(text, f"the value of {key}")
    for part in reversed(path):
        value = {part: value}
    return value


def _merged(base: Any, layer: Any, path: tuple[str, ...] = ()) -> Any:
    """The layer over the base: dicts by key, a list's entries by number, everything else replaced."""
    if not isinstance(layer, dict) or not isinstance(base, (dict, list)):
        return layer
    merged: Any = base.copy()
    for key, value in layer.items():
        here, place = (*path, str(key)), key
        if isinstance(base, list):
            if not str(key).isdigit() or int(key) >= len(base):
                raise ValueError(f"there is no {'.'.join(here)}; {'.'.join(path)} has {len(base)} and counts from 0")
            place = int(key)
        present = isinstance(base, list) or key in base
        merged[place] = _merged(base[place], value, here) if present else value
    return merged


def _overlaid(base: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = _merged(base, layer)
    training = layer.get("training")
    if isinstance(training, dict):
        given = [name for name in EITHER if training.get(name) is not None]
        if len(given) == 1:
            tree["training"] = {name: v for name, v in tree["training"].items() if name not in EITHER or name in given}
    return tree


def _typed(tree: dict[str, Any]) -> Recipe:
    """The tree as a Recipe; pydantic finds what does not fit, here it is said in sentences."""
    import json

    try:
        from pydantic import ValidationError
    except ModuleNotFoundError as error:
        raise ValueError(f"recipes need {error.name}: pip install 'taps_ext[train]'") from error
    try:
        # JSON, where lists are tuples: the strict mode for it changes no text into numbers and no number into text
        recipe: Recipe = _adapter().validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        raise ValueError("\n".join(map(_sentence, error.errors()))) from None
    return recipe


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Recipe)


def _sentence(error: Mapping[str, Any]) -> str:
    kind, path, given = error["type"], tuple(str(key) for key in error["loc"]), error["input"]
    where = ".".join(path)
    if kind == "value_error":
        return _located(str(error["ctx"]["error"]), path)
    if kind == "missing" and not path[-1].isdigit():
        return f"the recipe has no {where}; give {EXAMPLES.get(where, f'{where}=...')}"
    if kind in ("missing", "too_long"):
        path = path[:-1] if kind == "missing" else path
        return f"{'.'.join(path)} must have {len(get_args(type_at(path)))} entries, got {given}"
    expected = EXPECTED.get(kind) or error.get("ctx", {}).get("expected", error["msg"])
    or_null = " or null" if NoneType in get_args(type_at(path)) else ""
    quotes = "; put it in quotes" if kind == "string_type" and isinstance(given, (int, float)) else ""
    return f"{where} must be {expected}{or_null}, got {'null' if given is None else repr(given)}{quotes}"


def _located(message: str, path: tuple[str, ...]) -> str:
    """The sentence of a section about one of its fields, with the field's whole name."""
    field, _, rest = message.partition(" ")
    return f"{'.'.join((*path, field))} {rest}" if type_at((*path, field)) is not None else message
