"""A network as the parts of it that can be traced: all of it, or around and inside of what cannot.

The innermost module whose forward cannot be traced stays one opaque call. What it calls, itself and whole, is a part
of its own, traced from the arguments that it was seen to get, and so on within that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from repfuse.errors import RepfuseError
from repfuse.tracing.arguments import Arguments, NotDescribable, describe
from repfuse.tracing.leaves import is_leaf
from repfuse.tracing.trace import DoesNotRun, Seen, Traced, Untraceable, run_untraced, trace


@dataclass(frozen=True)
class Part:
    """The module at ``path`` with its graph. ``arguments`` describe those that it was traced with.

    ``shared`` are the modules in it, by their path within it, that other parts or opaque forwards use too.
    """

    path: str
    traced: Traced
    arguments: Any
    shared: frozenset[str] = frozenset()


@dataclass
class Parts:
    """The parts of a network, the outermost first, and what could not be traced through: by path, the reason."""

    parts: list[Part] = field(default_factory=list)
    opaque: dict[str, str] = field(default_factory=dict)


def trace_parts(module: nn.Module, arguments: Arguments) -> Parts:
    """Trace a network part by part. Raises RepfuseError where it does not take the arguments."""
    return _Search(module).run(arguments)


class _Search:
    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.path_of: dict[nn.Module, str] = {part: path for path, part in module.named_modules()}
        self.parts: dict[nn.Module, tuple[Traced, Any]] = {}
        self.opaque: dict[nn.Module, str] = {}
        self.entered: set[nn.Module] = set()
        self.touched: set[nn.Module] = set()
        self.pending = deque[tuple[nn.Module, Arguments]]()

    def run(self, arguments: Arguments) -> Parts:
        try:
            self._look_into(self.module, arguments)
        except DoesNotRun as error:
            raise _does_not_run(arguments, error) from error
        while self.pending:
            part, given = self.pending.popleft()
            try:
                self._look_into(part, given)
            except (DoesNotRun, RepfuseError) as error:  # alone, the part does not do what it did in its place
                self.opaque[part] = str(error)
        users = {part: set(_modules_in_graph(part, traced)) for part, (traced, _) in self.parts.items()}
        found = Parts(opaque={self.path_of[part]: why for part, why in self.opaque.items()})
        for part, (traced, description) in self.parts.items():
            shared = frozenset(path for path, inner in part.named_modules() if self._is_shared(inner, part, users))
            found.parts.append(Part(self.path_of[part], traced, description, shared))
        return found

    def _look_into(self, part: nn.Module, arguments: Arguments) -> None:
        """Trace one part, and put what its opaque modules call on the list."""
        try:
            traced = trace(part, arguments)
        except Untraceable as error:
            self.opaque[part] = str(error)
            self._note(part, run_untraced(part, arguments))
            return
        self.parts[part] = traced, _description(arguments)
        for path, why in traced.opaque.items():
            self.opaque[part.get_submodule(path)] = why
        self._note(part, traced.seen)

    def _note(self, part: nn.Module, seen: Seen) -> None:
        self.touched.update(part.get_submodule(path) for path in seen.touched)
        for path, entry in seen.entered.items():
            inner = part.get_submodule(path)
            known = inner in self.entered or inner in self.parts
            self.entered.add(inner)
            if not known and not is_leaf(inner) and inner in self.path_of:
                self._enter(inner, entry.arguments, alike=entry.alike)

    def _enter(self, inner: nn.Module, arguments: Arguments, *, alike: bool) -> None:
        if alike and _description(arguments) is not None:
            self.pending.append((inner, arguments))
            return
        self.opaque[inner] = "it is called with other settings each time, or with objects that are no plain data"
        with suppress(DoesNotRun):
            self._note(inner, run_untraced(inner, arguments))

    def _is_shared(self, inner: nn.Module, part: nn.Module, users: dict[nn.Module, set[nn.Module]]) -> bool:
        """Whether anything but the graph of ``part`` uses ``inner``, as far as is known."""
        return (
            inner in self.touched
            or (inner in self.entered and inner is not part)
            or any(inner in used for other, used in users.items() if other is not part)
            or any(inner in insides for insides in self._insides_without(part))
        )

    def _insides_without(self, part: nn.Module) -> Iterator[set[nn.Module]]:
        """Yield the modules within each opaque module that does not hold ``part`` itself."""
        for module in self.opaque:
            insides = set(module.modules())
            if part not in insides:
                yield insides - {module}


def _modules_in_graph(part: nn.Module, traced: Traced) -> Iterator[nn.Module]:
    """Yield the modules that a graph runs, but not opaque ones and not the outermost."""
    paths = [path for path in traced.calls if path]
    paths += [str(node.target) for node in traced.nodes if node.op == "call_module"]
    return (part.get_submodule(path) for path in paths if path not in traced.opaque)


def _description(arguments: Arguments) -> Any:
    try:
        return describe((arguments.args, dict(arguments.kwargs)))
    except NotDescribable:
        return None


def _does_not_run(arguments: Arguments, error: Exception) -> RepfuseError:
    shapes = ", ".join("x".join(map(str, getattr(x, "shape", ()))) or repr(x) for x in arguments.args)
    return RepfuseError(
        f"The model does not run on the example input {shapes}.",
        str(error),
        "Give the shape that the model expects with --input, for example --input 1x3x224x224.",
    )
