"""The measurements of `bench_beyond.py`: a cell is one way to decode one domain's prompts, and is kept when it is done.

The library holds no counters: drafter forwards, rows of the lm_head and time are counted by wrapping it from outside.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from beyond_counts import Counts, cost_a_step, counting, timed_steps
from drafter_filters import filtering_drafters
from peers import PaperWay, RecursiveRejection
from peers.loop import Peer
from peers.sum_merging import SumMerging
from timing import no_garbage_collection
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import corpus

import taps_ext
from taps_ext.composition import EVIDENCE_DECAY
from taps_ext.decode.plain import plain_generate
from taps_ext.drafters import evidence
from taps_ext.drafters.evidence import PROMPT_WEIGHT
from taps_ext.target.model import TargetModel

ROWS = 10  # of a batch
SWITCHING = "switching"  # prompts that change their domain half-way
REJECTION, TUNED = "recursive rejection", "recursive rejection, sharpened"  # as published, and from a power of q
PAPER = {"the paper's routing": "routed", "the paper's merging": "merged"}
SUM = "merged by sum"
NO_FILTERS = (0, 1.0, 0.0)
SHARPNESSES = (1.0, 1.5, 2.2, 3.3, 5.0)
PLACES_APART = 8  # tokens
TIMED_PROMPTS = 12
STEP_TOKENS = 9  # of a first step: the prefill's, one a level and the bonus token, and one more
TUNING_PROMPTS = 40
MEASURED_SEED, TUNING_SEED = 0, 1  # of prompts: what is measured, and what peers and constants are tuned on


def as_key(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, separators=(",", ":"))


@dataclass(frozen=True)
class Cell:
    """One way to decode one domain's prompts."""

    world: str
    drafters: tuple[str, ...]
    way: str  # a composition of the library, or a peer
    domain: str
    temperature: float
    drafting: str = "coupled"
    nodes: int = 60  # of each drafter's tree, root included
    budget: int | None = None  # of a merged tree; None: the whole union
    decay: float | None = None  # of the evidence; None: the composition looks at none
    draw: int = 0  # which noise: cells of one draw and one prompt have the same
    rows: int = ROWS  # of a batch
    share: float = 1.0  # of the domain's prompts
    filters: tuple[int, float, float] = NO_FILTERS  # of the request: top_k, top_p, min_p
    filters_drafter: bool = False  # on the drafter's side too
    prompts: int = MEASURED_SEED  # the seed of the prompts
    prompt_weight: float = PROMPT_WEIGHT  # of a prompt's tokens in the evidence
    places: float | None = None  # first steps at places of the plain texts of this temperature; None: whole texts

    @property
    def key(self) -> str:
        return as_key(asdict(self))


@dataclass(frozen=True)
class CostCell:
    """What a step of each way costs with so many drafters, on prompts of all domains in turn."""

    world: str
    drafters: tuple[str, ...]
    temperature: float
    rows: int  # of a batch

    @property
    def key(self) -> str:
        return as_key({"cost": asdict(self)})


@dataclass(frozen=True)
class Settings:
    """How much is decoded."""

    prompts: int = 40  # of each domain
    max_new_tokens: int = 96


def is_peer(cell: Cell) -> bool:
    """Whether another system's way decodes it, with random numbers of its own."""
    return cell.way in (REJECTION, TUNED, *PAPER)


def domain_of(drafter: str) -> str:
    """What it was trained on."""
    return next(part for part in re.split("[/-]", drafter) if part in corpus.ALL_DOMAINS)


def set_of(drafter: str) -> str:
    """What its name says besides."""
    return "-".join(part for part in re.split("[/-]", drafter) if part not in corpus.ALL_DOMAINS)


class World:
    """A folder with `target/` and `drafters/`: the models, and held-out prompts of every domain.

    A drafter's path below `drafters/` names its domain, and with what else is in it the set that it belongs to:
    `1/math` is of the set `1`, `math-hass` of `hass`, `math` of a set without a name.
    """

    def __init__(self, name: str, folder: Path, settings: Settings) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32)
        self.name, self.settings, self.target = name, settings, TargetModel(model.eval())
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder / "target", padding_side="left")
        folders = sorted(path.parent for path in folder.glob("drafters/**/config.json"))
        paths = {path.relative_to(folder / "drafters").as_posix(): path for path in folders}
        self.drafters = taps_ext.load_drafters(paths, model)
        if uncalibrated := [name for name, drafter in self.drafters.items() if drafter.calibration is None]:
            raise SystemExit(f"{folder}: {', '.join(uncalibrated)} not calibrated: run taps-ext calibrate first")
        self.domains = [domain for domain in corpus.ALL_DOMAINS if domain in map(domain_of, paths)]
        self.sets = [
            [name for domain in self.domains for name in paths if (set_of(name), domain_of(name)) == (one, domain)]
            for one in sorted(set(map(set_of, paths)))
        ]
        self.digest = _digest([folder / "target", *folders])
        self._prompts: dict[tuple[str, int], list[Any]] = {}
        self._plain: dict[tuple[Any, ...], list[list[int]]] = {}
        self._peers: dict[tuple[str, tuple[str, ...]], Peer] = {}

    def decoder(self, cell: Cell) -> taps_ext.SpeculativeDecoder:
        decoder = taps_ext.SpeculativeDecoder(
            self.target,
            {name: self.drafters[name] for name in cell.drafters},
            "merged" if cell.way == SUM else cell.way,
            shape=taps_ext.TreeShape(max_nodes=cell.nodes),
            max_nodes=cell.budget,
            drafting=cell.drafting,
            evidence_decay=0 if cell.way == "merged" and cell.decay is None else cell.decay,
        )
        if cell.way == SUM:
            assert cell.budget is not None
            decoder.composition = SumMerging(cell.budget, cell.decay)
        return decoder

    def prompts(self, domain: str, seed: int = MEASURED_SEED) -> list[Any]:
        """The domain's conversations up to a user turn."""
        if (domain, seed) not in self._prompts:
            count, switches = self.settings.prompts, domain == SWITCHING
            self._prompts[domain, seed] = (
                corpus.switching_prompts(self.domains, count, seed) if switches else corpus.prompts(domain, count, seed)
            )
        return self._prompts[domain, seed]

    def encoded(self, prompts: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Tokens and mask int64 [B, P], padded on the left."""
        batch = self.tokenizer.apply_chat_template(
            list(prompts), add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        return batch["input_ids"], batch["attention_mask"]

    def sampling(
        self, temperature: float, draw: int, first: int, count: int, filters: tuple[int, float, float] = NO_FILTERS
    ) -> taps_ext.SamplingParams:
        """A seed a prompt and draw, so that every way to decode a prompt meets the same noise."""
        seeds = [10_000 * draw + first + row for row in range(count)]
        return taps_ext.SamplingParams(temperature, *filters, seed=seeds)

    def plain_texts(self, cell: Cell) -> list[list[int]]:
        """The new tokens of each prompt of the cell's domain by plain decoding, at the temperature of its places."""
        domain, draw, filters = cell.domain, cell.draw, cell.filters
        temperature = cell.temperature if cell.places is None else cell.places
        key = (domain, cell.prompts, temperature, draw, filters)
        if key not in self._plain:
            texts: list[list[int]] = []
            for first, tokens, mask in self._batches(replace(cell, rows=ROWS, share=1.0)):
                sampling = self.sampling(temperature, draw, first, len(tokens), filters)
                length = self.settings.max_new_tokens
                out = plain_generate(self.target, tokens, mask, sampling=sampling, max_new_tokens=length)
                texts += out.new_tokens
            self._plain[key] = texts
        return self._plain[key]

    def _batches(self, cell: Cell) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The place of the first prompt, tokens and mask of each batch."""
        prompts = self.prompts(cell.domain, cell.prompts)
        prompts = prompts[: math.ceil(cell.share * len(prompts))]
        for first in range(0, len(prompts), cell.rows):
            yield first, *self.encoded(prompts[first : first + cell.rows])

    def peer(self, cell: Cell) -> Peer:
        """The competitor of a cell; what it is tuned on is not measured."""
        key = (cell.way, cell.drafters)
        if key not in self._peers:
            drafters = {name: self.drafters[name] for name in cell.drafters}
            if cell.way in PAPER:
                self._peers[key] = PaperWay(self.target, drafters, PAPER[cell.way])
            else:
                self._peers[key] = self._rejection(cell.drafters[0], SHARPNESSES if cell.way == TUNED else (1.0,))
        return self._peers[key]

    def _rejection(self, drafter: str, sharpnesses: tuple[float, ...]) -> RecursiveRejection:
        count = min(TUNING_PROMPTS, 4 * self.settings.prompts)
        prompts = corpus.prompts(domain_of(drafter), count, seed=TUNING_SEED)
        return RecursiveRejection(
            self.target,
            self.drafters[drafter],
            [self.encoded([prompt])[0][0] for prompt in prompts],
            tuning_tokens=self.settings.max_new_tokens,
            sharpnesses=sharpnesses,
        )

    def measure(self, cell: Cell) -> dict[str, Any]:
        """The cell's figures, of each prompt and in sum."""
        if cell.places is not None:
            return self._measure_places(cell)
        stats, texts, counts = self._decoded_by_peer(cell) if is_peer(cell) else self._decoded(cell)
        plain = self.plain_texts(cell) if texts is not None else None
        return {
            "accepted": [sum(row) for row in stats.num_accepted],
            "steps": [len(row) for row in stats.num_accepted],
            "identical": None if plain is None else sum(a == b for a, b in zip(texts or [], plain, strict=False)),
            "nodes": sum(map(sum, stats.num_nodes)),
            "levels": counts.levels,
            "chosen": dict(Counter(choice for row in stats.choices for choice in row if isinstance(choice, str))),
        }

    def _decoded(self, cell: Cell) -> tuple[taps_ext.DecodeStats, list[list[int]] | None, Counts]:
        decoder, runs, length = self.decoder(cell), [], self.settings.max_new_tokens
        with (
            counting(self.target) as counts,
            mock.patch.object(evidence, "PROMPT_WEIGHT", cell.prompt_weight),
            filtering_drafters(*cell.filters) if cell.filters_drafter else nullcontext(),
        ):
            for first, tokens, mask in self._batches(cell):
                sampling = self.sampling(cell.temperature, cell.draw, first, len(tokens), cell.filters)
                runs.append(decoder.generate(tokens, mask, sampling=sampling, max_new_tokens=length))
        texts = [tokens for run in runs for tokens in run.new_tokens]
        return taps_ext.DecodeStats.joined([run.stats for run in runs]), texts, counts

    def _decoded_by_peer(self, cell: Cell) -> tuple[taps_ext.DecodeStats, None, Counts]:
        peer, length = self.peer(cell), self.settings.max_new_tokens
        runs = []
        for first, tokens, mask in self._batches(cell):
            prompts = [row[kept.bool()] for row, kept in zip(tokens, mask, strict=True)]
            seed = 10_000 * cell.draw + first
            runs.append(peer.generate(prompts, cell.temperature, cell.nodes, length, seed).stats)
        return taps_ext.DecodeStats.joined(runs), None, Counts()

    def _measure_places(self, cell: Cell) -> dict[str, Any]:
        """Of first steps alone, so that two temperatures can be compared on the same text."""
        texts = self.plain_texts(cell)
        begun = []  # the prompt, and its text up to a place
        for place, (prompt, text) in enumerate(zip(self.prompts(cell.domain), texts, strict=True)):
            tokens = self.encoded([prompt])[0][0].tolist()
            ends = range(2, len(text) - STEP_TOKENS, PLACES_APART)  # none of a text that is too short
            begun += [(place, [*tokens, *text[:end]]) for end in ends]
        decoder, accepted, steps, nodes = self.decoder(cell), [0] * len(texts), [0] * len(texts), 0
        for first in range(0, len(begun), cell.rows):
            rows = begun[first : first + cell.rows]
            batch = self.tokenizer.pad({"input_ids": [tokens for _, tokens in rows]}, return_tensors="pt")
            sampling = self.sampling(cell.temperature, cell.draw, 5_000 + first, len(rows))  # not the text's own noise
            stats = decoder.generate(
                batch["input_ids"],
                batch["attention_mask"],
                sampling=sampling,
                max_new_tokens=STEP_TOKENS,
                eos_token_id=(),
            ).stats
            for (place, _), counts, sizes in zip(rows, stats.num_accepted, stats.num_nodes, strict=True):
                accepted[place] += counts[0]
                steps[place] += 1
                nodes += sizes[0]
        return {"accepted": accepted, "steps": steps, "identical": None, "nodes": nodes, "levels": 0, "chosen": {}}

    def cost(self, cell: CostCell) -> dict[str, Any]:
        """By way: counts and milliseconds a step. The ways take turns, prompt by prompt: a busy machine slows all."""
        decoders = {way: self.decoder(one) for way, one in cost_ways(cell).items()}
        steps: dict[str, list[dict[str, float]]] = {way: [] for way in decoders}
        mixed = [prompt for prompts in zip(*map(self.prompts, self.domains), strict=True) for prompt in prompts]
        batches = [mixed[first : first + cell.rows] for first in range(0, len(mixed), cell.rows)]
        length = self.settings.max_new_tokens
        with no_garbage_collection(), counting(self.target) as counts:
            for place, prompts in enumerate(batches[: 1 + (TIMED_PROMPTS // cell.rows or 1)]):
                tokens, mask = self.encoded(prompts)
                sampling = self.sampling(cell.temperature, 0, cell.rows * place, len(prompts))
                for way, decoder in decoders.items():
                    found = timed_steps(decoder.stream(tokens, mask, sampling=sampling, max_new_tokens=length), counts)
                    steps[way] += found if place else []  # the first batch warms up
        return {way: cost_a_step(found) for way, found in steps.items() if found}


def cost_ways(cell: CostCell) -> dict[str, Cell]:
    """The ways whose steps are timed."""

    def way(composition: str, **more: Any) -> Cell:
        return Cell(cell.world, cell.drafters, composition, "", cell.temperature, **more)

    return {
        "single": Cell(cell.world, cell.drafters[:1], "single", "", cell.temperature),
        "evidence": way("evidence", decay=EVIDENCE_DECAY),
        "confidence": way("confidence"),
        "merged, 60": way("merged", budget=60),
        "merged, 60, evidence": way("merged", budget=60, decay=EVIDENCE_DECAY),
        "merged": way("merged"),
    }


def code_digest() -> str:
    """Of all that measures: results of two codes do not mix."""
    found = hashlib.sha256()
    here, package = Path(__file__).resolve().parent, Path(taps_ext.__file__).resolve().parent
    measuring = [here / f"{name}.py" for name in ("beyond_cells", "beyond_counts", "drafter_filters", "timing")]
    measuring += [*here.glob("peers/*.py"), *here.glob("worlds/*.py")]
    for path in sorted([*measuring, *package.rglob("*.py"), *package.glob("_C*.so")]):
        found.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return f"{found.hexdigest()[:16]}, {torch.get_num_threads()} threads of torch {torch.__version__}"


def _digest(folders: Sequence[Path]) -> str:
    """Of the weights and calibrations in the folders."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted([*folder.glob("*.safetensors"), *folder.glob("calibration.json")]):
            found.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]
