"""Drafters that propose few of the target's tokens: what they draft, that texts stay the target's, and their files."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from drafter_files import Tensors, V, make_network, make_target
from safetensors.torch import load_file, save_file
from small_models import VOCAB, prompts, sentences, trained_drafters, trained_target
from torch import Tensor, nn

import taps_ext as taps
from taps_ext.checkpoints import (
    average_drafters,
    export_drafter,
    load_drafter,
    load_drafters,
    save_drafter,
    validate_drafter,
)
from taps_ext.checkpoints.export import LOADERS
from taps_ext.composition import COMPOSITIONS
from taps_ext.drafters import DraftVocabulary, EagleDrafter, evidence
from taps_ext.drafters.growth import rows_of_head
from taps_ext.tree import Lengths

SHAPE = taps.TreeShape(depth=4, branching=4, max_nodes=16)
SIZES = {"math": 36, "chat": 48}


@cache
def frequent_tokens(domain: str, size: int) -> DraftVocabulary:
    """The most frequent tokens of a domain."""
    counts = sentences(domain, 40, 60, seed=9).flatten().bincount(minlength=VOCAB)
    return DraftVocabulary(counts.argsort(descending=True, stable=True)[:size].sort().values, VOCAB)


def with_vocabulary(drafter: EagleDrafter, vocabulary: DraftVocabulary | None) -> EagleDrafter:
    given = drafter.network, drafter.embedding, drafter.lm_head, drafter.name, drafter.calibration
    return EagleDrafter(*given, vocabulary=vocabulary)


@cache
def drafters() -> dict[str, EagleDrafter]:
    """The trained specialists, each with a vocabulary of its own."""
    return {name: with_vocabulary(one, frequent_tokens(name, SIZES[name])) for name, one in trained_drafters().items()}


class Masked(nn.Module):
    """An lm_head whose logits outside a vocabulary are -inf."""

    def __init__(self, lm_head: nn.Module, vocabulary: DraftVocabulary) -> None:
        super().__init__()
        self.lm_head, self.mask = lm_head, vocabulary.t2d

    def forward(self, features: Tensor) -> Tensor:
        return self.lm_head(features).masked_fill(~self.mask, -torch.inf)


# ---- what is drafted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_tree_is_that_of_a_drafter_whose_other_tokens_are_impossible(temperature: float) -> None:
    """With the target's noise and without, node for node: the noise is that of the target's own tokens."""
    ids, _ = prompts(4, longest=9)
    features = trained_target().get_decoder()(input_ids=ids).last_hidden_state
    counts, roots = Lengths.of([8] * 4, torch.device("cpu")), ids[:, -1]
    sampling = taps.SamplingParams(temperature, seed=5).rows(4, torch.device("cpu"))
    for name, drafter in drafters().items():
        masked = with_vocabulary(drafter, None)
        assert drafter.ends.vocabulary is not None
        object.__setattr__(masked.ends, "head", Masked(drafter.lm_head, drafter.ends.vocabulary))
        trees = []
        for one in (drafter, masked):
            state = one.reset(4, sampling)
            one.observe(state, features[:, :-1], ids[:, 1:], counts)
            trees.append(one.propose(state, roots, SHAPE, torch.ones(4, dtype=torch.bool)))
        assert torch.equal(trees[0].tokens, trees[1].tokens), name
        assert torch.equal(trees[0].parents, trees[1].parents)
        torch.testing.assert_close(trees[0].scores, trees[1].scores)
        assert drafter.ends.vocabulary.t2d[trees[0].tokens[trees[0].is_node()][1:]].float().mean() > 0.9


def test_a_drafter_of_fewer_tokens_than_branches_proposes_them_all() -> None:
    drafter = with_vocabulary(trained_drafters()["math"], DraftVocabulary(torch.tensor([7, 9]), VOCAB))
    state = drafter.reset(1)
    drafter.observe(state, torch.randn(1, 3, 64), torch.tensor([[4, 5, 6]]), Lengths.of([3], torch.device("cpu")))
    tree = drafter.propose(state, torch.tensor([6]), taps.TreeShape(2, 5, 30), torch.tensor([True]))
    tree.validate()
    assert sorted(tree.tokens[0, : int(tree.num_nodes[0])].tolist()) == [6, 7, 7, 7, 9, 9, 9]


def test_drafters_of_one_vocabulary_draft_together_and_others_apart() -> None:
    both = trained_drafters()
    shared = [with_vocabulary(one, frequent_tokens("math", 36)) for one in both.values()]
    equal = DraftVocabulary(frequent_tokens("math", 36).tokens.clone(), VOCAB)
    assert shared[0].drafts_with(shared[1])
    assert shared[0].drafts_with(with_vocabulary(both["chat"], equal))
    assert not shared[0].drafts_with(with_vocabulary(both["chat"], frequent_tokens("math", 35)))
    assert not shared[0].drafts_with(both["chat"])


def test_a_token_that_cannot_be_proposed_is_improbable_and_rules_no_drafter_out() -> None:
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    known = evidence.token_log_probs(logits, torch.tensor([0, 4, 9]), vocab_size=100)
    torch.testing.assert_close(known, logits.log_softmax(-1)[torch.arange(3), torch.tensor([0, 4, 9])])
    outside = evidence.token_log_probs(logits, torch.tensor([-1, 4, -1]), vocab_size=100)
    torch.testing.assert_close(outside.exp()[[0, 2]] * 90, torch.full((2,), evidence.OUTSIDE))
    assert outside[1] == known[1]


# ---- the text


MIXES: dict[str, Callable[[], dict[str, EagleDrafter]]] = {
    "two vocabularies": drafters,
    "one and the whole": lambda: {**drafters(), "chat": trained_drafters()["chat"]},
    "one for both": lambda: {
        name: with_vocabulary(one, frequent_tokens("chat", 40)) for name, one in trained_drafters().items()
    },
}
CASES = [
    *((mix, "merged", drafting) for mix, drafting in itertools.product(MIXES, ("coupled", "topk"))),
    *(("two vocabularies", name, "coupled") for name in COMPOSITIONS if name != "merged"),
]


def make_decoder(mix: str, composition: str, **kwargs: Any) -> taps.SpeculativeDecoder:
    one = "math" if composition == "single" else None
    return taps.SpeculativeDecoder(trained_target(), MIXES[mix](), composition, drafter=one, shape=SHAPE, **kwargs)


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_the_text_is_the_targets_whatever_can_be_proposed(case: tuple[str, str, str]) -> None:
    """Greedy and sampled rows at once; tokens outside all vocabularies are among them."""
    mix, composition, drafting = case
    sampling = taps.SamplingParams([0.0, 0.3, 0.7, 1.0, 1.5], seed=11)
    decoder = make_decoder(mix, composition, drafting=drafting)
    result = decoder.generate(*prompts(5), sampling=sampling, max_new_tokens=32)
    plain = taps.plain_generate(trained_target(), *prompts(5), sampling=sampling, max_new_tokens=32)
    assert torch.equal(result.sequences, plain.sequences)
    known = frequent_tokens("math", 36).t2d | frequent_tokens("chat", 48).t2d
    assert not all(known[token] for row in plain.new_tokens for token in row)


def acceptance_length(mix: str, temperature: float, **kwargs: Any) -> float:
    runs = [
        make_decoder(mix, "merged", **kwargs).generate(
            *prompts(8), sampling=taps.SamplingParams(temperature, seed=seed), max_new_tokens=60, eos_token_id=()
        )
        for seed in range(3)
    ]
    return taps.DecodeStats.joined([run.stats for run in runs]).acceptance_length


def test_drafts_are_accepted_and_a_look_at_the_noise_of_the_right_tokens_helps() -> None:
    """Were tokens or noise not mapped, the text would be the same, and hardly a draft be accepted."""
    assert acceptance_length("two vocabularies", 0.0) > 2.0
    assert acceptance_length("two vocabularies", 1.0) > 1.1 * acceptance_length(
        "two vocabularies", 1.0, drafting="topk"
    )


# ---- the rows of the lm_head


def test_rows_are_those_of_the_lm_head_with_their_biases() -> None:
    lm_head, vocabulary = nn.Linear(8, 20).bfloat16(), DraftVocabulary(torch.tensor([0, 3, 19]), 20)
    head, x = rows_of_head(lm_head, vocabulary), torch.randn(5, 8).bfloat16()
    torch.testing.assert_close(head(x), lm_head(x)[:, vocabulary.tokens])
    assert not any(parameter.requires_grad for parameter in head.parameters())


class Wrapped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "lm_head", [Wrapped(8, 20), nn.Linear(8, 20, device="meta"), nn.Sequential(nn.Linear(8, 20))], ids=repr
)
def test_an_lm_head_whose_rows_cannot_be_taken_is_refused_in_a_sentence(lm_head: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"a draft vocabulary needs rows of the target's lm_head.*; load the target"):
        rows_of_head(lm_head, DraftVocabulary(torch.tensor([0, 3]), 20))


# ---- files

WORDS = DraftVocabulary(torch.tensor([0, 3, 4, 17, 40]), V)


def save(folder: Path, vocabulary: DraftVocabulary | None = WORDS) -> Path:
    target = make_target()
    embedding = target.get_input_embeddings()
    return save_drafter(
        make_network(target), folder, embedding=embedding, target_config=target.config, vocabulary=vocabulary
    )


def test_a_saved_drafter_holds_its_vocabulary_and_nothing_of_the_target(tmp_path: Path) -> None:
    target, network = make_target(), make_network(make_target())
    folder = save(tmp_path / "d")
    held = load_file(folder / "model.safetensors")
    assert held.keys() == network.state_dict().keys() | {"d2t", "t2d"}
    assert held["d2t"].tolist() == [0, 2, 2, 14, 36] and held["t2d"].nonzero().flatten().tolist() == [0, 3, 4, 17, 40]
    drafter = load_drafter(folder, target)
    assert drafter.ends.vocabulary == WORDS
    assert torch.equal(drafter.ends.head.weight, target.lm_head.weight[WORDS.tokens])
    report = validate_drafter(folder)
    assert report.passed and "5 of 61 tokens" in str(report)


def test_loaded_drafters_of_one_vocabulary_share_its_rows(tmp_path: Path) -> None:
    folders = {name: save(tmp_path / name) for name in ("math", "chat")}
    both = load_drafters({**folders, "whole": save(tmp_path / "whole", None)}, make_target())
    assert both["math"].ends is both["chat"].ends is not both["whole"].ends
    assert both["math"].drafts_with(both["chat"])


BROKEN: dict[str, Callable[[Tensors], Tensors]] = {
    "must ascend within 0..60, got 5 from 0 to 40": lambda t: {**t, "d2t": torch.tensor([0, 2, 1, 14, 36])},
    "must ascend within 0..60, got 5 from -1 to 40": lambda t: {**t, "d2t": torch.tensor([-1, 2, 2, 14, 36])},
    "must ascend within 0..60, got 5 from 0 to 61": lambda t: {**t, "d2t": torch.tensor([0, 2, 2, 14, 57])},
    "d2t and the mask t2d name different tokens": lambda t: {**t, "t2d": t["t2d"].roll(1)},
    "must be int64 [D] and bool [V], got int64 [1, 5] and bool [61]": lambda t: {**t, "d2t": t["d2t"][None]},
    "got int32 [5] and bool [61]": lambda t: {**t, "d2t": t["d2t"].int()},
    "got int64 [5] and uint8 [61]": lambda t: {**t, "t2d": t["t2d"].byte()},
    "has 4 of 61 tokens, by its config.json 5 of 61": lambda t: {
        **t, "d2t": t["d2t"][:4], "t2d": t["t2d"].clone().index_fill_(0, torch.tensor(40), False)
    },
    "has 5 of 62 tokens, by its config.json 5 of 61": lambda t: {
        **t, "t2d": torch.cat([t["t2d"], torch.tensor([False])])
    },
}  # fmt: skip


@pytest.mark.parametrize("sentence", BROKEN)
def test_damaged_maps_are_refused_in_a_sentence(sentence: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "d")
    weights = folder / "model.safetensors"
    save_file(BROKEN[sentence](load_file(weights)), weights)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(re.sub(r',\s*"taps": {[^}]*}', "", config))
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        load_drafter(folder, make_target())
    assert "\n" not in str(caught.value)


# ---- averaging and other programs


def test_an_average_has_the_tokens_of_all_its_parents(tmp_path: Path) -> None:
    other = DraftVocabulary(torch.tensor([3, 5, 60]), V)
    parents = [save(tmp_path / "a"), save(tmp_path / "b"), save(tmp_path / "c", other)]
    alike = load_drafter(average_drafters(parents[:2], None, tmp_path / "alike"), make_target())
    assert alike.ends.vocabulary == WORDS
    joined = load_drafter(average_drafters(parents[1:], None, tmp_path / "joined"), make_target())
    assert joined.ends.vocabulary == DraftVocabulary(torch.tensor([0, 3, 4, 5, 17, 40, 60]), V)
    assert torch.equal(joined.network.fc.weight, make_network(make_target()).fc.weight)
    whole = save(tmp_path / "whole", None)
    for pair in ((whole, parents[0]), (parents[0], whole)):
        with pytest.raises(ValueError, match=f"{whole} drafts over the whole vocabulary.*; export the latter"):
            average_drafters(pair, None, tmp_path / "mixed")


@pytest.mark.parametrize("program", LOADERS)
def test_a_program_that_cannot_read_a_draft_vocabulary_gets_the_drafter_without(program: str, tmp_path: Path) -> None:
    target, folder = make_target(), save(tmp_path / "d")
    target.save_pretrained(tmp_path / "target")
    assert any("draft vocabulary" in reason for reason in validate_drafter(folder).loaders[program])
    given: dict[str, Any] = {"to": program, "target": tmp_path / "target"}
    with pytest.raises(ValueError, match=f"exported to {program}: a draft vocabulary .*; give --whole-vocabulary"):
        export_drafter(folder, output=tmp_path / "refused", **given)
    written = export_drafter(folder, output=tmp_path / "out", whole_vocabulary=True, **given)
    assert not load_file(written / "model.safetensors").keys() & {"d2t", "t2d"}
    assert "draft_vocab_size" not in (written / "config.json").read_text()
    drafter = load_drafter(written, target)
    assert drafter.ends.vocabulary is None and drafter.ends.head is target.lm_head
