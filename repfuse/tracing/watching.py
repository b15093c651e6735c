"""What modules that cannot be traced do when they run: which others they call, with what, and whose insides they read.

PyTorch's modules are called through ``nn.Module.__call__`` and look their tensors and children up through
``nn.Module.__getattr__``. While a network is watched, both also write down what they see.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from repfuse.tracing.arguments import Arguments, constants_of


@dataclass
class Entered:
    """A module that others call in forwards that were not traced: the arguments of its first call, and how often.

    ``alike`` says whether all calls gave the same values for what is no tensor.
    """

    arguments: Arguments
    calls: int = 1
    alike: bool = True


@dataclass
class Watched:
    """What was seen: modules that were called from the watched forwards, and others whose insides these read."""

    entered: dict[nn.Module, Entered] = field(default_factory=dict)
    touched: set[nn.Module] = field(default_factory=set)


@contextmanager
def watching(opaque: Collection[nn.Module]) -> Iterator[Watched]:
    """Watch the forwards of the ``opaque`` modules, as far as they are their own: not those of what they call."""
    seen, running = Watched(), [None]
    call, look_up = nn.Module.__call__, nn.Module.__getattr__
    nn.Module.__call__ = _watched_call(call, frozenset(opaque), seen, running)  # type: ignore[method-assign]
    nn.Module.__getattr__ = _watched_look_up(look_up, frozenset(opaque), seen, running)  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        nn.Module.__call__ = call  # type: ignore[method-assign]
        nn.Module.__getattr__ = look_up  # type: ignore[method-assign]


def _watched_call(call: Any, opaque: frozenset[nn.Module], seen: Watched, running: list[Any]) -> Any:
    def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if running[-1] in opaque:
            _enter(seen, self, Arguments(args, kwargs))
        running.append(self)
        try:
            return call(self, *args, **kwargs)
        finally:
            running.pop()

    return watched


def _watched_look_up(look_up: Any, opaque: frozenset[nn.Module], seen: Watched, running: list[Any]) -> Any:
    def watched(self: nn.Module, name: str) -> Any:
        if running[-1] is not self and running[-1] in opaque:
            seen.touched.add(self)
        return look_up(self, name)

    return watched


def _enter(seen: Watched, module: nn.Module, arguments: Arguments) -> None:
    """Note a call. The arguments are copied: what comes later may overwrite them."""
    known = seen.entered.get(module)
    if known is None:
        seen.entered[module] = Entered(copy.deepcopy(arguments))
        return
    known.calls += 1
    known.alike = known.alike and constants_of(known.arguments) == constants_of(arguments)
