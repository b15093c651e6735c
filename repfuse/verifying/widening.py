"""Runs in float64 all the way, over weights in the dtype in which they are stored.

A stored tensor is widened as an operator reads it, and forgotten after: at no time is there more than one layer in
float64. So is what the forward computes from the inputs, also where it fixes a dtype itself: ``softmax(x.float())`` or
``norm(x.float()).to(torch.bfloat16)`` would round its values. Nothing is merged across such a cast, so the proof may
leave it out. A cast of weights alone stays: a rounding of weights belongs to the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

Change = Callable[[str, torch.Tensor], torch.Tensor]
"""Name and tensor -> the tensor, changed: in float64, where it is floating."""

WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
}
_ALSO = {**WIDE, torch.complex64: torch.complex128}
"""What widened values meet; complex inputs and weights by themselves stay as they are."""


class Widening(TorchDispatchMode):
    """While it is on, no operator narrows what is computed from ``inputs``, and what it meets is widened too, exactly.

    ``stored`` are the network's tensors by name, which operators read as ``change`` makes them. ``by_layer_is_wrong``
    says where that is not the same as a network in float64.
    """

    def __init__(self, inputs: Any, stored: Iterable[tuple[str, torch.Tensor]], change: Change) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._data = WeakTensorKeyDictionary()
        self._views = WeakTensorKeyDictionary()
        self._remember(self._data, inputs)
        self._change = change
        self._stored = {_memory(x): name for name, x in stored if x.is_floating_point() and _memory(x)}
        self._wrong = False

    def by_layer_is_wrong(self, stored: Iterable[tuple[str, torch.Tensor]]) -> bool:
        """Whether the network wrote into its own tensors, exchanged one of ``stored`` for another, or cast one.

        What was written went into a tensor that is not wide. A cast may be autocast's, which leaves float64 alone.
        """
        now = {_memory(x): name for name, x in stored if x.is_floating_point() and _memory(x)}
        return self._wrong or now != self._stored

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        data = any(tensor in self._data for tensor in tensors)
        views = any(self._is_ours(tensor) for tensor in tensors)
        if not data and not views:
            return func(*args, **kwargs)
        if data and kwargs.get("dtype") in WIDE:
            kwargs = kwargs | {"dtype": WIDE[kwargs["dtype"]]}
        if not data:
            self._wrong |= any(_narrows(kwargs.get("dtype"), tensor) for tensor in tensors)
        if func._schema.is_mutable:
            args, kwargs = self._for_writing(func, args, kwargs)
        else:
            args, kwargs = tree_map(self._read, (args, kwargs))
            if data:
                args, kwargs = tree_map(_widened, (args, kwargs))
        result = func(*args, **kwargs)
        if data:
            self._remember(self._data, result)
        elif views and _is_view(func):
            self._remember(self._views, result)
        return result

    def _is_ours(self, tensor: torch.Tensor) -> bool:
        return _memory(tensor) in self._stored or tensor in self._views

    def _read(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        name = self._stored.get(_memory(value))
        return value if name is None else self._change(name, value)

    def _for_writing(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Leave what is written as it is, and read the rest."""
        arguments = func._schema.arguments
        written = {argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write}
        named = {**dict(zip((argument.name for argument in arguments), args, strict=False)), **kwargs}
        outputs = tree_leaves([named[name] for name in written if name in named])
        self._wrong |= any(isinstance(x, torch.Tensor) and self._is_ours(x) for x in outputs)
        read = {name: x if name in written else tree_map(self._read, x) for name, x in named.items()}
        return tuple(read[argument.name] for argument, _ in zip(arguments, args, strict=False)), {
            name: read[name] for name in kwargs
        }

    def _remember(self, tensors: WeakTensorKeyDictionary, values: Any) -> None:
        for leaf in tree_leaves(values):
            if isinstance(leaf, torch.Tensor):
                tensors[leaf] = True


def _memory(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """Return what identifies a tensor's memory and how it is read; None where it has none."""
    if tensor.layout is not torch.strided or not tensor.numel() or tensor.device.type == "meta":
        return None
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _narrows(dtype: torch.dtype | None, tensor: torch.Tensor) -> bool:
    return dtype in WIDE and tensor.is_floating_point() and torch.finfo(dtype).eps > torch.finfo(tensor.dtype).eps


def _is_view(func: Any) -> bool:
    return any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)


def _widened(value: Any) -> Any:
    wide = _ALSO.get(value.dtype) if isinstance(value, torch.Tensor) else None
    return value if wide is None else value.to(wide)
