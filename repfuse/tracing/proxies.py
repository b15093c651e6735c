"""What stands for a tensor while a forward is traced.

A proxy of torch.fx records what is done to it. These also record writes as writes, and those that stand for values
computed from parameters alone know their shape and their numbers: forward code that computes weights asks for them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

from repfuse.tracing.assignment import assigned


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


class Proxy(fx.Proxy):
    """A proxy that records ``x += y`` and ``x[i] = y`` as what they do to a tensor, writes in place.

    torch.fx records ``x + y`` for the former and refuses the latter.
    """

    __iadd__ = _in_place(operator.iadd)
    __isub__ = _in_place(operator.isub)
    __imul__ = _in_place(operator.imul)
    __itruediv__ = _in_place(operator.itruediv)
    __ifloordiv__ = _in_place(operator.ifloordiv)
    __imod__ = _in_place(operator.imod)
    __ipow__ = _in_place(operator.ipow)
    __iand__ = _in_place(operator.iand)
    __ior__ = _in_place(operator.ior)
    __ixor__ = _in_place(operator.ixor)

    def __setitem__(self, index: Any, value: Any) -> None:
        """Record the write; what is read from this object afterwards is its result."""
        self.node = self.tracer.create_proxy("call_function", assigned, (self, index, value), {}).node

    def __getattr__(self, k: str) -> Any:
        """Answer ``requires_grad`` (this is inference); record an attribute that is a tensor as a value of its own."""
        if k == "requires_grad":
            return False
        if k in _TENSORS:
            return self.tracer.create_proxy("call_function", getattr, (self, k), {})
        return super().__getattr__(k)


class ConstantProxy(Proxy):
    """A proxy of a value that is computed from parameters and buffers alone: questions about it have answers.

    Its dtype and device stay questions, so that the graph also holds for the model in another dtype or place.
    """

    tracer: Any

    def __getattr__(self, k: str) -> Any:
        """Answer what is asked of the shape or the number, and leave the rest to be recorded."""
        return getattr(self._value(), k) if k in _FACTS else super().__getattr__(k)

    def __len__(self) -> int:
        return len(self._value())

    def __int__(self) -> int:
        return int(self._value())

    def __float__(self) -> float:
        return float(self._value())

    def __index__(self) -> int:
        return operator.index(self._value())

    def _value(self) -> Any:
        return self.tracer.answer(self.node)


class PlainTensor(ConstantProxy):
    """Stands for a tensor that is a plain attribute of a module, neither parameter nor buffer.

    Reading such an attribute cannot be observed, so each use makes a node, in the forward that uses it.
    """

    def __init__(self, tracer: Any, name: str) -> None:
        self.tracer = tracer
        self.name = name

    @property
    def node(self) -> fx.Node:
        """The reading of the attribute, made anew each time."""
        made: fx.Node = self.tracer.create_node("get_attr", self.name, (), {})
        return made

    @node.setter
    def node(self, written: fx.Node) -> None:
        """Leave the name as it is: the next reading comes after the write."""


class Factories(TorchFunctionMode):
    """Records tensors made of numbers (``torch.zeros(3)``), which would belong to nobody if made while tracing."""

    def __init__(self, tracer: fx.Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _FACTORIES or (isinstance(func, OpOverload) and _makes_a_tensor(func)):
            return self._tracer.create_proxy("call_function", func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _makes_a_tensor(func: OpOverload) -> bool:
    taken = any("Tensor" in str(argument.type) for argument in func._schema.arguments)
    return not taken and [str(returned.type) for returned in func._schema.returns] == ["Tensor"]


def answers(value: Any) -> Iterator[Any]:
    """Yield the parts of a constant's proxy, as iterating over its value would."""
    return (value[index] for index in range(len(value)))


_FACTS = frozenset({"shape", "ndim", "dim", "ndimension", "size", "numel", "nelement", "item", "tolist"})
_TENSORS = frozenset(name for name in ("data", "T", "mT", "H", "mH", "real", "imag") if hasattr(Tensor, name))

_FACTORIES = frozenset(
    {
        torch.arange,
        torch.as_tensor,
        torch.bartlett_window,
        torch.blackman_window,
        torch.empty,
        torch.eye,
        torch.full,
        torch.hamming_window,
        torch.hann_window,
        torch.kaiser_window,
        torch.linspace,
        torch.logspace,
        torch.ones,
        torch.rand,
        torch.randint,
        torch.randn,
        torch.randperm,
        torch.scalar_tensor,
        torch.tensor,
        torch.tril_indices,
        torch.triu_indices,
        torch.zeros,
    }
)
