"""What an evaluation compares: variants of decoding, each written as a short spec.

    [LABEL=]COMPOSITION[:NAME+NAME...][@NODES][,topk][,auto][,evidence=DECAY][,weight=W]

COMPOSITION is plain, single, average or one of the decoder's compositions; the names are the drafters that take part
(all, unless they are named). NODES is the size of each drafter's tree; `merged@NODES` verifies as many nodes of the
union, weighted by evidence unless `evidence=0`, and `merged` the whole union of trees of the evaluation's size.
`average` is one drafter of averaged weights, without look-ups, which have none; W is the first one's share of two.
`topk` drafts what is likely, without a look at the target's noise. With `auto` each step takes the tree that pays, by
the costs of the run, within the limits of `TreeShape.auto` and at most NODES nodes. The spec is the label where none is
given.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..composition import COMPOSITIONS, EVIDENCE_DECAY, check_decay
from ..tree import TreeShape

PLAIN, SINGLE, AVERAGE, MERGED, EVIDENCE = "plain", "single", "average", "merged", "evidence"
NAMES = (PLAIN, SINGLE, AVERAGE, *(name for name in COMPOSITIONS if name != SINGLE))
FLAGS = ("topk", "auto")
OPTIONS = (*FLAGS, EVIDENCE, "weight")
RESERVED = "+@,:="  # characters of a drafter's name that would make specs ambiguous
SPEC = re.compile(r"(?P<composition>[^:@,]*)(?::(?P<names>[^@,]*))?(?:@(?P<nodes>[^,]*))?(?:,(?P<options>.*))?")
LABELLED = re.compile(rf"(?P<label>[^=]*)=(?P<spec>(?:{'|'.join(NAMES)})(?:[:@,].*)?)")


@dataclass(frozen=True)
class Variant:
    """One way to decode."""

    label: str
    composition: str
    drafters: tuple[str, ...] = ()  # that take part, in the order given
    max_nodes: int | None = None  # of a tree, or verified of the union; None: no tree (plain), or the whole union
    drafting: str = "coupled"  # what is asked for: drafters that are not calibrated, as averages, draft top-k
    evidence_decay: float | None = None  # None: evidence plays no part; 0: a merged tree without weights
    weight: float | None = None  # of the first of two drafters in their average; None: equal weights, or no average
    adapts: bool = False  # each step takes the tree that pays; max_nodes is a limit

    @property
    def is_plain(self) -> bool:
        """Whether it is decoding without drafters, whose text every variant must give."""
        return self.composition == PLAIN

    @property
    def drafting_names(self) -> tuple[str, ...]:
        """The names of its decoder's drafters: an average is one."""
        return (AVERAGE,) if self.composition == AVERAGE else self.drafters

    def runs_at(self, temperature: float) -> bool:
        """Whether it is a variant of its own there: without noise, top-k is what coupled is."""
        return temperature > 0 or self.drafting == "coupled"

    def to_dict(self) -> dict[str, Any]:
        """All but the label, as JSON values."""
        told = asdict(self)
        del told["label"]
        return {**told, "drafters": list(self.drafters)}


def parse_variants(
    specs: Sequence[str],
    drafters: Sequence[str],
    temperatures: Sequence[float],
    max_nodes: int,
    without_weights: Collection[str] = (),
) -> list[Variant]:
    """The variants of these specs, of the default list without any; plain is the first, added where it is missing.

    Args:
        drafters: the names that there are.
        max_nodes: the size of a tree where a spec says none.
        without_weights: the names of drafters that cannot be averaged.

    Raises ValueError, in a sentence, for what is no spec, unknown names, and variants that are the same.
    """
    for name in drafters:
        if not name.strip() or any(character in name for character in RESERVED):
            raise ValueError(f"a drafter's name may not be empty or hold any of {RESERVED}, got {name!r}")
        if name == AVERAGE:
            raise ValueError(
                f"the name {AVERAGE!r} is that of averaged weights; give the drafter another, as NAME=FOLDER"
            )
    averaged = [name for name in drafters if name not in without_weights]
    specs = specs or default_specs(drafters, max_nodes, any(value > 0 for value in temperatures), len(averaged) > 1)
    variants = [_parse(spec.strip(), drafters, averaged, max_nodes) for spec in specs]
    plain = [one for one in variants if one.is_plain] or [Variant(PLAIN, PLAIN)]
    variants = [*plain, *(one for one in variants if not one.is_plain)]
    _refuse_repeated(variants)
    for variant in variants:
        if not any(variant.runs_at(temperature) for temperature in temperatures):
            raise ValueError(
                f"variant {variant.label!r} has nothing to run: topk is no other variant at temperature 0; "
                "leave it out, or give a --temperature above 0"
            )
    return variants


def default_specs(drafters: Sequence[str], max_nodes: int, is_sampled: bool, is_averaged: bool = True) -> list[str]:
    """What is compared unless something else is asked for; merged trees at the union and at an equal budget."""
    singles = [f"{SINGLE}:{name}" for name in drafters]
    if len(drafters) < 2:
        return [PLAIN, *singles, *(f"{spec},topk" for spec in singles if is_sampled)]
    routed = [name for name in COMPOSITIONS if name not in (SINGLE, MERGED)]
    merged = [MERGED, f"{MERGED}@{max_nodes}", f"{MERGED}@{max_nodes},{EVIDENCE}=0"]
    topk = [f"{spec},topk" for spec in (*singles, "confidence", MERGED) if is_sampled]
    return [PLAIN, *singles, *([AVERAGE] if is_averaged else []), *routed, *merged, *topk]


def _parse(text: str, drafters: Sequence[str], averaged: Sequence[str], max_nodes: int) -> Variant:
    """The variant of a spec; ValueError, in a sentence that quotes it, unless it is one."""
    labelled = LABELLED.fullmatch(text)
    label, spec = (labelled["label"].strip(), labelled["spec"]) if labelled else (text, text)
    found = SPEC.fullmatch(spec)
    try:
        if found is None or found["composition"] not in NAMES:
            raise ValueError(f"a variant is [LABEL=]COMPOSITION..., with a composition of {', '.join(NAMES)}")
        if not label:
            raise ValueError("the label before = is empty")
        if found["composition"] == PLAIN:
            return _plain(label, spec)
        names = averaged if found["composition"] == AVERAGE else drafters
        return _speculative(label, found.groupdict(), names, max_nodes)
    except ValueError as error:
        raise ValueError(f"variant {text!r}: {error}") from error


def _plain(label: str, spec: str) -> Variant:
    if spec != PLAIN:
        raise ValueError("plain decoding takes no drafters, nodes or options")
    return Variant(label, PLAIN)


def _speculative(label: str, parts: Mapping[str, str | None], drafters: Sequence[str], max_nodes: int) -> Variant:
    composition, options = str(parts["composition"]), _options(parts["options"])
    names = _participants(composition, parts["names"], drafters)
    nodes = None if parts["nodes"] is None else _num_nodes(parts["nodes"])
    is_union, adapts = composition == MERGED and nodes is None, "auto" in options
    usual = TreeShape.auto().max_nodes if adapts else None if is_union else max_nodes
    return Variant(
        label,
        composition,
        names,
        nodes or usual,
        "topk" if "topk" in options else "coupled",
        _decay(composition, is_union, options.get(EVIDENCE)),
        _weight(composition, names, options.get("weight")),
        adapts,
    )


def _options(text: str | None) -> dict[str, str]:
    """The options by name, with their values."""
    found: dict[str, str] = {}
    for option in [] if text is None else text.split(","):
        name, equals, value = option.partition("=")
        if name not in OPTIONS or bool(equals) == (name in FLAGS):
            raise ValueError(f"an option is topk, auto, evidence=DECAY or weight=W, got {option!r}")
        if name in found:
            raise ValueError(f"the option {name} is given twice")
        found[name] = value
    return found


def _participants(composition: str, text: str | None, drafters: Sequence[str]) -> tuple[str, ...]:
    names = tuple(drafters) if text is None else tuple(text.split("+"))
    there = ", ".join(drafters) or "none"
    if unknown := [name for name in names if name not in drafters]:
        raise ValueError(f"there is no drafter {unknown[0]!r}; there are {there}")
    if len(set(names)) < len(names):
        raise ValueError("a drafter is named twice")
    if composition == SINGLE and len(names) != 1:
        raise ValueError(f"single takes one drafter, as single:{(*names, 'NAME')[0]}; there are {there}")
    if composition != SINGLE and len(names) < 2:
        raise ValueError(
            f"{composition} takes two drafters or more, got {', '.join(names) or 'none'}; give single:NAME"
        )
    return names


def _num_nodes(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < 2:
        raise ValueError(f"@ is followed by the nodes of a tree, 2 or more with its root, got {text!r}")
    return int(text)


def _decay(composition: str, is_union: bool, text: str | None) -> float | None:
    """What the decoder does by default is spelt out: weights where there is a budget to share out."""
    if composition not in (EVIDENCE, MERGED):
        if text is not None:
            raise ValueError(f"evidence=DECAY goes with evidence and merged, not with {composition}")
        return None
    if text is None:
        return 0.0 if is_union else EVIDENCE_DECAY
    decay = _number("evidence", text)
    return 0.0 if composition == MERGED and decay == 0 else check_decay(decay)


def _weight(composition: str, names: Sequence[str], text: str | None) -> float | None:
    if text is None:
        return None
    weight = _number("weight", text)
    if composition != AVERAGE or len(names) != 2 or not 0 <= weight <= 1:
        raise ValueError("weight=W, from 0 to 1, goes with an average of two drafters, as average:NAME+NAME,weight=0.3")
    return None if weight == 0.5 else weight


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}= is followed by a number, got {text!r}") from None


def _refuse_repeated(variants: Sequence[Variant]) -> None:
    """Labels differ, and so does what is done."""
    labels: set[str] = set()
    done: dict[Variant, str] = {}
    for variant in variants:
        if variant.label in labels:
            raise ValueError(f"two variants have the label {variant.label!r}; give them others, as LABEL=SPEC")
        labels.add(variant.label)
        is_average = variant.composition == AVERAGE  # which has no calibration to draft coupled with
        same = replace(variant, label="", drafting="topk" if is_average else variant.drafting)
        if same in done:
            raise ValueError(f"the variants {done[same]!r} and {variant.label!r} are the same; leave one of them out")
        done[same] = variant.label
