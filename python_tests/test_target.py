"""The target: tree scoring equals sequential scoring on stock models, and stock use stays what it was."""

from __future__ import annotations

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import EOS, FAMILIES, HIDDEN, PAD, VOCAB, new_target, prompts, trained_drafters, trained_target
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import taps_ext as taps
from taps_ext import ops
from taps_ext.drafters import save_drafter
from taps_ext.kv_cache import FIRST_CAPACITY
from taps_ext.tree import DraftTree

TREE_PARENTS = [[-1, 0, 0, 1, 1, 2, 4, 6], [-1, 0, 1, 2, 0, 0, 0, 0]]
TREE_COUNTS = [8, 4]


def a_tree(seed: int = 0) -> DraftTree:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, VOCAB, (2, 8), generator=generator)
    return DraftTree(tokens, torch.tensor(TREE_PARENTS), torch.zeros(2, 8), torch.tensor(TREE_COUNTS))


def sequential_logits(model: Any, prefix: list[int], tree: DraftTree, row: int, node: int) -> Tensor:
    """The stock model's logits behind the prefix and the node's own path."""
    path: list[int] = []
    while node >= 0:
        path.insert(0, int(tree.tokens[row, node]))
        node = int(tree.parents[row, node])
    logits: Tensor = model(input_ids=torch.tensor([prefix + path])).logits[0, -1]
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_every_node_is_scored_as_if_its_path_were_the_text(family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model = new_target(family).to(dtype)
    target = taps.TargetModel(model)
    prefixes = [[5, 6, 7, 8, 9], [10, 11]]
    tokens = torch.tensor([prefixes[0], prefixes[1] + [0, 0, 0]])
    lengths = torch.tensor([5, 2])
    kv = target.new_cache(2)
    prefill = target.prefill(tokens, lengths, kv)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.05}
    for row, prefix in enumerate(prefixes):
        stock = model(input_ids=torch.tensor([prefix]), output_hidden_states=True)
        torch.testing.assert_close(prefill.logits[row, 0], stock.logits[0, -1], **tolerance)
        torch.testing.assert_close(prefill.features[row, : len(prefix)], stock.hidden_states[-1][0], **tolerance)
    for seed in range(3):  # several steps on one cache: commits of non-contiguous paths in between
        tree = a_tree(seed)
        scored = target.score(tree, lengths, kv)
        for row, count in enumerate(TREE_COUNTS):
            for node in range(count):
                expected = sequential_logits(model, prefixes[row], tree, row, node)
                torch.testing.assert_close(scored.logits[row, node], expected, **tolerance)
        path = torch.tensor([[0, 1, 4, 6, -1, -1, -1, -1], [0] + [-1] * 7])
        num_accepted = torch.tensor([3, 0])
        target.commit(path, num_accepted, lengths, kv, int((lengths + num_accepted + 1).max()))
        lengths = lengths + num_accepted + 1
        for row, count in enumerate((4, 1)):
            prefixes[row] = prefixes[row] + tree.tokens[row, path[row, :count]].tolist()


@torch.inference_mode()
def test_the_cache_grows_and_keeps_what_it_holds() -> None:
    target = taps.TargetModel(trained_target())
    kv = target.new_cache(1)
    tokens = torch.randint(4, VOCAB, (1, FIRST_CAPACITY - 3))
    target.prefill(tokens, torch.tensor([tokens.shape[1]]), kv)
    before = [tuple(part[:, :, : kv.kv_length].clone() for part in kv.layer(index)) for index in range(2)]
    assert kv.capacity == FIRST_CAPACITY
    kv.reserve(8)
    assert kv.capacity == 2 * FIRST_CAPACITY
    for index, (keys, values) in enumerate(before):
        assert torch.equal(kv.layer(index)[0][:, :, : kv.kv_length], keys)
        assert torch.equal(kv.layer(index)[1][:, :, : kv.kv_length], values)


def test_nothing_is_allocated_between_growths() -> None:
    target = taps.TargetModel(trained_target())
    kv = target.new_cache(1)
    tree = DraftTree(*(value[:1] for value in (a_tree().tokens, a_tree().parents, a_tree().scores)), torch.tensor([8]))
    target.prefill(torch.tensor([[5, 6, 7]]), torch.tensor([3]), kv)
    address = [buffer.data_ptr() for buffer in kv.buffers.values()]
    for length in range(3, 40):
        target.score(tree, torch.tensor([length]), kv)
        target.commit(torch.tensor([[0] + [-1] * 7]), torch.tensor([0]), torch.tensor([length]), kv, length + 1)
    assert [buffer.data_ptr() for buffer in kv.buffers.values()] == address


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_generate_is_unchanged_bit_for_bit(family: str) -> None:
    torch.manual_seed(4)
    model = new_target(family)
    ids, mask = prompts(3)
    arguments = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12, "output_logits": True}
    before = model.generate(ids, return_dict_in_generate=True, **arguments)
    taps.TargetModel(model)
    after = model.generate(ids, return_dict_in_generate=True, **arguments)
    assert torch.equal(before.sequences, after.sequences)
    assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))


def test_grouped_key_value_heads_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, *arguments: Any, **kwargs: Any) -> Tensor:
        seen.append((query.shape[1], key.shape[1]))
        return sdpa(query, key, *arguments, **kwargs)

    target = taps.TargetModel(trained_target())
    kv = target.new_cache(2)
    target.prefill(torch.tensor([[5, 6], [7, 8]]), torch.tensor([2, 2]), kv)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    target.score(a_tree(), torch.tensor([2, 2]), kv)
    assert seen == [(4, 2), (4, 2)]


def test_a_sliding_window_is_refused_only_when_it_can_be_exceeded() -> None:
    torch.manual_seed(0)
    windowed = new_target("mistral", sliding_window=64)
    drafters = {"math": trained_drafters()["math"]}
    decoder = taps.SpeculativeDecoder(windowed, drafters, "single", shape=taps.TreeShape(3, 3, 10))
    ids, mask = prompts(2)
    stock = windowed.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=30)
    assert torch.equal(decoder.generate(ids, mask, max_new_tokens=30).sequences, stock)
    with pytest.raises(ValueError, match="see 64 tokens only, but prompt and new tokens can reach 72"):
        decoder.generate(ids, mask, max_new_tokens=60)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_length_dependent_rope_is_refused_where_a_tree_would_change_it_too_early(temperature: float) -> None:
    torch.manual_seed(3)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    target = new_target(max_position_embeddings=40, rope_scaling=rope)
    decoder = taps.SpeculativeDecoder(target, {"math": trained_drafters()["math"]}, shape=taps.TreeShape(6, 3, 20))
    ids, mask = prompts(2)
    sampling = taps.SamplingParams(temperature, seed=3)
    plain = taps.plain_generate(target, ids, mask, sampling=sampling, max_new_tokens=28)
    result = decoder.generate(ids, mask, sampling=sampling, max_new_tokens=28)
    assert torch.equal(result.sequences, plain.sequences)
    with pytest.raises(ValueError, match=r"changes its rotary frequencies beyond 40 tokens, but .* can reach 41"):
        decoder.generate(ids, mask, sampling=sampling, max_new_tokens=29)


def test_a_text_may_fill_the_context_of_a_target_with_learned_positions() -> None:
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=HIDDEN, n_layer=2, n_head=4, eos_token_id=EOS)
    target = GPT2LMHeadModel(config).eval()
    ids, mask = prompts(3)
    stock = target.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20, pad_token_id=PAD)
    decoder = taps.SpeculativeDecoder(target, trained_drafters(), shape=taps.TreeShape(6, 4, 30))
    assert torch.equal(decoder.generate(ids, mask, max_new_tokens=20).sequences, stock)


def test_attention_that_was_changed_behind_the_decoders_back_is_noticed() -> None:
    target = deepcopy(trained_target())
    decoder = taps.SpeculativeDecoder(target, trained_drafters())
    target.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attention was set to 'eager'"):
        decoder.generate(torch.tensor([[5, 6]]), max_new_tokens=4)


def test_targets_that_cannot_be_verified_on_a_tree_are_refused_with_the_reason() -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match="recurrent state"):
        taps.TargetModel(mamba)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="encoder-decoder"):
        taps.TargetModel(t5)
    with torch.device("meta"):
        unloaded = new_target()
    with pytest.raises(ValueError, match="not in memory"):
        taps.TargetModel(unloaded)
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        taps.TargetModel(new_target().double())
    with pytest.raises(ValueError, match="no LM head"):
        taps.TargetModel(trained_target().get_decoder())
    with pytest.raises(ValueError, match="changes the LM head's output"):
        taps.TargetModel(new_scaled_target())


def new_scaled_target() -> Any:
    from transformers import GraniteConfig

    config = GraniteConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        logits_scaling=8.0,
    )
    return AutoModelForCausalLM.from_config(config)


def test_a_dispatched_target_gives_the_same_text() -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(6)
    model = new_target()
    ids, mask = prompts(2)
    stock = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=16)
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu"}
    rest = {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    dispatched = accelerate.dispatch_model(model, {**device_map, **rest}, force_hooks=True)
    decoder = taps.SpeculativeDecoder(dispatched, {"math": trained_drafters()["math"]}, "single")
    assert torch.equal(decoder.generate(ids, mask, max_new_tokens=16).sequences, stock)


def test_a_quantised_target_gives_its_own_text_and_takes_drafters(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates this quantiser; it is the one that needs nothing installed
        quantised = torch.ao.quantization.quantize_dynamic(deepcopy(trained_target()), {torch.nn.Linear})
    drafter = trained_drafters()["math"]
    save_drafter(
        drafter.network, tmp_path / "math", embedding=drafter.embedding.weight, target_config=trained_target().config
    )
    drafters = taps.load_drafters({"math": str(tmp_path / "math")}, quantised)
    ids, mask = prompts(2)
    stock = quantised.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=16)
    result = taps.SpeculativeDecoder(quantised, drafters).generate(ids, mask, max_new_tokens=16)
    assert torch.equal(result.sequences, stock)
    assert result.stats.acceptance_length > 1.5


def test_ops_see_the_same_tree_that_the_target_attends_with() -> None:
    tree = a_tree()
    mask = ops.tree_attention_mask(tree.parents, tree.num_nodes, torch.tensor([2, 1]), 3)
    assert mask.shape == (2, 1, 8, 11)
    assert mask[1, 0, :, :3].tolist() == [[True, False, False]] * 8
