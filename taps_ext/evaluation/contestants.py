"""The drafters of an evaluation: whether they are this target's, what tells them apart, and the variants' decoders."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints import CorpusStore, average_drafters, load_drafter, load_drafters
from ..checkpoints.corpus import HEADER_FILE
from ..checkpoints.files import DrafterFiles, read_drafter_files, sha256
from ..checkpoints.formats import check_fits, network_config
from ..checkpoints.load import LOOKUP, TargetIdentity, is_lookup
from ..decode.budget import CostTable
from ..decode.decoder import SpeculativeDecoder
from ..drafters import Drafter
from ..target.model import TargetModel
from ..tree import TreeShape
from .answering import Contestant
from .plan import Settings
from .variants import AVERAGE, MERGED, SINGLE, Variant

Folders = Mapping[str, Any]  # drafters by name: a folder or hub id each
Participants = Mapping[str, Mapping[str, Drafter]]  # by a variant's label: its drafters by name


def check_drafters(folders: Folders, target_config: Any) -> dict[str, DrafterFiles]:
    """The files of the drafters that have some; ValueError or OSError, in a sentence, for one that does not fit."""
    found = {}
    for name, folder in folders.items():
        try:
            if is_lookup(folder):
                if folder != LOOKUP:
                    CorpusStore(folder, target_config.vocab_size)
                continue
            found[name] = read_drafter_files(folder)
            check_fits(found[name], network_config(found[name], target_config), target_config)
        except (ValueError, OSError) as error:
            raise ValueError(f"drafter {name!r}: {error}") from error
    return found


def refuse_strangers(drafters: Mapping[str, DrafterFiles], target: TargetIdentity) -> None:
    """ValueError, in a sentence, for a drafter that says that it was trained for other weights than the target's."""
    for name, files in drafters.items():
        told = files.target.get("fingerprint")
        if told is not None and told not in (target.weights, target.ends):
            raise ValueError(
                f"drafter {name!r} is of another target, {files.target.get('name')}: its fingerprint is not that of "
                f"{target}; give a drafter of this target, or remove taps.target from {files.folder / 'config.json'} "
                "to use it all the same"
            )


def drafter_facts(drafters: Mapping[str, DrafterFiles], folders: Folders) -> dict[str, Any]:
    """Which weights or stores they are, as JSON values; look-ups in the text alone have none."""
    digests = {name: files.digest or _digest(files.folder) for name, files in drafters.items()}
    stores = {name: folder for name, folder in folders.items() if is_lookup(folder) and folder != LOOKUP}
    digests |= {name: sha256(Path(folder).expanduser() / HEADER_FILE) for name, folder in stores.items()}
    return {name: {"name": short_name(folder), "sha256": digests.get(name, "")} for name, folder in folders.items()}


def short_name(path_or_id: Any) -> str:
    """A hub id, or a folder's own name."""
    path = Path(path_or_id).expanduser()
    return path.resolve().name if path.exists() else str(path_or_id)


def _digest(folder: Path) -> str:
    """Of the weights of a drafter that does not say it."""
    files = sorted(path for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind))
    sums = [sha256(path) for path in files]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def load_participants(
    target: TargetModel, folders: Folders, variants: Sequence[Variant], tokenizer: Any = None
) -> dict[str, dict[str, Drafter]]:
    """The drafters of each variant by its label; variants share those that they have in common.

    With a `tokenizer`, corpus stores that were made with another one are refused.
    """
    used = {name: path for name, path in folders.items() if any(name in variant.drafters for variant in variants)}
    loaded = load_drafters(used, target, tokenizer)
    found = {}
    for variant in variants:
        found[variant.label] = {name: loaded[name] for name in variant.drafters}
        if variant.composition == AVERAGE:
            average = _average(target, [folders[name] for name in variant.drafters], variant.weight)
            found[variant.label] = {AVERAGE: average}
    return found


def _average(target: TargetModel, folders: Sequence[Any], weight: float | None) -> Drafter:
    with tempfile.TemporaryDirectory() as folder:
        average_drafters(folders, None if weight is None else [weight, 1 - weight], Path(folder) / AVERAGE)
        return load_drafter(Path(folder) / AVERAGE, target)


def measure_costs(
    target: TargetModel, variants: Sequence[Variant], participants: Participants, batch_size: int
) -> CostTable:
    """What the parts of a step cost here, with every drafter of the variants that adapt."""
    adapting = [participants[variant.label] for variant in variants if variant.adapts]
    drafters = {name: drafter for some in adapting for name, drafter in some.items()}
    return SpeculativeDecoder(target, drafters).cost_table(batch_size)


def make_contestants(
    target: TargetModel,
    variants: Sequence[Variant],
    participants: Participants,
    settings: Settings,
    costs: CostTable | None,
) -> list[Contestant]:
    """A decoder a variant; all share the target and the drafters. Variants that adapt go by `costs`."""
    return [
        Contestant(one, None if one.is_plain else _decoder(target, participants[one.label], one, settings, costs))
        for one in variants
    ]


def _decoder(
    target: TargetModel, drafters: Mapping[str, Drafter], variant: Variant, settings: Settings, costs: CostTable | None
) -> SpeculativeDecoder:
    is_average, is_merged = variant.composition == AVERAGE, variant.composition == MERGED
    max_nodes = variant.max_nodes or settings.max_nodes
    fixed = TreeShape(settings.depth, settings.branching, max_nodes)
    return SpeculativeDecoder(
        target,
        drafters,
        SINGLE if is_average else variant.composition,
        shape=TreeShape.auto(max_nodes=max_nodes) if variant.adapts else fixed,
        max_nodes=variant.max_nodes if is_merged else None,
        drafting="topk" if is_average else variant.drafting,  # which it would be anyway, with a warning
        evidence_decay=variant.evidence_decay,
        costs=costs,
        extend=settings.extend,
    )
