"""Drafters of one shape as one: what a stack computes, whose memory it is, and drafters that come and go."""

from __future__ import annotations

import copy
import gc
import random
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from drafter_files import LLAMA3_ROPE, make_target
from small_models import prompts, trained_drafters, trained_target
from torch import Tensor, nn

import taps_ext as taps
from taps_ext import native
from taps_ext.checkpoints import load_network, save_drafter
from taps_ext.drafters import EagleConfig, EagleDrafter, EagleNetwork, GroupedDrafters
from taps_ext.drafters.eagle_stack import EagleStack, layout

needs_native = pytest.mark.skipif(native.unavailable_reason() is not None, reason="the native module is not built")
H = 48
SHAPE = taps.TreeShape(depth=4, branching=4, max_nodes=16)
ROPES: list[dict[str, Any]] = [
    {},
    {"rope_theta": 500000.0},
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
]
# Rounding: sums in another order. The norm is in float32 for every dtype, so that float64 is no better than it.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2}


def make_networks(count: int, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> list[EagleNetwork]:
    """Frozen networks of one shape, each with a rope of its own."""
    shape = {"hidden_size": H, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(seed)
    networks = [
        EagleNetwork(
            EagleConfig(**{**shape, "head_dim": 8, "vocab_size": 50, **sizes, **ROPES[(seed + d) % len(ROPES)]})
        )
        for d in range(count)
    ]
    for network in networks:  # all parameters differ: norms start as ones
        for parameter in network.parameters():
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return [network.to(dtype).requires_grad_(False) for network in networks]


def generated(seed: int) -> tuple[list[EagleNetwork], dict[str, Any]]:
    """Networks of a generated configuration, and inputs for all their stages behind a few slots of context."""
    draw = random.Random(seed)
    kv_heads = draw.choice([1, 2, 4])
    dtype = draw.choice(list(TOLERANCE))
    networks = make_networks(
        draw.randint(2, 5),
        seed,
        dtype,
        num_attention_heads=kv_heads * draw.choice([1, 2, 3]),
        num_key_value_heads=kv_heads,
        head_dim=draw.choice([4, 16]),
        intermediate_size=draw.choice([20, 96]),
        rms_norm_eps=draw.choice([1e-6, 1e-2]),
        hidden_act=draw.choice(["silu", "gelu"]),
        fc_bias=draw.random() < 0.5,
        qkv_bias=draw.random() < 0.5,
    )
    batch, slots, context = draw.randint(1, 3), draw.randint(1, 6), draw.randint(0, 5)
    rows, config = (len(networks), batch), networks[0].config
    past = [torch.randn(*rows, kv_heads, context, config.head_dim, dtype=dtype) for _ in range(2)]
    mask = torch.rand(*rows, 1, slots, context + slots) < 0.6
    mask[..., context:] |= torch.eye(slots, dtype=torch.bool)
    return networks, {
        "embeddings": torch.randn(*rows, slots, config.hidden_size, dtype=dtype),
        "features": torch.randn(*rows, slots, config.hidden_size, dtype=dtype),
        "positions": torch.randint(0, 3000, (batch, slots)),
        "past": past,
        "mask": None if context == 0 and draw.random() < 0.5 else mask,
    }


def stages(stack: Any, inputs: dict[str, Any], d: int | slice) -> list[Tensor]:
    """What project, qkv, attend and finish give for networks `d`; a network alone and a stack of several alike."""
    x = stack.project(inputs["embeddings"][d], inputs["features"][d])
    query, key, value = stack.qkv(x, inputs["positions"])
    keys, values = (torch.cat((past[d], new), -2) for past, new in zip(inputs["past"], (key, value), strict=True))
    attended = stack.attend(query, keys, values, None if inputs["mask"] is None else inputs["mask"][d])
    return [x, query, key, value, attended, stack.finish(x, attended)]


def storages(networks: Sequence[EagleNetwork]) -> dict[int, int]:
    """The bytes of each piece of memory that holds parameters of the networks."""
    held = [parameter.untyped_storage() for network in networks for parameter in network.parameters()]
    return {storage.data_ptr(): storage.nbytes() for storage in held}


def num_bytes(networks: Sequence[EagleNetwork]) -> int:
    """What the networks' parameters need, without anything beside them."""
    return sum(parameter.nbytes for network in networks for parameter in network.parameters())


# --- what it computes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_a_stack_gives_what_each_network_gives_alone(seed: int) -> None:
    networks, inputs = generated(seed)
    alone = [stages(network, inputs, d) for d, network in enumerate(networks)]
    found = stages(EagleStack(networks), inputs, slice(None))
    tolerance = TOLERANCE[networks[0].fc.weight.dtype]
    for stage, together in enumerate(found):
        for d, outputs in enumerate(alone):
            torch.testing.assert_close(together[d], outputs[stage], atol=tolerance, rtol=tolerance)
    for d, network in enumerate(networks):  # its parameters lie elsewhere now, with the same values
        assert all(a.equal(b) for a, b in zip(stages(network, inputs, d), alone[d], strict=True))


@pytest.mark.parametrize("seed", range(10))
def test_a_stack_of_one_is_its_network_bit_for_bit_and_leaves_it_alone(seed: int) -> None:
    networks, inputs = generated(seed)
    network = networks[0].requires_grad_(seed % 2 == 0)
    before = list(network.parameters())
    expected = stages(network, inputs, 0)
    found = stages(EagleStack([network]), inputs, slice(0, 1))
    assert all(a[0].equal(b) for a, b in zip(found, expected, strict=True))
    assert all(a is b for a, b in zip(network.parameters(), before, strict=True))


def test_only_the_rope_may_differ_within_a_stack() -> None:
    one, other = make_networks(2)
    assert one.config != other.config
    assert layout(one) is not None
    assert layout(one) == layout(other)
    for sizes in ({"intermediate_size": 40}, {"qkv_bias": True}, {"rms_norm_eps": 1e-4}, {"hidden_act": "gelu"}):
        assert layout(make_networks(1, **sizes)[0]) not in (None, layout(one)), sizes
    assert layout(make_networks(1, dtype=torch.bfloat16)[0]) != layout(one)


# --- whose memory it is --------------------------------------------------------------------------------------------


def test_weights_are_held_once_and_two_stacks_of_the_same_networks_share_them() -> None:
    networks = make_networks(4, fc_bias=True)
    needed = num_bytes(networks)
    first, others, second = EagleStack(networks), EagleStack(make_networks(2, seed=1)), EagleStack(networks)
    assert sum(storages(networks).values()) == needed
    assert others._held is not first._held
    mine = {tensor.data_ptr() for tensor in first._held.tensors.values()}
    assert mine == set(storages(networks)) == {tensor.data_ptr() for tensor in second._held.tensors.values()}


def test_a_selection_of_other_networks_has_a_stack_of_its_own_and_disturbs_none() -> None:
    networks, places = make_networks(4), [3, 1]
    inputs = torch.randn(2, 4, 1, 3, H)
    whole = EagleStack(networks)
    expected = whole.project(*inputs)
    part = EagleStack([networks[place] for place in places])
    torch.testing.assert_close(part.project(*inputs[:, places]), expected[places])
    assert whole.project(*inputs).equal(expected)


def test_a_dropped_stack_is_freed_whatever_outlives_it() -> None:
    """Networks in a newer stack, networks kept for later, networks dropped with it."""
    networks = make_networks(4)
    values = [copy.deepcopy(network.state_dict()) for network in networks]
    old = EagleStack(networks)
    freed = [weakref.ref(tensor) for tensor in old._held.tensors.values()]
    new = EagleStack(networks[:2])
    kept = networks[2]
    dropped = weakref.ref(networks.pop())
    del old
    assert not any(tensor() is not None for tensor in freed)
    assert dropped() is None
    assert sum(storages(networks[:2]).values()) == num_bytes(networks[:2])
    assert set(storages(networks[:2])) == {tensor.data_ptr() for tensor in new._held.tensors.values()}
    assert sum(storages([kept]).values()) == num_bytes([kept])
    for network, before in zip(networks, values, strict=False):
        assert all(value.equal(before[name]) for name, value in network.state_dict().items())


def test_a_network_in_training_runs_alone() -> None:
    networks = make_networks(4)
    in_training = [network.requires_grad_(True) for network in networks[1:3]]
    mine = [parameter for network in in_training for parameter in network.parameters()]
    assert layout(in_training[0]) is None
    with pytest.raises(ValueError, match="must be frozen and alike"):
        EagleStack(networks)
    embedding, lm_head = nn.Embedding(50, H), nn.Linear(H, 50, bias=False)
    drafters = [EagleDrafter(network, embedding, lm_head) for network in networks]
    assert GroupedDrafters(drafters).members == [[0, 3], [1], [2]]
    assert all(a is b for a, b in zip((p for one in in_training for p in one.parameters()), mine, strict=True))


def test_a_network_with_replaced_layers_runs_alone() -> None:
    class Quantised(nn.Linear):
        """What a quantiser puts in place of a layer: its weight is not all there is to it."""

    class Otherwise(EagleNetwork):
        """One that may compute otherwise."""

    one, other = make_networks(2)
    other.layer.mlp.up_proj = Quantised(H, 96, bias=False).requires_grad_(False)
    assert layout(other) is None
    assert layout(Otherwise(one.config).requires_grad_(False)) is None


def test_a_stacked_network_can_be_trained_and_the_stack_follows_it() -> None:
    """Made in inference mode, too; and when the stack goes, the optimizer keeps the parameters that it knows."""
    networks = make_networks(2)
    with torch.inference_mode():
        stack = EagleStack(networks)
    network = networks[0].requires_grad_(True)
    before = stack._held.tensors["fc.weight"].clone()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    out = network(*torch.randn(2, 1, 3, H), torch.arange(3)[None])
    out.square().sum().backward()
    optimizer.step()
    changed = stack._held.tensors["fc.weight"]
    assert changed[0].equal(network.fc.weight) and not changed[0].equal(before[0])
    assert changed[1].equal(before[1])
    known = list(network.parameters())
    del stack
    assert all(a is b for a, b in zip(network.parameters(), known, strict=True))


def test_a_moved_network_is_stacked_anew() -> None:
    networks = make_networks(2)
    first = EagleStack(networks)
    networks[1].double().float()  # the same objects, other memory
    networks[1].fc.weight.mul_(2)
    second = EagleStack(networks)
    assert second._held.tensors["fc.weight"][1].equal(networks[1].fc.weight)
    assert not second._held.tensors["fc.weight"].equal(first._held.tensors["fc.weight"])


def test_a_stacked_network_is_saved_by_itself(tmp_path: Path) -> None:
    target = make_target()
    networks = [EagleNetwork(EagleConfig.for_target(target.config)).requires_grad_(False) for _ in range(4)]
    call: dict[str, Any] = {"embedding": target.get_input_embeddings(), "target_config": target.config}
    alone = save_drafter(networks[2], tmp_path / "alone", **call) / "model.safetensors"
    stack = EagleStack(networks)
    stacked = save_drafter(networks[2], tmp_path / "stacked", **call) / "model.safetensors"
    assert stacked.read_bytes() == alone.read_bytes()
    loaded = load_network(tmp_path / "stacked").state_dict()
    assert all(value.equal(loaded[name]) for name, value in networks[2].state_dict().items())
    del stack


def test_whoever_computes_with_a_parameter_keeps_its_memory() -> None:
    """Networks are shared by threads: one that has fetched a parameter must not find other memory in it, or none."""
    networks = make_networks(3)
    fetched = [(parameter, parameter.data_ptr()) for network in networks for parameter in network.parameters()]
    stack = EagleStack(networks)
    fetched += [(parameter, parameter.data_ptr()) for network in networks for parameter in network.parameters()]
    del stack
    assert all(parameter.data_ptr() == address for parameter, address in fetched)


def test_threads_run_networks_while_stacks_come_and_go() -> None:
    networks = make_networks(3)
    embeddings, features = torch.randn(2, 2, 40, H)
    positions, stop, wrong = torch.arange(40)[None], threading.Event(), []

    def run(network: EagleNetwork, expected: Tensor) -> None:
        while not stop.is_set():
            if not network(embeddings, features, positions).equal(expected):
                wrong.append(network)

    threads = [
        threading.Thread(target=run, args=(network, network(embeddings, features, positions))) for network in networks
    ]
    for thread in threads:
        thread.start()
    for turn in range(30):
        EagleStack(networks[turn % 2 :])
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


# --- drafters that come and go -------------------------------------------------------------------------------------


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
    decoder = taps.SpeculativeDecoder(target, drafters, composition, shape=SHAPE, drafting="topk")

    def check(decoder: taps.SpeculativeDecoder) -> list[EagleNetwork]:
        result = decoder.generate(ids, mask, sampling=sampling, max_new_tokens=24)
        assert result.new_tokens == expected
        assert result.stats.drafters == tuple(decoder.drafters)
        return [drafter.network for drafter in decoder.drafters.values()]

    networks = check(decoder)
    assert sum(storages(networks).values()) == num_bytes(networks)
    stacked = [weakref.ref(tensor) for tensor in stack_of(decoder)._held.tensors.values()]

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
    assert not any(tensor() is not None for tensor in stacked), "the stack of four went with its last user"

    folder = tmp_path / "code"
    one = drafters["chat"]
    save_drafter(one.network, folder, embedding=one.embedding, target_config=target.config)
    more = fewer.with_drafters({**drafters, "code": taps.load_drafter(folder, target)})
    del fewer
    networks = check(more)
    assert len(networks) == 4
    assert sum(storages(networks).values()) == num_bytes(networks)


def stack_of(decoder: taps.SpeculativeDecoder) -> EagleStack:
    """Of the one group of a decoder."""
    (group,) = decoder.grouped_drafters._groups
    return group._stack  # type: ignore[attr-defined, no-any-return]


@needs_native
def test_two_decoders_share_the_weights_of_their_drafters() -> None:
    target, drafters = trained_target(), four_drafters()
    ids, mask = prompts(2)
    expected = taps.plain_generate(target, ids, mask, max_new_tokens=24).new_tokens
    decoders = [
        taps.SpeculativeDecoder(target, drafters, "merged", shape=SHAPE),
        taps.SpeculativeDecoder(target, drafters, "confidence", shape=SHAPE),
        taps.SpeculativeDecoder(target, drafters, "single", drafter="chat", shape=SHAPE),
    ]
    networks = [drafter.network for drafter in drafters.values()]
    assert stack_of(decoders[0])._held is stack_of(decoders[1])._held
    assert sum(storages(networks).values()) == num_bytes(networks)
    for decoder in decoders:
        assert decoder.generate(ids, mask, max_new_tokens=24).new_tokens == expected
