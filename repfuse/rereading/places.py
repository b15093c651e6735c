"""Where a file is read again: in a fresh process, or in this one, and then why."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from repfuse.errors import EXIT_FAILED_CHECK, RepfuseError
from repfuse.rereading.messages import Answer, Job
from repfuse.rereading.process import FreshProcess, Output
from repfuse.rereading.reading import answer

SAME_PROCESS = "REPFUSE_SAME_PROCESS"
"""The environment variable that, set to 1, leaves out the fresh process. The check stays, and says where it was."""
FRESH = "a fresh process"


class Place:
    """Takes one job and gives its answer. ``name`` says where, and why there if that is not a fresh process."""

    def __init__(self, process: FreshProcess | None, why: str = "") -> None:
        self._process = process
        self._asked: Future[Output] | Job | None = None
        self.name = f"this process, because {why}" if why else FRESH

    def ask(self, job: Job) -> None:
        """Give it the job. A process of its own begins at once; this one, where the job needs what no other has."""
        lost = sorted(name for name in set(job.needs) if not _importable(name)) if self._process else []
        if lost:
            self._process, self.name = None, f"this process, because {lost[0]} exists in no other"
        self._asked = self._process.ask(job) if self._process else replace(job, alone=False)

    def answer(self, seconds: float) -> Answer:
        """Return the answer; one from a process of its own may take so many seconds more.

        Raises RepfuseError, with the exit code of a failed check, where there is none or the file could not be read.
        """
        found = self._answer(seconds)
        if found.refused:
            what, why, hint = found.refused
            raise RepfuseError(
                "What was written cannot be read again; nothing was kept.",
                f"{what} {why}",
                hint or "Choose another --format, and please report it.",
                exit_code=EXIT_FAILED_CHECK,
            )
        return found

    def _answer(self, seconds: float) -> Answer:
        if isinstance(self._asked, Job):
            return answer(self._asked)
        assert self._process is not None and self._asked is not None
        return self._process.answer(self._asked, seconds)


@contextmanager
def place() -> Iterator[Place]:
    """Give a place to read a file in: a fresh process, which starts at once, where that can be."""
    with ExitStack() as stack:
        try:
            why = _why_not_fresh()
            process = None if why else stack.enter_context(FreshProcess())
        except OSError as error:
            why, process = f"no other can be started: {error.strerror or error}", None
        yield Place(process, why)


def _why_not_fresh() -> str:
    if os.environ.get(SAME_PROCESS) == "1":
        return f"{SAME_PROCESS}=1 asks for that"
    if getattr(sys, "frozen", False) or "python" not in Path(sys.executable or "").name.lower():
        return "this program is no Python that could be started again"
    return ""


def _importable(name: str) -> bool:
    """Whether another process finds the package of the module ``name``: what is loaded already does not count."""
    package = name.partition(".")[0]
    if package in ("__main__", "__mp_main__"):
        return False
    finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
    return any(find is not None and find(package, None) is not None for find in finders)
