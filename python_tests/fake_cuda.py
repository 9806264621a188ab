"""A CUDA device that computes nothing: what the library asks of a device is seen without one.

Under `fake_cuda()` tensors have shapes, dtypes and a device, no values (torch's FakeTensorMode). So a step runs whole,
and what a device would make slow or refuse comes to light: tensors of two devices in one op, values read on the host,
copies between host and device. The host gets what the test answers for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from taps_ext import ops
from taps_ext.decode import state
from taps_ext.target import model, support

# Not the first: whoever forgets the index is found out. (Where there is a GPU, torch wants the device to be there.)
DEVICE = torch.device("cuda", 0 if torch.cuda.device_count() == 1 else 1)
NO_DEVICE = ("not linked with support for cuda", "NVIDIA driver", "no CUDA-capable device")
aten = torch.ops.aten


@dataclass
class Traffic:
    """What went between host and device."""

    reads: list[list[int]] = field(default_factory=list)  # the shapes read one by one, each a synchronisation
    waits: int = 0  # for all that a step's record is made of
    copies: list[str] = field(default_factory=list)  # anything else that crossed
    kernels: list[str] = field(default_factory=list)  # the attention kernels called

    def clear(self) -> None:
        """Forget what was until now."""
        self.reads, self.waits, self.copies, self.kernels = [], 0, [], []


@contextmanager
def fake_cuda() -> Iterator[Traffic]:
    """Inside, `DEVICE` can be used and the ops are their fakes.

    Of a step the host fetches that every row accepted one draft token; anything else that it reads is 0, 1, 0, ...
    """
    traffic = Traffic()

    def to_host(tensors: dict[str, Tensor]) -> dict[str, Any]:
        traffic.waits += 1
        batch_size, length = tensors["tokens"].shape
        values = {
            "num_accepted": min(1, length - 1),
            "is_invalid": False,
            "num_nodes": 6,
            "tokens": [7] * length,
            "proposers": [1] * (length - 1),
            "choice": 0,
            "log_probs": [-0.5] * length,
        }
        outlook = {
            name: _zeros(list(tensors[name].shape)) for name in ("gains", "levels", "promised") if name in tensors
        }
        return {name: [values[name]] * batch_size for name in tensors.keys() - outlook.keys()} | outlook

    def tolist(tensor: Tensor) -> Any:
        if tensor.is_cpu:
            return _zeros(list(tensor.shape))
        traffic.reads.append(list(tensor.shape))
        return [row % 2 for row in range(len(tensor))]

    ops.load_for_tracing()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(ops, "_ops", return_value=torch.ops.taps_ext))
        stack.enter_context(mock.patch.object(support, "refuse_without_ops"))
        stack.enter_context(mock.patch.object(state, "to_host", to_host))
        stack.enter_context(mock.patch.object(model, "refuse_other_logits"))  # it reads values
        stack.enter_context(mock.patch("torch.backends.cuda.can_use_flash_attention", _flash_takes))
        stack.enter_context(mock.patch("torch.backends.cuda.can_use_efficient_attention", return_value=True))
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", tolist))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(_Crossings(traffic))
        stack.enter_context(_Python())
        yield traffic


def placed(module: Any, dtype: torch.dtype, device: torch.device = DEVICE) -> Any:
    """The module with all that it holds on the device, its parameters in `dtype`: `to()` cannot take fakes there."""
    for part in module.modules():
        for held in (part._parameters, part._buffers, vars(part)):
            tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
            held.update({name: _placed(value, dtype, device) for name, value in tensors.items()})
    return module


def _placed(value: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(value, nn.Parameter):
        return nn.Parameter(torch.empty_like(value, device=device, dtype=dtype), requires_grad=False)
    return torch.empty_like(value, device=device)


def _flash_takes(parameters: Any) -> bool:
    return parameters.query.dtype in (torch.bfloat16, torch.float16) and parameters.attn_mask is None


class _Crossings(TorchDispatchMode):
    """Notes copies between devices, and checks what the attention kernels are given."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith("_scaled_dot_product"):
            self.traffic.kernels.append(name)
        if name == "_scaled_dot_product_efficient_attention" and args[3] is not None:
            _check_bias(args[0], args[1], args[3])
        results = func(*args, **(kwargs or {}))
        given, made = _devices(args), _devices(results)
        if given and not name.startswith("new_") and not name.endswith("_like") and len(given | made) > 1:
            self.traffic.copies.append(f"{name} from {given} to {made}")
        return results


def _devices(values: Any) -> set[torch.device]:
    return {leaf.device for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


def _check_bias(query: Tensor, key: Tensor, bias: Tensor) -> None:
    """What the kernel demands of its bias (its checks are in no Python): full size, and rows of aligned strides."""
    assert bias.shape == (*query.shape[:3], key.shape[2])
    assert bias.dtype == query.dtype and bias.stride(-1) == 1
    assert all(stride * bias.element_size() % 16 == 0 for stride in bias.stride()[:3]), bias.stride()


class _Python(TorchFunctionMode):
    """What a torch without CUDA cannot do in C++ for a tensor of another device: indexing, `torch.tensor`, reading."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.__getitem__:
            view, indices = _viewed(*args)
            return view if indices is None else aten.index(view, indices)
        if func is Tensor.__setitem__:
            view, indices = _viewed(args[0], args[1])
            if indices is not None:
                return aten.index_put_(view, indices, args[2])
            return aten.copy_(view, args[2]) if isinstance(args[2], Tensor) else view.fill_(args[2])
        if func is torch.tensor:
            known = func(*args, **{**kwargs, "device": None})  # torch would go on with its values, and for real
            return torch.empty(known.shape, dtype=known.dtype).to(kwargs.get("device") or "cpu")
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if not any(words in str(error) for words in NO_DEVICE):
                raise
            name = {"__invert__": "bitwise_not"}.get(func.__name__, func.__name__)
            return getattr(aten, name)(*args, **kwargs)  # past the binding that wants to switch to the device


def _zeros(shape: list[int]) -> Any:
    return [_zeros(shape[1:]) for _ in range(shape[0])] if shape else 0


def _viewed(tensor: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None] | None]:
    """The tensor with the slices, numbers and None of an index applied, and its index tensors by axis, if any."""
    index = index if isinstance(index, tuple) else (index,)
    if any(part is Ellipsis for part in index):
        place = [part is Ellipsis for part in index].index(True)
        num_axes = sum(part is not None for part in index) - 1
        index = index[:place] + (slice(None),) * (tensor.dim() - num_axes) + index[place + 1 :]
    indices: list[Tensor | None] = []
    for part in index:
        if isinstance(part, Tensor):
            assert part.dtype == torch.int64, "a mask as an index is read on the host"
        elif part is None:
            tensor = tensor.unsqueeze(len(indices))
        elif isinstance(part, slice):
            if part != slice(None):
                tensor = aten.slice(tensor, len(indices), part.start, part.stop, part.step or 1)
        else:
            tensor = tensor.select(len(indices), part)
            continue
        indices.append(part if isinstance(part, Tensor) else None)
    return tensor, indices if any(part is not None for part in indices) else None
