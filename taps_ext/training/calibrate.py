"""Fit how a drafter uses the target's noise: alpha and beta by temperature and depth, and what they gain.

The target draws y = argmax_v(log p(v) / T + g(v)). A drafter that sees the noise g gives y the probability
softmax(alpha * log q / T + beta * g)(y), and (alpha, beta) minimise the mean of -log of it: conditional logit (McFadden
1974), convex. One of four texts is left out of the fit and shows what was gained. Nothing is decoded.

Head and noise are computed once per place, of which `CANDIDATES` tokens are kept: the fit takes the same time and
memory for every vocabulary, 32 KB a place at 6 depths. (From the places of a text to the file of a drafter it is one
computation, and one file.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..checkpoints.files import CALIBRATION_FILE, check_writable, read_drafter_files
from ..checkpoints.formats import CalibrationRecord, read_vocabulary, write_calibration
from ..checkpoints.load import TargetIdentity, identify, network_of
from ..drafters import DraftVocabulary
from ..drafters.coupling import LEAST_TEMPERATURE, Calibration
from ..drafters.network import EagleNetwork
from ..native import code_version
from .features import DraftBatch, FeatureSource, FrozenTarget, Head
from .masks import TokenDataset
from .objectives import aligned_attention, next_stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PathOrId = str | os.PathLike[str]
Progress = Callable[[str, int, int | None], None]  # what is done, how many, and of how many (None: unknown)

MOST_TEMPERATURE = 100.0
BATCH_SEQUENCES = 8  # of one forward of the target
NUM_SEQUENCES = 64  # at least, where there are so many: slots of one text are alike
HELD_OUT = 4  # one text in so many is left out of the fit
MIN_PLACES = 32  # of a depth; deeper ones are not fitted, and drafting uses the last that is
MAX_REPEATS = 4  # draws at one place of the text, where there are few places
ENOUGH_TOKENS = 512  # that are learned, of held-out conversations that are calibrated on
HELD_OUT_TEXTS, TRAINING_TEXTS = "held-out", "training"  # what texts were to the training that made the drafter

CANDIDATES = 1024  # tokens kept of a place; all tokens of a smaller vocabulary
CHUNK = 32  # places whose logits exist at a time: at V = 128,256 half a gigabyte
LEAST_WORD = 1e-30  # of the exponential draw whose -log is the noise, which is finite so
PRIOR = 1.0  # places' worth of a pull towards EAGLE-2: against too few places, and a perfect drafter has no optimum
LEAST_ALPHA, FIRST_BETA = 1e-4, 0.25  # alpha is above 0; a fit begins at EAGLE-2's alpha and this beta
MAX_STEPS, DIGITS = 50, 4  # digits behind the point: more than the data tells, and fewer than rounding errors reach
NUM_CHILDREN, NUM_BINS = 10, 10  # of a node, as a tree of the usual branching keeps them; of probability, equally wide


@dataclass(frozen=True)
class CalibrationSettings:
    """Hold what a calibration depends on besides drafter, target and text; raise ValueError for what makes no sense."""

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


# ---- what was found


@dataclass(frozen=True)
class Measures:
    """Hold what one way to score a node's children is worth, per draw of the target."""

    nats: float  # mean of -log of the probability given to the drawn token
    hit_rate: float  # share of the draws that are among the best children
    calibration_error: float  # |predicted - observed| probability of the best children, summed over bins of it


@dataclass(frozen=True)
class FittedCell:
    """Hold one temperature and depth, measured on the texts that were left out of the fit."""

    temperature: float
    depth: int
    alpha: float
    beta: float
    uncoupled_alpha: float
    num_draws: int
    coupled: Measures
    uncoupled: Measures  # beta = 0 and its own alpha
    topk: Measures  # EAGLE-2's own scores: beta = 0 and alpha = temperature


@dataclass(frozen=True)
class CalibrationReport:
    """Hold a calibration and what it is worth."""

    calibration: Calibration
    cells: tuple[FittedCell, ...]  # temperature by temperature, each from depth 1
    seed: int
    num_fitted: int  # places of the text
    num_held_out: int
    repeats: int  # draws at each place of the fit

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: all that was measured."""
        return {**self.calibration.to_dict(), **self._facts(), "cells": [asdict(cell) for cell in self.cells]}

    def record(self, facts: Mapping[str, Any]) -> CalibrationRecord:
        """Return what calibration.json holds; `facts` name its target and text."""
        return CalibrationRecord(self.calibration, {**facts, **self._facts()})

    def _facts(self) -> dict[str, Any]:
        def table(figure: Callable[[FittedCell], float]) -> list[list[float]]:
            values, depth = [round(figure(cell), 4) for cell in self.cells], self.calibration.depth
            return [values[i : i + depth] for i in range(0, len(values), depth)]

        gains = {
            "nats_over_uncoupled": table(lambda cell: cell.uncoupled.nats - cell.coupled.nats),
            "nats_over_topk": table(lambda cell: cell.topk.nats - cell.coupled.nats),
            "calibration_error": table(lambda cell: cell.coupled.calibration_error),
        }
        positions = {"fitted": self.num_fitted, "held_out": self.num_held_out, "draws_at_each": self.repeats}
        return {"seed": self.seed, "positions": positions, "held_out": gains}


# ---- from a network to its report


def calibrate(
    network: EagleNetwork,
    source: FeatureSource,
    dataset: TokenDataset,
    settings: CalibrationSettings | None = None,
    progress: Progress | None = None,
    vocabulary: DraftVocabulary | None = None,
) -> CalibrationReport:
    """Return the calibration of a drafter's network, and what it is worth on texts that were left out of the fit.

    The result is the same to the bit on one kind of device with one number of threads. `network` stays as it is and
    drafts in its own dtype, on the source's device. Of a drafter with a draft vocabulary, only draws of its tokens
    count: no coefficient changes what becomes of the others. Raise ValueError for texts without enough to draft.
    """
    settings, progress = settings or CalibrationSettings(), progress or (lambda what, done, total: None)
    slots = collect(network, source, dataset, settings.depth, settings.positions, settings.seed, progress)
    is_held_out, share = slots.sequence % HELD_OUT == 1, settings.positions // HELD_OUT
    parts = [(slots[~is_held_out], settings.positions - share), (slots[is_held_out], share)]
    depth, heads = _depth(*(part for part, _ in parts)), Heads.of(source, vocabulary)
    fitted, held_out = (
        draw(part.cut(depth), heads, settings.temperatures, wanted, f"{settings.seed}/{number}", progress)
        for number, (part, wanted) in enumerate(parts)
    )
    cells: list[FittedCell] = []
    for (t, temperature), d in product(enumerate(settings.temperatures), range(depth)):
        progress("fits", len(cells), len(settings.temperatures) * depth)
        cells.append(_cell(fitted.sample(temperature, t, d), held_out.sample(temperature, t, d), temperature, d + 1))
    rows = [cells[i : i + depth] for i in range(0, len(cells), depth)]
    alpha, beta = (tuple(tuple(getattr(cell, name) for cell in row) for row in rows) for name in ("alpha", "beta"))
    calibration = Calibration(settings.temperatures, alpha, beta)
    num_fitted, num_held_out = (len(part) for part, _ in parts)
    return CalibrationReport(calibration, tuple(cells), settings.seed, num_fitted, num_held_out, fitted.repeats)


def _depth(fitted: DraftSlots, held_out: DraftSlots) -> int:
    """Return to which depth there are enough places; raise ValueError where there are not even next to the root."""
    enough = (fitted.num_places >= MIN_PLACES) & (held_out.num_places > 0)
    if not enough[0]:
        raise ValueError(
            f"the texts have {len(fitted) + len(held_out)} places where something could be drafted, too few to "
            f"calibrate; give more conversations, or some with longer answers"
        )
    return int(enough.long().cumprod(0).sum())


def _cell(sample: Sample, held_out: Sample, temperature: float, depth: int) -> FittedCell:
    """Return the coefficients of one temperature and depth, and what they are worth on held-out draws."""
    uncoupled = fit(sample, temperature, with_noise=False)
    coupled = min(uncoupled, fit(sample, temperature))  # noise that does not help is not used
    measures = [measure(held_out, *rule) for rule in (coupled[1:], uncoupled[1:], (temperature, 0.0))]
    return FittedCell(temperature, depth, *coupled[1:], uncoupled[1], len(held_out.drawn), *measures)


# ---- where something could be drafted


@dataclass(frozen=True)
class DraftSlots:
    """Hold slots of many texts: where a drafter would have drafted, what the target says there, and what drafts say.

    The slot s of a text stands for the draw of token s + 2. A draft of depth d made there comes from a step that began
    d - 1 slots before: pass d of the drafter over its own features, as in `objectives.estimate`.
    Shapes: S slots, D depths, H hidden.
    """

    # [1 + D, S, H], of which the lm_head makes the logits of one draw: the target's, then the drafter's by depth
    features: Tensor
    # int64 [S], up to which depth a draft can have been made there: each is in an answer from its root on
    reach: Tensor
    sequence: Tensor  # int64 [S], of which text, numbered from 0 in the order they were taken

    def __getitem__(self, index: Tensor) -> DraftSlots:
        """Return some of the slots, by a mask or indices [S]."""
        return DraftSlots(self.features[:, index], self.reach[index], self.sequence[index])

    def __len__(self) -> int:
        return len(self.reach)

    @property
    def num_places(self) -> Tensor:
        """Return int64 [D], on the CPU: at how many of them a draft of each depth can be."""
        depths = torch.arange(1, len(self.features))
        return (self.reach.cpu() >= depths[:, None]).sum(-1)

    def cut(self, depth: int) -> DraftSlots:
        """Return the slots without the deeper drafts."""
        return DraftSlots(self.features[: 1 + depth], self.reach, self.sequence)


@torch.no_grad()
def collect(
    network: EagleNetwork,
    source: FeatureSource,
    dataset: TokenDataset,
    depth: int,
    count: int,
    seed: int,
    progress: Progress,
) -> DraftSlots:
    """Return at most `count` slots of a data set, chosen by the seed from many texts.

    `network` drafts in its own dtype. Raise ValueError for texts without a slot.
    """
    chosen, parts = _choose(dataset, depth, count, Random(f"{seed}/slots")), []
    for start in range(0, len(chosen), BATCH_SEQUENCES):
        progress("texts", start, len(chosen))
        part = chosen[start : start + BATCH_SEQUENCES]
        batch = source.draft_batch(dataset.batch([index for index, _ in part]))
        rows = torch.tensor([row for row, (_, slots) in enumerate(part) for _ in slots])
        slots, reach = torch.tensor([entry for _, entries in part for entry in entries]).unbind(1)
        drafted = (made[rows, slots] for made in _passes(network, batch, depth))
        features = torch.stack([batch.next_features[rows, slots], *drafted])
        parts.append(DraftSlots(features, *(ids.to(features.device) for ids in (reach, rows + start))))
    if not parts:
        raise ValueError(
            "the texts have no place where something could be drafted; give conversations with longer answers"
        )
    features = torch.cat([part.features for part in parts], dim=1)
    return DraftSlots(features, *(torch.cat([getattr(part, name) for part in parts]) for name in ("reach", "sequence")))


def _passes(network: EagleNetwork, batch: DraftBatch, depth: int) -> Iterator[Tensor]:
    """Yield the drafter's features [B, T, H] of each depth."""
    dtype = network.fc.weight.dtype
    embeddings, streams = batch.next_embeddings.to(dtype), [batch.features.to(dtype)]
    for _ in range(depth):
        made = network.finish(*aligned_attention(network, embeddings, streams))
        yield made
        streams.append(next_stream(streams[-1], made))


def _choose(dataset: TokenDataset, depth: int, count: int, random: Random) -> list[tuple[int, list[tuple[int, int]]]]:
    """Return sequences with some of their slots, each with its reach: a random part of those of enough sequences."""
    found: list[tuple[int, int, int]] = []
    for number, index in enumerate(random.sample(range(len(dataset)), len(dataset))):
        if number >= NUM_SEQUENCES and len(found) >= count:
            break
        found += [(index, slot, reach) for slot, reach in _reaches(dataset[index].loss_mask, depth)]
    by_sequence: dict[int, list[tuple[int, int]]] = {}
    for place in sorted(random.sample(range(len(found)), min(count, len(found)))):
        index, slot, reach = found[place]
        by_sequence.setdefault(index, []).append((slot, reach))
    return list(by_sequence.items())


def _reaches(loss_mask: Sequence[bool], depth: int) -> Iterator[tuple[int, int]]:
    """Yield the slots where something can be drafted, with up to which depth.

    A draft of depth d for token t needs a root, token t - d, that a step drew or verified: all from there to t are
    learned. The first of an answer is drawn by the prefill and never drafted.
    """
    run = 0
    for token, learned in enumerate(loss_mask):
        run = run + 1 if learned else 0
        if run > 1 and token > 2:
            yield token - 2, min(run - 1, depth, token - 2)


# ---- the draws


class Sample(NamedTuple):
    """Hold the draws of one temperature and depth. Shapes: S draws, C candidates."""

    differences: Tensor  # float32 [2, S, C]: log q / T and the noise of each candidate, less those of the drawn one
    log_counts: Tensor  # float32 [S, C], of how many tokens a candidate stands for
    drawn: Tensor  # int64 [S], the drawn candidate
    num_places: int

    def log_shares(self, coefficients: Tensor) -> Tensor:
        """Return float32 [S, C], the log-probability given to all that a candidate stands for; coefficients [2]."""
        scores = coefficients.to(self.differences) @ self.differences.flatten(1)
        return scores.view_as(self.log_counts).add_(self.log_counts).log_softmax(-1)

    def losses(self, log_shares: Tensor) -> Tensor:
        """Return float64 [S], -log of the probability given to the drawn tokens."""
        return -log_shares.gather(1, self.drawn[:, None])[:, 0].double()


class Draws(NamedTuple):
    """Hold the draws at some places. Shapes: D depths, S draws, C candidates, T temperatures."""

    logits: Tensor  # float32 [D, S, C], the drafter's log q
    noise: Tensor  # float32 [S, C]
    log_counts: Tensor  # float32 [S, C]
    drawn: Tensor  # int64 [T, S], the drawn candidates; -1: a token outside the draft vocabulary
    reach: Tensor  # int64 [S], the depths that count
    repeats: int  # draws at each place

    def sample(self, temperature: float, t: int, d: int) -> Sample:
        """Return the draws of temperature number t at the places where a draft of depth d + 1 can be."""
        reached = ((self.reach > d) & (self.drawn[t] >= 0)).nonzero()[:, 0]
        drawn = self.drawn[t, reached]
        values = torch.stack((self.logits[d, reached] / temperature, self.noise[reached]))
        values -= values.gather(-1, drawn.expand(2, -1)[..., None])
        return Sample(values, self.log_counts[reached], drawn, len(reached) // self.repeats)


class Heads(NamedTuple):
    """Make logits of features: the target's, and the drafter's, which may be those of a draft vocabulary."""

    target: Head
    drafter: Head
    tokens: Tensor | slice  # int64 [D], whose logits the drafter's are
    draft_ids: Tensor | None  # int64 [V], the inverse, -1 outside; None: the drafter has every token

    @classmethod
    def of(cls, source: FeatureSource, vocabulary: DraftVocabulary | None) -> Heads:
        """Return the heads of a drafter of this target."""
        if vocabulary is None:
            return cls(source.logits, source.logits, slice(None), None)
        ids = (ids.to(source.embedding.device) for ids in (vocabulary.tokens, vocabulary.draft_ids))
        return cls(source.logits, source.draft_head(vocabulary), *ids)


@torch.no_grad()
def draw(
    slots: DraftSlots, heads: Heads, temperatures: Sequence[float], wanted: int, seed: str, progress: Progress
) -> Draws:
    """Return about `wanted` draws of the target at the slots, with i.i.d. standard Gumbel noise of the seed.

    Of decoding's own noise only the distribution matters. The heads make the logits of each feature once.
    """
    repeats = min(MAX_REPEATS, max(1, wanted // len(slots)))
    generator = torch.Generator(slots.reach.device).manual_seed(Random(f"{seed}/noise").getrandbits(63))
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(slots), CHUNK):
        progress("draws", start, len(slots))
        features = slots.features[:, start : start + CHUNK]
        true_logits, logits = heads.target(features[0]).log_softmax(-1), heads.drafter(features[1:]).log_softmax(-1)
        for _ in range(repeats):
            noise = torch.empty_like(true_logits).exponential_(generator=generator).clamp_(min=LEAST_WORD).log_().neg_()
            drawn = torch.stack([(true_logits / temperature + noise).argmax(-1) for temperature in temperatures])
            drawn, noise = drawn if heads.draft_ids is None else heads.draft_ids[drawn], noise[:, heads.tokens]
            tokens, log_counts = _candidates(logits, noise, drawn.clamp(min=0), generator)
            kept = logits.gather(-1, tokens.expand(len(logits), -1, -1)), noise.gather(-1, tokens)
            place = (tokens == drawn[..., None]).int().argmax(-1).where(drawn >= 0, -1)
            parts.append((*kept, log_counts, place, slots.reach[start : start + CHUNK]))
    logits, noise, log_counts, drawn, reach = (
        torch.cat(part, axis) for part, axis in zip(zip(*parts, strict=True), (1, 0, 0, 1, 0), strict=True)
    )
    return Draws(logits, noise, log_counts, drawn, reach, repeats)


def _candidates(logits: Tensor, noise: Tensor, drawn: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the tokens to keep, int64 [S, C], and the log of how many tokens each stands for, float32 [S, C].

    Priority sampling (Duffield, Lund and Thorup 2007): tokens with much probability or noise are kept and stand for
    themselves; a random part of the others, by weight, stands for the rest, so that no sum over the vocabulary is
    biased. The drawn tokens are always kept. `logits`, float32 [D, S, V], are log q.
    """
    size = noise.shape[-1]
    if size <= CANDIDATES:
        return torch.arange(size, device=noise.device).expand_as(noise), torch.zeros_like(noise)
    best = logits.amax(0)
    weights = best.exp() + (best / 2).softmax(-1) + noise.softmax(-1) + ((best + noise) / 2).softmax(-1)
    priorities = weights / (1 - torch.rand(weights.shape, generator=generator, device=weights.device))
    priorities, tokens = priorities.scatter_(1, drawn.T, torch.inf).topk(CANDIDATES + 1)
    counts = (priorities[:, -1:] / weights.gather(1, tokens)).clamp_(min=1)
    return tokens[:, :-1], counts.masked_fill_(priorities.isinf(), 1).log_()[:, :-1]


# ---- the fit


@torch.no_grad()
def fit(sample: Sample, temperature: float, with_noise: bool = True) -> tuple[float, float, float]:
    """Return the least loss, and alpha and beta there: nats a draw with the pull towards EAGLE-2.

    alpha is at least LEAST_ALPHA and beta at least 0, or 0 without noise. Their square roots are fitted, so that an
    optimum on the edge is smooth too.
    """
    rows = [[temperature, 0.0], [LEAST_ALPHA, 0.0], [1.0, with_noise]]
    eagle2, least, is_free = torch.tensor(rows, dtype=torch.float64)
    roots = torch.tensor([temperature - LEAST_ALPHA, FIRST_BETA], dtype=torch.float64).sqrt()
    optimizer = torch.optim.LBFGS([roots], max_iter=MAX_STEPS, line_search_fn="strong_wolfe")
    pull = PRIOR / sample.num_places

    def closure() -> Any:
        coefficients = (roots.square() + least) * is_free
        away, log_shares = coefficients - eagle2, sample.log_shares(coefficients)
        loss = sample.losses(log_shares).mean().cpu() + pull / 2 * away.square().sum()
        slope = sample.differences.flatten(1) @ log_shares.exp_().flatten() / len(sample.drawn)
        roots.grad = 2 * roots * is_free * (slope.double().cpu() + pull * away)
        return loss

    optimizer.step(closure)
    loss, (alpha, beta) = closure().item(), ((roots.square() + least) * is_free).tolist()
    return loss, round(alpha, DIGITS), round(beta, DIGITS)


@torch.no_grad()
def measure(sample: Sample, alpha: float, beta: float) -> Measures:
    """Return what the coefficients are worth."""
    log_shares = sample.log_shares(torch.tensor([alpha, beta]))
    best, children = (log_shares - sample.log_counts).topk(min(NUM_CHILDREN, log_shares.shape[-1]))
    predicted, is_drawn = best.double().exp().cpu(), (children == sample.drawn[:, None]).cpu()
    bins = (predicted * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    surplus = torch.bincount(bins.flatten(), (predicted - is_drawn.double()).flatten(), minlength=NUM_BINS)
    nats, count = float(sample.losses(log_shares).mean()), len(sample.drawn)
    return Measures(nats, int(is_drawn.sum()) / count, float(surplus.abs().sum()) / count)


# ---- drafters on disk


def calibrate_drafter(
    folder: PathOrId,
    model: PreTrainedModel,
    dataset: TokenDataset,
    settings: CalibrationSettings | None = None,
    progress: Progress | None = None,
    target_name: str = "unnamed",
    texts: str | None = None,
) -> CalibrationReport:
    """Calibrate the drafter in a directory: calibration.json is written there, or replaced.

    `model` is its target, `target_name` what the file calls that, `texts` what the dataset was to its training, if that
    is known. Raise ValueError or OSError, in a sentence, for a directory that cannot be written to or holds no drafter
    of this target.
    """
    place = calibratable(folder)
    files = read_drafter_files(place)
    network = network_of(files, model.config.get_text_config())
    identity, source = identify(model), FrozenTarget(model)
    if files.target.get("fingerprint", identity.fingerprint) != identity.fingerprint:
        raise ValueError(f"{place} was trained for a target with other weights than {target_name}; give that one")
    network = drafting_copy(network, source)
    report = calibrate(network, source, dataset, settings, progress, read_vocabulary(files))
    facts = calibration_facts(target_facts(target_name, identity), dataset, texts)
    write_calibration(place, report.record(facts), files.digest)
    return report


def drafting_copy(network: EagleNetwork, source: FeatureSource) -> EagleNetwork:
    """Return a copy of a network in the target's own dtype, on its device, as it drafts."""
    copied: EagleNetwork = deepcopy(network).to(source.embedding.device, source.embedding.dtype)
    return copied.eval().requires_grad_(False)


def calibratable(folder: PathOrId) -> Path:
    """Return the path of a drafter's directory; raise ValueError or OSError if it cannot be written to."""
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise ValueError(
            f"{folder} is no directory here, and a calibration is written into the drafter's directory; give one, or a "
            f"copy of a hub repository as `hf download OWNER/NAME --local-dir DIRECTORY` makes it"
        )
    check_writable(place)
    return place


def target_facts(path_or_id: str, identity: TargetIdentity) -> dict[str, Any]:
    """Return which target it was, as JSON values: a hub id or the last part of a path, commit and fingerprint."""
    path = Path(path_or_id).expanduser()
    name = path.resolve().name if path.exists() else path_or_id
    return {"name": name, "commit": identity.revision, "fingerprint": identity.fingerprint}


def calibration_facts(
    target: Mapping[str, Any] | None, dataset: TokenDataset, texts: str | None = None
) -> dict[str, Any]:
    """Return what a calibration says of its origin; a function of what it was made of, without times or folders.

    `texts`: what the dataset was to the drafter's training, where that is known.
    """
    data = dataset_facts(dataset) | ({} if texts is None else {"texts": texts})
    return {"target": target, "data": data, "code": code_version()}


def dataset_facts(dataset: TokenDataset) -> dict[str, Any]:
    """Return size and content of a dataset, as JSON values."""
    return {"num_sequences": len(dataset), "num_tokens": dataset.num_tokens, "sha256": dataset.checksum}


# ---- the end of a run


def calibration_texts(training: TokenDataset, validation: TokenDataset | None) -> tuple[TokenDataset, str]:
    """Return the texts to calibrate a run's drafters on, and what they were to it: held out, if these are enough."""
    if validation is not None and sum(validation.num_learned) >= ENOUGH_TOKENS:
        return validation, HELD_OUT_TEXTS
    return training, TRAINING_TEXTS


class Watching(Protocol):
    """What follows a calibration; see `trainer.Observer`."""

    def note(self, sentence: str) -> None: ...

    def progress(self, what: str, done: int, total: int | None) -> None: ...


def calibrate_run(
    folders: Iterable[Path],
    source: FeatureSource,
    training: TokenDataset,
    validation: TokenDataset | None,
    seed: int,
    target: Mapping[str, Any] | None,
    watching: Watching,
) -> None:
    """Write calibration.json for the drafters of a run that have none, on the run's own texts.

    A calibration that fails costs no drafter: it is noted. Drafters with the same file of weights share one.
    """
    dataset, texts = calibration_texts(training, validation)
    records: dict[str | None, CalibrationRecord] = {}
    for folder in uncalibrated(folders):
        try:
            for leftover in folder.glob(f".{CALIBRATION_FILE}.*"):  # of a killed process
                leftover.unlink()
            files = read_drafter_files(folder)
            if files.digest not in records:
                watching.note(f"calibrating the drafter {folder.name}")
                network = drafting_copy(network_of(files), source)
                settings, vocabulary = CalibrationSettings(seed=seed), read_vocabulary(files)
                report = calibrate(network, source, dataset, settings, watching.progress, vocabulary)
                records[files.digest] = report.record(calibration_facts(target, dataset, texts))
            write_calibration(folder, records[files.digest], files.digest)
        except (ValueError, RuntimeError, OSError) as error:  # also memory or a disk that runs out
            watching.note(not_calibrated(folder.name, error))
        else:
            if texts == TRAINING_TEXTS:
                watching.note(
                    f"the drafter {folder.name} is calibrated on the texts that it was trained on: fewer than "
                    f"{ENOUGH_TOKENS} tokens to learn were held out"
                )


def uncalibrated(folders: Iterable[Path]) -> list[Path]:
    """Return the directories without a calibration."""
    return [folder for folder in folders if not (folder / CALIBRATION_FILE).exists()]


def not_calibrated(name: str, error: Exception) -> str:
    """Return the sentence on a drafter whose calibration failed."""
    return f"the drafter {name} is not calibrated: {next(iter(str(error).splitlines()), type(error).__name__)}"
