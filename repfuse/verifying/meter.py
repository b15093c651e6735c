"""How far a verification is: by the work of the trials that have been run, of all that will be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import overload

from repfuse.progress import Progress
from repfuse.verifying.inputs import Trial


class Meter:
    """Tells ``progress`` the stage and the fraction done, up to ``end``, as the trials that it watches are run."""

    def __init__(self, progress: Progress, total: float, end: float) -> None:
        self._progress, self._total, self._end = progress, max(total, 1.0), end
        self._done, self._stage = 0.0, ""

    def stage(self, name: str) -> None:
        """Say what is done now."""
        self._stage = name
        self._tell()

    def watch(self, trials: Sequence[Trial]) -> Sequence[Trial]:
        """Return the same trials; each counts as done when the next one is asked for."""
        return _Watched(trials, self._count)

    def _count(self, trial: Trial) -> None:
        self._done += trial.work
        self._tell()

    def _tell(self) -> None:
        self._progress(self._stage, self._end * min(1.0, self._done / self._total))


class _Watched(Sequence[Trial]):
    def __init__(self, trials: Sequence[Trial], count: Callable[[Trial], None]) -> None:
        self._trials, self._counted = trials, count

    @overload
    def __getitem__(self, index: int) -> Trial: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Trial]: ...

    def __getitem__(self, index: int | slice) -> Trial | Sequence[Trial]:
        return self._trials[index]

    def __len__(self) -> int:
        return len(self._trials)

    def __iter__(self) -> Iterator[Trial]:
        for trial in self._trials:
            yield trial
            self._counted(trial)
