"""The target: tree scoring equals sequential scoring on stock models, and stock use stays what it was."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
import transformers
from small_models import (
    EOS,
    FAMILIES,
    HIDDEN,
    MLP,
    PAD,
    SIZES,
    VOCAB,
    new_model,
    new_target,
    prompts,
    trained_drafters,
    trained_target,
)
from torch import Tensor
from transformers import (
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
from taps_ext.drafters.eagle import EagleConfig, EagleDrafter, EagleNetwork
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
        target.commit(path, kv.lengths.plus(Lengths.of([4, 1])), kv)
        for row, count in enumerate((4, 1)):
            prefixes[row] = prefixes[row] + tree.tokens[row, path[row, :count]].tolist()


@torch.inference_mode()
def test_the_cache_grows_and_keeps_what_it_holds() -> None:
    target = taps.TargetModel(trained_target())
    kv = target.new_cache(1)
    tokens = torch.randint(4, VOCAB, (1, FIRST_CAPACITY - 3))
    target.prefill(tokens, Lengths.of([tokens.shape[1]]), kv)
    before = [tuple(part[:, :, : kv.lengths.longest].clone() for part in kv.layers[index]) for index in range(2)]
    assert kv.capacity == FIRST_CAPACITY
    kv.reserve(8)
    assert kv.capacity == 2 * FIRST_CAPACITY
    for index, (keys, values) in enumerate(before):
        assert torch.equal(kv.layers[index][0][:, :, : kv.lengths.longest], keys)
        assert torch.equal(kv.layers[index][1][:, :, : kv.lengths.longest], values)


def test_nothing_is_allocated_between_growths() -> None:
    target = taps.TargetModel(trained_target())
    kv = target.new_cache(1)
    tree = DraftTree(*(value[:1] for value in (a_tree().tokens, a_tree().parents, a_tree().scores)), torch.tensor([8]))
    target.prefill(torch.tensor([[5, 6, 7]]), Lengths.of([3]), kv)
    address = [buffer.data_ptr() for buffer in kv.buffers.values()]
    for length in range(3, 40):
        target.score(tree, kv)
        target.commit(torch.tensor([[0] + [-1] * 7]), Lengths.of([length + 1]), kv)
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
    with pytest.raises(ValueError, match="a running state"):
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


class SinkAttention(torch.nn.Module):
    """An attention that asks its function for more than keys and values, or does without the function."""

    def __init__(self, attention: Any, **more: Any) -> None:
        super().__init__()
        self.attention, self.more = attention, more
        if not more:
            attention.config = deepcopy(attention.config)
            attention.config._attn_implementation = "sdpa"

    def forward(self, *arguments: Any, **kwargs: Any) -> Any:
        if not self.more:
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


def skip_without_interface(model: Any) -> None:
    """Older versions of transformers have families with attention classes of their own, which are refused by name."""
    try:
        taps.TargetModel(model)
    except ValueError as error:
        if "does not use transformers' AttentionInterface" not in str(error) or transformers.__version__ >= "5":
            raise
        pytest.skip(str(error))


def any_drafter(target: taps.TargetModel) -> dict[str, EagleDrafter]:
    """A drafter with weights of its own, for targets whose text is at stake and not its speed."""
    config = EagleConfig(target.hidden_size, 48, 4, 2, 8, target.vocab_size)
    ends = torch.nn.Embedding(target.vocab_size, target.hidden_size), torch.nn.Linear(target.hidden_size, VOCAB)
    return {"any": EagleDrafter(EagleNetwork(config).requires_grad_(False), *ends, "any")}


def assert_stock_text(model: Any, max_new_tokens: int = 16) -> None:
    target, (ids, mask) = taps.TargetModel(model), prompts(3)
    arguments = {"attention_mask": mask, "do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": PAD}
    stock = model.generate(ids, **arguments)
    decoder = taps.SpeculativeDecoder(target, any_drafter(target), shape=taps.TreeShape(4, 3, 20))
    assert torch.equal(decoder.generate(ids, mask, max_new_tokens=max_new_tokens).sequences, stock)


LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
HEADS: dict[str, dict[str, Any]] = {
    "Cohere": {**SIZES, **MLP, "logit_scale": 0.0625},
    "Granite": {**SIZES, **MLP, "logits_scaling": 8.0},
    "NanoChat": {**SIZES, **MLP, "num_key_value_heads": 2},  # a soft cap of 15
    "Gemma3Text": {**SIZES, **MLP, "head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": 4.0},
    "Phi": {**SIZES, **MLP},  # a bias
    "MiniCPM3": {**SIZES, **MLP, **LATENT, "num_key_value_heads": 4, "dim_model_base": 8},
    "ModernBertDecoder": {**SIZES, **MLP, "num_hidden_layers": 2},  # a layer before the matrix
}


@pytest.mark.parametrize("family", HEADS)
@torch.inference_mode()
def test_whatever_stands_behind_the_head_is_in_the_logits(family: str) -> None:
    """Also where row 0 of the embedding is zero, as padding_idx=0 makes it: logits of token 0 alone show little."""
    model = new_model(family, {"Gemma3Text": "Gemma3ForCausalLM"}.get(family), **HEADS[family])
    model.get_input_embeddings().weight[0] = 0
    target, tree, kv = taps.TargetModel(model), a_tree(), None
    prefixes = [[5, 6, 7, 8, 9], [10, 11]]
    kv = target.new_cache(2)
    tokens = torch.tensor([prefixes[0], prefixes[1] + [0, 0, 0]])
    prefill = target.prefill(tokens, Lengths.of([5, 2]), kv)
    scored = target.score(tree, kv)
    for row, count in enumerate(TREE_COUNTS):
        stock = model(input_ids=torch.tensor([prefixes[row]])).logits[0, -1]
        torch.testing.assert_close(prefill.logits[row, 0], stock, rtol=1e-4, atol=1e-5)
        for node in range(count):
            expected = sequential_logits(model, prefixes[row], tree, row, node)
            torch.testing.assert_close(scored.logits[row, node], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", HEADS)
def test_drafters_scale_and_cap_as_the_target_does_or_are_refused(family: str, tmp_path: Path) -> None:
    model = new_model(family, {"Gemma3Text": "Gemma3ForCausalLM"}.get(family), **HEADS[family])
    network = EagleNetwork(EagleConfig.for_target(model.config))
    save_drafter(network, tmp_path / "d", embedding=model.get_input_embeddings(), target_config=model.config)
    if family == "ModernBertDecoder":
        with pytest.raises(ValueError, match="ModernBertDecoderForCausalLM changes the LM head's product"):
            taps.load_drafters({"d": tmp_path / "d"}, model)
        return
    drafter = taps.load_drafters({"d": tmp_path / "d"}, model)["d"]
    tokens = torch.arange(VOCAB)[None]
    with torch.inference_mode():
        features, logits = taps.TargetModel(model).decoder_stack(tokens).last_hidden_state, model(tokens).logits
        torch.testing.assert_close(drafter.ends.logits(features), logits, rtol=1e-4, atol=1e-5)


def test_a_cap_that_no_config_names_is_refused_for_drafters_and_decoded_for_the_target(tmp_path: Path) -> None:
    model = new_model("NanoChat", **HEADS["NanoChat"])
    network = EagleNetwork(EagleConfig.for_target(model.config))
    save_drafter(network, tmp_path / "d", embedding=model.get_input_embeddings(), target_config=model.config)
    stack, model.config.final_logit_softcapping = model.base_model, 15.0
    stack.norm.register_forward_hook(lambda module, arguments, output: output)
    model.lm_head.register_forward_hook(lambda module, arguments, output: output + 0.1 * output.sin())
    assert_stock_text(model)  # it is in the head's own product
    forward = model.forward

    def shifted(*arguments: Any, **kwargs: Any) -> Any:
        output = forward(*arguments, **kwargs)
        output.logits = output.logits + 0.1 * output.logits.sin()
        return output

    model.forward = shifted
    with pytest.raises(ValueError, match="changes the LM head's product"):
        taps.load_drafters({"d": tmp_path / "d"}, model)


@pytest.mark.parametrize("lengths", [[40, 40], [40, 17]])
def test_a_prefill_computes_the_logits_of_one_column_a_row(lengths: list[int]) -> None:
    model = deepcopy(trained_target())
    target, rows = taps.TargetModel(model), []
    model.get_output_embeddings().register_forward_hook(
        lambda head, arguments, out: rows.append(out.shape[:-1].numel())
    )
    target.prefill(torch.randint(4, VOCAB, (2, 40)), Lengths.of(lengths), target.new_cache(2))
    assert rows == [2]


def test_threads_share_a_model_that_two_targets_drive() -> None:
    model = deepcopy(trained_target())
    decoders = [taps.SpeculativeDecoder(model, trained_drafters(), shape=taps.TreeShape(4, 3, 10)) for _ in range(2)]
    assert len(decoders[0].target.decoder_stack._forward_hooks) == 1
    given = [prompts(count, seed=count) for count in (1, 2, 3)]
    expected = [model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20) for ids, mask in given]

    def text(index: int) -> list[Tensor]:
        ids, mask = given[index % 3]
        if index % 3 == 2:
            return [model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20) for _ in range(3)]
        return [decoders[index % 3].generate(ids, mask, max_new_tokens=20).sequences for _ in range(3)]

    with ThreadPoolExecutor(6) as pool:
        for index, found in enumerate(pool.map(text, range(6))):
            assert all(torch.equal(one, expected[index % 3]) for one in found)


class Unmasked(torch.nn.Module):
    """A layer that lets each node see what stands before it: the mask of a tree, but not its ancestry."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, *arguments: Any, **kwargs: Any) -> Any:
        means = hidden.cumsum(1) / torch.arange(1, hidden.shape[1] + 1)[:, None]
        return self.layer(hidden + 0.05 * means, *arguments, **kwargs)


def test_a_target_that_mixes_the_branches_of_a_tree_is_refused() -> None:
    model: Any = new_target()
    model.model.layers[1] = Unmasked(model.model.layers[1])
    with pytest.raises(ValueError, match="other logits than its own forward gives the same tokens"):
        taps.TargetModel(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["Mixtral", "Qwen2Moe", "Olmoe"])
def test_routers_that_flip_on_near_ties_are_no_reason_to_refuse(family: str, dtype: torch.dtype) -> None:
    experts = {"num_experts": 8, "num_local_experts": 8, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
    shared = {"shared_expert_intermediate_size": 16, "num_key_value_heads": 2}
    for seed in range(3):
        model: Any = new_model(family, dtype=dtype, **{**SIZES, **MLP, **experts, **shared, "bos_token_id": seed})
        skip_without_interface(model)
        taps.TargetModel(model)


@pytest.mark.parametrize("family", ["StableLm", "Nemotron", "ModernBertDecoder"])
def test_families_that_once_raised_tensor_errors_give_their_own_text(family: str) -> None:
    heads = {} if family == "ModernBertDecoder" else {"num_key_value_heads": 2}
    model = new_model(family, **SIZES, **MLP, **heads)
    skip_without_interface(model)
    assert_stock_text(model)


def test_a_layer_whose_own_code_fails_on_a_tree_is_refused_by_name() -> None:
    model = new_model("Doge", **SIZES, **MLP, num_key_value_heads=2)
    with pytest.raises(ValueError, match="target DogeForCausalLM fails in a forward over the nodes of a tree"):
        taps.TargetModel(model)
    assert model.config._attn_implementation != "taps_tree"


def test_sparse_attention_is_called_by_its_name() -> None:
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    model = new_model("DeepseekV32", **SIZES, **MLP, **LATENT, **experts, moe_intermediate_size=16)
    with pytest.raises(ValueError, match=r"has sparse attention \(indexed_attention\): its layers select or compress"):
        taps.TargetModel(model)


def test_training_mode_is_refused_and_never_switched_off() -> None:
    model = new_target().train()
    with pytest.raises(ValueError, match=r"is in training mode, .* call model\.eval\(\)"):
        taps.TargetModel(model)
    assert model.training and model.config._attn_implementation != "taps_tree"
    target = taps.TargetModel(model.eval())
    model.train()
    with pytest.raises(ValueError, match="is in training mode"):
        target.new_cache(1)


@pytest.mark.parametrize("is_made_under_autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_text_is_the_targets_under_autocast(
    dtype: torch.dtype, is_made_under_autocast: bool
) -> None:
    model, (ids, mask) = deepcopy(trained_target()).to(dtype), prompts(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_made_under_autocast):
        decoder = taps.SpeculativeDecoder(model, trained_drafters(), shape=taps.TreeShape(4, 3, 20))
    with torch.autocast("cpu", torch.bfloat16):
        stock = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20)
        result = decoder.generate(ids, mask, max_new_tokens=20)
    assert torch.equal(result.sequences, stock)
    assert result.stats.acceptance_length > 1.5
    if dtype == torch.float32:  # and without autocast, to the bit what it was
        stock = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20)
        assert torch.equal(decoder.generate(ids, mask, max_new_tokens=20).sequences, stock)


def with_adapters(model: Any) -> Any:
    """The model in a PeftModel, with LoRA weights that change its text."""
    import peft

    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, lora).eval()


def test_a_wrapper_of_adapters_and_the_model_inside_are_one_target() -> None:
    model = with_adapters(deepcopy(trained_target()))
    ids, mask = prompts(2)
    arguments = {"input_ids": ids, "attention_mask": mask, "do_sample": False, "max_new_tokens": 16}
    stock = model.generate(**arguments)
    assert not torch.equal(stock, trained_target().generate(**arguments)), "the adapters change the text"
    for target in (model, model.get_base_model()):
        decoder = taps.SpeculativeDecoder(target, trained_drafters())
        assert torch.equal(decoder.generate(ids, mask, max_new_tokens=16).sequences, stock)
        for caller in (model, model.get_base_model()):
            assert torch.equal(caller.generate(**arguments, custom_generate=decoder), stock)


def test_adapters_that_are_switched_off_or_merged_decode_as_the_model_then_writes() -> None:
    model, (ids, mask) = with_adapters(deepcopy(trained_target())), prompts(2)

    def assert_same(decoder: taps.SpeculativeDecoder, target: Any) -> None:
        stock = target.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=16)
        assert torch.equal(decoder.generate(ids, mask, max_new_tokens=16).sequences, stock)

    decoder = taps.SpeculativeDecoder(model, trained_drafters())
    with model.disable_adapter():
        assert_same(decoder, trained_target())
    model.merge_adapter()
    assert_same(decoder, model)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert_same(taps.SpeculativeDecoder(merged, trained_drafters()), merged)


@pytest.mark.parametrize("method", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompts_that_are_learned_are_no_part_of_the_layers_and_refused(method: str) -> None:
    import peft

    config = getattr(peft, method)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="learns prompts or prefixes"):
        taps.TargetModel(peft.get_peft_model(new_target(), config).eval())


def test_two_processes_of_tensor_parallelism_give_the_text_of_one(tmp_path: Path) -> None:
    target = deepcopy(trained_target())
    target.save_pretrained(tmp_path / "target")
    for name, drafter in trained_drafters().items():
        save_drafter(drafter.network, tmp_path / name, embedding=drafter.embedding, target_config=target.config)
    folders = {name: str(tmp_path / name) for name in trained_drafters()}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*command, small_models.__file__, str(tmp_path / "target"), *folders.values(), str(tmp_path / "out")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(taps.__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    ids, mask = prompts(2)
    drafters = taps.load_drafters(folders, target)
    alone = taps.SpeculativeDecoder(target, drafters, shape=taps.TreeShape()).generate(ids, mask, max_new_tokens=24)
    sequences, acceptance_length = torch.load(tmp_path / "out")
    assert torch.equal(sequences, alone.sequences)
    assert acceptance_length == alone.stats.acceptance_length > 2.5, "random drafters have 1.4"


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
    result = taps.SpeculativeDecoder(quantised, drafters, shape=taps.TreeShape()).generate(ids, mask, max_new_tokens=16)
    assert torch.equal(result.sequences, stock)
    assert result.stats.acceptance_length > 1.5


def test_ops_see_the_same_tree_that_the_target_attends_with() -> None:
    tree = a_tree()
    mask = ops.tree_attention_mask(tree.parents, tree.num_nodes, torch.tensor([2, 1]), 3)
    assert mask.shape == (2, 1, 8, 11)
    assert mask[1, 0, :, :3].tolist() == [[True, False, False]] * 8
