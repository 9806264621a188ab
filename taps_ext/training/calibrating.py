"""The calibration of a drafter: alpha and beta by depth and temperature, from text, and what they are worth.

At places of the text the target's own noise is drawn, and the token that the target then picks; the coefficients are
those under which the drafter, seeing the same noise, gives these tokens the most probability. A part of the texts is
left out of the fit and tells what was gained. Nothing is decoded.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoints.files import CALIBRATION_FILE, check_writable, read_drafter_files
from ..checkpoints.formats import CalibrationRecord, write_calibration
from ..checkpoints.load import identify, network_of
from ..drafters.coupling import LEAST_TEMPERATURE, Calibration
from ..drafters.network import EagleNetwork
from .calibration_report import COUPLED, TOPK, UNCOUPLED, CalibrationReport, Cell, Measures, measure
from .coupled_draws import Chunk, Draws, Progress
from .coupled_likelihood import Likelihood, fit, likelihood
from .dataset import TokenDataset
from .draft_slots import DraftSlots, collect
from .features import FeatureSource, FrozenTarget
from .provenance import calibration_facts, target_facts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PathOrId = str | os.PathLike[str]

MOST_TEMPERATURE = 100.0
HELD_OUT = 4  # one text in so many is left out of the fit
MIN_PLACES = 32  # of a depth; deeper ones are not fitted, and drafting uses the last that is
ENOUGH_TOKENS = 512  # that are learned, of held-out conversations that are calibrated on
HELD_OUT_TEXTS, TRAINING_TEXTS = "held-out", "training"  # what texts were to the training that made the drafter
DIGITS = 4  # behind the point: more than the data tells, and fewer than rounding errors reach


@dataclass(frozen=True)
class CalibrationSettings:
    """What a calibration depends on besides drafter, target and text."""

    temperatures: tuple[float, ...] = (0.3, 0.7, 1.0, 1.5)  # ascending
    depth: int = 6
    positions: int = 2048  # places of the text; where there are far fewer, several draws at each
    seed: int = 0  # of the places and the noise

    def __post_init__(self) -> None:
        ascends = all(a < b for a, b in pairwise(self.temperatures))
        within = all(LEAST_TEMPERATURE <= temperature <= MOST_TEMPERATURE for temperature in self.temperatures)
        if not self.temperatures or not ascends or not within:
            allowed = f"within {LEAST_TEMPERATURE:g} and {MOST_TEMPERATURE:g}"
            raise ValueError(f"temperatures must ascend {allowed}, got {list(self.temperatures)}")
        for name, least in (("depth", 1), ("positions", 2 * MIN_PLACES)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


def calibrate(
    network: EagleNetwork,
    source: FeatureSource,
    dataset: TokenDataset,
    settings: CalibrationSettings | None = None,
    progress: Progress | None = None,
) -> CalibrationReport:
    """The calibration of a drafter's network, and what it is worth on texts that were left out of the fit.

    The same bits from run to run on one kind of device with one number of threads. `network` stays as it is and drafts
    in its own dtype, on the source's device. ValueError, in a sentence, for texts without enough to draft.
    """
    settings, progress = settings or CalibrationSettings(), progress or (lambda what, done, total: None)
    slots = _collect(network, source, dataset, settings, progress)
    is_held_out, share = slots.sequence % HELD_OUT == 1, settings.positions // HELD_OUT
    parts = ((~is_held_out, settings.positions - share), (is_held_out, share))
    fitted, held_out = (
        Draws(slots[mask], source.logits, settings.temperatures, wanted, f"{settings.seed}/{part}", progress)
        for part, (mask, wanted) in enumerate(parts)
    )
    _cut_depth(fitted, held_out)
    coupled, uncoupled = _fit(fitted, with_noise=True), _fit(fitted, with_noise=False)
    tables = (tuple(tuple(row) for row in part.tolist()) for part in coupled.unbind(-1))
    calibration = Calibration(settings.temperatures, *tables)
    cells = _cells(held_out, coupled, uncoupled)
    return CalibrationReport(
        calibration, tuple(cells), settings.seed, len(fitted.slots), len(held_out.slots), fitted.repeats
    )


def drafting_copy(network: EagleNetwork, source: FeatureSource) -> EagleNetwork:
    """A copy of a network in the target's own precision and place, as it drafts."""
    copied: EagleNetwork = deepcopy(network).to(source.embedding.device, source.embedding.dtype)
    return copied.eval().requires_grad_(False)


def calibrate_drafter(
    folder: PathOrId,
    model: PreTrainedModel,
    dataset: TokenDataset,
    settings: CalibrationSettings | None = None,
    progress: Progress | None = None,
    target_name: str = "unnamed",
    texts: str | None = None,
) -> CalibrationReport:
    """What the calibration of a drafter's folder is worth; calibration.json is written there, or replaced.

    `model` is its target, `target_name` what the file calls that, `texts` what the dataset was to its training, where
    that is known. ValueError or OSError, in a sentence, for a folder that cannot be written to or is no drafter of this
    target.
    """
    place = calibratable(folder)
    files = read_drafter_files(place)
    network = network_of(files, model.config.get_text_config())
    identity, source = identify(model), FrozenTarget(model)
    if files.target.get("fingerprint", identity.fingerprint) != identity.fingerprint:
        raise ValueError(f"{place} was trained for a target with other weights than {target_name}; give that one")
    report = calibrate(drafting_copy(network, source), source, dataset, settings, progress)
    facts = calibration_facts(target_facts(target_name, identity), dataset, texts)
    write_calibration(place, report.record(facts), files.digest)
    return report


def calibration_texts(training: TokenDataset, validation: TokenDataset | None) -> tuple[TokenDataset, str]:
    """A run's texts that its drafters are calibrated on, and what they were to it: held out, if these are enough."""
    if validation is not None and sum(validation.num_learned) >= ENOUGH_TOKENS:
        return validation, HELD_OUT_TEXTS
    return training, TRAINING_TEXTS


def calibrate_run(
    folders: Iterable[Path],
    source: FeatureSource,
    training: TokenDataset,
    validation: TokenDataset | None,
    seed: int,
    target: Mapping[str, Any] | None,
    note: Callable[[str], None],
) -> None:
    """calibration.json for those drafters of a run that have none, on the run's own texts.

    A calibration that fails costs no drafter: `note` gets a sentence. Drafters with the same file of weights share one.
    """
    dataset, texts = calibration_texts(training, validation)
    records: dict[str | None, CalibrationRecord] = {}
    for folder in uncalibrated(folders):
        try:
            for leftover in folder.glob(f".{CALIBRATION_FILE}.*"):  # of a killed process
                leftover.unlink()
            files = read_drafter_files(folder)
            if files.digest not in records:
                note(f"calibrating the drafter {folder.name}")
                network = drafting_copy(network_of(files), source)
                report = calibrate(network, source, dataset, CalibrationSettings(seed=seed))
                records[files.digest] = report.record(calibration_facts(target, dataset, texts))
            write_calibration(folder, records[files.digest], files.digest)
        except (ValueError, RuntimeError, OSError) as error:  # also memory or a disk that runs out
            note(not_calibrated(folder.name, error))
        else:
            if texts == TRAINING_TEXTS:
                note(
                    f"the drafter {folder.name} is calibrated on the texts that it was trained on: fewer than "
                    f"{ENOUGH_TOKENS} tokens to learn were held out"
                )


def uncalibrated(folders: Iterable[Path]) -> list[Path]:
    """Those without a calibration."""
    return [folder for folder in folders if not (folder / CALIBRATION_FILE).exists()]


def not_calibrated(name: str, error: Exception) -> str:
    """The sentence on a drafter whose calibration failed."""
    return f"the drafter {name} is not calibrated: {next(iter(str(error).splitlines()), type(error).__name__)}"


def calibratable(folder: PathOrId) -> Path:
    """The folder of a drafter, if a calibration can be written into it; else ValueError or OSError, in a sentence."""
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise ValueError(
            f"{folder} is no folder here, and a calibration is written into the drafter's folder; give one, or a copy "
            f"of a hub repository as `hf download OWNER/NAME --local-dir FOLDER` makes it"
        )
    check_writable(place)
    return place


def _collect(
    network: EagleNetwork,
    source: FeatureSource,
    dataset: TokenDataset,
    settings: CalibrationSettings,
    progress: Progress,
) -> DraftSlots:
    parts = []
    for part, done, total in collect(network, source, dataset, settings.depth, settings.positions, settings.seed):
        parts.append(part)
        progress("texts", done, total)
    if not parts:
        raise ValueError(
            "the texts have no place where something could be drafted; give conversations with longer answers"
        )
    joined = [torch.cat([getattr(part, name) for part in parts]) for name in ("truth", "reach", "sequence")]
    drafted = torch.cat([part.drafted for part in parts], dim=1)
    return DraftSlots(joined[0], drafted, joined[1], joined[2])


def _cut_depth(fitted: Draws, held_out: Draws) -> None:
    """Both as deep as there are enough draws; ValueError where there are not even of drafts next to the root."""
    enough = (fitted.num_places >= MIN_PLACES) & (held_out.num_places > 0)
    depth = int(enough.long().cumprod(0).sum())
    if depth == 0:
        raise ValueError(
            f"the texts have {len(fitted.slots) + len(held_out.slots)} places where something could be drafted, too "
            f"few to calibrate; give more conversations, or some with longer answers"
        )
    for draws in (fitted, held_out):
        draws.cut(depth)


def _fit(draws: Draws, with_noise: bool) -> Tensor:
    """The coefficients float64 [T, D, 2], rounded."""
    sweeps = count(1)

    def evaluate(coefficients: Tensor) -> Likelihood:
        shaped = coefficients.view(len(draws.temperatures), draws.num_depths, 2)
        what = f"{'coupled' if with_noise else 'uncoupled'}, sweep {next(sweeps)}"
        sums = [_sums(chunk, draws.temperatures, shaped) for chunk in draws.chunks(what)]
        return Likelihood(*(torch.stack(parts).sum(0) / draws.repeats for parts in zip(*sums, strict=True)))

    temperatures = torch.tensor(draws.temperatures).repeat_interleave(draws.num_depths)
    found = fit(evaluate, temperatures, draws.num_places.repeat(len(draws.temperatures)), with_noise)
    return torch.round(found, decimals=DIGITS).view(len(draws.temperatures), draws.num_depths, 2)


def _sums(chunk: Chunk, temperatures: Sequence[float], coefficients: Tensor) -> Likelihood:
    """The sums of a chunk, of all cells (temperature by temperature), on the CPU."""
    of_depths = [_reached(chunk, d) for d in range(len(chunk.logits))]
    found = [
        likelihood(logits, noise, drawn[t], temperature, *coefficients[t, d].tolist())
        for t, temperature in enumerate(temperatures)
        for d, (logits, noise, drawn) in enumerate(of_depths)
    ]
    return Likelihood(*(torch.stack(parts).cpu() for parts in zip(*found, strict=True)))


def _reached(chunk: Chunk, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, noise and draws of those that a draft of depth d + 1 can be for."""
    if bool((reached := chunk.reach > d).all()):
        return chunk.logits[d], chunk.noise, chunk.drawn
    return chunk.logits[d, reached], chunk.noise[reached], chunk.drawn[:, reached]


def _cells(draws: Draws, coupled: Tensor, uncoupled: Tensor) -> Iterator[Cell]:
    """What the coefficients [T, D, 2] are worth on held-out draws."""
    sums: dict[tuple[int, int, str], list[Measures]] = defaultdict(list)
    for chunk in draws.chunks("held out"):
        for d in range(draws.num_depths):
            logits, noise, drawn = _reached(chunk, d)
            for t, temperature in enumerate(draws.temperatures):
                alpha, beta = coupled[t, d].tolist()
                sums[t, d, COUPLED].append(measure(logits * (alpha / temperature) + noise * beta, drawn[t]))
                sums[t, d, UNCOUPLED].append(measure(logits * (float(uncoupled[t, d, 0]) / temperature), drawn[t]))
                sums[t, d, TOPK].append(measure(logits, drawn[t]))
    for t, temperature in enumerate(draws.temperatures):
        for d in range(draws.num_depths):
            rules = {rule: Measures.total(sums[t, d, rule]) for rule in (COUPLED, UNCOUPLED, TOPK)}
            alpha, beta = coupled[t, d].tolist()
            yield Cell(temperature, d + 1, alpha, beta, float(uncoupled[t, d, 0]), rules)
