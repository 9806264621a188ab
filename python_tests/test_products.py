"""Packed products: the same numbers, never of old weights, and nothing else about a model changes."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import prompts, trained_drafters, trained_target
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import taps_ext as taps
from taps_ext import products
from taps_ext.drafters.eagle import EagleDrafter
from taps_ext.products import PackedForward, PackedProducts, pack_products

pytestmark = pytest.mark.skipif(not products._is_measured(), reason="weights are packed on x86 with AVX2 only")


@pytest.fixture(autouse=True)
def small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small weights are packed too, whatever memory is free."""
    monkeypatch.setattr(products, "LEAST_SIZE", 0)
    monkeypatch.setattr(products, "_has_room", lambda num_bytes: True)


@pytest.fixture
def stock_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each product that torch's own forward of `nn.Linear` computes."""
    rows: list[int] = []
    stock = nn.Linear.forward

    def counted(module: nn.Linear, input: Tensor) -> Tensor:
        rows.append(input.shape[:-1].numel())
        return stock(module, input)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    return rows


def packed_linear(in_size: int = 48, out_size: int = 80, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(in_size, out_size, bias)
    pack_products(linear)
    assert isinstance(vars(linear)["forward"], PackedForward)
    return linear


def expected(linear: nn.Linear, x: Tensor) -> Tensor:
    with torch.no_grad():
        bias = None if linear.bias is None else linear.bias.double()
        return nn.functional.linear(x.double(), linear.weight.double(), bias).float()


@torch.inference_mode()
def in_a_call(module: Any, x: Tensor, call: PackedProducts | None = None) -> Tensor:
    with (call or PackedProducts()).running():
        out: Tensor = module(x)
    return out


@pytest.mark.parametrize("case", range(40))
def test_packed_products_are_torchs_own_up_to_rounding(case: int, stock_rows: list[int]) -> None:
    random = torch.Generator().manual_seed(case)
    in_size, out_size, num_rows, kind = (
        int(torch.randint(*ends, (), generator=random)) for ends in ((1, 200), (1, 300), (4, 129), (0, 4))
    )
    linear = packed_linear(in_size, out_size, bias=case % 2 == 0)
    x = torch.randn(num_rows, in_size, generator=random)
    if kind == 1:
        x = x[None]
    elif kind == 2:
        x = x.T.contiguous().T
    elif kind == 3:
        x = torch.randn(num_rows, 2, 2 * in_size, generator=random)[:, :1, ::2]
    out = in_a_call(linear, x)
    assert out.shape == (*x.shape[:-1], out_size) and out.is_contiguous() and not stock_rows
    torch.testing.assert_close(out, expected(linear, x), rtol=1e-5, atol=1e-5)


def test_other_numbers_of_rows_and_everything_outside_a_call_are_torchs_own(stock_rows: list[int]) -> None:
    linear, call = packed_linear(), PackedProducts()
    for num_rows in (0, 1, 3, 129, 400):
        in_a_call(linear, torch.randn(num_rows, 48), call)
    assert stock_rows == [0, 1, 3, 129, 400]
    linear(torch.randn(8, 48)).sum().backward()
    assert linear.weight.grad is not None
    with call.running():  # with gradients
        linear(torch.randn(9, 48)).sum().backward()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert in_a_call(linear, torch.randn(10, 48), call).dtype == torch.bfloat16
    assert stock_rows[5:] == [8, 9, 10]


def test_the_switch_turns_packing_off(stock_rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(products.SWITCH, "0")
    in_a_call(packed_linear(), torch.randn(8, 48))
    assert stock_rows == [8]


def test_nothing_is_packed_where_memory_is_short(stock_rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_has_room", lambda num_bytes: False)
    linear, call = packed_linear(), PackedProducts()
    for _ in range(2):
        in_a_call(linear, torch.randn(8, 48), call)
    assert stock_rows == [8, 8]


def test_room_is_what_a_quarter_of_the_memory_leaves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    assert products._has_room(0) and not products._has_room(1 << 60)
    monkeypatch.setattr(products, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert products._has_room(350_000) and not products._has_room(350_001)
    (tmp_path / "memory.max").write_text("max\n")
    assert products._has_room(350_001)


def changed_in_place(linear: nn.Linear) -> None:
    with torch.no_grad():
        linear.weight.mul_(2)


def changed_through_data(linear: nn.Linear) -> None:
    linear.weight.data[5, 7] += 0.01


def with_rows_swapped(linear: nn.Linear) -> None:
    linear.weight.data = linear.weight.data.flip(0)


def with_columns_swapped(linear: nn.Linear) -> None:
    linear.weight.data.copy_(linear.weight.data.flip(1))


def merged(linear: nn.Linear) -> None:
    linear.weight.data += 0.01 * torch.randn(80, 2) @ torch.randn(2, 48)


def loaded(linear: nn.Linear) -> None:
    linear.load_state_dict(nn.Linear(48, 80).state_dict())


def replaced(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(torch.randn(80, 48))


def resized(linear: nn.Linear) -> None:
    linear.weight, linear.bias = nn.Parameter(torch.randn(90, 48)), nn.Parameter(torch.randn(90))


def biased(linear: nn.Linear) -> None:
    linear.bias.data += 1


CHANGES = (
    changed_in_place,
    changed_through_data,
    with_rows_swapped,
    with_columns_swapped,
    merged,
    loaded,
    replaced,
    resized,
    biased,
)


@pytest.mark.parametrize("change", CHANGES)
def test_the_next_call_uses_the_weights_as_they_are_then(change: Any, stock_rows: list[int]) -> None:
    linear, x = packed_linear(), torch.randn(8, 48)
    before = in_a_call(linear, x)
    change(linear)
    after = in_a_call(linear, x)
    assert not stock_rows
    assert before.shape != after.shape or not torch.allclose(before, after, rtol=0, atol=1e-4)
    torch.testing.assert_close(after, expected(linear, x), rtol=1e-5, atol=1e-5)


def test_columns_in_another_order_are_another_weight() -> None:
    """Even where sums are exact, so that they do not tell."""
    linear, x = packed_linear(), torch.rand(8, 48)
    linear.weight.data = torch.arange(80.0 * 48).view(80, 48)
    in_a_call(linear, x)
    linear.weight.data.copy_(linear.weight.data.flip(1))
    torch.testing.assert_close(in_a_call(linear, x), expected(linear, x), rtol=1e-5, atol=1e-5)


def test_a_counted_change_is_seen_within_a_call() -> None:
    linear, call, x = packed_linear(), PackedProducts(), torch.randn(8, 48)
    for change in (lambda linear: None, changed_in_place, loaded, replaced):
        change(linear)
        torch.testing.assert_close(in_a_call(linear, x, call), expected(linear, x), rtol=1e-5, atol=1e-5)


def test_an_unchanged_weight_is_packed_once_for_all_calls() -> None:
    linear = packed_linear()
    linear.weight.data[0, 0] = torch.nan
    in_a_call(linear, torch.randn(8, 48))
    first = vars(linear)["forward"]._weight
    for num_rows in (4, 128):
        in_a_call(linear, torch.randn(num_rows, 48))
        assert vars(linear)["forward"]._weight is first is not None


def test_a_model_in_another_dtype_keeps_no_packed_weights() -> None:
    linear = packed_linear()
    in_a_call(linear, torch.randn(8, 48))
    linear.double()
    in_a_call(linear, torch.randn(8, 48, dtype=torch.float64))
    linear.float()
    in_a_call(linear.bfloat16(), torch.randn(8, 48).bfloat16())
    with torch.inference_mode(), PackedProducts().running(), pytest.raises(RuntimeError):  # torch's own message
        linear(torch.randn(8, 48))
    assert vars(linear)["forward"]._weight is None


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_model_compute_with_their_own_weights(way: str, tmp_path: Path) -> None:
    model, x = nn.Sequential(packed_linear()), torch.randn(8, 48)
    before = in_a_call(model, x)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        other[0].weight.zero_()
    for out in (in_a_call(other, x), other(x)):
        torch.testing.assert_close(out, other[0].bias.expand_as(out))
    with torch.no_grad():
        model[0].weight.mul_(-1)
    assert not torch.allclose(in_a_call(model, x), before)
    model = None  # type: ignore[assignment]
    torch.testing.assert_close(in_a_call(other, x), other[0].bias.expand(8, -1))


def test_a_model_is_freed_with_its_packed_weights_at_once() -> None:
    linear = packed_linear()
    in_a_call(linear, torch.randn(8, 48))
    freed = [weakref.ref(linear), weakref.ref(vars(linear)["forward"])]
    gc.disable()
    try:
        del linear
        assert [one() for one in freed] == [None, None]
    finally:
        gc.enable()


def test_a_compiled_module_computes_as_torch_does() -> None:
    linear = packed_linear()
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    x = torch.randn(8, 48)
    for _ in range(2):
        torch.testing.assert_close(in_a_call(compiled, x), expected(linear, x), rtol=1e-5, atol=1e-5)


def test_modules_with_a_replaced_forward_and_subclasses_are_left_alone() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(Doubled(8, 8), nn.Linear(8, 8), nn.Linear(8, 8).bfloat16())
    hook = model[1].forward = lambda input: input
    pack_products(model)
    assert "forward" not in vars(model[0]) and vars(model[1])["forward"] is hook and "forward" not in vars(model[2])


def test_accelerates_hooks_stand_around_packed_products() -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubling(hooks.ModelHook):  # type: ignore[misc,name-defined]
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 2 * output

    linear, x = packed_linear(), torch.randn(8, 48)
    hooks.add_hook_to_module(linear, Doubling())
    torch.testing.assert_close(in_a_call(linear, x), 2 * expected(linear, x), rtol=1e-5, atol=1e-5)
    hooks.remove_hook_from_module(linear)
    torch.testing.assert_close(in_a_call(linear, x), expected(linear, x), rtol=1e-5, atol=1e-5)


def test_threads_share_packed_weights_while_they_are_made() -> None:
    linears = [packed_linear(256, 512) for _ in range(8)]
    inputs = [torch.randn(4 + i, 256) for i in range(4)]

    def work(x: Tensor) -> list[Tensor]:
        return [in_a_call(linear, x) for _ in range(5) for linear in linears]

    with ThreadPoolExecutor(4) as pool:
        for x, outs in zip(inputs, pool.map(work, inputs), strict=True):
            for linear, out in zip(linears * 5, outs, strict=True):
                torch.testing.assert_close(out, expected(linear, x), rtol=1e-5, atol=1e-5)


# ---- Decoding


def make_decoder() -> taps.SpeculativeDecoder:
    """A decoder on copies of the trained models, whose products are packed."""
    target = copy.deepcopy(trained_target())
    ends = target.get_input_embeddings(), target.get_output_embeddings()
    drafters = {
        name: EagleDrafter(copy.deepcopy(one.network), *ends, name, one.calibration)
        for name, one in trained_drafters().items()
    }
    return taps.SpeculativeDecoder(target, drafters, shape=taps.TreeShape(depth=4, branching=4, max_nodes=16))


def num_packed(module: nn.Module) -> int:
    forwards = [vars(one).get("forward") for one in module.modules()]
    return sum(isinstance(one, PackedForward) and one._weight is not None for one in forwards)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_decoding_with_packed_products_gives_the_same_text(batch_size: int, temperature: float) -> None:
    decoder, options = make_decoder(), {"sampling": taps.SamplingParams(temperature, seed=7), "max_new_tokens": 32}
    plain = taps.plain_generate(trained_target(), *prompts(batch_size), **options)
    result = decoder.generate(*prompts(batch_size), **options)
    assert torch.equal(result.sequences, plain.sequences)
    model: Any = decoder.target.model
    assert num_packed(model) == 15 == sum(type(one) is nn.Linear for one in model.modules())
    assert all(num_packed(one.network) == 8 for one in decoder.drafters.values())


@pytest.mark.parametrize("way", ["generate", "plain_generate", "forward"])
def test_a_target_by_itself_computes_as_torch_does(way: str, stock_rows: list[int]) -> None:
    decoder, (ids, mask) = make_decoder(), prompts(4)
    decoder.generate(ids, mask, max_new_tokens=8)
    model: Any = decoder.target.model
    stock_rows.clear()
    if way == "generate":
        model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8)
    elif way == "plain_generate":
        taps.plain_generate(model, ids, mask, max_new_tokens=8)
    else:
        model(ids)
    assert stock_rows.count(4) > 50 or way == "forward"
    assert len(stock_rows) % 15 == 0 and stock_rows


def test_a_call_after_a_change_gives_the_new_weights_text() -> None:
    decoder, (ids, mask) = make_decoder(), prompts(2)
    model: Any = decoder.target.model
    texts = [decoder.generate(ids, mask, max_new_tokens=24).sequences]
    for part in (model.lm_head, model.model.layers[1].mlp.down_proj, model.model.layers[0].self_attn.v_proj):
        part.weight.data += 0.3 * torch.randn_like(part.weight)
        texts.append(decoder.generate(ids, mask, max_new_tokens=24).sequences)
        assert torch.equal(texts[-1], model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=24))
        assert not torch.equal(*texts[-2:])


def test_adapters_merged_into_a_target_count_at_once() -> None:
    peft = pytest.importorskip("peft")
    decoder, (ids, mask) = make_decoder(), prompts(2)
    before = decoder.generate(ids, mask, max_new_tokens=24).sequences
    lora = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["down_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(decoder.target.model, lora).eval()
    for change in (lambda: None, wrapped.merge_adapter, wrapped.unmerge_adapter):
        change()
        after = decoder.generate(ids, mask, max_new_tokens=24).sequences
        stock = wrapped.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=24)
        assert torch.equal(after, stock) and not torch.equal(after, before)


def test_a_target_is_saved_as_before(tmp_path: Path) -> None:
    decoder, (ids, mask) = make_decoder(), prompts(2)
    text = decoder.generate(ids, mask, max_new_tokens=16).sequences
    model: Any = decoder.target.model
    assert model.state_dict().keys() == trained_target().state_dict().keys()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=16), text)
