"""A fresh Python process that reads a file again, and what becomes of one that does not answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import IO

from repfuse.errors import EXIT_FAILED_CHECK, RepfuseError
from repfuse.rereading.messages import Answer, Job
from repfuse.wording import LINE

ADVICE = "Try again. If it stays so, please report it; repfuse.save(..., verify=False) writes without this check."
COMMAND = ("-P", "-m", "repfuse.rereading")  # -P: the folder of the program is in the path that it is given
Output = tuple[bytes, bytes]


class FreshProcess:
    """Starts at once, so that it has imported what it needs when there is a job; ends with the block that it is for.

    It shares the environment, the working directory and the import path of this process, and nothing else. There is no
    shell and no temporary file that a killed process would leave. Raises OSError where it cannot be started.
    """

    def __init__(self) -> None:
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed on exit; a pipe could fill up
        try:
            self._process = subprocess.Popen(
                [sys.executable, *COMMAND],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},  # noqa: PTH109
            )
        except OSError:
            self._said.close()
            raise
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> FreshProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.shutdown()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            assert pipe is not None
            pipe.close()

    def ask(self, job: Job) -> Future[Output]:
        """Send the job. This process goes on with its own work."""
        return self._thread.submit(self._process.communicate, job.to_bytes())

    def answer(self, asked: Future[Output], seconds: float) -> Answer:
        """Wait so many seconds for the answer, and return it. Raises RepfuseError where there is none."""
        try:
            data, _ = asked.result(seconds)
        except TimeoutError as error:
            raise self._failed(f"It did not answer within {seconds:.0f} s.") from error
        if code := self._process.returncode:
            raise self._failed(_died(code))
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


def _died(code: int) -> str:
    if code > 0:
        return f"It ended with exit code {code}."
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    memory = ", as a system does that runs out of memory" if name == "SIGKILL" else ""
    return f"It was killed by {name}{memory}."
