"""Claims about the training of drafters: masks, features, objectives, determinism, and what is saved."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from taps_ext.drafters.checkpoint import load_network
from taps_ext.drafters.eagle_network import EagleConfig, EagleNetwork
from taps_ext.training import Example, TokenDataset, Trainer, TrainingConfig, train_drafter
from taps_ext.training.dataset import collate
from taps_ext.training.features import DraftBatch, FrozenTarget
from taps_ext.training.objectives import OBJECTIVES
from taps_ext.training.objectives.eagle2 import eagle2_losses, guess_loss
from taps_ext.training.objectives.hass import aligned_pass, alignment_mask, hass_losses, next_stream, top_tokens_loss
from taps_ext.training.trainer import new_network, schedule

VOCAB, HIDDEN = 23, 16


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def make_network(target: LlamaForCausalLM, seed: int = 1) -> EagleNetwork:
    return new_network(EagleConfig.for_target(target.config), seed)


def make_examples(count: int = 12, seed: int = 0, shortest: int = 5) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(count):
        tokens = torch.randint(1, VOCAB, (shortest + index % 6,), generator=generator).tolist()
        examples.append(Example(tuple(tokens), tuple(i >= 2 for i in range(len(tokens)))))
    return examples


def make_draft_batch(target: LlamaForCausalLM, rows: int = 3) -> DraftBatch:
    return FrozenTarget(target).draft_batch(collate(make_examples(rows)))


# --- dataset ---------------------------------------------------------------------------------------------------------


def test_an_epoch_visits_every_sequence_once() -> None:
    dataset = TokenDataset(make_examples(12))
    batches = dataset.batches(4, seed=3)
    seen = [
        tuple(row[:n].tolist())
        for _ in range(3)
        for b in [next(batches)]
        for row, n in zip(b.tokens, b.lengths, strict=True)
    ]
    assert sorted(seen) == sorted(example.tokens for example in dataset.sequences)


def test_batches_are_a_function_of_the_seed() -> None:
    dataset = TokenDataset(make_examples(12))
    first, again, other = (
        [next(b).tokens.tolist() for _ in range(6)] for b in (dataset.batches(2, s) for s in (5, 5, 6))
    )
    assert first == again != other


def test_padding_is_never_learned() -> None:
    batch = collate(make_examples(5))
    past_end = torch.arange(batch.tokens.shape[1]) >= batch.lengths[:, None]
    assert past_end.any() and not batch.loss_mask[past_end].any()


def test_an_example_needs_a_mask_of_its_length() -> None:
    with pytest.raises(ValueError, match="loss_mask must have 3 entries"):
        Example((1, 2, 3), (True,))


def test_a_sequence_with_nothing_to_learn_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence 0 has no token to learn"):
        TokenDataset([Example((1, 2, 3), (False, False, True))], max_length=2)


# --- features --------------------------------------------------------------------------------------------------------


def test_slots_hold_feature_i_token_next_and_the_feature_after(target: LlamaForCausalLM) -> None:
    batch = collate(make_examples(3))
    draft = FrozenTarget(target).draft_batch(batch)
    for row in range(3):
        length = int(batch.lengths[row])
        alone = target.model(batch.tokens[row : row + 1, :length]).last_hidden_state[0]  # without padding
        torch.testing.assert_close(draft.features[row, : length - 1], alone[:-1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(draft.next_features[row, : length - 1], alone[1:], rtol=1e-4, atol=1e-5)
        embedded = target.model.embed_tokens(batch.tokens[row, 1:length])
        assert torch.equal(draft.next_embeddings[row, : length - 1], embedded)
        for slot in range(draft.loss_mask.shape[1]):
            expected = slot + 2 < length and bool(batch.loss_mask[row, slot + 2])
            assert bool(draft.loss_mask[row, slot]) == expected


def test_features_pass_the_head_to_the_targets_own_logits(target: LlamaForCausalLM) -> None:
    batch = collate(make_examples(2))
    frozen = FrozenTarget(target)
    logits = target(batch.tokens).logits
    torch.testing.assert_close(frozen.logits(frozen.draft_batch(batch).features), logits[:, :-1], rtol=1e-4, atol=1e-5)


# --- objectives, against literal re-statements -----------------------------------------------------------------------


def literal_guess_loss(target: LlamaForCausalLM, guesses: Tensor, batch: DraftBatch, config: TrainingConfig) -> float:
    """The losses, slot by slot and element by element."""
    losses = []
    for row, slot in batch.loss_mask.nonzero().tolist():
        guess, truth = guesses[row, slot].double(), batch.next_features[row, slot].double()
        gaps = [abs(a - b) for a, b in zip(guess.tolist(), truth.tolist(), strict=True)]
        feature = sum(0.5 * g * g if g < 1 else g - 0.5 for g in gaps) / HIDDEN
        p = (target.lm_head.weight.double() @ truth).softmax(0).tolist()
        log_q = (target.lm_head.weight.double() @ guess).log_softmax(0).tolist()
        loss = config.feature_weight * feature
        loss += config.distribution_weight * -sum(a * b for a, b in zip(p, log_q, strict=True))
        if config.objective == "hass":
            top = sorted(range(VOCAB), key=lambda v: -p[v])[: config.num_top_tokens]
            loss += config.top_weight * -sum(p[v] * log_q[v] for v in top)
        losses.append(loss)
    return math.fsum(losses) / len(losses)


def literal_pass(network: EagleNetwork, embeddings: Tensor, streams: list[Tensor], row: int) -> Tensor:
    """Pass n for one row: each query with a context of its own, where slot j's feature comes from one named stream."""
    slots, last = embeddings.shape[1], len(streams) - 1
    outputs = []
    for t in range(slots):
        feature_of = [streams[0][row, j] if j <= t - last else streams[j - (t - last)][row, j] for j in range(t + 1)]
        x = network.project(embeddings[row, : t + 1], torch.stack(feature_of))[None]
        q, k, v = network.qkv(x, torch.arange(t + 1)[None])
        q, k, v = q[0, :, -1], k[0].repeat_interleave(2, 0), v[0].repeat_interleave(2, 0)
        weights = ((k @ q[..., None])[..., 0] / q.shape[-1] ** 0.5).softmax(-1)
        outputs.append(network.finish(x[:, -1:], (weights[..., None] * v).sum(1).reshape(1, 1, -1))[0, 0])
    return torch.stack(outputs)


def test_eagle2_is_a_teacher_forced_pass_with_two_losses(target: LlamaForCausalLM) -> None:
    config = TrainingConfig(noise=0.0, feature_weight=0.7, distribution_weight=0.3)
    batch, network, frozen = make_draft_batch(target), make_network(target), FrozenTarget(target)
    (loss,) = eagle2_losses(network, frozen.logits, batch, config, torch.Generator())
    guesses = torch.stack([literal_pass(network, batch.next_embeddings, [batch.features], row) for row in range(3)])
    assert float(loss.detach()) == pytest.approx(literal_guess_loss(target, guesses, batch, config), rel=1e-5)


def test_eagle2_noise_is_uniform_scaled_by_length_and_seeded(target: LlamaForCausalLM) -> None:
    batch, network = make_draft_batch(target), make_network(target)
    seen: list[Tensor] = []
    network.forward = lambda e, f, p: (seen.append(f - batch.features), batch.next_features)[1]  # type: ignore[method-assign]
    for seed in (1, 1, 2):
        config = TrainingConfig(noise=0.1)
        list(eagle2_losses(network, FrozenTarget(target).logits, batch, config, torch.Generator().manual_seed(seed)))
    half_width = 0.1 * 512 / (batch.features.shape[1] + 1)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert 0.9 * half_width < seen[0].abs().max() <= half_width * 1.0001


def test_hass_passes_read_their_own_features_for_the_last_slots(target: LlamaForCausalLM) -> None:
    batch, network = make_draft_batch(target), make_network(target)
    slots = batch.features.shape[1]
    streams = [batch.features]
    for _ in range(4):
        guesses = aligned_pass(network, batch.next_embeddings, streams, torch.arange(slots)[None])
        for row in range(3):
            expected = literal_pass(network, batch.next_embeddings, streams, row)
            torch.testing.assert_close(guesses[row], expected, rtol=1e-4, atol=1e-5)
        streams.append(next_stream(streams[-1], guesses))


def test_hass_loss_sums_the_literal_loss_of_each_pass(target: LlamaForCausalLM) -> None:
    config = TrainingConfig(objective="hass", alignment_passes=3, num_top_tokens=4, distribution_weight=0.2)
    batch, network, frozen = make_draft_batch(target), make_network(target), FrozenTarget(target)
    losses = list(hass_losses(network, frozen.logits, batch, config, torch.Generator()))
    assert len(losses) == 3
    streams = [batch.features]
    for loss in losses:
        guesses = torch.stack([literal_pass(network, batch.next_embeddings, streams, row) for row in range(3)])
        assert float(loss.detach()) == pytest.approx(literal_guess_loss(target, guesses, batch, config), rel=1e-5)
        streams.append(next_stream(streams[-1], guesses))


def test_a_hass_query_never_sees_a_later_slot(target: LlamaForCausalLM) -> None:
    slots = 7
    for num_streams in range(1, 5):
        mask = alignment_mask(slots, num_streams)
        keys = torch.arange(slots).repeat(num_streams)
        assert not mask[keys[None] > torch.arange(slots)[:, None]].any()
        seen = [sorted(keys[mask[t]].tolist()) for t in range(slots)]
        assert seen == [list(range(t + 1)) for t in range(slots)]  # every earlier slot exactly once


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_gradients_match_finite_differences(target: LlamaForCausalLM, objective: str) -> None:
    config = TrainingConfig(objective=objective, noise=0.0, num_top_tokens=4)  # type: ignore[arg-type]
    head = copy.deepcopy(target.lm_head).double()
    single = make_draft_batch(target, rows=2)
    batch = DraftBatch(
        *(part.double() for part in (single.features, single.next_embeddings, single.next_features)), single.loss_mask
    )
    network = make_network(target).double()
    network.layer.post_attention_layernorm = torch.nn.RMSNorm(HIDDEN, 1e-6, dtype=torch.float64)  # Llama's is float32
    positions = torch.arange(batch.features.shape[1])[None]
    streams = [batch.features, next_stream(batch.features, batch.next_features)]  # held still: they carry no gradient

    def loss() -> Tensor:
        if objective == "eagle2":
            return next(eagle2_losses(network, head, batch, config, torch.Generator()))
        guesses = aligned_pass(network, batch.next_embeddings, streams, positions)
        truth = head(batch.next_features[batch.loss_mask]).detach()
        return guess_loss(guesses, head, batch, config) + top_tokens_loss(head(guesses[batch.loss_mask]), truth, 4)

    loss().backward()
    generator, width = torch.Generator().manual_seed(2), 1e-6
    for parameter in network.parameters():
        assert parameter.grad is not None
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        slope = float((parameter.grad * direction).sum())
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * width * direction
                values.append(float(loss()))
                parameter -= sign * width * direction
        # float64 rounding over the width is about 1e-9 of a loss near 5; curvature adds less
        assert slope == pytest.approx((values[0] - values[1]) / (2 * width), rel=1e-5, abs=1e-7)


# --- trainer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_training_lowers_the_loss_and_leaves_the_target_alone(target: LlamaForCausalLM, objective: str) -> None:
    before = copy.deepcopy(target.state_dict())
    config = TrainingConfig(objective=objective, steps=60, batch_size=4, warmup_steps=5, learning_rate=5e-3)  # type: ignore[arg-type]
    result = Trainer(target, config).train(TokenDataset(make_examples()))
    assert result.losses[-1] < 0.95 * result.losses[0]  # of hass, most is the entropy of an untrained target
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())
    assert all(parameter.grad is None for parameter in target.parameters())


def test_training_is_a_function_of_its_seed(target: LlamaForCausalLM) -> None:
    def trained(seed: int) -> list[Tensor]:
        torch.rand(1)  # the global generator's state is not an input
        config = TrainingConfig(steps=3, batch_size=4, seed=seed)
        return list(Trainer(target, config).train(TokenDataset(make_examples())).network.parameters())

    first, again, other = trained(4), trained(4), trained(5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True) if a.ndim == 2)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    config = TrainingConfig(steps=100, warmup_steps=10)
    factors = [schedule(step, config) for step in range(101)]
    assert max(factors) == factors[10] == factors[9] == 1.0 and factors[0] == 0.1 and factors[100] == 0.0
    assert factors[:10] == sorted(factors[:10]) and factors[10:] == sorted(factors[10:], reverse=True)


def test_a_saved_drafter_is_the_trained_one_in_the_published_format(target: LlamaForCausalLM, tmp_path: Path) -> None:
    config = TrainingConfig(steps=2, batch_size=4)
    result = train_drafter(target, TokenDataset(make_examples()), config, tmp_path / "drafter", dtype=torch.float32)
    loaded = load_network(tmp_path / "drafter").state_dict()
    assert "fc.bias" not in loaded
    assert all(torch.equal(loaded[name], value) for name, value in result.network.state_dict().items())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("objective", "eagle3", "objective must be 'eagle2' or 'hass'"),
        ("steps", 0, "steps must be at least 1"),
        ("learning_rate", float("nan"), "learning_rate must be positive"),
        ("noise", -1.0, "noise must be at least 0"),
    ],
)
def test_a_wrong_config_is_refused_by_name(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{field: value})  # type: ignore[arg-type]
