"""The decoder on CUDA: on a GPU where there is one, and everywhere on a device that computes nothing (`fake_cuda`)."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from copy import deepcopy
from typing import Any
from unittest import mock

import fake_cuda
import pytest
import torch
from small_models import CALIBRATIONS, new_target, prompts, trained_drafters, trained_target
from torch import Tensor
from transformers import LogitsProcessorList

import taps_ext as taps
from taps_ext import native, tiny
from taps_ext.checkpoints import save_drafter
from taps_ext.composition import COMPOSITIONS
from taps_ext.decode import plain as plain_generation
from taps_ext.decode.request import Request
from taps_ext.decode.state import StepRecord, StopRules
from taps_ext.drafters import EagleConfig, EagleDrafter, EagleNetwork

SHAPE = taps.TreeShape(depth=3, branching=3, max_nodes=8)
FLASH, EFFICIENT = "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"

# ---- a device that computes nothing


def fake_decoder(
    composition: str, dtype: torch.dtype, shape: taps.TreeShape = SHAPE, costs: taps.CostTable | None = None
) -> taps.SpeculativeDecoder:
    """A target and three drafters, two of them alike, on the fake device."""
    target = taps.TargetModel(fake_cuda.placed(new_target(), dtype))
    drafters = {}
    for name, kv_heads in (("a", 2), ("b", 4), ("c", 2)):
        config = EagleConfig.for_target(target.config, num_key_value_heads=kv_heads)
        network = fake_cuda.placed(EagleNetwork(config), dtype)
        drafters[name] = EagleDrafter(network, target.embedding, target.lm_head, name, CALIBRATIONS["math"])
    chosen = "b" if composition == "single" else None
    return taps.SpeculativeDecoder(target, drafters, composition, drafter=chosen, shape=shape, costs=costs)


def fake_request(lengths: list[int], temperature: float, **changes: Any) -> Request:
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    fields = {
        "input_ids": ids,
        "moved_left": ids,
        "attention_mask": torch.ones(len(lengths), max(lengths), dtype=torch.int64),
        "prompt_lengths": tuple(lengths),
        "sampling": taps.SamplingParams(temperature),
        "rules": StopRules((400,) * len(lengths), frozenset(), ()),
        "pad_token": 0,
        "processors": LogitsProcessorList(),
        "return_log_probs": False,
    }
    return Request(**{**fields, **changes})


@pytest.mark.parametrize("composition", COMPOSITIONS)
@torch.inference_mode()
def test_a_step_reads_the_host_once_and_copies_nothing(composition: str) -> None:
    with fake_cuda.fake_cuda() as traffic:
        decoder = fake_decoder(composition, torch.float32)
        for lengths, temperature in itertools.product([[5], [5, 3, 4, 1]], [0.0, 1.0]):
            request = fake_request(lengths, temperature)
            state = decoder._begin(request)
            decoder._prefill(request, state)
            traffic.clear()
            decoder._step(request, state)
            if composition == "evidence":  # whoever is to draft is chosen on the host, before the drafting
                assert traffic.reads.pop(0) == [len(lengths)]
                if len(lengths) > 1:  # and is told its rows, where they are not all
                    assert [copy.partition(" ")[0] for copy in traffic.copies] == ["to", "to"]
                    traffic.copies.clear()
            assert traffic.waits == 1 and traffic.reads == []
            assert traffic.copies == []


@pytest.mark.parametrize("composition", sorted(COMPOSITIONS.keys() - {"evidence"}))
@torch.inference_mode()
def test_a_step_whose_tree_adapts_reads_the_host_once(composition: str) -> None:
    """Nothing but small tables goes to the device: how deep drafts were accepted."""
    costs = taps.CostTable((1, 4, 8), (1.0, 1.1, 1.2), dict.fromkeys("abc", (0.1, 0.1)), 3)
    with fake_cuda.fake_cuda() as traffic:
        decoder = fake_decoder(composition, torch.float32, taps.TreeShape.auto(), costs)
        for lengths in ([5], [5, 3, 4, 1]):
            request = fake_request(lengths, 1.0)
            state = decoder._begin(request)
            decoder._prefill(request, state)
            for _ in range(3):
                traffic.clear()
                decoder._step(request, state)
                assert traffic.waits == 1 and traffic.reads == []
                assert len(traffic.copies) <= 1


@torch.inference_mode()
def test_neither_log_probabilities_nor_a_row_that_ends_cost_another_read() -> None:
    rules = StopRules((400, 3, 400), frozenset(), ())
    with fake_cuda.fake_cuda() as traffic:
        decoder = fake_decoder("merged", torch.float32)
        request = fake_request([5, 5, 5], 1.0, rules=rules, return_log_probs=True)
        state = decoder._begin(request)
        decoder._prefill(request, state)
        traffic.clear()
        decoder._step(request, state)
        assert [row.finish_reason for row in state.rows] == [None, "length", None]
        assert traffic.waits == 1 and traffic.reads == []
        assert traffic.copies == []


@pytest.mark.parametrize(
    "dtype, lengths, prefix_kernel",
    [
        (torch.bfloat16, [5, 5], FLASH),
        (torch.bfloat16, [5, 4], EFFICIENT),
        (torch.float16, [1], FLASH),
        (torch.float32, [5], EFFICIENT),
    ],
)
@torch.inference_mode()
def test_a_layer_attends_in_two_fused_kernels(dtype: torch.dtype, lengths: list[int], prefix_kernel: str) -> None:
    with fake_cuda.fake_cuda() as traffic:
        decoder, request = fake_decoder("merged", dtype), fake_request(lengths, 0.0)
        state = decoder._begin(request)
        decoder._prefill(request, state)
        traffic.clear()
        decoder._step(request, state)
        assert traffic.kernels == [EFFICIENT, prefix_kernel] * 2


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="one GPU, where torch wants two for two")
@pytest.mark.parametrize("composition", COMPOSITIONS)
@torch.inference_mode()
def test_an_lm_head_on_another_device_than_the_embedding_drafts_there(composition: str) -> None:
    """As a device map places them: the drafters are beside the lm_head, tokens and trees beside the embedding."""
    there = torch.device("cuda", 0)
    with fake_cuda.fake_cuda():
        model = fake_cuda.placed(new_target(), torch.float32)
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight, device=there), requires_grad=False)
        head.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(there),))
        target = taps.TargetModel(model)
        drafters = {}
        for name in "ab":
            network = fake_cuda.placed(EagleNetwork(EagleConfig.for_target(target.config)), torch.float32, there)
            drafters[name] = EagleDrafter(network, target.embedding, target.lm_head, name, CALIBRATIONS["math"])
        chosen = "b" if composition == "single" else None
        decoder = taps.SpeculativeDecoder(target, drafters, composition, drafter=chosen, shape=SHAPE)
        request = fake_request([5, 3], 1.0)
        state = decoder._begin(request)
        decoder._prefill(request, state)
        decoder._step(request, state)
        assert state.root_tokens.device == target.device == fake_cuda.DEVICE != there


@torch.inference_mode()
def test_plain_decoding_draws_on_the_device() -> None:
    with fake_cuda.fake_cuda():
        request, positions = fake_request([3], 1.0), torch.tensor([3], device=fake_cuda.DEVICE)
        sampling = request.sampling.rows(1, fake_cuda.DEVICE)
        run = plain_generation._PlainRun(request, request.rows(), sampling, positions)
        logits = torch.zeros(1, 64, device=fake_cuda.DEVICE)
        assert {run.draw(torch.zeros(1, 3), logits).device for _ in range(3)} == {fake_cuda.DEVICE}
        assert run.positions.device == run.are_finished(run.positions, None).device == fake_cuda.DEVICE


@torch.inference_mode()
def test_the_fake_device_sees_what_a_real_one_would_suffer_from() -> None:
    with fake_cuda.fake_cuda() as traffic:
        there, here = torch.zeros(3, device=fake_cuda.DEVICE), torch.zeros(3)
        torch.tensor([1.0], device=fake_cuda.DEVICE)
        there[1:] = here[1:]
        assert len(traffic.copies) == 2
        for wrong in (
            lambda: there + here,
            lambda: there.sum().item(),
            lambda: bool(there[0]),
            lambda: there.nonzero(),
        ):
            with pytest.raises(Exception, match=r"cuda:\d|_local_scalar_dense|nonzero"):
                wrong()
        with pytest.raises(AssertionError, match="a mask as an index"):
            there[there > 0]


def test_a_target_on_a_gpu_without_ops_for_it_is_refused_with_the_way_out() -> None:
    info = {"cuda": "none", "cuda_reason": "this torch was built without CUDA"}
    with mock.patch.object(native, "load") as load:
        load.return_value.build_info.return_value = info
        with pytest.raises(ValueError, match=r"built without them \(this torch .* CUDA\); .*; or use the CPU"):
            native.refuse_without_ops("target X on cuda:0")
        load.return_value.build_info.return_value = {"cuda": "13.0", "cuda_reason": "-"}
        native.refuse_without_ops("target X on cuda:0")


@pytest.mark.parametrize(
    "has_gpu, built, chosen", [(True, "13.0", "cuda"), (True, "none", "cpu"), (False, "13.0", "cpu")]
)
def test_the_device_is_a_gpu_where_there_is_one_and_ops_for_it(has_gpu: bool, built: str, chosen: str) -> None:
    with mock.patch.object(native, "load") as load, mock.patch("torch.cuda.is_available", return_value=has_gpu):
        load.return_value.build_info.return_value = {"cuda": built, "cuda_reason": "-"}
        assert native.choose_device() == torch.device(chosen)


# ---- a GPU

on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or native.reason_without_ops() is not None, reason="no GPU here, or no ops for it"
)
SAMPLINGS = {
    "greedy": taps.SamplingParams(),
    "T=1": taps.SamplingParams(1.0, seed=5),
    "T=0.7, filtered": taps.SamplingParams(0.7, top_k=40, top_p=0.9, min_p=0.02, seed=6),
}


@pytest.fixture(scope="module")
def tiny_models() -> dict[str, tuple[Any, dict[str, EagleDrafter]]]:
    """The embedded models on the CPU and on the GPU."""
    models: dict[str, tuple[Any, dict[str, EagleDrafter]]] = {}
    for place in ("cpu", "cuda"):
        model, _ = tiny.load_target()
        torch.nn.Module.to(model, place)
        paths = {name: str(path) for name, path in tiny.drafter_paths().items()}
        models[place] = model, taps.load_drafters(paths, model)
    return models


def tiny_prompts() -> Iterator[Tensor]:
    _, tokenizer = tiny.load_target()
    for domain in tiny.DOMAINS:
        for turns in tiny.prompts(domain, 2, seed=0):
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            yield tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


@on_gpu
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("composition", ["confidence", "merged"])
def test_the_text_of_a_gpu_is_that_of_the_cpu(tiny_models: Any, composition: str, sampling: Any) -> None:
    decoders = {
        place: taps.SpeculativeDecoder(model, drafters, composition) for place, (model, drafters) in tiny_models.items()
    }
    for ids in tiny_prompts():
        arguments: dict[str, Any] = {"sampling": sampling, "max_new_tokens": 64}
        expected = taps.plain_generate(tiny_models["cpu"][0], ids, **arguments).new_tokens
        assert taps.plain_generate(tiny_models["cuda"][0], ids, **arguments).new_tokens == expected
        for place, decoder in decoders.items():
            result = decoder.generate(ids.to(place), **arguments)
            assert result.new_tokens == expected
            assert result.sequences.device.type == place
        assert decoders["cuda"].generate(ids, **arguments).new_tokens == expected, "prompts may lie on the host"


def moved(place: str) -> tuple[Any, dict[str, EagleDrafter]]:
    """The trained small models on another device."""
    target = deepcopy(trained_target()).to(place)
    embedding, lm_head = target.get_input_embeddings(), target.get_output_embeddings()
    return target, {
        name: EagleDrafter(deepcopy(drafter.network).to(place), embedding, lm_head, name, drafter.calibration)
        for name, drafter in trained_drafters().items()
    }


@on_gpu
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_batches_on_a_gpu_give_the_text_of_the_cpu(composition: str, sampling: Any) -> None:
    ids, mask = prompts(5)
    drafter = "math" if composition == "single" else None
    arguments: dict[str, Any] = {"sampling": sampling, "max_new_tokens": [40, 7, 33, 40, 1], "return_log_probs": True}
    host = taps.SpeculativeDecoder(trained_target(), trained_drafters(), composition, drafter=drafter, shape=SHAPE)
    there = taps.SpeculativeDecoder(*moved("cuda"), composition, drafter=drafter, shape=SHAPE)
    expected, result = host.generate(ids, mask, **arguments), there.generate(ids.cuda(), mask.cuda(), **arguments)
    assert result.new_tokens == expected.new_tokens
    assert result.finish_reasons == expected.finish_reasons
    assert result.stats.num_accepted == expected.stats.num_accepted
    assert result.log_probs is not None and expected.log_probs is not None
    for row, expected_row in zip(result.log_probs, expected.log_probs, strict=True):
        torch.testing.assert_close(torch.tensor(row), torch.tensor(expected_row), atol=1e-4, rtol=1e-3)


@on_gpu
def test_processors_and_transformers_own_door_work_on_a_gpu() -> None:
    ids, mask = (tensor.cuda() for tensor in prompts(3))
    target, drafters = moved("cuda")
    call: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 24, "repetition_penalty": 1.7}
    stock = target.generate(ids, **call)
    decoder = taps.SpeculativeDecoder(target, drafters, shape=SHAPE)
    assert torch.equal(target.generate(ids, custom_generate=decoder, **call), stock)


@on_gpu
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("composition", [name for name in COMPOSITIONS if name != "evidence"])
def test_a_step_on_a_gpu_synchronises_once(composition: str, batch_size: int) -> None:
    """By torch's own watch: its errors show the line. (With evidence the host waits to know who is to draft.)"""
    drafter = "math" if composition == "single" else None
    decoder = taps.SpeculativeDecoder(*moved("cuda"), composition, drafter=drafter, shape=SHAPE)
    ids, mask = (tensor.cuda() for tensor in prompts(batch_size))
    fetch, num_syncs = StepRecord.fetch, []

    def watched_fetch(*arguments: Any, **kwargs: Any) -> StepRecord:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            record = fetch(*arguments, **kwargs)
            torch.cuda.set_sync_debug_mode("error")
        num_syncs.append(sum("synchroniz" in str(one.message) for one in caught))
        return record

    for sampling in SAMPLINGS.values():
        steps = decoder.stream(ids, mask, sampling=sampling, max_new_tokens=40, return_log_probs=True, eos_token_id=())
        next(steps)
        with mock.patch.object(StepRecord, "fetch", watched_fetch):
            torch.cuda.set_sync_debug_mode("error")
            try:
                num_steps = sum(1 for _ in steps)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert num_steps > 2
        assert num_syncs[-num_steps:] == [1] * num_steps


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("place", ["cuda:1", "cuda:0 and cuda:1"])
def test_another_gpu_and_several_give_the_same_text(place: str, tmp_path: Any) -> None:
    ids, mask = prompts(3)
    expected = taps.plain_generate(trained_target(), ids, mask, max_new_tokens=30).new_tokens
    target, drafters = moved("cuda:1")
    if place != "cuda:1":
        accelerate = pytest.importorskip("accelerate")
        parts = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
        places = dict(zip(parts, (0, 0, 1, 1, 0, 1), strict=True))
        target = accelerate.dispatch_model(deepcopy(trained_target()), places)
        for name, drafter in trained_drafters().items():
            embedding, config = drafter.embedding, trained_target().config
            save_drafter(drafter.network, tmp_path / name, embedding=embedding, target_config=config)
        drafters = taps.load_drafters({name: str(tmp_path / name) for name in drafters}, target)
    assert taps.SpeculativeDecoder(target, drafters, shape=SHAPE).generate(ids, mask, max_new_tokens=30).new_tokens == (
        expected
    )
