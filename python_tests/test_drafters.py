"""The EAGLE-2 drafter against a literal one: no cache, no mask, every node's whole context computed anew in float64."""

from __future__ import annotations

import copy
import doctest
import gc
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from literal_drafter import (
    LLAMA3_ROPE,
    H,
    LoneDrafter,
    Text,
    Together,
    V,
    assert_same_tree,
    literal_tree,
    make_drafter,
    new_target,
    paths_of,
)
from small_models import prompts, trained_drafters, trained_target
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

import taps_ext as taps
from taps_ext import native, ops
from taps_ext.checkpoints import save_drafter
from taps_ext.drafters import EagleConfig, EagleDrafter, EagleNetwork, base, growth
from taps_ext.tree import Lengths, TreeShape

needs_native = pytest.mark.skipif(native.unavailable_reason() is not None, reason="the native module is not built")


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    return new_target()


@needs_native
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_key_value_heads": 4, "fc_bias": True},
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE, "head_dim": 16},
    ],
    ids=["gqa", "bias", "llama3-rope"],
)
def test_incremental_trees_of_a_ragged_batch_equal_full_recomputation(target: LlamaForCausalLM, overrides: Any) -> None:
    drafter = make_drafter(target, **overrides)
    text, state, shape = Text(target, 3, 40), drafter.reset(3), TreeShape(depth=4, branching=3, max_nodes=26)
    for counts in ([9, 4, 14], [1, 3, 2], [0, 5, 1], [4, 1, 0]):
        text.feed(drafter, state, counts)
        tree = text.propose(drafter, state, shape)
        tree.validate()
        assert tree.tokens[:, 0].equal(text.roots())
        for b, fed in enumerate(text.fed):
            expected = literal_tree(drafter, text.features[b, :fed], text.tokens[b, 1 : fed + 1], shape)
            assert_same_tree(paths_of(tree, b), expected)


@needs_native
@pytest.mark.parametrize("shape", [TreeShape(1, 4, 3), TreeShape(1, 1, 1), TreeShape(3, 1, 60), TreeShape(3, 200, 70)])
def test_every_tree_shape_equals_full_recomputation(target: LlamaForCausalLM, shape: TreeShape) -> None:
    drafter = make_drafter(target)
    text, state = Text(target, 1, 12), drafter.reset(1)
    text.feed(drafter, state, [7])
    tree = text.propose(drafter, state, shape)
    branching = min(shape.branching, V)
    assert tree.capacity == min(shape.max_nodes, 1 + branching + (shape.depth - 1) * branching**2)
    if branching < V:
        expected = literal_tree(drafter, text.features[0, :7], text.tokens[0, 1:8], shape)
        assert_same_tree(paths_of(tree, 0), expected)


@needs_native
def test_a_row_drafts_the_same_alone_and_in_a_batch(target: LlamaForCausalLM) -> None:
    drafter, shape = make_drafter(target), TreeShape(4, 4, 20)
    together, alone = Text(target, 3, 40), Text(target, 3, 40)
    batch_state, states = drafter.reset(3), [drafter.reset(1) for _ in range(3)]
    for counts in ([12, 3, 7], [1, 2, 0], [2, 4, 1]):
        together.feed(drafter, batch_state, counts)
        tree = together.propose(drafter, batch_state, shape)
        for b in range(3):
            start, stop = alone.fed[b], alone.fed[b] + counts[b]
            alone.fed[b] = stop
            if counts[b]:
                drafter.observe(
                    states[b],
                    alone.features[b : b + 1, start:stop],
                    alone.tokens[b : b + 1, start + 1 : stop + 1],
                    Lengths.of(counts[b : b + 1]),
                )
            single = drafter.propose(states[b], alone.tokens[b : b + 1, stop], shape, torch.tensor([True]))
            assert_same_tree(paths_of(tree, b), paths_of(single, 0))


@needs_native
def test_inactive_rows_get_only_their_root(target: LlamaForCausalLM) -> None:
    drafter = make_drafter(target)
    text, state = Text(target, 3, 20), drafter.reset(3)
    text.feed(drafter, state, [5, 0, 3])  # row 1 has observed nothing at all
    tree = text.propose(drafter, state, TreeShape(3, 3, 10), [True, False, False])
    tree.validate()
    assert tree.num_nodes.tolist() == [10, 1, 1]
    assert tree.tokens[:, 0].equal(text.roots())


@needs_native
def test_proposing_leaves_the_committed_state_as_it_was(target: LlamaForCausalLM) -> None:
    drafter, shape = make_drafter(target), TreeShape(4, 3, 20)
    eager, lazy = Text(target, 2, 30), Text(target, 2, 30)
    eager_state, lazy_state = drafter.reset(2), drafter.reset(2)
    for counts in ([8, 5], [2, 1], [1, 4]):
        eager.feed(drafter, eager_state, counts)
        first, second = (eager.propose(drafter, eager_state, shape) for _ in range(2))
        assert first.tokens.equal(second.tokens)
        assert first.scores.equal(second.scores)
        lazy.feed(drafter, lazy_state, counts)
    assert eager_state.last_output.equal(lazy_state.last_output)
    assert eager.propose(drafter, eager_state, shape).scores.equal(lazy.propose(drafter, lazy_state, shape).scores)


@needs_native
def test_the_cache_moves_only_when_it_doubles(target: LlamaForCausalLM) -> None:
    drafter, shape = make_drafter(target), TreeShape(3, 4, 12)
    text, state = Text(target, 2, 420), drafter.reset(2)
    text.feed(drafter, state, [180, 3])
    capacities, addresses = [], set()
    for _ in range(40):
        text.propose(drafter, state, shape)
        text.feed(drafter, state, [5, 2])
        capacities.append(state.keys.shape[2])
        addresses.add((state.keys.shape[2], state.keys.data_ptr(), state.values.data_ptr()))
    assert sorted(set(capacities)) == [256, 512]
    assert len(addresses) == 2
    fed = text.fed[0]
    expected = literal_tree(drafter, text.features[0, :fed], text.tokens[0, 1 : fed + 1], TreeShape(2, 2, 5))
    assert_same_tree(paths_of(text.propose(drafter, state, TreeShape(2, 2, 5)), 0), expected)


class NoHostRead(TorchDispatchMode):
    """Raises when a value is read on the host, or a shape depends on one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "equal"}, f"{name} reads the device"
        return func(*args, **(kwargs or {}))


@needs_native
def test_drafting_reads_nothing_on_the_host(target: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = make_drafter(target)
    text, state = Text(target, 2, 20), drafter.reset(2)
    text.feed(drafter, state, [6, 9])
    block, roots, active = text.block([2, 3]), text.roots(), torch.tensor([True, False])
    monkeypatch.setattr(growth, "can_read", lambda device: False)  # as where the host would have to wait
    monkeypatch.setattr(Tensor, "tolist", None)  # goes past the dispatcher
    with NoHostRead():
        drafter.observe(state, *block)
        drafter.propose(state, roots, TreeShape(4, 3, 20), active)


@needs_native
def test_two_threads_on_one_drafter_propose_what_two_runs_propose(target: LlamaForCausalLM) -> None:
    drafter, shape = make_drafter(target), TreeShape(4, 4, 24)

    def run(seed: int) -> list[Tensor]:
        text, state = Text(target, 2, 60, seed), drafter.reset(2)
        trees = []
        for counts in ([20, 9], *([[1, 2], [3, 1]] * 8)):
            text.feed(drafter, state, counts)
            trees.append(text.propose(drafter, state, shape).tokens)
        return trees

    expected = {seed: run(seed) for seed in range(4)}
    found: dict[int, list[Tensor]] = {}
    threads = [threading.Thread(target=lambda seed=seed: found.update({seed: run(seed)})) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, trees in expected.items():
        assert all(a.equal(b) for a, b in zip(trees, found[seed], strict=True))


@needs_native
def test_states_made_in_inference_mode_go_on_outside_of_it(target: LlamaForCausalLM) -> None:
    drafter = make_drafter(target)
    text = Text(target, 1, 20)
    with torch.inference_mode():
        state = drafter.reset(1)
        text.feed(drafter, state, [5])
        text.propose(drafter, state, TreeShape(3, 3, 10))
    text.feed(drafter, state, [3])
    text.propose(drafter, state, TreeShape(3, 3, 10)).validate()


@needs_native
def test_a_bfloat16_target_is_drafted_for_in_bfloat16(target: LlamaForCausalLM) -> None:
    torch.manual_seed(3)
    half = LlamaForCausalLM(target.config).to(torch.bfloat16)
    network = EagleNetwork(EagleConfig.for_target(half.config)).to(torch.bfloat16)
    assert network.rotary.inv_freq.dtype == torch.float32
    drafter = EagleDrafter(network, half.get_input_embeddings(), half.get_output_embeddings())
    text, state = Text(target, 2, 20), drafter.reset(2)
    text.feed(drafter, state, [5, 7])
    assert state.keys.dtype == torch.bfloat16
    text.propose(drafter, state, TreeShape(3, 3, 10)).validate()


# --- several drafters ----------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("alike", [2, 3])
def test_drafters_in_lockstep_propose_the_trees_of_each_alone(target: LlamaForCausalLM, alike: int) -> None:
    """One of them has another cache shape; one is of another type and drafts alone, in its place."""
    drafters = [make_drafter(target, seed) for seed in range(alike)]
    drafters.insert(1, make_drafter(target, seed=7, num_key_value_heads=4))
    one = drafters[0]
    drafters.append(LoneDrafter(make_drafter(target, seed=8).network, one.embedding, one.lm_head, "lone"))
    grouped, shape = Together(drafters), TreeShape(4, 4, 22)
    assert sorted(map(len, grouped.groups)) == [1, alike + 1]
    text, states = Text(target, 3, 40), [drafter.reset(3) for drafter in drafters]
    group_states = grouped.reset(3)
    active = torch.tensor([True, True, False])
    for counts in ([9, 4, 14], [1, 3, 2], [0, 5, 1], [4, 1, 0]):
        features, tokens, num_tokens = text.block(counts)
        grouped.observe(group_states, features, tokens, num_tokens)
        for drafter, state in zip(drafters, states, strict=True):
            drafter.observe(state, features, tokens, num_tokens)
        trees = grouped.propose(group_states, text.roots(), shape, active)
        for drafter, state, tree in zip(drafters, states, trees, strict=True):
            alone = drafter.propose(state, text.roots(), shape, active)
            for name in ("tokens", "parents", "num_nodes"):
                assert getattr(tree, name).equal(getattr(alone, name))
            torch.testing.assert_close(tree.scores, alone.scores, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(tree.entropies, alone.entropies, atol=1e-5, rtol=1e-5)


@needs_native
def test_drafters_in_lockstep_take_one_call_a_level(target: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "can_read", lambda device: False)  # every level
    calls: Counter[str] = Counter()
    for name in ("expand_frontier", "prune_tree"):
        monkeypatch.setattr(ops, name, counted(getattr(ops, name), name, calls))
    drafters = [make_drafter(target, seed) for seed in range(3)]
    head = counted(target.get_output_embeddings(), "lm_head", calls)
    head.parameters = target.get_output_embeddings().parameters
    for drafter in drafters:
        drafter.ends = replace(drafter.ends, lm_head=head)
    grouped, text = Together(drafters), Text(target, 2, 20)
    states = grouped.reset(2)
    grouped.observe(states, *text.block([5, 3]))
    grouped.propose(states, text.roots(), TreeShape(5, 3, 20), torch.tensor([True, True]))
    assert calls == {"expand_frontier": 5, "lm_head": 5, "prune_tree": 1}


def counted(function: Any, name: str, calls: Counter[str]) -> Any:
    def call(*arguments: Any) -> Any:
        calls[name] += 1
        return function(*arguments)

    return call


def test_zero_tokens_change_nothing(target: LlamaForCausalLM) -> None:
    drafter = make_drafter(target)
    text, state = Text(target, 2, 20), drafter.reset(2)
    text.feed(drafter, state, [4, 6])
    before = (state.lengths, state.last_output, state.keys.clone())
    text.feed(drafter, state, [0, 0])
    assert state.lengths is before[0]
    assert state.last_output is before[1]
    assert state.keys.equal(before[2])


def test_observing_gives_what_the_training_forward_gives(target: LlamaForCausalLM) -> None:
    drafter = make_drafter(target)
    text, state = Text(target, 1, 12), drafter.reset(1)
    for count in (5, 1, 3):
        text.feed(drafter, state, [count])
    embeddings = drafter.embedding(text.tokens[:, 1:10])
    out = drafter.network(embeddings.double(), text.features[:, :9].double(), torch.arange(9)[None])
    torch.testing.assert_close(state.last_output, out[:, -1], atol=1e-5, rtol=1e-5)


def test_the_training_forward_is_its_stages_and_reaches_every_parameter(target: LlamaForCausalLM) -> None:
    network = EagleNetwork(EagleConfig.for_target(target.config, fc_bias=True, qkv_bias=True))
    embeddings, features = torch.randn(2, 2, 6, H)
    positions = torch.arange(6)[None]
    x = network.project(embeddings, features)
    query, key, value = network.qkv(x, positions)
    # a second stream of keys, switched off by the mask, changes nothing: how HASS composes the stages
    causal = torch.ones(6, 6).tril().bool()
    mask = torch.cat((causal, torch.zeros(6, 6, dtype=torch.bool)), 1)
    out = network.finish(x, network.attend(query, torch.cat((key, key), 2), torch.cat((value, value), 2), mask))
    torch.testing.assert_close(out, network(embeddings, features, positions), atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in network.parameters())


def test_the_drafter_holds_the_targets_own_embedding_and_lm_head(target: LlamaForCausalLM) -> None:
    drafter = make_drafter(target)
    assert drafter.embedding.weight.data_ptr() == target.get_input_embeddings().weight.data_ptr()
    assert drafter.lm_head.weight.data_ptr() == target.get_output_embeddings().weight.data_ptr()
    assert not any("embed" in key or "head" in key for key in drafter.network.state_dict())


def test_misshapen_observations_are_refused_in_a_sentence(target: LlamaForCausalLM) -> None:
    drafter = make_drafter(target)
    state, features, tokens = drafter.reset(2), torch.zeros(2, 3, H), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"features must be \[2, 3, 32\], got \[2, 3, 31\]"):
        drafter.observe(state, features[..., :-1], tokens, Lengths.of([1, 1]))
    with pytest.raises(ValueError, match=r"next_tokens must be \[2, T\], got \[1, 3\]"):
        drafter.observe(state, features, tokens[:1], Lengths.of([1, 1]))
    with pytest.raises(ValueError, match=r"num_tokens must be \[2\], got \[1\]"):
        drafter.observe(state, features, tokens, Lengths.of([1]))
    with pytest.raises(ValueError, match=r"num_tokens must lie in 0\.\.3 \(the slots given\), got 4"):
        drafter.observe(state, features, tokens, Lengths.of([1, 4]))


def test_a_rope_that_depends_on_the_text_length_is_refused(target: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="rope type must be one of default, linear, llama3, yarn, got dynamic"):
        EagleConfig.for_target(target.config, rope_scaling={"rope_type": "dynamic", "factor": 2.0})


def test_the_example_of_a_custom_drafter_runs() -> None:
    result = doctest.testmod(base, extraglobs={"ops": ops})
    assert result.attempted > 2 and result.failed == 0


# --- drafters that come and go ----------------------------------------------------------------------------------------


def four_drafters() -> dict[str, EagleDrafter]:
    """The two specialists, and each once more, disturbed: it accepts less, and drafts other trees."""
    drafters = dict(trained_drafters())
    torch.manual_seed(3)
    for name, drafter in list(drafters.items()):
        network = copy.deepcopy(drafter.network)
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        drafters[f"disturbed {name}"] = EagleDrafter(network, drafter.embedding, drafter.lm_head, f"disturbed {name}")
    return drafters


@needs_native
@pytest.mark.parametrize("composition", ["merged", "evidence"])
def test_drafters_are_dropped_and_loaded_while_the_text_stays_the_same(composition: str, tmp_path: Path) -> None:
    target, drafters = trained_target(), four_drafters()
    ids, mask = prompts(3)
    sampling = taps.SamplingParams(temperature=0.8, seed=4)
    expected = taps.plain_generate(target, ids, mask, sampling=sampling, max_new_tokens=24).new_tokens
    decoder = taps.SpeculativeDecoder(target, drafters, composition, shape=TreeShape(4, 4, 16), drafting="topk")

    def check(decoder: taps.SpeculativeDecoder) -> list[EagleNetwork]:
        result = decoder.generate(ids, mask, sampling=sampling, max_new_tokens=24)
        assert result.new_tokens == expected
        assert result.stats.drafters == tuple(decoder.drafters)
        return [drafter.network for drafter in decoder.drafters.values()]

    networks = check(decoder)
    assert sum(storages(networks).values()) == num_bytes(networks), "no weight is copied"

    running = decoder.stream(ids, mask, sampling=sampling, max_new_tokens=24)
    next(running)
    dropped = weakref.ref(drafters.pop("disturbed math").network)
    fewer = decoder.with_drafters(drafters)
    del decoder, networks
    check(fewer)
    assert [token for event in running for token in event.new_tokens[0]]  # a running call keeps its drafters
    del running
    gc.collect()
    assert dropped() is None

    folder = tmp_path / "code"
    one = drafters["chat"]
    save_drafter(one.network, folder, embedding=one.embedding, target_config=target.config)
    more = fewer.with_drafters({**drafters, "code": taps.load_drafter(folder, target)})
    del fewer
    networks = check(more)
    assert len(networks) == 4
    assert sum(storages(networks).values()) == num_bytes(networks)


def storages(networks: Sequence[EagleNetwork]) -> dict[int, int]:
    """The bytes of each piece of memory that holds parameters of the networks."""
    held = [parameter.untyped_storage() for network in networks for parameter in network.parameters()]
    return {storage.data_ptr(): storage.nbytes() for storage in held}


def num_bytes(networks: Sequence[EagleNetwork]) -> int:
    """What the networks' parameters need, without anything beside them."""
    return sum(parameter.nbytes for network in networks for parameter in network.parameters())


FAMILIES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "GPT2": ({"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 96}, {"intermediate_size": 128}),
    "GPTJ": ({"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 96, "rotary_dim": 4}, {"intermediate_size": 128}),
    "CodeGen": (
        {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 96, "rotary_dim": 4, "n_inner": 80},
        {"intermediate_size": 80},
    ),
    "GPTBigCode": ({"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 96}, {"intermediate_size": 128}),
    "OPT": (
        {"hidden_size": 48, "word_embed_proj_dim": 32, "ffn_dim": 80, "num_attention_heads": 4, "num_hidden_layers": 2},
        {"intermediate_size": 80},  # the layers are wider than the features
    ),
    "Falcon": ({"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}, {"intermediate_size": 128}),
}


@pytest.mark.parametrize("family", FAMILIES)
@needs_native
def test_drafters_are_made_saved_loaded_and_used_for_every_spelling_of_sizes(family: str, tmp_path: Path) -> None:
    sizes, expected = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(vocab_size=V, bos_token_id=0, eos_token_id=1, **sizes)
    model_class = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    torch.manual_seed(0)
    model: Any = getattr(transformers, model_class)(config).eval()
    shape = EagleConfig.for_target(config)
    assert (shape.hidden_size, shape.num_attention_heads, shape.head_dim) == (32, 4, 8)
    assert {name: getattr(shape, name) for name in expected} == expected
    assert shape.max_position_embeddings == (96 if "n_positions" in sizes else config.max_position_embeddings)
    network = EagleNetwork(shape)
    save_drafter(network, tmp_path / "d", embedding=model.get_input_embeddings(), target_config=config)
    drafters = taps.load_drafters({"d": tmp_path / "d"}, model)
    assert drafters["d"].network.config == shape
    with pytest.raises(ValueError, match="hidden size 32 differs from target hidden size 64"):
        taps.load_drafter(tmp_path / "d", small_target(V))
    if family == "Falcon" or (transformers.__version__ < "5" and family in ("GPTJ", "CodeGen")):
        return  # its attention is not transformers' interface, which a tree needs
    ids = torch.randint(2, V, (2, 7))
    stock = model.generate(ids, do_sample=False, max_new_tokens=16, pad_token_id=0)
    decoder = taps.SpeculativeDecoder(model, drafters, shape=TreeShape(4, 3, 12))
    assert torch.equal(decoder.generate(ids, max_new_tokens=16).sequences, stock)


def small_target(vocab_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def test_a_config_without_sizes_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"config \(\w+\) gives no word_embed_proj_dim or hidden_size"):
        EagleConfig.for_target(PretrainedConfig(vocab_size=8))


# --- drafters of one's own --------------------------------------------------------------------------------------------


class Chain(taps.Drafter):
    """Proposes a chain of the tokens that followed the root's token at first, `length` of them at most."""

    def __init__(self, length: int) -> None:
        config = trained_target().config
        self.name, self.vocab_size, self.hidden_size, self.length = (
            "chain",
            config.vocab_size,
            config.hidden_size,
            length,
        )
        self.calls = 0

    def reset(self, batch_size: int, sampling: Any = None, decay: float | None = None) -> Any:
        state: Any = taps.DrafterState()
        state.texts = [[] for _ in range(batch_size)]
        return state

    def observe(self, state: Any, features: Tensor, next_tokens: Tensor, num_tokens: taps.Lengths) -> None:
        for text, tokens, count in zip(state.texts, next_tokens.tolist(), num_tokens.host, strict=True):
            text += tokens[:count]

    def propose(self, state: Any, root_tokens: Tensor, shape: TreeShape, active: Tensor) -> Any:
        self.calls += 1
        capacity = max(shape.capacity(self.vocab_size), self.length + 1)
        tree = taps.DraftTree.of_roots(root_tokens).padded(capacity)
        for row, text in enumerate(state.texts):
            places = [place for place, token in enumerate(text[:-1]) if token == text[-1]]
            chain = text[places[0] + 1 :][: self.length] if places and active[row] else []
            for node, token in enumerate(chain, start=1):
                tree.tokens[row, node], tree.parents[row, node], tree.scores[row, node] = token, node - 1, -0.1 * node
            tree.num_nodes[row] = len(chain) + 1
        return tree


@needs_native
@pytest.mark.parametrize("composition", ["single", "merged"])
def test_a_tree_deeper_than_its_shape_changes_no_text(composition: str) -> None:
    target, (ids, mask) = trained_target(), prompts(3)
    shape = TreeShape(depth=2, branching=3, max_nodes=9)
    decoder = taps.SpeculativeDecoder(target, {"chain": Chain(5)}, composition, shape=shape)
    result = decoder.generate(ids, mask, max_new_tokens=40, return_log_probs=True, eos_token_id=())
    assert result.new_tokens == taps.plain_generate(target, ids, mask, max_new_tokens=40, eos_token_id=()).new_tokens
    assert max(map(max, result.stats.num_accepted)) > shape.depth
    assert result.log_probs is not None and [len(row) for row in result.log_probs] == [40] * 3


@needs_native
def test_a_tree_of_another_capacity_is_refused_by_the_drafters_name() -> None:
    decoder = taps.SpeculativeDecoder(trained_target(), {"chain": Chain(9)}, shape=TreeShape(2, 3, 6))
    with pytest.raises(ValueError, match=r"drafter 'chain' proposed a tree of 10 slots; pad it to the 6 of"):
        decoder.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4)


def test_what_is_no_drafter_is_refused_with_the_class_to_subclass() -> None:
    with pytest.raises(ValueError, match=r"drafter 'mine' must be a taps\.Drafter, got object; subclass it"):
        taps.SpeculativeDecoder(trained_target(), {"mine": object()})  # type: ignore[dict-item]


class Counted(EagleDrafter):
    """A subclass that proposes nothing, and counts how often it is asked."""

    calls = 0

    def propose(self, state: Any, root_tokens: Tensor, shape: TreeShape, active: Tensor) -> Any:
        self.calls += 1
        return taps.DraftTree.of_roots(root_tokens).padded(shape.capacity(self.vocab_size))


@needs_native
@pytest.mark.parametrize("composition", ["confidence", "merged", "evidence"])
def test_a_subclass_proposes_what_it_says(composition: str) -> None:
    own = trained_drafters()
    drafters = {
        name: Counted(one.network, one.embedding, one.lm_head, name, one.calibration) for name, one in own.items()
    }
    decoder = taps.SpeculativeDecoder(trained_target(), drafters, composition, shape=TreeShape(3, 3, 9))
    stats = decoder.generate(*prompts(3), max_new_tokens=12, eos_token_id=()).stats
    assert stats.acceptance_length == 1.0
    assert all(drafter.calls > 0 for drafter in drafters.values())


@needs_native
@pytest.mark.parametrize("is_inside", [True, False])
def test_a_stream_goes_on_in_another_mode_than_it_was_made_in(is_inside: bool) -> None:
    decoder = taps.SpeculativeDecoder(trained_target(), trained_drafters(), shape=TreeShape(3, 3, 9))
    ids, mask = prompts(2)
    expected = decoder.generate(ids, mask, max_new_tokens=[9, 20]).new_tokens
    with torch.inference_mode(is_inside):
        steps = decoder.stream(ids, mask, max_new_tokens=[9, 20])
    with torch.inference_mode(not is_inside):
        events = list(steps)
    assert [[token for event in events for token in event.new_tokens[row]] for row in range(2)] == expected
