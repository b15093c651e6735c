"""How far a verification is: by the work of the calls that are done, of all that will be."""

from __future__ import annotations

from typing import Any

from torch import jit, nn

from repfuse.progress import Progress
from repfuse.verifying.inputs import elements


class Meter:
    """Tells ``progress`` the stage and the fraction done, from ``start`` to ``end``, as the networks it watches run.

    ``total`` is the work of all calls, in elements of their inputs.
    """

    def __init__(self, progress: Progress, total: float, start: float = 0.0, end: float = 1.0) -> None:
        self._progress, self._total = progress, max(total, 1.0)
        self._start, self._end = start, end
        self._done, self._stage = 0.0, ""

    def stage(self, name: str) -> None:
        """Say what is done now."""
        self._stage = name
        self._tell()

    def watch(self, copy: nn.Module) -> None:
        """Count each call of a network that it returns from; those of TorchScript, which takes no hooks, go unseen."""
        if not isinstance(copy, jit.ScriptModule):
            copy.register_forward_hook(self._count)

    def _count(self, _module: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        self._done += elements(inputs)
        self._tell()

    def _tell(self) -> None:
        part = min(1.0, self._done / self._total)
        self._progress(self._stage, self._start + (self._end - self._start) * part)
