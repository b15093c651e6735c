"""One execution of a module's forward, as a recording keeps it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from repfuse.recording.sizes import Decision


@dataclass(frozen=True)
class Question:
    """Forward code asked what numbers tensors hold, by ``name``: it may do something else for others."""

    name: str
    nodes: tuple[fx.Node, ...]


@dataclass(eq=False)
class Call:
    """A call of the module at ``path``, the ``number``-th of that module; arguments and result with nodes for tensors.

    The nodes that were made while it ran are the recording's from ``start`` to ``stop``; ``own`` are those that its own
    forward made, and the calls that it made, in order. ``lines`` gives, where the forward is a graph, the value of
    each line of that graph by its number. ``autocast`` is the state of mixed precision in which it was called.
    """

    path: str
    number: int
    caller: Call | None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    start: int = 0
    stop: int = 0
    output: Any = None
    own: list[fx.Node | Call] = field(default_factory=list)
    lines: dict[int, fx.Node] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    stored: list[fx.Node] = field(default_factory=list)
    """Values that its module holds since."""
    changes_state: bool = False
    """Whether its module holds something else since that is no value of the recording."""
    meets_errors: bool = False
    """Whether something that it called raised an error, also one that it caught."""
    switches_gradients: bool = False
    autocast: tuple[bool, bool] = (False, False)
    enters_autocast: bool = False

    def chain(self) -> Iterator[Call]:
        """Yield this call, its caller, and so on up to the root."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.caller

    def up_to(self, outer: Call) -> list[Call]:
        """Return this call and its callers below ``outer``, innermost first."""
        return list(itertools.takewhile(lambda call: call is not outer, self.chain()))
