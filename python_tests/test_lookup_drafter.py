"""Look-up drafters: what they observe, what they propose in a batch, and what they cost the decoder."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from literal_lookup import LiteralLookup
from small_models import VOCAB, new_target, prompts, trained_drafters, trained_target
from test_drafters import NoHostRead
from torch import Tensor

import taps_ext as taps
from taps_ext import tiny
from taps_ext.drafters import evidence
from taps_ext.drafters.lookup import LookupState

SHAPE = taps.TreeShape(depth=4, branching=4, max_nodes=16)


def lengths(*counts: int) -> taps.Lengths:
    return taps.Lengths.of(counts)


def observed(drafter: taps.LookupDrafter, *blocks: list[list[int]], **kwargs: Any) -> Any:
    """A state that has observed blocks of rows, which are padded with a token that no text may hold."""
    state = drafter.reset(len(blocks[0]), **kwargs)
    for rows in blocks:
        counts = [len(row) for row in rows]
        tokens = torch.tensor([row + [-1] * (max(counts) - len(row)) for row in rows], dtype=torch.int64)
        drafter.observe(state, None, tokens, lengths(*counts))
    return state


class Watched(taps.LookupDrafter):
    """Keeps what it observes."""

    def reset(self, *args: Any, **kwargs: Any) -> LookupState:
        self.seen: list[tuple[Any, Tensor, taps.Lengths]] = []
        return super().reset(*args, **kwargs)

    def observe(self, state: Any, features: Tensor | None, next_tokens: Tensor, num_tokens: taps.Lengths) -> None:
        self.seen.append((features, next_tokens, num_tokens))
        super().observe(state, features, next_tokens, num_tokens)


@pytest.mark.parametrize("others", [{}, {"chat": "chat"}])
def test_a_drafter_without_features_observes_each_rows_whole_text_in_order(others: dict[str, str]) -> None:
    """From the prompt's first token to the last root, on the CPU; a row that has ended observes nothing more."""
    watched = Watched(VOCAB)
    drafters = {"lookup": watched, **{name: trained_drafters()[name] for name in others}}
    decoder = taps.SpeculativeDecoder(trained_target(), drafters, shape=SHAPE)
    ids, mask = prompts(3)
    result = decoder.generate(ids, mask, max_new_tokens=[30, 3, 17], eos_token_id=())
    texts: list[list[int]] = [[], [], []]
    for features, tokens, counts in watched.seen:
        assert features is None and tokens.device.type == "cpu" and tokens.dtype == torch.int64
        for row, count in enumerate(counts.host):
            texts[row] += tokens[row, :count].tolist()
    for row, text in enumerate(texts):
        whole = ids[row][mask[row].bool()].tolist() + result.new_tokens[row]
        assert text == whole[: len(text)]
        assert len(text) >= int(mask[row].sum()) + 1  # all but the step that ended the row
    assert sum(sum(counts.host) for *_, counts in watched.seen) == sum(map(len, texts))


def test_a_row_drafts_the_same_alone_and_in_a_batch() -> None:
    """Also where rows begin late, end, or observe nothing for a while."""
    drafter = taps.LookupDrafter(VOCAB)
    blocks = [[[5, 6, 7, 5, 6], [], [9, 8, 9]], [[7], [4, 5, 4], []], [[5, 6], [], []]]
    rows = [[token for block in blocks for token in block[row]] for row in range(3)]
    roots = torch.tensor([row[-1] for row in rows])
    together = drafter.propose(observed(drafter, *blocks), roots, SHAPE, torch.ones(3, dtype=torch.bool))
    together.validate()
    for row in range(3):
        pieces = [[block[row]] for block in blocks]
        alone = drafter.propose(observed(drafter, *pieces), roots[row : row + 1], SHAPE, torch.tensor([True]))
        for name in ("tokens", "parents", "scores", "num_nodes", "entropies"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[row])
    assert together.num_nodes.min() > 1


def test_inactive_rows_keep_only_their_root() -> None:
    drafter = taps.LookupDrafter(VOCAB)
    state = observed(drafter, [[5, 6, 5, 6], [5, 6, 5, 6]])
    tree = drafter.propose(state, torch.tensor([6, 6]), SHAPE, torch.tensor([False, True]))
    tree.validate()
    assert tree.num_nodes.tolist() == [1, int(tree.num_nodes[1])] and tree.num_nodes[1] > 1
    assert tree.tokens[0].tolist() == [6] + [0] * (tree.capacity - 1)
    only = drafter.propose_rows(state, torch.tensor([6, 6]), SHAPE, torch.tensor([True, True]), [0])
    assert only.num_nodes[0] > 1 and only.num_nodes[1] == 1


@pytest.mark.parametrize(
    "shape", [taps.TreeShape(1, 1, 2), taps.TreeShape(5, 1, 9), taps.TreeShape(3, 2, 60), taps.TreeShape(6, 10, 1)]
)
def test_trees_keep_to_their_shape(shape: taps.TreeShape) -> None:
    drafter = taps.LookupDrafter(VOCAB)
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(4, (60,), generator=generator).tolist()
    state = observed(drafter, [text])
    tree = drafter.propose(state, torch.tensor(text[-1:]), shape, torch.tensor([True]))
    tree.validate()
    assert tree.capacity == shape.capacity(VOCAB)
    depths = taps.ops.tree_depths(tree.parents, tree.num_nodes)[0]
    assert int(depths.max()) <= shape.depth
    least = taps.TreeShape(shape.depth, shape.branching, shape.max_nodes, min_score=-1.0)
    pruned = drafter.propose(state, torch.tensor(text[-1:]), least, torch.tensor([True]))
    assert bool((pruned.scores[pruned.is_node()] >= -1.0).all())


def test_proposing_reads_nothing_from_the_device() -> None:
    """On a GPU the host would wait; `active` and the roots are there."""
    drafter = taps.LookupDrafter(VOCAB)
    state = observed(drafter, [[5, 6, 5, 6]])
    roots, active = torch.tensor([6]), torch.tensor([True])
    with NoHostRead():
        drafter.propose(state, roots, SHAPE, active)


def test_evidence_is_the_discounted_log_probability_of_the_text() -> None:
    """Token by token, by literal search; the same tokens of a prompt count as for networks."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(4, (110,), generator=generator).tolist()
    for prompt_length in (2, 30, 90):
        cuts = [0, prompt_length + 1, prompt_length + 4, prompt_length + 5, 110]
        blocks = [[text[start:end]] for start, end in pairwise(cuts)]
        state = observed(taps.LookupDrafter(VOCAB), *blocks, decay=0.9)
        literal = LiteralLookup(8)
        log_probs = [literal.append(token, place <= prompt_length) for place, token in enumerate(text)]
        first = prompt_length + 1 - min(prompt_length, evidence.MAX_SLOTS - 1)
        weights = [evidence.PROMPT_WEIGHT if place < prompt_length else 1.0 for place in range(110)]
        expected = sum(weights[place] * log_probs[place] * 0.9 ** (109 - place) for place in range(first, 110))
        assert float(state.evidence[0]) == pytest.approx(expected, abs=1e-3)
    assert taps.LookupDrafter(VOCAB).reset(2).evidence is None


def test_look_ups_write_what_a_repetitive_text_repeats() -> None:
    """A target that copies its prompt is followed by whole paths."""
    model, tokenizer = tiny.load_target()
    drafters = taps.load_drafters({"lookup": "lookup"}, model)
    text = tokenizer.apply_chat_template(tiny.prompts("chat", 1)[0], tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    decoder = taps.SpeculativeDecoder(model, drafters, shape=taps.TreeShape())
    result = decoder.generate(**inputs, max_new_tokens=160, eos_token_id=())
    plain = taps.plain_generate(model, **inputs, max_new_tokens=160, eos_token_id=())
    assert result.new_tokens == plain.new_tokens
    assert result.stats.acceptance_length > 1.3


def test_look_ups_need_no_size_of_features_and_no_lm_head() -> None:
    """And are not warned of: their coupling needs no fit for a target."""
    target = new_target(hidden_size=32)
    drafter = taps.load_drafter("lookup", target)
    assert isinstance(drafter, taps.LookupDrafter) and (drafter.name, drafter.vocab_size) == ("lookup", VOCAB)
    ids, mask = prompts(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder = taps.SpeculativeDecoder(target, {"any": drafter})
        decoder.generate(ids, mask, max_new_tokens=8, sampling=taps.SamplingParams(1.0))
    target.get_output_embeddings = lambda: None  # type: ignore[method-assign]
    assert taps.load_drafters({"mine": "lookup"}, target)["mine"].name == "mine"


def test_a_directory_named_lookup_is_loaded_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lookup").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no weights in ./lookup"):
        taps.load_drafter("./lookup", trained_target())


def test_bad_look_ups_are_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"max_context must lie in 1\.\.32, got 0"):
        taps.LookupDrafter(VOCAB, max_context=0)
    with pytest.raises(ValueError, match=f"has vocabulary {VOCAB + 1}, the target {VOCAB}"):
        taps.SpeculativeDecoder(trained_target(), {"lookup": taps.LookupDrafter(VOCAB + 1)})


def test_the_noise_raises_the_tokens_that_it_favours() -> None:
    """A row at temperature 0 and one without a look at the noise are drafted alike."""
    drafter, text = taps.LookupDrafter(VOCAB), [5, 6, 5, 7, 5, 8, 5, 9, 5]
    sampling = taps.SamplingParams([0.0, 1.0, 0.2], seed=[1, 2, 2]).rows(3)
    roots, active = torch.tensor([5] * 3), torch.ones(3, dtype=torch.bool)
    coupled = drafter.propose(observed(drafter, [text] * 3, sampling=sampling), roots, SHAPE, active)
    plain = drafter.propose(observed(drafter, [text] * 3), roots, SHAPE, active)
    assert torch.equal(coupled.scores[0], plain.scores[0])
    assert not torch.equal(coupled.scores[1], plain.scores[1])
    drawn = taps.SamplingParams(1.0, seed=[2]).rows(1)
    logits = torch.full((1, 1, VOCAB), -math.inf)
    logits[..., [6, 7, 8, 9]] = 0.0  # equally likely, so that the noise alone decides
    walk = taps.ops.verify_tree(
        logits,
        taps.DraftTree.of_roots(torch.tensor([5])),
        drawn.temperature,
        drawn.top_k,
        drawn.top_p,
        drawn.min_p,
        drawn.seeds,
        torch.tensor([len(text)]),
    )

    def children(tree: taps.DraftTree) -> dict[int, float]:
        nodes = zip(tree.tokens[1].tolist(), tree.parents[1].tolist(), tree.scores[1].tolist(), strict=True)
        return {token: score for token, parent, score in nodes if parent == 0}

    gains = {token: children(coupled)[token] - children(plain)[token] for token in (6, 7, 8, 9)}
    assert max(gains, key=lambda token: gains[token]) == int(walk.bonus_tokens)
