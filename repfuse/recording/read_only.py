"""Runs over the memory of a network that is not to change: the forward that would write into it ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from repfuse.networks import tensors_of


class OperatorMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Its ``__torch_dispatch__`` is not wrapped by PyTorch, which would import its compiler at the first operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class ReadOnly(OperatorMode):  # type: ignore[no-untyped-call]
    """While it is on, no operator writes into the tensors ``stored``: the forward that tries to ends there.

    Where they are not ``shared`` with anybody it may. ``wrong`` says that it did. Since ``forget``: ``draws`` that an
    operator drew random numbers, ``counts`` that the shape of a result depended on numbers, and ``wrote`` are the
    tensors that were written into.
    """

    def __init__(self, stored: Iterable[torch.Tensor], *, shared: bool = True) -> None:
        super().__init__()
        self.stored = list(stored)  # alive, so that nothing else comes to lie where they do
        self._storages = {_storage(x) for x in self.stored} - {None} if shared else set()
        self.wrong = False
        self.forget()

    def forget(self) -> None:
        """Forget what was noted of the operators so far."""
        self.draws = self.counts = False
        self.wrote: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        if into := written_into(func, args, kwargs):
            self.overwritten(into)
        tags = func.tags
        if tags:
            self.draws |= torch.Tag.nondeterministic_seeded in tags
            self.counts |= torch.Tag.dynamic_output_shape in tags and _by_mask(func, args)
        return func(*args, **kwargs)

    def overwritten(self, tensors: Sequence[torch.Tensor]) -> None:
        """Note that these are written into. Raises OverwritesItself where one of them is not to change."""
        self.wrote += tensors
        if any(_storage(tensor) in self._storages for tensor in tensors):
            self.wrong = True
            raise OverwritesItself


def _by_mask(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the shape of a result really depends on numbers: that of an index does only where it is a mask."""
    if func is not torch.ops.aten.index.Tensor:
        return True
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])


class OverwritesItself(RuntimeError):
    """A network writes into its own tensors."""


def written_into(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the tensors that one call of an operator writes into."""
    names, written = _arguments(func)
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    if named.get("training"):
        written |= _STATISTICS  # which the schema does not tell
    elif named.get("training") is False:
        written -= _STATISTICS  # which the schema may tell, and it does not write into them then
    return tensors_of([value for name, value in named.items() if name in written]) if written else []


@cache
def _arguments(func: Any) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the names of an operator's arguments, in order, and of those that it writes into."""
    arguments = func._schema.arguments
    written = frozenset(a.name for a in arguments if a.alias_info and a.alias_info.is_write)
    updates = func.__name__.partition(".")[0] in _UPDATING
    return tuple(a.name for a in arguments), written | _STATISTICS if updates else written


WRITING_UNSEEN = frozenset({"apply_", "map_", "map2_"})
"""Methods that write into their tensor past all operators."""

_STATISTICS = frozenset({"running_mean", "running_var"})
_UPDATING = ("batch_norm_update_stats", "batch_norm_gather_stats", "batch_norm_gather_stats_with_counts")


def _storage(tensor: torch.Tensor) -> int | None:
    """Return what identifies a tensor's memory as a whole, of which it may be a part; None where it has none."""
    if tensor.layout is not torch.strided or tensor.is_nested or not tensor.numel() or tensor.is_meta:
        return None
    with torch._C.DisableTorchFunction():  # no recorder is to note it
        return tensor.untyped_storage().data_ptr()
