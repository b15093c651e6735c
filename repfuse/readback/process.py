"""A reader of written files: a fresh Python process, or this one where none can be had, and then why."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

from repfuse.checkpoint import script
from repfuse.checkpoint.user_code import folders
from repfuse.errors import EXIT_FAILED_CHECK, RepfuseError
from repfuse.wording import LINE

if TYPE_CHECKING:  # the process is to start before this one imports torch
    from torch import nn

    from repfuse.readback.messages import Answer, Job

ADVICE = "Try again. If it stays so, please report it; repfuse.save(..., verify=False) writes without this check."
COMMAND = ("-P", "-m", "repfuse.readback")  # -P: the folder of the program is in the path that it is given
SAME_PROCESS = "REPFUSE_SAME_PROCESS"
"""The environment variable that, set to 1, leaves out the fresh process. The check stays, and says where it was."""
FRESH, ASKED = "a fresh process", "that was asked for"


class Reader:
    """Takes one job and gives its answer. ``name`` says where, and why there if that is not a fresh process.

    The process starts at once, so that it has imported what it needs when there is a job, and ends with the block that
    it is for. ``prepare`` names more to import, which this process has imported; then comes the job. It shares the
    environment, the working directory and the import path of this process, and nothing else. There is no shell and no
    temporary file that a killed process would leave.
    """

    def __init__(self, *, fresh: bool = True) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._prepared = False
        self._asked: Future[tuple[bytes, bytes]] | Job | None = None
        self._thread = ThreadPoolExecutor(1)
        self._said: IO[bytes] = io.BytesIO()
        self.name = f"this process, because {why}" if (why := self._started() if fresh else ASKED) else FRESH

    def _started(self) -> str:
        """Start the process, or return why there is none."""
        if os.environ.get(SAME_PROCESS) == "1":
            return f"{SAME_PROCESS}=1 asks for that"
        if getattr(sys, "frozen", False) or "python" not in Path(sys.executable or "").name.lower():
            return "this program is no Python that could be started again"
        try:
            self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed on exit; a pipe could fill up
            self._process = subprocess.Popen(
                [sys.executable, *COMMAND],
                bufsize=0,  # what a process that died did not take would be written again as its pipe is closed
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},  # noqa: PTH109
            )
        except OSError as error:
            return f"no other can be started: {error.strerror or error}"
        return ""

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
        self._thread.shutdown()
        for pipe in (self._process.stdin, self._process.stdout, self._said) if self._process else (self._said,):
            assert pipe is not None
            with suppress(BrokenPipeError):  # of what was not read
                pipe.close()

    def prepare(self, network: nn.Module) -> None:
        """Let the process import what defines a network like this one, while this process works."""
        modules = {type(part).__module__ for part in network.modules()}
        self._prepare(sorted(filter(_importable, modules)))

    def _prepare(self, modules: list[str]) -> None:
        """Have it import modules from where this process finds them now; what it cannot, it will say of the job."""
        self._prepared, path = True, [path or os.getcwd() for path in sys.path]  # noqa: PTH109
        if self._process:
            assert self._process.stdin is not None
            with suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps({"path": path, "modules": modules}).encode() + b"\n")

    def ask(self, job: Job) -> None:
        """Give it the job. A process of its own begins at once; this one, where the job needs what no other has."""
        from repfuse.readback.messages import packed

        lost = sorted(name for name in set(job.needs) if not _importable(name)) if self._process else []
        if lost:
            self.name = f"this process, because {lost[0]} exists in no other"
        if lost or not self._process:
            self._asked = job
            return
        if not self._prepared:
            self._prepare([])
        sent = packed(replace(job, folders=tuple(folders)))
        self._asked = self._thread.submit(self._process.communicate, sent)

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
        from repfuse.readback.messages import Answer, unpacked
        from repfuse.readback.reading import answer

        assert self._asked is not None
        if not isinstance(self._asked, Future):
            return answer(self._asked)
        assert self._process is not None
        try:
            data, _ = self._asked.result(seconds)
        except TimeoutError as error:
            raise self._failed(f"It did not answer within {seconds:.0f} s.") from error
        if code := self._process.returncode:
            raise self._failed(_died(code))
        try:
            found = unpacked(data)
        except Exception as error:  # it is not what was agreed on, in whatever way
            raise self._failed("What it answered is none.") from error
        if not isinstance(found, Answer):
            raise self._failed("What it answered is none.")
        return found

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


def _died(code: int) -> str:
    if code > 0:
        return f"It ended with exit code {code}."
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    memory = ", as a system does that runs out of memory" if name == "SIGKILL" else ""
    return f"It was killed by {name}{memory}."


def _importable(name: str) -> bool:
    """Whether another process finds the package of the module ``name``: what is loaded already does not count.

    It finds ``__main__`` where that is a script that the user named.
    """
    package = name.partition(".")[0]
    if package in ("__main__", "__mp_main__"):
        return script.is_known()
    finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
    return any(find is not None and find(package, None) is not None for find in finders)
