"""A reader of written files: a fresh Python process, or this one where none can be had, and then why.

``python -m repfuse.readback.process`` is that process: a job comes in on its standard input, an answer goes out, and
all that is printed goes elsewhere. Each line of the input before the job says where Python modules are found, and which
it will need; an empty line ends them.
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import IO, TYPE_CHECKING

from repfuse.checkpoint.user_code import PIP, folders, knows_a_script
from repfuse.errors import EXIT_FAILED_CHECK, RepfuseError
from repfuse.wording import LINE

if TYPE_CHECKING:  # the process is to start before this one imports torch
    from torch import nn

    from repfuse.checking.inputs import Trial
    from repfuse.readback.reading import Answer, Job

ADVICE = "Try again. If it stays so, please report it; repfuse.save(..., verify=False) writes without this check."
COMMAND = ("-P", "-m", "repfuse.readback.process")  # -P: the folder of the program is in the path that it is given
SAME_PROCESS = "REPFUSE_SAME_PROCESS"
"""The environment variable that, set to 1, leaves out the fresh process. The check stays, and says where it was."""
FRESH, ASKED = "a fresh process", "that was asked for"


PATIENCE = 120.0  # seconds for the process to import torch and a library of models from a slow disk
BYTES_A_SECOND = 2e6  # that it reads at least
SLOWER = 20  # times longer than here it may compute
FORKED = "REPFUSE_FORKED"
"""The environment variable of a process that has imported torch and computed nothing: a copy of it is a fresh one."""


class Copy:
    """A copy of this process that reads, in the place of a new one: what `repfuse.cli.many` has of ``Popen``."""

    def __init__(self, said: IO[bytes]) -> None:
        (given, give), (answered, answer) = os.pipe(), os.pipe()
        streams = (given, answer, said.fileno())
        self._process = get_context("fork").Process(target=_read_in_copy, args=(streams, (give, answered)))
        self._process.start()
        for end in (given, answer):
            os.close(end)
        self.stdin, self.stdout = os.fdopen(give, "wb"), os.fdopen(answered, "rb")
        self.kill, self.wait = self._process.kill, self._process.join
        self.returncode: int | None = None

    def communicate(self, sent: bytes) -> tuple[bytes, bytes]:
        """Send the job, and return the answer."""
        with suppress(BrokenPipeError):
            self.stdin.write(sent)
            self.stdin.close()
        data = self.stdout.read()
        self.wait()
        self.returncode = self._process.exitcode
        return data, b""


def _read_in_copy(streams: Sequence[int], others: Sequence[int]) -> None:
    """Be the reading process: its standard streams are those of one that was started, and nothing else of it runs."""
    for end in others:
        os.close(end)
    for standard, end in enumerate(streams):
        os.dup2(end, standard)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(each, mode, closefd=False) for each, mode in enumerate("rww"))
    main()


class Reader:
    """Takes one job and gives its answer. ``name`` says where, and why there if that is not a fresh process.

    The process starts at once, so that it has imported what it needs when there is a job, and ends with the block that
    it is for. It imports the libraries of networks that the user ``named``, and what ``prepare`` finds. It shares the
    environment, the working directory and the import path of this process, and nothing else. There is no shell and no
    temporary file that a killed process would leave.
    """

    def __init__(self, *, fresh: bool = True, named: Iterable[str] = ()) -> None:
        self._process: subprocess.Popen[bytes] | Copy | None = None
        self._prepared = False
        self._found: Callable[[], Answer] | None = None  # once it was asked
        self._thread = ThreadPoolExecutor(1)
        self._said: IO[bytes] = io.BytesIO()
        self.name = f"this process, because {why}" if (why := self._started() if fresh else ASKED) else FRESH
        libraries = PIP.keys() & set(named)  # each takes as long to import as torch
        self._has = {"torch", "repfuse", *libraries}
        if libraries:
            self._import(sorted(libraries))

    def _started(self) -> str:
        """Start the process, or return why there is none."""
        if os.environ.get(SAME_PROCESS) == "1":
            return f"{SAME_PROCESS}=1 asks for that"
        if getattr(sys, "frozen", False) or "python" not in Path(sys.executable or "").name.lower():
            return "this program is no Python that could be started again"
        try:
            self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed on exit; a pipe could fill up
            if os.environ.get(FORKED) == "1" and hasattr(os, "fork"):
                self._process = Copy(self._said)
                return ""
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

    def prepare(self, network: nn.Module) -> bool:
        """Let the process import what defines a network like this one, while this process works; say whether
        that is more than what it has.
        """
        modules = sorted(filter(_importable, {type(part).__module__ for part in network.modules()}))
        self._import(modules)
        return self._process is not None and not self._has.issuperset(name.partition(".")[0] for name in modules)

    def _import(self, modules: Sequence[str]) -> None:
        """Have it import modules from where this process finds them now; what it cannot, it will say of the job."""
        self._prepared, path = True, [path or os.getcwd() for path in sys.path]  # noqa: PTH109
        if self._process:
            assert self._process.stdin is not None
            with suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps({"path": path, "modules": modules}).encode() + b"\n")
                self._process.stdin.flush()

    def ask(self, job: Job, trials: Iterable[Trial] = ()) -> None:
        """Give it the job, on the inputs of these trials. A process of its own begins at once; this one, where the job
        needs what no other has.
        """
        from repfuse.readback.reading import answer, packed

        job = replace(job, inputs=tuple(trial.inputs for trial in trials))
        lost = sorted(name for name in set(job.needs) if not _importable(name)) if self._process else []
        if lost:
            self.name = f"this process, because {lost[0]} exists in no other"
        if lost or not self._process:
            self._found = partial(answer, job)
            return
        if not self._prepared:
            self._import([])
        sent = b"\n" + packed(replace(job, folders=tuple(folders)))
        since, size = time.perf_counter(), Path(job.path).stat().st_size
        asked = self._thread.submit(self._process.communicate, sent)
        self._found = partial(self._received, asked, since, size)

    def answer(self) -> Answer:
        """Return the answer, for which a process of its own has as long as it may take.

        Raises RepfuseError, with the exit code of a failed check, where there is none or the file could not be read.
        """
        assert self._found is not None
        found = self._found()
        if found.refused:
            what, why, hint = found.refused
            raise RepfuseError(
                "What was written cannot be read again; nothing was kept.",
                f"{what} {why}",
                hint or "Choose another --format, and please report it.",
                exit_code=EXIT_FAILED_CHECK,
            )
        return found

    def _received(self, asked: Future[tuple[bytes, bytes]], since: float, size: int) -> Answer:
        from repfuse.readback.reading import Answer, unpacked

        assert self._process is not None
        seconds = PATIENCE + size / BYTES_A_SECOND + SLOWER * (time.perf_counter() - since)
        try:
            data, _ = asked.result(seconds)
        except TimeoutError as error:
            raise self._failed(f"It did not answer within {seconds:.0f} s.") from error
        if code := self._process.returncode:
            raise self._failed(_died(code))
        with suppress(Exception):  # it is not what was agreed on, in whatever way
            if isinstance(found := unpacked(data), Answer):
                return found
        raise self._failed("What it answered is none.")

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
        return knows_a_script()
    finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
    return any(find is not None and find(package, None) is not None for find in finders)


# The process itself.


LOOKS = 1.0  # seconds between two looks at whether the parent is still there


def main() -> None:
    """Read one job, do it, and write the answer."""
    end_with_parent()
    gc.disable()  # this process ends before there is garbage to speak of
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # whatever the network's code prints is no part of the answer
        from repfuse.plans import Plan, reader_of
        from repfuse.readback.reading import answer, packed, unpacked  # takes its seconds while the parent writes

        for line in iter(sys.stdin.buffer.readline, b"\n"):
            needed = json.loads(line)
            sys.path[:] = needed["path"]
            for name in needed["modules"]:
                with suppress(Exception):  # of what is missing the job will tell
                    importlib.import_module(name)
            reader_of(Plan)  # of which a file of weights holds some
        out.write(packed(answer(unpacked(sys.stdin.buffer.read()))))
    sys.stderr.flush()
    os._exit(0)  # the parent waits for the end, and to take apart what was imported is a tenth of a second


def end_with_parent() -> None:
    """Let this process end with the one that started it, which may be killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
