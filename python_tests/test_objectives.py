"""Claims about what a drafter learns: its slots, its losses, what each pass sees, and the noise."""

from __future__ import annotations

import copy
import math
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from taps_ext.drafters.network import EagleConfig, EagleNetwork
from taps_ext.training import objectives
from taps_ext.training.features import DraftBatch, FrozenTarget
from taps_ext.training.masks import Example, TokenDataset, collate
from taps_ext.training.objectives import ObjectivePass, PassOutput, first_stream, next_stream
from taps_ext.training.recipe import ObjectiveConfig

VOCAB, HIDDEN = 23, 16
HASS = ObjectiveConfig(name="hass", num_top_tokens=4, distribution_weight=0.2, feature_weight=0.7)
EAGLE2 = ObjectiveConfig(name="eagle2", distribution_weight=0.3, feature_weight=0.7)
BOTH = pytest.mark.parametrize("config", [EAGLE2, HASS], ids=lambda config: config.name)


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
        model = LlamaForCausalLM(config).eval()
        model.lm_head.weight.data *= 20  # an untrained target is sure of nothing
        return model


def make_network(target: LlamaForCausalLM, seed: int = 1) -> EagleNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EagleNetwork(EagleConfig.for_target(target.config))


def make_examples(count: int, shortest: int = 5) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    examples = []
    for index in range(count):
        tokens = torch.randint(1, VOCAB, (shortest + 2 * (index % 4),), generator=generator).tolist()
        examples.append(Example(tuple(tokens), tuple(i >= 2 and i % 3 > 0 for i in range(len(tokens)))))
    return examples


def make_batch(target: LlamaForCausalLM, rows: int = 3, shortest: int = 5) -> DraftBatch:
    return FrozenTarget(target).draft_batch(collate(make_examples(rows, shortest)))


def as_double(batch: DraftBatch) -> DraftBatch:
    names = ("features", "next_embeddings", "next_features")
    return replace(batch, **{name: getattr(batch, name).double() for name in names})


def all_passes(model: ObjectivePass, batch: DraftBatch, num_passes: int | None = None) -> list[PassOutput]:
    """The outputs of each pass; the gradients of all are added up."""
    streams, outputs = [first_stream(batch, replace(model.config, noise=0.0), 0)], []
    for _ in range(num_passes or model.config.num_passes):
        outputs.append(model(batch, streams))
        outputs[-1].loss.backward()
        streams.append(next_stream(streams[-1], outputs[-1].guesses))
    return outputs


def gradients(model: ObjectivePass) -> dict[str, Tensor]:
    """The gradient of each parameter, which is forgotten."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys() and first
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-4, atol=1e-5)  # sums in another order


# --- slots -----------------------------------------------------------------------------------------------------------


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


def test_the_dataset_counts_the_slots_that_are_learned(target: LlamaForCausalLM) -> None:
    dataset = TokenDataset(make_examples(6))
    learned = FrozenTarget(target).draft_batch(dataset.batch(range(6))).loss_mask.sum(1)
    assert learned.tolist() == list(dataset.num_learned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_pass_the_head_to_the_targets_own_logits(target: LlamaForCausalLM, dtype: torch.dtype) -> None:
    batch, model = collate(make_examples(2)), copy.deepcopy(target).to(dtype)
    frozen = FrozenTarget(model)
    logits = frozen.logits(frozen.draft_batch(batch).features)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model(batch.tokens).logits[:, :-1].float(), rtol=1e-4, atol=1e-5)


# --- losses and passes, against literal re-statements ----------------------------------------------------------------


def literal_loss(target: LlamaForCausalLM, guesses: Tensor, batch: DraftBatch, config: ObjectiveConfig) -> float:
    """The losses, slot by slot and element by element, summed."""
    losses = []
    for row, slot in batch.loss_mask.nonzero().tolist():
        guess, truth = guesses[row, slot].double(), batch.next_features[row, slot].double()
        gaps = [abs(a - b) for a, b in zip(guess.tolist(), truth.tolist(), strict=True)]
        feature = sum(0.5 * g * g if g < 1 else g - 0.5 for g in gaps) / HIDDEN
        p = (target.lm_head.weight.double() @ truth).softmax(0).tolist()
        log_q = (target.lm_head.weight.double() @ guess).log_softmax(0).tolist()
        loss = config.feature_weight * feature
        loss += config.distribution_weight * -sum(a * b for a, b in zip(p, log_q, strict=True))
        if config.name == "hass":
            top = sorted(range(VOCAB), key=lambda v: -p[v])[: config.num_top_tokens]
            loss += config.top_weight * -sum(p[v] * log_q[v] for v in top)
        losses.append(loss)
    return math.fsum(losses)


def literal_correct(target: LlamaForCausalLM, guesses: Tensor, batch: DraftBatch) -> list[list[int]]:
    """[row, slot] of the learned slots where guess and truth draw the same token."""
    return [
        [row, slot]
        for row, slot in batch.loss_mask.nonzero().tolist()
        if target.lm_head(guesses[row, slot]).argmax() == target.lm_head(batch.next_features[row, slot]).argmax()
    ]


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
    return torch.stack(outputs).detach()


@BOTH
def test_each_pass_is_the_literal_one(target: LlamaForCausalLM, config: ObjectiveConfig) -> None:
    batch, network = make_batch(target, rows=12), make_network(target)
    outputs = all_passes(ObjectivePass(network, FrozenTarget(target).logits, config), batch)
    assert len(outputs) == (3 if config.name == "hass" else 1)
    streams, num_correct = [batch.features], 0
    for output in outputs:
        guesses = torch.stack([literal_pass(network, batch.next_embeddings, streams, row) for row in range(12)])
        torch.testing.assert_close(output.guesses, guesses, rtol=1e-4, atol=1e-5)
        assert output.loss.item() == pytest.approx(literal_loss(target, guesses, batch, config), rel=1e-5)
        assert output.is_correct.nonzero().tolist() == literal_correct(target, guesses, batch)
        assert int(output.num_correct) == len(literal_correct(target, guesses, batch))
        num_correct += int(output.num_correct)
        streams.append(next_stream(streams[-1], guesses))
    assert num_correct > 0, "the claim about correct slots is hollow"


@pytest.mark.parametrize(("slots", "block"), [(1, 64), (2, 1), (11, 3), (12, 4), (70, 64)])
def test_each_slot_reads_every_earlier_slot_once_and_no_later_one(
    target: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, slots: int, block: int
) -> None:
    """Also where the queries fall into several blocks, and where passes are more than slots."""
    monkeypatch.setattr(objectives, "MIN_BLOCK", block)
    network, generator = make_network(target), torch.Generator().manual_seed(0)
    embeddings, *streams = (torch.randn(1, slots, HIDDEN, generator=generator) for _ in range(6))
    for num_passes in range(1, 6):
        x, attended = objectives.aligned_attention(network, embeddings, streams[:num_passes])
        guesses = network.finish(x, attended)[0].detach()
        expected = literal_pass(network, embeddings, streams[:num_passes], 0)
        torch.testing.assert_close(guesses, expected, rtol=1e-4, atol=1e-5)


def test_what_is_behind_a_text_changes_nothing(target: LlamaForCausalLM) -> None:
    batch = make_batch(target, rows=4)
    is_padding = torch.arange(batch.features.shape[1]) >= batch.lengths[:, None]
    assert is_padding.any() and not batch.loss_mask[is_padding].any()
    junk = {
        name: getattr(batch, name).masked_fill(is_padding[..., None], 1e4)
        for name in ("features", "next_embeddings", "next_features")
    }
    model = ObjectivePass(make_network(target), FrozenTarget(target).logits, HASS)
    outputs, from_outputs = all_passes(model, batch), gradients(model)
    junk_outputs, from_junk = all_passes(model, replace(batch, **junk)), gradients(model)
    for output, other in zip(outputs, junk_outputs, strict=True):
        assert torch.equal(output.guesses[~is_padding], other.guesses[~is_padding])
        assert torch.equal(output.loss, other.loss) and torch.equal(output.is_correct, other.is_correct)
    assert_close(from_outputs, from_junk)


@BOTH
def test_a_batch_is_the_sum_of_its_rows(target: LlamaForCausalLM, config: ObjectiveConfig) -> None:
    model = ObjectivePass(make_network(target), FrozenTarget(target).logits, config)
    examples = make_examples(4)
    whole, from_whole = all_passes(model, FrozenTarget(target).draft_batch(collate(examples))), gradients(model)
    parts = [all_passes(model, FrozenTarget(target).draft_batch(collate([example]))) for example in examples]
    assert_close(from_whole, gradients(model))
    for n, output in enumerate(whole):
        assert output.loss.item() == pytest.approx(sum(part[n].loss.item() for part in parts), rel=1e-5)
        assert int(output.num_correct) == sum(int(part[n].num_correct) for part in parts)


def test_a_batch_with_nothing_to_learn_has_no_loss_and_a_gradient_of_zero(target: LlamaForCausalLM) -> None:
    batch = make_batch(target)
    model = ObjectivePass(make_network(target), FrozenTarget(target).logits, HASS)
    for output in all_passes(model, replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))):
        assert output.loss.item() == 0.0 == float(output.num_correct)
    found = gradients(model)  # of every parameter: processes that learn nothing still exchange gradients
    assert found.keys() == dict(model.named_parameters()).keys()
    assert not any(gradient.any() for gradient in found.values())


# --- gradients -------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("num_streams", [1, 3])
def test_gradients_match_finite_differences(
    target: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, config: ObjectiveConfig, num_streams: int
) -> None:
    monkeypatch.setattr(objectives, "CHUNK_SLOTS", 3)
    monkeypatch.setattr(objectives, "MIN_BLOCK", 3)
    head = copy.deepcopy(target.lm_head).double().requires_grad_(False)
    batch, network = as_double(make_batch(target, rows=2)), make_network(target).double()
    network.layer.post_attention_layernorm = torch.nn.RMSNorm(HIDDEN, 1e-6, dtype=torch.float64)  # Llama's is float32
    model = ObjectivePass(network, head, config)
    streams = [batch.features]  # held still: they carry no gradient
    for _ in range(num_streams - 1):
        streams.append(next_stream(streams[-1], batch.next_features))

    (2 * model(batch, streams).loss).backward()
    generator, width = torch.Generator().manual_seed(2), 1e-6
    for parameter in network.parameters():
        assert parameter.grad is not None
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        slope = float((parameter.grad * direction).sum()) / 2
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * width * direction
                values.append(model(batch, streams).loss.item())
                parameter -= sign * width * direction
        # float64 rounding over the width is about 1e-8 of a sum near 50; curvature adds less
        assert slope == pytest.approx((values[0] - values[1]) / (2 * width), rel=1e-5, abs=1e-6)


@BOTH
def test_how_large_the_chunks_are_changes_nothing(
    target: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, config: ObjectiveConfig
) -> None:
    batch, model = make_batch(target), ObjectivePass(make_network(target), FrozenTarget(target).logits, config)
    whole, from_whole = all_passes(model, batch), gradients(model)
    monkeypatch.setattr(objectives, "CHUNK_SLOTS", 4)
    assert batch.loss_mask.sum() % 4, "a last chunk that is not full"
    chunked = all_passes(model, batch)
    assert_close(from_whole, gradients(model))
    for one, other in zip(whole, chunked, strict=True):
        assert one.loss.item() == pytest.approx(other.loss.item(), rel=1e-6)
        assert torch.equal(one.is_correct, other.is_correct)


def test_logits_exist_for_one_chunk_at_a_time(target: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "CHUNK_SLOTS", 4)
    made: list[weakref.ref[Tensor]] = []

    def head(features: Tensor) -> Tensor:
        assert len(features) <= 4 and sum(one() is not None for one in made) <= 1  # the target's, of the same chunk
        logits: Tensor = target.lm_head(features)
        made.append(weakref.ref(logits))
        return logits

    batch = make_batch(target)
    output = ObjectivePass(make_network(target), head, HASS)(batch, [batch.features])
    assert len(made) == 2 * math.ceil(int(batch.loss_mask.sum()) / 4) > 4
    assert not any(one() is not None for one in made) and output.loss.requires_grad


@BOTH
def test_checkpointing_gives_the_same_gradients(target: LlamaForCausalLM, config: ObjectiveConfig) -> None:
    batch, network, head = make_batch(target), make_network(target), FrozenTarget(target).logits
    model, saving = ObjectivePass(network, head, config), ObjectivePass(network, head, config, True)
    plain, expected = all_passes(model, batch), gradients(model)
    calls: list[int] = []
    finish = network.finish
    network.finish = lambda x, read: (calls.append(1), finish(x, read))[1]  # type: ignore[method-assign]
    saved, found = all_passes(saving, batch), gradients(saving)
    assert len(calls) == 2 * config.num_passes, "computed again in each backward"
    assert all(torch.equal(one.loss, other.loss) for one, other in zip(plain, saved, strict=True))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_pass_leaves_no_graph_behind(target: LlamaForCausalLM, gradient_checkpointing: bool) -> None:
    batch, network = make_batch(target), make_network(target)
    model = ObjectivePass(network, FrozenTarget(target).logits, HASS, gradient_checkpointing)
    made: list[weakref.ref[Tensor]] = []
    project = network.project

    def watched(embeddings: Tensor, features: Tensor) -> Tensor:
        assert not features.requires_grad
        x = project(embeddings, features)
        made.append(weakref.ref(x))
        return x

    network.project = watched  # type: ignore[method-assign]
    streams = [batch.features]
    for _ in range(3):
        output = model(batch, streams)
        assert not output.guesses.requires_grad
        output.loss.backward()
        streams.append(next_stream(streams[-1], output.guesses))
        del output
        assert made and not any(one() is not None for one in made)
    assert not any(stream.requires_grad for stream in streams)


def test_only_the_network_is_a_part_of_the_module(target: LlamaForCausalLM) -> None:
    network = make_network(target)
    model = ObjectivePass(network, target.lm_head, EAGLE2)
    expected = {f"network.{name}": value for name, value in network.state_dict().items()}
    assert model.state_dict().keys() == expected.keys() == dict(model.named_parameters()).keys()


@BOTH
def test_losses_are_float32_under_autocast(target: LlamaForCausalLM, config: ObjectiveConfig) -> None:
    batch, model = make_batch(target), ObjectivePass(make_network(target), FrozenTarget(target).logits, config)
    exact = all_passes(model, batch)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = all_passes(model, batch)
    for output, other in zip(outputs, exact, strict=True):
        assert output.loss.dtype == output.guesses.dtype == torch.float32
        assert output.loss.item() == pytest.approx(other.loss.item(), rel=0.05)  # bfloat16 keeps 8 bits
    assert all(gradient.dtype == torch.float32 and gradient.any() for gradient in gradients(model).values())


# --- noise -----------------------------------------------------------------------------------------------------------


def noise_of(batch: DraftBatch, seed: int, noise: float = 0.1) -> Tensor:
    return first_stream(batch, replace(EAGLE2, noise=noise), seed) - batch.features


def test_noise_is_uniform_with_a_width_by_the_texts_own_length(target: LlamaForCausalLM) -> None:
    batch = replace(make_batch(target, rows=4, shortest=40), features=torch.zeros(4, 45, HIDDEN))
    found = noise_of(batch, seed=1)
    assert len(set(batch.lengths.tolist())) == 4
    for row, length in enumerate(batch.lengths.tolist()):
        unit = found[row, :length] / (0.1 * 512 / (length + 1))
        assert 0.98 < unit.abs().max() <= 1.0 and not found[row, length:].any()
        # of 600 and more draws in [-1, 1]: four standard deviations of their mean and of their mean square
        assert abs(float(unit.mean())) < 4 * (1 / 3 / 600) ** 0.5
        assert abs(float(unit.square().mean()) - 1 / 3) < 4 * (4 / 45 / 600) ** 0.5


def test_noise_is_a_function_of_seed_text_and_length(target: LlamaForCausalLM) -> None:
    examples = make_examples(4)
    whole = FrozenTarget(target).draft_batch(collate(examples))
    whole = replace(whole, features=torch.zeros_like(whole.features))
    torch.rand(1)  # the global generator's state is not an input
    found = noise_of(whole, seed=7)
    for row, length in enumerate(whole.lengths.tolist()):
        alone = collate([examples[row]])
        padded = replace(
            whole,
            features=torch.zeros(1, length + row, HIDDEN),
            lengths=alone.lengths - 1,
            ids=alone.ids,
        )
        assert torch.equal(noise_of(padded, seed=7)[0, :length], found[row, :length])
    for seed in (8, 7 + (1 << 32), -7):
        assert not (noise_of(whole, seed) == found)[whole.loss_mask].any()
    assert not torch.equal(found[0, :4], found[1, :4])


def test_only_eagle2_adds_noise(target: LlamaForCausalLM) -> None:
    batch = make_batch(target)
    assert first_stream(batch, replace(HASS, noise=0.1), 1) is batch.features
    assert first_stream(batch, replace(EAGLE2, noise=0.0), 1) is batch.features
    before = batch.features.clone()
    assert not torch.equal(first_stream(batch, EAGLE2, 1), before) and torch.equal(batch.features, before)


def test_the_next_stream_is_the_guesses_one_slot_later(target: LlamaForCausalLM) -> None:
    stream, guesses = torch.randn(2, 5, HIDDEN), torch.randn(2, 5, HIDDEN, requires_grad=True)
    found: Any = next_stream(stream, guesses)
    assert torch.equal(found[:, 0], stream[:, 0]) and torch.equal(found[:, 1:], guesses[:, :-1])
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("family", "what"),
    [
        ("Gemma3Text", "changes its embeddings"),
        ("Phi", "changes the LM head's product"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_that_does_more_than_two_matrices_is_refused(family: str, what: str, dtype: torch.dtype) -> None:
    """Training knows the embedding and the lm_head as matrices; what else they do would be left out in silence."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCAB, **sizes)
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).eval()
    if family == "Phi":
        torch.nn.init.ones_(model.lm_head.bias)
    with pytest.raises(ValueError, match=f"target .* {what}"):
        FrozenTarget(model.to(dtype))


@pytest.mark.parametrize(
    ("family", "extra"),
    [("Granite", {"logits_scaling": 8.0}), ("Cohere", {"logit_scale": 0.5}), ("NanoChat", {})],
)
def test_training_scales_and_caps_as_the_target_does(family: str, extra: dict[str, Any]) -> None:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCAB, **sizes, **extra)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=4)  # a cap shows at large logits only
    tokens = torch.arange(VOCAB)[None]
    with torch.no_grad():
        hidden, logits = model.base_model(tokens).last_hidden_state, model(tokens).logits
        torch.testing.assert_close(FrozenTarget(model).logits(hidden), logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(model.get_output_embeddings()(hidden), logits, rtol=1e-2)


def test_the_lm_head_keeps_its_precision_under_autocast(target: LlamaForCausalLM) -> None:
    frozen = FrozenTarget(target)
    features = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0))
    exact = frozen.logits(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen.logits(features), exact)
