"""The target: tree scoring equals sequential scoring on stock models, and stock use stays what it was."""

from __future__ import annotations

import itertools
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
from taps_ext.checkpoints import save_drafter
from taps_ext.target import tree_attention
from taps_ext.target.kv_cache import FIRST_CAPACITY
from taps_ext.tree import DraftTree, Lengths

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
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
    kv = target.new_cache(2)
    prefill = target.prefill(tokens, Lengths.of([5, 2]), kv)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.05}
    for row, prefix in enumerate(prefixes):
        stock = model(input_ids=torch.tensor([prefix]), output_hidden_states=True)
        torch.testing.assert_close(prefill.logits[row, 0], stock.logits[0, -1], **tolerance)
        torch.testing.assert_close(prefill.features[row, : len(prefix)], stock.hidden_states[-1][0], **tolerance)
    for seed in range(3):  # several steps on one cache: commits of non-contiguous paths in between
        tree = a_tree(seed)
        scored = target.score(tree, kv)
        for row, count in enumerate(TREE_COUNTS):
            for node in range(count):
                expected = sequential_logits(model, prefixes[row], tree, row, node)
                torch.testing.assert_close(scored.logits[row, node], expected, **tolerance)
        path = torch.tensor([[0, 1, 4, 6, -1, -1, -1, -1], [0] + [-1] * 7])
        num_accepted = torch.tensor([3, 0])
        target.commit(path, num_accepted, kv.lengths.plus(Lengths.of([4, 1])), kv)
        for row, count in enumerate((4, 1)):
            prefixes[row] = prefixes[row] + tree.tokens[row, path[row, :count]].tolist()


@torch.inference_mode()
def test_the_cache_grows_and_keeps_what_it_holds() -> None:
    target = taps.TargetModel(trained_target())
    kv = target.new_cache(1)
    tokens = torch.randint(4, VOCAB, (1, FIRST_CAPACITY - 3))
    target.prefill(tokens, Lengths.of([tokens.shape[1]]), kv)
    before = [tuple(part[:, :, : kv.lengths.longest].clone() for part in kv.layer(index)) for index in range(2)]
    assert kv.capacity == FIRST_CAPACITY
    kv.reserve(8)
    assert kv.capacity == 2 * FIRST_CAPACITY
    for index, (keys, values) in enumerate(before):
        assert torch.equal(kv.layer(index)[0][:, :, : kv.lengths.longest], keys)
        assert torch.equal(kv.layer(index)[1][:, :, : kv.lengths.longest], values)


def test_nothing_is_allocated_between_growths() -> None:
    target = taps.TargetModel(trained_target())
    kv = target.new_cache(1)
    tree = DraftTree(*(value[:1] for value in (a_tree().tokens, a_tree().parents, a_tree().scores)), torch.tensor([8]))
    target.prefill(torch.tensor([[5, 6, 7]]), Lengths.of([3]), kv)
    address = [buffer.data_ptr() for buffer in kv.buffers.values()]
    for length in range(3, 40):
        target.score(tree, kv)
        target.commit(torch.tensor([[0] + [-1] * 7]), torch.tensor([0]), Lengths.of([length + 1]), kv)
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


def literal_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """[B, N, heads, D] in float64 on the CPU: keys repeated, one mask over everything, one softmax."""
    query, key, value = (states.cpu().double() for states in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_in_two_parts_is_attention_in_one(device: str, dtype: torch.dtype) -> None:
    """Whatever the sizes: rows of one length or several, one prefix column or many, heads grouped or not, any width."""
    torch.manual_seed(0)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[
        dtype
    ]  # of values in 0..1, per unit of score
    for (heads, kv_heads), (length, num_nodes), (width, value_width), loudness in itertools.product(
        [(8, 2), (3, 3), (4, 1)], [(0, 8), (1, 8), (37, 5), (130, 60)], [(16, 16), (64, 64), (24, 8), (5, 5)], [1, 30]
    ):
        tree = random_tree(num_nodes)
        for lengths in ([length] * 2, [length, max(length - 7, 1)]):
            if length == 0 and lengths[1]:
                continue
            query = loudness * torch.randn(2, heads, num_nodes, width)
            key = torch.randn(2, kv_heads, length + num_nodes + 3, width)  # as in a cache, with room behind it
            value = torch.rand(2, kv_heads, length + num_nodes + 3, value_width)
            query, key, value = (states.to(device, dtype) for states in (query, key, value))
            key, value = key[:, :, : length + num_nodes], value[:, :, : length + num_nodes]
            ends = torch.tensor(lengths)
            ancestors = ops.tree_attention_mask(tree.parents, tree.num_nodes, torch.zeros_like(ends), 0)
            is_ragged = len(set(lengths)) > 1
            view = tree_attention.TreeView(ancestors.to(device), length, ends.to(device) if is_ragged else None)
            mask = ops.tree_attention_mask(tree.parents, tree.num_nodes, ends, length)
            read = view.attend(query, key, value, None)
            assert read.dtype == dtype and read.is_contiguous()
            error = (read.cpu().double() - literal_attention(query, key, value, mask)).abs().max()
            assert error < tolerance * loudness, (heads, kv_heads, lengths, num_nodes, width, loudness)


def test_a_node_that_is_not_a_number_reaches_no_other() -> None:
    tree = random_tree(8)
    query, key, value = torch.randn(2, 4, 8, 16), torch.randn(2, 2, 11, 16), torch.randn(2, 2, 11, 16)
    ancestors = ops.tree_attention_mask(tree.parents, tree.num_nodes, torch.zeros(2, dtype=torch.int64), 0)
    clean = tree_attention.TreeView(ancestors, 3, None).attend(query, key, value, None)
    query[:, :, 5] = torch.nan
    poisoned = tree_attention.TreeView(ancestors, 3, None).attend(query, key, value, None)
    others = [0, 1, 2, 3, 4, 6, 7]
    assert poisoned[:, 5].isnan().all()
    assert torch.equal(poisoned[:, others], clean[:, others])


def random_tree(num_nodes: int) -> DraftTree:
    parents = [[-1] + [int(torch.randint(0, node, ())) for node in range(1, num_nodes)] for _ in range(2)]
    shape = (2, num_nodes)
    return DraftTree(
        torch.zeros(shape, dtype=torch.int64), torch.tensor(parents), torch.zeros(shape), torch.full((2,), num_nodes)
    )


def test_keys_are_not_repeated_and_no_mask_spans_nodes_and_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a layer computes with has as many heads as the cache; only the tree's part has a mask a node."""
    seen: list[tuple[list[int], list[int], list[int] | None]] = []
    attend = tree_attention.partial_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None) -> Any:
        seen.append((list(query.shape), list(key.shape), None if bias is None else list(bias.shape)))
        return attend(query, key, value, bias, scale)

    target = taps.TargetModel(trained_target())
    monkeypatch.setattr(tree_attention, "partial_attention", spy)
    for lengths, prefix_bias in (([3, 3], None), ([3, 2], [2, 1, 1, 3])):
        kv = target.new_cache(2)
        target.prefill(torch.tensor([[5, 6, 4], [7, 8, 4]]), Lengths.of(lengths), kv)
        seen.clear()
        target.score(a_tree(), kv)
        tree_part, prefix_part = ([2, 2, 16, 16], [2, 2, 8, 16], [2, 1, 16, 8]), ([2, 2, 16, 16], [2, 2, 3, 16])
        assert seen == [tree_part, (*prefix_part, prefix_bias)] * 2


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


class SinkAttention(torch.nn.Module):
    """An attention that asks its function for more than keys and values, or does without the function."""

    def __init__(self, attention: Any, **more: Any) -> None:
        super().__init__()
        self.attention, self.more = attention, more

    def forward(self, *arguments: Any, **kwargs: Any) -> Any:
        if not self.more:
            kwargs.pop("taps_tree", None)
            kwargs["attention_mask"] = None
        return self.attention(*arguments, **kwargs, **self.more)


@pytest.mark.parametrize(
    "more, said",
    [
        ({"s_aux": torch.zeros(4)}, "LlamaAttention asks for attention sinks, which tree attention does not support"),
        (
            {"softcap": 30.0},
            "does not support `softcap`|asks for soft-capped scores",
        ),  # transformers 5, or we ourselves
        ({}, "2 layers with keys and values, but only 1 use transformers' AttentionInterface"),
    ],
)
def test_attention_that_a_tree_cannot_give_is_refused_at_the_door(more: dict[str, Any], said: str) -> None:
    torch.manual_seed(0)
    model: Any = new_target()
    model.model.layers[1].self_attn = SinkAttention(model.model.layers[1].self_attn, **more)
    with pytest.raises(ValueError, match=said):
        taps.TargetModel(model)


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
