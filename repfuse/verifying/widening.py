"""Runs in float64 all the way: what a forward computes from its inputs stays wide, also where it fixes a dtype itself.

``softmax(x.float())`` or ``norm(x.float()).to(torch.bfloat16)`` would round its values. Nothing is merged across such a
cast, so the comparison may leave it out. A cast of weights alone stays: a rounding of weights belongs to the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from repfuse.networks import named_tensors

Change = Callable[[str, Tensor], Tensor]
"""Name and tensor -> the tensor, changed: in float64, where it is floating."""

WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
}
_ALSO = {**WIDE, torch.complex64: torch.complex128}
"""What widened values meet; complex inputs and weights by themselves stay as they are."""


class Widening(TorchFunctionMode):
    """While it is on, no function of torch narrows what is not computed from the tensors of ``network`` alone.

    What such functions meet is widened, exactly; and what forward makes of numbers alone.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._constant = WeakTensorKeyDictionary()
        self._remember(x for _, x in named_tensors(network))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call one function of torch."""
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if all(x in self._constant for x in tensors):
            result = func(*args, **kwargs)
            if not tensors:
                result = _mapped(_widened, result)
            self._remember(x for x in tree_leaves(result) if isinstance(x, Tensor))
            return result
        name = getattr(func, "__name__", "")
        if name in _NARROWING and args[0].is_floating_point():
            return _widened(args[0])
        written = args[:1] if name in _WRITING or (name.endswith("_") and not name.endswith("__")) else ()
        return func(*written, *(_mapped(_widened, x) for x in args[len(written) :]), **_mapped(_widened, kwargs))

    def _remember(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self._constant[tensor] = True


_NARROWING = frozenset({"float", "half", "bfloat16", "type"})
_WRITING = frozenset({"__setitem__", "__set__", "__get__"})
"""Whose first argument has to stay the object that it is; so has that of every function whose name ends with _."""


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return WIDE.get(value, value)
    wide = _ALSO.get(value.dtype)
    return value if wide is None else value.to(wide)


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to the tensors and dtypes in a value."""
    if isinstance(value, Tensor | torch.dtype):
        return function(value)
    if isinstance(value, list):  # or torch.fx's kind of it
        return [_mapped(function, item) for item in value]
    if type(value) is tuple:
        return tuple(_mapped(function, item) for item in value)
    if isinstance(value, dict):
        return {name: _mapped(function, item) for name, item in value.items()}
    return value
