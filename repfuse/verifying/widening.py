"""Runs in float64 all the way, also through a forward that fixes a dtype itself.

``softmax(x.float())`` or ``norm(x.float()).to(torch.bfloat16)`` would round the values of a network that has been
widened, or fail where they meet its float64 weights. Nothing is merged across such a cast, so the proof may leave it
out. What is computed from weights alone is left as it is: a rounding of weights belongs to the network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
}
_ALSO = {**WIDE, torch.complex64: torch.complex128}
"""What widened values meet; complex inputs and weights by themselves stay as they are."""


class Widening(TorchDispatchMode):
    """While it is on, no operator narrows what is computed from ``inputs``; what it meets is widened too, exactly."""

    def __init__(self, inputs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._data = WeakTensorKeyDictionary()
        self._remember(inputs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        if not any(isinstance(leaf, torch.Tensor) and leaf in self._data for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if kwargs.get("dtype") in WIDE:
            kwargs = kwargs | {"dtype": WIDE[kwargs["dtype"]]}
        if not func._schema.is_mutable:
            args, kwargs = tree_map(_widened, (args, kwargs))
        result = func(*args, **kwargs)
        self._remember(result)
        return result

    def _remember(self, values: Any) -> None:
        for leaf in tree_leaves(values):
            if isinstance(leaf, torch.Tensor):
                self._data[leaf] = True


def _widened(value: Any) -> Any:
    wide = _ALSO.get(value.dtype) if isinstance(value, torch.Tensor) else None
    return value if wide is None else value.to(wide)
