"""Running a part of a graph, and seeing to it that it gives the same result every time and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NotReproducible(RuntimeError):
    """The result would be another one each time."""


def run(steps: Iterable[fx.Node], module: nn.Module, read: Callable[[str], Any]) -> dict[fx.Node, Any]:
    """Run nodes of a graph of ``module``, in order, and return their values; ``read`` gives its tensors by name."""
    values: dict[fx.Node, Any] = {}
    for step in steps:
        values[step] = _result(step, values, module, read)
    return values


def _result(step: fx.Node, values: dict[fx.Node, Any], module: nn.Module, read: Callable[[str], Any]) -> Any:
    if step.op == "get_attr":
        return read(str(step.target))
    args, kwargs = map_arg((step.args, step.kwargs), values.__getitem__)
    if step.op == "call_method":
        return getattr(args[0], str(step.target))(*args[1:], **kwargs)
    if step.op == "call_module":  # not by calling it: while a trace is under way, that would be recorded
        return module.get_submodule(str(step.target)).forward(*args, **kwargs)
    assert callable(step.target)
    return step.target(*args, **kwargs)


def storage_of(tensor: Tensor) -> int:
    """Return what two tensors have in common if their numbers lie in the same memory; they themselves on ``meta``, and
    where they are sparse.
    """
    if tensor.layout is not torch.strided:
        return id(tensor)
    return tensor.untyped_storage().data_ptr() or id(tensor)


@contextmanager
def reproducible(kept: Iterable[Tensor]) -> Iterator[None]:
    """Raise NotReproducible before an operator draws random numbers, or writes into ``kept``.

    Operators are watched as they run, below the Python API: no spelling hides them.
    """
    with torch._C.DisableTorchFunction(), _Watch(kept):  # the former, so that no trace under way records what runs
        yield


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, kept: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = {storage_of(tensor) for tensor in kept}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotReproducible(f"{func} gives another result each time")
        if not self._kept.isdisjoint(map(storage_of, _overwritten(func, args, kwargs))):
            raise NotReproducible(f"{func} changes a tensor of the model")
        return func(*args, **kwargs)


def _overwritten(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    marks = {argument.name: argument.alias_info for argument in func._schema.arguments}
    written = [value for name, value in named.items() if marks[name] is not None and marks[name].is_write]
    return [leaf for leaf in tree_leaves(written) if isinstance(leaf, Tensor)]
