"""Runs over the memory of a network that is not to change: the forward that would write into it ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class ReadOnly(TorchDispatchMode):
    """While it is on, no operator writes into the tensors ``stored``: the forward that tries to ends there.

    ``wrong`` says that it did.
    """

    def __init__(self, stored: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages = {_storage(x) for x in stored.values()} - {None}
        self.wrong = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        self.check(func, args, kwargs)
        return func(*args, **kwargs)

    def check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise OverwritesItself where an operator writes into a tensor that is not to change."""
        named = by_name(func, args, kwargs)
        names = written(func) | _statistics_written(func, named)
        if names:
            self.keep(tensors_in(value for name, value in named.items() if name in names))

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """Raise OverwritesItself where one of these is not to change."""
        if any(map(self.is_kept, tensors)):
            self.wrong = True
            raise OverwritesItself

    def is_kept(self, tensor: torch.Tensor) -> bool:
        """Whether nothing is to write into a tensor."""
        return _storage(tensor) in self._storages


class OverwritesItself(RuntimeError):
    """A network writes into its own tensors."""


class MemoryKept(TorchFunctionMode):
    """The same where the forward takes the memory itself, past all operators: as an array, say."""

    def __init__(self, mode: ReadOnly) -> None:
        super().__init__()
        self._mode = mode

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call one function of torch."""
        if getattr(func, "__name__", "") in _TAKING:
            self._mode.keep(tensors_in(args[:1]))
        return func(*args, **(kwargs or {}))


_TAKING = ("numpy", "__array__", "__dlpack__", "storage", "untyped_storage", "data_ptr", "share_memory_")


@cache
def arguments_of(func: Any) -> tuple[str, ...]:
    """Return the names of an operator's arguments, in order."""
    return tuple(argument.name for argument in func._schema.arguments)


def by_name(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return what an operator is given by the names of its arguments."""
    return {**dict(zip(arguments_of(func), args, strict=False)), **kwargs}


@cache
def written(func: Any) -> frozenset[str]:
    """Return the names of the arguments that an operator writes into."""
    arguments = func._schema.arguments
    return frozenset(a.name for a in arguments if a.alias_info and a.alias_info.is_write)


def _statistics_written(func: Any, named: Mapping[str, Any]) -> set[str]:
    """Return the statistics that a normalisation in training mode writes into, which its schema does not tell."""
    updates = func.__name__.partition(".")[0] in _UPDATING
    return {"running_mean", "running_var"} if updates or named.get("training") else set()


_UPDATING = ("batch_norm_update_stats", "batch_norm_gather_stats", "batch_norm_gather_stats_with_counts")


def memory(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """Return what identifies a tensor's memory and how it is read; None where it has none."""
    if tensor.layout is not torch.strided or tensor.is_nested or not tensor.numel() or tensor.is_meta:
        return None
    with torch._C.DisableTorchFunction():  # MemoryKept is for others
        return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _storage(tensor: torch.Tensor) -> int | None:
    """Return what identifies a tensor's memory as a whole, of which it may be a part; None where it has none."""
    if memory(tensor) is None:
        return None
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage().data_ptr()


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among what an operator takes or returns; it knows no other containers than lists and tuples."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
