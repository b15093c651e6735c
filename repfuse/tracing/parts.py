"""A network as the parts of it that can be traced: all of it, or around and inside of what cannot.

The innermost module whose forward cannot be traced stays one opaque call. What it calls, itself and whole, is a part
of its own, traced from the arguments that it was seen to get, and so on within that. A block that is opaque may be a
part, too: as the graph that torch.export makes of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from repfuse.errors import RepfuseError
from repfuse.preconditions import check_traceable
from repfuse.tracing.arguments import Arguments, NotDescribable, describe
from repfuse.tracing.exporting import export, is_block
from repfuse.tracing.leaves import is_leaf
from repfuse.tracing.reaching import reached
from repfuse.tracing.trace import DoesNotRun, Traced, Untraceable, run_untraced, trace
from repfuse.tracing.uses import Uses, modules_in_graph
from repfuse.tracing.watching import Entered, Watched


@dataclass(frozen=True)
class Part:
    """The module at ``path`` with its graph. ``arguments`` describe those that it was traced with.

    ``shared`` are the modules in it, by their path within it, that other parts or opaque forwards use too. Where
    ``exported``, the graph is that of ``export(module)``.
    """

    path: str
    traced: Traced
    arguments: Any
    shared: frozenset[str] = frozenset()
    exported: bool = False


@dataclass(frozen=True)
class Parts:
    """The parts of a network, the outermost first, and what could not be traced through: by path, the reason.

    ``exports`` are opaque blocks as exported parts: each may stand for the parts within it.
    """

    parts: list[Part]
    opaque: dict[str, str]
    exports: list[Part]


DIFFERENTLY = "it is called with other settings each time, or with objects that are no plain data"


def trace_parts(module: nn.Module, arguments: Arguments) -> Parts:
    """Trace a network part by part. Raises RepfuseError where that cannot be, or it does not take the arguments."""
    check_traceable(module)
    return _Search(module).run(arguments)


class _Search:
    """What was traced so far, what opaque modules were seen to do, and what is still to be looked into."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.path_of: dict[nn.Module, str] = {part: path for path, part in module.named_modules()}
        self.parts: dict[nn.Module, tuple[Traced, Any]] = {}
        self.opaque: dict[nn.Module, str] = {}
        self.called: dict[nn.Module, Entered] = {}
        """Opaque modules, with their arguments."""
        self.entered: dict[nn.Module, Entered] = {}
        self.touched: dict[nn.Module, set[nn.Module]] = {}
        self.decided: set[nn.Module] = set()
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
        for part in [part for part in self.parts if not self._is_alike(part)]:
            del self.parts[part]
            self.opaque[part] = DIFFERENTLY
        for part in self.opaque:
            self.touched.setdefault(part, set()).update(reached(part))
        return self._found()

    def _found(self) -> Parts:
        in_graphs = {part: modules_in_graph(part, traced) for part, (traced, _) in self.parts.items()}
        uses = Uses(in_graphs, self.entered, self.touched, self.opaque.keys())
        parts = [
            Part(self.path_of[part], traced, description, uses.shared(part))
            for part, (traced, description) in self.parts.items()
        ]
        opaque = {self.path_of[part]: why for part, why in self.opaque.items()}
        return Parts(parts, opaque, list(self._exports(uses)))

    def _look_into(self, part: nn.Module, arguments: Arguments) -> None:
        """Trace one part, and put what its opaque modules call on the list."""
        try:
            traced = trace(part, arguments)
        except Untraceable as error:
            self.opaque[part] = str(error)
            self._note(run_untraced(part, arguments))
            return
        self.parts[part] = traced, _description(arguments)
        for path, why in traced.opaque.items():
            self.opaque[part.get_submodule(path)] = why
        self._note(traced.seen)

    def _note(self, seen: Watched) -> None:
        self.called.update(seen.opaque)
        self.decided |= seen.decided
        for by, touched in seen.touched.items():
            self.touched.setdefault(by, set()).update(touched)
        for inner, entry in seen.entered.items():
            if inner in self.entered:
                self.entered[inner].add(entry.arguments, entry.callers, alike=entry.alike)
                continue
            self.entered[inner] = entry
            if not is_leaf(inner) and inner in self.path_of:
                self._enter(inner, entry)

    def _enter(self, inner: nn.Module, entry: Entered) -> None:
        if entry.alike and _description(entry.arguments) is not None:
            self.pending.append((inner, entry.arguments))
            return
        self.opaque[inner] = DIFFERENTLY
        with suppress(DoesNotRun):
            self._note(run_untraced(inner, entry.arguments))

    def _is_alike(self, part: nn.Module) -> bool:
        """Whether all calls that were seen agree in what a trace takes for fixed."""
        known = [calls[part] for calls in (self.entered, self.called) if part in calls]
        return all(entry.alike for entry in known)

    def _exports(self, uses: Uses) -> Iterator[Part]:
        for block, entry in self.called.items():
            description = _description(entry.arguments)
            fits = self._is_alike(block) and self._joins(block) and uses.alone(block)
            if description is None or not fits or block in self.decided:  # no graph holds a branch on values
                continue
            made = export(block, entry.arguments)
            if made is not None:
                with suppress(Untraceable, DoesNotRun):
                    yield Part(self.path_of[block], trace(made, entry.arguments), description, exported=True)

    def _joins(self, block: nn.Module) -> bool:
        """Whether the forward of the block itself brings convolutions together with each other, or normalisations."""
        called = [inner for inner, entry in self.entered.items() if block in entry.callers]
        layers = [inner for inner in called if any(isinstance(part, _ConvNd | _BatchNorm) for part in inner.modules())]
        return is_block(block) and len(layers) + bool(block._parameters) > 1


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
