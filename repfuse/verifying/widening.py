"""Runs in float64 all the way, over weights in the dtype in which they are stored.

A stored tensor is widened as an operator reads it, and forgotten after: at no time is there more than one layer in
float64. So is what the forward computes from the inputs, also where it fixes a dtype itself: ``softmax(x.float())`` or
``norm(x.float()).to(torch.bfloat16)`` would round its values. Nothing is merged across such a cast, so the proof may
leave it out. A cast of weights alone stays: a rounding of weights belongs to the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from repfuse.recording.read_only import ReadOnly, arguments_of, by_name, memory, tensors_in, written

Change = Callable[[str, torch.Tensor], torch.Tensor]
"""Name and tensor -> the tensor, changed: in float64, where it is floating."""

WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
}
_ALSO = {**WIDE, torch.complex64: torch.complex128}
"""What widened values meet; complex inputs and weights by themselves stay as they are."""


class Widening(ReadOnly):  # type: ignore[no-untyped-call]
    """While it is on, no operator narrows what is computed from ``inputs``, and what it meets is widened too, exactly.

    ``stored`` are the network's tensors by name, which operators read as ``change`` makes them, and never write into:
    the forward that tries to ends there. ``by_layer_is_wrong`` says where all this is not the same as a network in
    float64. Where the network is there as a ``whole``, so is what forward makes of numbers alone.
    """

    def __init__(self, inputs: Any, stored: Mapping[str, torch.Tensor], change: Change, *, whole: bool = False) -> None:
        super().__init__(stored)
        self._whole = whole
        self._data = WeakTensorKeyDictionary()
        self._views = WeakTensorKeyDictionary()
        self._remember(self._data, inputs)
        self._change = change
        self._stored = _floating(stored)
        self._paused = False

    def by_layer_is_wrong(self, stored: Mapping[str, torch.Tensor]) -> bool:
        """Whether the network writes into its own tensors, exchanged one of ``stored`` for another, or cast one.

        A cast may be autocast's, which leaves float64 alone.
        """
        return self.wrong or _floating(stored) != self._stored

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        self.check(func, args, kwargs)
        tensors = list(tensors_in((*args, *kwargs.values())))
        data = any(tensor in self._data for tensor in tensors)
        views = any(self._is_ours(tensor) for tensor in tensors)
        if not data and not views:
            result = func(*args, **kwargs)
            return _mapped(_widened, result) if self._whole and not tensors else result
        if data and kwargs.get("dtype") in WIDE:
            kwargs = kwargs | {"dtype": WIDE[kwargs["dtype"]]}
        if not data:
            self.wrong |= any(_narrows(kwargs.get("dtype"), tensor) for tensor in tensors)
        if func._schema.is_mutable:
            args, kwargs = self._for_writing(func, args, kwargs)
        else:
            args, kwargs = _mapped(self.read, args), _mapped(self.read, kwargs)
            if data:
                args, kwargs = _mapped(_widened, args), _mapped(_widened, kwargs)
        result = func(*args, **kwargs)
        if data:
            self._remember(self._data, result)
        elif views and _is_view(func):
            self._remember(self._views, result)
        return result

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what an operator is given for a tensor: another one, if it is the network's."""
        name = self._stored.get(memory(tensor))
        return tensor if name is None else self._change(name, tensor)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let operators be what they are."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _is_ours(self, tensor: torch.Tensor) -> bool:
        return memory(tensor) in self._stored or tensor in self._views

    def is_kept(self, tensor: torch.Tensor) -> bool:
        """Nor into what was widened, which the network would not see."""
        return super().is_kept(tensor) or tensor in self._views

    def _for_writing(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Leave what is written as it is, and read the rest."""
        names = written(func)
        read = {name: x if name in names else _mapped(self.read, x) for name, x in by_name(func, args, kwargs).items()}
        return tuple(read[name] for name in arguments_of(func)[: len(args)]), {name: read[name] for name in kwargs}

    def _remember(self, tensors: WeakTensorKeyDictionary, values: Any) -> None:
        for leaf in tree_leaves(values):
            if isinstance(leaf, torch.Tensor):
                tensors[leaf] = True


class WideningOfConvolutions(TorchFunctionMode):
    """The same for convolutions, which compare the dtypes of their input and their bias before they are an operator."""

    def __init__(self, widening: Widening) -> None:
        super().__init__()
        self._widening = widening

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call one function of torch."""
        if func in _COMPARING:
            with self._widening.paused():
                args, kwargs = _mapped(self._widening.read, args), _mapped(self._widening.read, kwargs or {})
        return func(*args, **(kwargs or {}))


_COMPARING = (torch.conv1d, torch.conv2d, torch.conv3d)


def _floating(stored: Mapping[str, torch.Tensor]) -> dict[Any, str]:
    return {memory(x): name for name, x in stored.items() if x.is_floating_point() and memory(x)}


def _narrows(dtype: torch.dtype | None, tensor: torch.Tensor) -> bool:
    return dtype in WIDE and tensor.is_floating_point() and torch.finfo(dtype).eps > torch.finfo(tensor.dtype).eps


def _is_view(func: Any) -> bool:
    return any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    wide = _ALSO.get(tensor.dtype)
    return tensor if wide is None else tensor.to(wide)


def _mapped(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(function, item) for item in value)
    if isinstance(value, dict):
        return {name: _mapped(function, item) for name, item in value.items()}
    return value
