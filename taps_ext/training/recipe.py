"""Recipes: all that a drafter's training depends on besides the code, as dataclasses, YAML files and overrides.

OmegaConf merges and converts. It is handed text, for of YAML's plain words only null means something here: `no` in a
text field stays a word, and `3e-5` in a field of numbers becomes one. (Half of this file is the list of the keys.)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

ObjectiveName = Literal["eagle2", "hass"]
VocabularyTokens = Literal["frequent", "all"]
FeatureMode = Literal["online", "stored"]
DtypeName = Literal["bfloat16", "float16", "float32"]
TargetDtypeName = Literal["auto", "bfloat16", "float16", "float32"]
Precision = Literal["fp32", "bf16"]

SHORT_COUNT = re.compile(r"(\d+)(?:\.(\d+))?([km])", re.IGNORECASE)  # 35k, 1.5m
UNITS = {"k": 3, "m": 6}
EITHER = ("steps", "epochs")  # of training: the one that is given later takes back the other
EXAMPLES = {
    "target": "target=meta-llama/Meta-Llama-3-8B-Instruct",
    "output": "output=drafters/mine",
    "data": "data.sources=[conversations.jsonl]",
    "data.sources": "data.sources=[conversations.jsonl]",
    "training": "training.steps=10000 or training.epochs=20",
}


# ---- what a recipe holds


@dataclass(frozen=True)
class SourceConfig:
    """One place that conversations come from: a JSON lines file, a directory, or a data set of the hub by its name."""

    path: str
    split: str = "train"  # of a directory or data set
    name: str | None = None  # the configuration of a data set that has several
    count: int | None = None  # take so many conversations; None: all, or what `weight` says
    weight: float | None = None  # share of the mixture, relative to the other sources' weights

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise ValueError("path is empty; give a file, a directory, or a data set of the hub as owner/name")
        if self.count is not None and self.weight is not None:
            raise ValueError(f"source {self.path} has a count and a weight; give one of them")
        _at_least(self, 1, "count")
        _positive(self, "weight")


@dataclass(frozen=True)
class DataConfig:
    """The conversations, and how they become token sequences."""

    sources: list[SourceConfig]  # kept as a tuple
    max_length: int = 2048  # tokens; a longer conversation is cut there
    validation: int = 128  # conversations that are held out, at most a tenth of all
    system_prompt: str | None = None  # put before conversations that bring none
    chat_template: str | None = None  # a jinja file; None: the tokenizer's own
    deduplicate: bool = True
    seed: int = 0  # of the choice and order of the conversations

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        if not self.sources:
            raise ValueError("data.sources is empty; give at least one, such as {path: conversations.jsonl}")
        if len({source.weight is None for source in self.sources}) > 1:
            raise ValueError(
                "either every source has a weight or none has; use count to take a number of conversations"
            )
        _at_least(self, 3, "max_length")
        _at_least(self, 0, "validation")


@dataclass(frozen=True)
class FeatureConfig:
    """Where the target's features come from: computed as they are needed, or read from where they were stored."""

    mode: FeatureMode = "online"
    path: str | None = None  # of stored features; None: `features` in the output directory
    dtype: DtypeName = "bfloat16"  # of features on disk


@dataclass(frozen=True)
class VocabularyConfig:
    """Choose the tokens that the drafter can propose: the most frequent ones among the learned tokens, or all."""

    tokens: VocabularyTokens = "frequent"
    coverage: float | None = None  # share of the learned tokens; None: 0.99
    max_size: int | None = None  # most tokens; None: 8,192 of a target with fewer than 65,536 tokens, else 32,000

    def __post_init__(self) -> None:
        _at_least(self, 1, "max_size")
        _positive(self, "coverage")
        if self.coverage is not None and self.coverage > 1:
            raise ValueError(f"vocabulary.coverage must be at most 1, got {self.coverage}")
        if self.tokens == "all" and (self.coverage is not None or self.max_size is not None):
            raise ValueError("vocabulary.tokens is all, and coverage and max_size choose some; leave them out")

    def max_size_of(self, vocab_size: int) -> int | None:
        """Return the most tokens of a draft vocabulary for a target with V tokens; None: it has all of them."""
        usual = 8192 if vocab_size < 65536 else 32000
        is_usual = self.coverage is None and self.max_size is None
        return None if self.tokens == "all" or (is_usual and vocab_size <= usual) else self.max_size or usual


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss. The published weights are 1.0 (feature) and 0.1 (distribution); HASS adds 1.0 (top tokens)."""

    name: ObjectiveName = "eagle2"
    feature_weight: float = 1.0  # smooth L1 between the drafter's output and the target's next feature
    distribution_weight: float = 0.1  # cross-entropy against the target's whole distribution
    noise: float = 0.1  # eagle2: half the width of the uniform noise on features, at 512 tokens (times 512 / length)
    alignment_passes: int = 3  # hass: the deepest pass sees two of its own features in a row
    top_weight: float = 1.0  # hass: cross-entropy against the target's likeliest tokens
    num_top_tokens: int = 10  # hass

    def __post_init__(self) -> None:
        _at_least(self, 1, "alignment_passes", "num_top_tokens")
        _at_least(self, 0, "feature_weight", "distribution_weight", "noise", "top_weight")

    @property
    def num_passes(self) -> int:
        """Return the forward and backward passes of the drafter per batch."""
        return self.alignment_passes if self.name == "hass" else 1


@dataclass(frozen=True)
class TrainingConfig:
    """The run: how long, how fast, on what, and what is written when. Batch sizes count sequences."""

    steps: int | None = None  # updates; exactly one of steps and epochs is given
    epochs: float | None = None
    batch_size: int = 16  # of an update, over all processes
    micro_batch_size: int | None = None  # of one forward on one process, at most; None: batch_size over the processes
    learning_rate: float = 3e-5  # at its peak
    warmup_steps: int = 0  # linear from 0
    decay_steps: int | None = None  # linear to 0 at this step; None: at the last one
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float | None = None  # of the whole gradient
    clip_value: float | None = 0.5  # of each of its elements
    precision: Precision = "fp32"
    gradient_checkpointing: bool = False  # less memory for a second forward of the MLP and its norm
    seed: int = 0  # of the initial weights, the order of the data and the noise
    log_every: int = 10  # steps
    validate_every: int = 500
    save_every: int = 500
    keep_checkpoints: int = 2  # the latest ones, besides the best drafter
    calibrate: bool = True  # the best and the final drafter at the end, so that they can draft with the target's noise
    tracker: str = "none"  # or what accelerate knows: tensorboard, wandb, trackio, mlflow, ...

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"exactly one of training.steps and training.epochs must be given, got {self.steps} and {self.epochs}"
            )
        _at_least(self, 1, "steps", "batch_size", "micro_batch_size", "decay_steps")
        _at_least(self, 1, "log_every", "validate_every", "save_every", "keep_checkpoints")
        _at_least(self, 0, "warmup_steps", "weight_decay")
        _positive(self, "epochs", "learning_rate", "clip_norm", "clip_value")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"training.betas must be at least 0 and below 1, got {self.betas}")


@dataclass(frozen=True)
class Recipe:
    """A whole training run: a target, conversations, an objective, and the directory that everything is written to."""

    target: str  # directory or hub id
    output: str  # directory
    data: DataConfig
    training: TrainingConfig
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    target_revision: str | None = None  # branch, tag or commit of a hub id
    target_dtype: TargetDtypeName = "auto"
    start: str | None = None  # a drafter to train further, directory or hub id; None: from nothing
    drafter_dtype: DtypeName = "bfloat16"  # of the saved drafter

    def __post_init__(self) -> None:
        for name in ("target", "output"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} is empty; give a directory" + (" or a hub id" if name == "target" else ""))

    @property
    def features_path(self) -> Path:
        """Return the directory of the stored features."""
        return Path(self.features.path or Path(self.output) / "features").expanduser()


def _at_least(config: Any, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and (not value >= least or value == float("inf")):
            wanted = "finite" if value > least else f"at least {least:g}"
            raise ValueError(f"{PREFIXES[type(config)]}{name} must be {wanted}, got {value}")


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{PREFIXES[type(config)]}{name} must be positive, got {value}")


PREFIXES: dict[type, str] = {  # of the fields' whole names
    SourceConfig: "data.sources[].",
    DataConfig: "data.",
    VocabularyConfig: "vocabulary.",
    ObjectiveConfig: "objective.",
    TrainingConfig: "training.",
}


# ---- files and overrides


def load_recipe(paths: Sequence[Path], overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of YAML files, later ones over earlier ones, and of overrides such as `training.seed=5`.

    Sections are merged key by key, lists are replaced; `data.sources.0.count=35k` reaches into a list. Of training's
    steps and epochs the one that was given last holds. A chat template that a file names is looked for beside it.
    Raise ValueError with a sentence on each line for each thing wrong.
    """
    try:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
    except ModuleNotFoundError as error:
        raise ValueError(f"recipes need {error.name}: pip install 'taps_ext[train]'") from error

    tree: Any = OmegaConf.create({})
    for path in map(Path, paths):
        layer = _beside(path, _normalised(_read_file(path)))
        tree = OmegaConf.merge(_without_other(tree, layer.get("training")), layer)
    for key, value in map(_parsed, overrides):
        section, _, name = key.rpartition(".")
        _without_other(tree, value if key == "training" else {name: value} if section == "training" else None)
        try:
            OmegaConf.update(tree, key, value, merge=True)
        except (OmegaConfBaseException, TypeError):
            raise ValueError(f"there is no {key}: a list has fewer entries, which count from 0") from None
    if wrong := list(_misfits(OmegaConf.to_container(tree))):
        raise ValueError("\n".join(wrong))
    try:
        recipe: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), tree))
    except OmegaConfBaseException as error:  # an interpolation, ${...}, of what is not there
        raise ValueError(str(error).splitlines()[0]) from error
    assert isinstance(recipe, Recipe)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """Return YAML with every key of the recipe, which `load_recipe` reads as an equal one."""
    import yaml

    text: str = yaml.safe_dump(as_tree(recipe), sort_keys=False, allow_unicode=True, width=2**31)
    return text


def as_tree(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as dicts, lists and plain values, as YAML and JSON have them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value

    return {name: plain(value) for name, value in dataclasses.asdict(recipe).items()}


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"there is no recipe {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the recipe {path} cannot be read: {error}") from error
    tree = _read_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold keys and values, such as target: DIRECTORY, got {type(tree).__name__}")
    return tree


def _read_yaml(text: str, origin: str) -> Any:
    """Return what the text says, plain words but null as text; raise ValueError, with the line, if it is no YAML."""
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark and "\n" in text else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{origin}{line} is not YAML: {problem}") from error


@cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for index, key in enumerate(keys):
                if key in keys[:index]:
                    mark = node.value[index][0].start_mark
                    raise yaml.constructor.ConstructorError(problem=f"{key} is given twice", problem_mark=mark)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
    return Loader


def _beside(path: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree of a file, whose chat template is named from the file's own directory."""
    data = tree.get("data")
    name = data.get("chat_template") if isinstance(data, dict) else None
    if isinstance(name, str) and (file := path.parent / name).is_file():
        return {**tree, "data": {**tree["data"], "chat_template": str(file)}}
    return tree


def _parsed(override: str) -> tuple[str, Any]:
    """Return the key and the value of `key=value`; what a text field gets needs no quotes."""
    key, sign, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not sign or not all(path):
        raise ValueError(f"{override!r} is no override; write key=value, such as training.learning_rate=5e-5")
    kind, value = type_at(path), text
    if not is_text(kind) or text.strip()[:1] in ("", "'", '"', "~") or text.strip() == "null":
        value = _read_yaml(text, f"the value of {key}")
    return ".".join(path), _normalised(value, kind)


def _without_other(tree: Any, training: Any) -> Any:
    """Return the tree without its steps or epochs where later values for training give the other one."""
    given = [name for name in EITHER if isinstance(training, dict) and training.get(name) is not None]
    if len(given) == 1 and isinstance(tree.get("training"), Mapping):
        for name in set(EITHER) - set(given):
            tree["training"].pop(name, None)
    return tree


# ---- the keys of a recipe, read off its dataclasses


def type_at(path: tuple[str, ...], kind: Any = Recipe) -> Any:
    """Return the type of what is at a dotted path; None if there is no such key."""
    for key in path:
        if dataclasses.is_dataclass(kind):
            kind = _fields(kind).get(key)  # type: ignore[arg-type]
        else:
            kind = get_args(kind)[0] if get_origin(kind) in (list, tuple) and key.isdigit() else None
    return kind


def is_text(kind: Any) -> bool:
    """Return whether a field holds free text."""
    return kind is str or (str in get_args(kind) and NoneType in get_args(kind))


@cache
def _fields(section: type) -> dict[str, Any]:
    return get_type_hints(section)


def _normalised(value: Any, kind: Any = Recipe) -> Any:
    """Return the tree with short forms written out: 35k, a source that is only a path, a section without content."""
    if dataclasses.is_dataclass(kind):
        if kind is SourceConfig and isinstance(value, str):
            return {"path": value}
        value = {} if value is None else value
    if isinstance(value, dict):
        return {str(key): _normalised(item, type_at((str(key),), kind)) for key, item in value.items()}
    if isinstance(value, list):
        return [_normalised(item, type_at(("0",), kind)) for item in value]
    return _integer(value) if isinstance(value, str) and (kind is int or int in get_args(kind)) else value


def _integer(text: str) -> str:
    """Return 35k as 35000 and 1e3 as 1000; what is no whole number stays as it is, and is refused later."""
    if match := SHORT_COUNT.fullmatch(text):
        whole, decimals, unit = match[1], (match[2] or "").rstrip("0"), UNITS[match[3].lower()]
        return whole + decimals.ljust(unit, "0") if len(decimals) <= unit else text
    try:
        return f"{int(number)}" if (number := float(text)).is_integer() else text
    except ValueError:
        return text


def _misfits(tree: Any, kind: Any = Recipe, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield a sentence for each unknown key, each missing one and each value that does not fit its field."""
    where = ".".join(path)
    if get_origin(kind) is list and isinstance(tree, list):
        for number, item in enumerate(tree):
            yield from _misfits(item, get_args(kind)[0], (*path, str(number)))
    elif dataclasses.is_dataclass(kind) and isinstance(tree, dict):
        for key in (key for key in tree if key not in _fields(kind)):  # type: ignore[arg-type]
            yield f"{'.'.join((*path, key))} is not known; {_advice((*path, key), kind)}"
        for one in dataclasses.fields(kind):
            name = ".".join((*path, one.name))
            if one.name in tree:
                yield from _misfits(tree[one.name], _fields(kind)[one.name], (*path, one.name))  # type: ignore[arg-type]
            elif one.default is one.default_factory is dataclasses.MISSING:
                yield f"the recipe has no {name}; give {EXAMPLES.get(name, f'{name}=...')}"
    elif dataclasses.is_dataclass(kind) or get_origin(kind) is list or not _fits(tree, kind):
        yield f"{where} must be {_expected(kind)}, got {'null' if tree is None else repr(tree)}"


def _fits(value: Any, kind: Any) -> bool:
    """Return whether OmegaConf takes a value for a field."""
    from omegaconf.errors import OmegaConfBaseException

    try:
        _one_field(kind).merge_with({"field": value})
    except (OmegaConfBaseException, TypeError, ValueError):
        return False
    return True


def _one_field(kind: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.structured(dataclasses.make_dataclass("OneField", [("field", kind)]))


def _expected(kind: Any) -> str:
    """Return what a field may hold, for people."""
    if dataclasses.is_dataclass(kind):
        return "a section of keys and values"
    if get_origin(kind) in (list, tuple):
        return "a list" if get_origin(kind) is list else f"a list of {len(get_args(kind))} numbers"
    if get_origin(kind) is Literal:
        *others, last = map(repr, get_args(kind))
        return f"{', '.join(others)} or {last}"
    if NoneType in get_args(kind):
        return f"{_expected(get_args(kind)[0])} or null"
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}[kind]


def _advice(path: tuple[str, ...], section: Any) -> str:
    """Return the key that was probably meant, or the keys that there are."""
    prefix, key = path[:-1], path[-1]
    siblings = list(_fields(section))
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
    """Return the paths of all keys that hold no section, with 0 for the number of a source."""
    if get_origin(kind) is list:
        kind, path = get_args(kind)[0], (*path, "0")
    if not dataclasses.is_dataclass(kind):
        return [path]
    return [leaf for name, child in _fields(kind).items() for leaf in _leaves(child, (*path, name))]  # type: ignore[arg-type]
