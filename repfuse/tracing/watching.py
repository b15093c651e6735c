"""What modules that cannot be traced do when they run: which others they call, with what, and whose insides they read.

PyTorch's modules are called through ``nn.Module.__call__`` and look their tensors and children up through
``nn.Module.__getattr__``. While a network is watched, both also write down what they see.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from repfuse.tracing.arguments import Arguments, constants_of


@dataclass
class Entered:
    """The arguments of a module's first call, and who calls it; ``alike``: all calls agree in what is no tensor."""

    arguments: Arguments
    callers: set[nn.Module] = field(default_factory=set)
    alike: bool = True

    def add(self, arguments: Arguments, callers: Iterable[nn.Module], *, alike: bool = True) -> None:
        """Note more calls."""
        self.callers.update(callers)
        self.alike = self.alike and alike and constants_of(self.arguments) == constants_of(arguments)


@dataclass
class Watched:
    """What was seen: calls of the watched modules, what these called, and by each of them whose insides it read.

    ``decided`` are those that asked for the value of a tensor, as a branch on one does.
    """

    opaque: dict[nn.Module, Entered] = field(default_factory=dict)
    entered: dict[nn.Module, Entered] = field(default_factory=dict)
    touched: dict[nn.Module, set[nn.Module]] = field(default_factory=lambda: defaultdict(set))
    decided: set[nn.Module] = field(default_factory=set)


@contextmanager
def watching(opaque: Collection[nn.Module]) -> Iterator[Watched]:
    """Watch the forwards of the ``opaque`` modules, as far as they are their own: not those of what they call."""
    seen, running = Watched(), [None]
    call, look_up = nn.Module.__call__, nn.Module.__getattr__
    nn.Module.__call__ = _watched_call(call, frozenset(opaque), seen, running)  # type: ignore[method-assign]
    nn.Module.__getattr__ = _watched_look_up(look_up, frozenset(opaque), seen, running)  # type: ignore[method-assign]
    try:
        with _Values(frozenset(opaque), seen, running):
            yield seen
    finally:
        nn.Module.__call__ = call  # type: ignore[method-assign]
        nn.Module.__getattr__ = look_up  # type: ignore[method-assign]


class _Values(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes who asks for the value of a tensor: ``bool``, ``int`` and ``item`` all end in one operator."""

    def __init__(self, opaque: frozenset[nn.Module], seen: Watched, running: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.opaque, self.seen, self.running = opaque, seen, running

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and self.running[-1] in self.opaque:
            self.seen.decided.add(self.running[-1])
        return func(*args, **(kwargs or {}))


def _watched_call(call: Any, opaque: frozenset[nn.Module], seen: Watched, running: list[Any]) -> Any:
    def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if running[-1] in opaque:
            _enter(seen.entered, self, Arguments(args, kwargs), running[-1])
        if self in opaque:
            _enter(seen.opaque, self, Arguments(args, kwargs), running[-1])
        running.append(self)
        try:
            return call(self, *args, **kwargs)
        finally:
            running.pop()

    return watched


def _watched_look_up(look_up: Any, opaque: frozenset[nn.Module], seen: Watched, running: list[Any]) -> Any:
    def watched(self: nn.Module, name: str) -> Any:
        if running[-1] is not self and running[-1] in opaque:
            seen.touched[running[-1]].add(self)
        return look_up(self, name)

    return watched


def _enter(calls: dict[nn.Module, Entered], module: nn.Module, arguments: Arguments, by: nn.Module | None) -> None:
    """Note a call. The arguments are copied: what comes later may overwrite them."""
    callers = () if by is None else (by,)
    if module in calls:
        calls[module].add(arguments, callers)
    else:
        calls[module] = Entered(copy.deepcopy(arguments), set(callers))


def in_terms_of(module: nn.Module, runner: nn.Module, watched: Watched) -> Watched:
    """Return what was seen of ``runner``, a copy of ``module``, for the modules of that."""
    original_of = dict(zip(runner.modules(), module.modules(), strict=True))

    def known(calls: dict[nn.Module, Entered]) -> dict[nn.Module, Entered]:
        return {
            original_of[part]: replace(
                entry, callers={original_of[caller] for caller in entry.callers if caller in original_of}
            )
            for part, entry in calls.items()
            if part in original_of
        }

    touched = {
        original_of[by]: {original_of[part] for part in parts if part in original_of}
        for by, parts in watched.touched.items()
    }
    decided = {original_of[part] for part in watched.decided}
    return Watched(known(watched.opaque), known(watched.entered), touched, decided)
