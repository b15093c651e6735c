"""Where a file is read again: in a fresh process, or in this one, and then why."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from repfuse.checkpoint import script
from repfuse.checkpoint.user_code import folders
from repfuse.errors import EXIT_FAILED_CHECK, RepfuseError
from repfuse.wording import LINE

if TYPE_CHECKING:  # the process is to start before this one imports torch
    from torch import nn

    from repfuse.readback.messages import Answer, Job

# A fresh Python process that reads a file again, and what becomes of one that does not answer.


ADVICE = "Try again. If it stays so, please report it; repfuse.save(..., verify=False) writes without this check."
COMMAND = ("-P", "-m", "repfuse.readback")  # -P: the folder of the program is in the path that it is given
Output = tuple[bytes, bytes]


class FreshProcess:
    """Starts at once, so that it has imported what it needs when there is a job; ends with the block that it is for.

    ``prepare`` names more to import, which this process has imported; then comes the job. It shares the environment,
    the working directory and the import path of this process, and nothing else. There is no shell and no temporary file
    that a killed process would leave. Raises OSError where it cannot be started.
    """

    def __init__(self) -> None:
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed on exit; a pipe could fill up
        try:
            self._process = subprocess.Popen(
                [sys.executable, *COMMAND],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(_path())},
            )
        except OSError:
            self._said.close()
            raise
        self._thread = ThreadPoolExecutor(1)
        self._prepared = False

    def __enter__(self) -> FreshProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.shutdown()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            assert pipe is not None
            with suppress(BrokenPipeError):  # of what was not read
                pipe.close()

    def prepare(self, modules: list[str]) -> None:
        """Have it import Python modules before there is a job, from where this process finds them now.

        What it cannot import, it will say when there is a job for which it matters.
        """
        assert self._process.stdin is not None
        self._prepared = True
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"path": _path(), "modules": modules}).encode() + b"\n")
            self._process.stdin.flush()

    def ask(self, job: Job) -> Future[Output]:
        """Send the job. This process goes on with its own work."""
        if not self._prepared:
            self.prepare([])
        return self._thread.submit(self._process.communicate, job.to_bytes())

    def answer(self, asked: Future[Output], seconds: float) -> Answer:
        """Wait so many seconds for the answer, and return it. Raises RepfuseError where there is none."""
        try:
            data, _ = asked.result(seconds)
        except TimeoutError as error:
            raise self._failed(f"It did not answer within {seconds:.0f} s.") from error
        if code := self._process.returncode:
            raise self._failed(_died(code))
        from repfuse.readback.messages import Answer

        try:
            return Answer.from_bytes(data)
        except Exception as error:  # it is not what was agreed on, in whatever way
            raise self._failed("What it answered is none.") from error

    def _failed(self, why: str) -> RepfuseError:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        last = f" The last that it said: {lines[-1].strip()[:LINE]}" if lines else ""
        return RepfuseError(
            "The file could not be checked in a fresh process; nothing was kept.",
            f"{why}{last}",
            ADVICE,
            exit_code=EXIT_FAILED_CHECK,
        )


def _path() -> list[str]:
    return [path or os.getcwd() for path in sys.path]  # noqa: PTH109


def _died(code: int) -> str:
    if code > 0:
        return f"It ended with exit code {code}."
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    memory = ", as a system does that runs out of memory" if name == "SIGKILL" else ""
    return f"It was killed by {name}{memory}."


SAME_PROCESS = "REPFUSE_SAME_PROCESS"
"""The environment variable that, set to 1, leaves out the fresh process. The check stays, and says where it was."""
FRESH = "a fresh process"


class Place:
    """Takes one job and gives its answer. ``name`` says where, and why there if that is not a fresh process."""

    def __init__(self, process: FreshProcess | None, why: str = "") -> None:
        self._process = process
        self._asked: Future[Output] | Job | None = None
        self.name = f"this process, because {why}" if why else FRESH

    def prepare(self, network: nn.Module) -> None:
        """Let a process of its own import what defines a network like this one, while this process works."""
        if self._process:
            modules = {type(part).__module__ for part in network.modules()}
            self._process.prepare(sorted(filter(_importable, modules)))

    def ask(self, job: Job) -> None:
        """Give it the job. A process of its own begins at once; this one, where the job needs what no other has."""
        lost = sorted(name for name in set(job.needs) if not _importable(name)) if self._process else []
        if lost:
            self._process, self.name = None, f"this process, because {lost[0]} exists in no other"
        here = replace(job, alone=False)
        self._asked = self._process.ask(replace(job, folders=tuple(folders))) if self._process else here

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
        if isinstance(self._asked, Future):
            assert self._process is not None
            return self._process.answer(self._asked, seconds)
        from repfuse.readback.reading import answer

        assert self._asked is not None
        return answer(self._asked)


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
    """Whether another process finds the package of the module ``name``: what is loaded already does not count.

    It finds ``__main__`` where that is a script that the user named.
    """
    package = name.partition(".")[0]
    if package in ("__main__", "__mp_main__"):
        return script.is_known()
    finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
    return any(find is not None and find(package, None) is not None for find in finders)
