"""`repfuse convert ... --into`: the same command for each of many checkpoints, each in a process of its own.

The processes are forked from one that has imported torch and computed nothing, so a checkpoint costs its conversion and
no start. What is done already, by the same command with the same version, from the same bytes, is not done again: the
report beside a result says all that.
"""

from __future__ import annotations

import glob
import importlib
import io
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import typer

from repfuse.checkpoint.json_file import read_json
from repfuse.cli.output import progress, say, show, show_json
from repfuse.errors import EXIT_FAILED_CHECK, RepfuseError
from repfuse.readback.__main__ import end_with_parent
from repfuse.readback.process import FORKED
from repfuse.report.many_view import Result, Status, many_view, markdown
from repfuse.report.schema import report_path
from repfuse.report.tables import plural
from repfuse.version import __version__

if TYPE_CHECKING:
    from repfuse.progress import Progress

# Which checkpoints, and where their results go.


@dataclass(frozen=True)
class Task:
    """One checkpoint, and the file that is to be made of it."""

    source: Path
    target: Path


SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "safetensors": ".safetensors"}


def tasks(patterns: Sequence[str], into: Path, form: str | None) -> list[Task]:
    """Return a task for each file that the patterns name; below the folder that all have in common, the tree is kept.

    A result has the name of its source, with another suffix where it is to be in another format.

    Raises RepfuseError where a pattern names no file, or two results would be one file.
    """
    found: list[Path] = []
    for pattern in patterns:
        paths = sorted(Path(name) for name in glob.glob(pattern, recursive=True))  # noqa: PTH207 - relative or not
        files = [path for path in paths if path.is_file() and not path.name.endswith(".report.json")]
        if not files:
            here = f"You are in {Path.cwd()}; quote patterns, as 'runs/*/best.pt'."
            raise RepfuseError(f"There is no file {pattern}.", "", here)
        found += files
    sources = list(dict.fromkeys(found))
    common = Path(os.path.commonpath([path.absolute().parent for path in sources]))
    made: dict[Path, Path] = {}
    suffix = SUFFIXES.get(form) if form else None
    for source in sources:
        target = into / source.absolute().relative_to(common)
        target = target.with_suffix(suffix) if suffix else target
        if target in made:
            why = f"One is {made[target]}, the other {source}."
            raise RepfuseError(f"Two results would be {target}.", why, "Rename one of them, or convert it apart.")
        if target.absolute() == source.absolute():
            raise RepfuseError(f"{into} would be written over {source}.", "", "Give another folder.")
        made[target] = source
    return [Task(source, target) for target, source in made.items()]


def listed(paths: Sequence[str]) -> list[str]:
    """Return the lines of text files, empty ones and comments apart. Raises RepfuseError where one cannot be read."""
    found = []
    for path in paths:
        try:
            lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            hint = "Give a text file, a path a line."
            raise RepfuseError(f"The list {path} cannot be read.", str(error), hint) from error
        found += [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise RepfuseError(f"{', '.join(paths)} names no file.", "", "Give a text file, a path a line.")
    return found


# One of them.


def command_of(task: Task, options: Sequence[str]) -> list[str]:
    """Return the arguments of `repfuse` that convert this one checkpoint."""
    return ["convert", str(task.source), str(task.target), *options]


def _known(task: Task) -> dict[str, Any]:
    """Return the report beside the target, where that is the file of which it speaks; else nothing."""
    from repfuse.checkpoint.opening import digest_of

    try:
        report = read_json(report_path(task.target), LARGEST)
        made = report["output"]["digest"] == digest_of(task.target)
    except (OSError, ValueError, KeyError, TypeError, RepfuseError):
        return {}
    return dict(report) if made else {}


LARGEST = 2**28
"""Bytes of a report."""


def _is_done(report: dict[str, Any], task: Task, options: Sequence[str]) -> bool:
    """Whether by this report a command with these options, of this version, made the target of the source as it is."""
    from repfuse.checkpoint.opening import digest_of

    try:
        asked = [report["environment"]["repfuse"], *shlex.split(report["command"])[len(command_of(task, ())) + 1 :]]
        source = report["input"]["digest"]
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
    return asked == [__version__, *options] and source == digest_of(task.source)


class Ended(NamedTuple):
    """How a command ended: its exit code, what it printed, what it said of errors, and the bytes that it took."""

    code: int
    printed: str
    said: str
    peak: int


Invoke = Callable[[list[str]], Ended]
"""Runs `repfuse` with these arguments."""


def convert_one(task: Task, options: Sequence[str], invoke: Invoke) -> Result:
    """Run the command for one checkpoint, unless that is done, and say what came of it."""
    names, report = (str(task.source), str(task.target)), _known(task)
    if _is_done(report, task, options):
        return Result(*names, "skipped", "done already")
    if task.target.exists() and not report and "--force" not in options:
        return Result(*names, "failed", "There is another file in its place, which --force replaces.")
    began = time.perf_counter()
    task.target.parent.mkdir(parents=True, exist_ok=True)
    ended = invoke(command_of(task, options))
    spent = (time.perf_counter() - began, ended.peak)
    if ended.code:
        lines = (line.removeprefix("error: ").strip() for line in ended.said.splitlines() if line[:6] != "note: ")
        return Result(*names, "failed", " ".join(lines) or "the check failed, and nothing was written", *spent)
    made = json.loads(ended.printed)
    status: Status = "converted" if made["status"] == "converted" else "nothing-to-fuse"
    return Result(*names, status, _summary(made), *spent)


BESIDE = ("--json", "--force")
"""Options that the command of each has, too: what is told apart by the report may be replaced."""


def _here(arguments: list[str], threads: int, memory: int | None) -> Ended:
    """Run the command in this process, which is for it alone."""
    from repfuse import cli

    _limit(threads, memory)
    sys.argv, cli.STARTED = ["repfuse", *arguments], time.perf_counter()
    printed, said, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(printed), redirect_stderr(said):
        try:
            cli.app([*arguments, *BESIDE], prog_name="repfuse")
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
    return Ended(code, printed.getvalue(), said.getvalue(), _peak(children=False))


def _below(arguments: list[str], threads: int) -> Ended:
    """Run the command in a new process, which ends with this one: a Dask worker may have no other kind."""
    start = [sys.executable, "-c", "from repfuse.cli.many import as_child; as_child()", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(start, capture_output=True, text=True, check=False, env=environment)
    died = f"its process was killed by {signal.Signals(-done.returncode).name}" if done.returncode < 0 else ""
    return Ended(done.returncode, done.stdout, died or done.stderr, _peak(children=True))


def as_child() -> None:
    """Be `repfuse` in a process that ends with the one that started it."""
    from repfuse import cli

    end_with_parent()
    arguments = sys.argv[1:]
    sys.argv = ["repfuse", *arguments]
    cli.app([*arguments, *BESIDE], prog_name="repfuse")


def _summary(report: dict[str, Any]) -> str:
    if not report["proof"]:
        return "nothing to fuse"
    sites = len(report["plan"]["sites"])
    timed = report["timing"]["measurements"][0]
    return f"{sites} merged, exact to {report['proof']['error']:.1e}, {timed['speedup']:.2f}x ({timed['verdict']})"


def _limit(threads: int, memory: int | None) -> None:
    import torch

    torch.set_num_threads(threads)
    if memory is not None and sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))


def _peak(*, children: bool) -> int:
    """Return the most bytes that this process had, or one of its children, where the system counts that."""
    if sys.platform == "win32":
        return 0
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF)
    return used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# All of them.


class Way(NamedTuple):
    """How all are converted: the options of each, how many at once, threads and bytes of each, a Dask scheduler."""

    options: tuple[str, ...]
    jobs: int
    threads: int
    memory: int | None
    dask: str | None = None


OWN = {"into", "listed", "jobs", "job_memory", "dask", "markdown", "as_json", "quiet", "verbose"}
"""The options that are of all of them together."""


def way_of(context: typer.Context, *, jobs: int, memory: float | None, dask: str | None) -> Way:
    """Return how the command line wants all to be converted, each with the options that were typed."""
    for name, option in (("dry_run", "--dry-run"), ("report_to", "--report")):
        if context.params[name]:
            raise RepfuseError(f"{option} is for one checkpoint.", "", "Leave it out, or --into.")
    own = None if memory is None else int(memory * 2**30)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    return Way(tuple(_typed(context)), jobs, threads, own or _free_memory(jobs), dask)


def _typed(context: typer.Context) -> Iterator[str]:
    for param in context.command.params:
        source = context.get_parameter_source(param.name or "")
        if param.param_type_name != "option" or param.name in OWN or source is None or source.name != "COMMANDLINE":
            continue
        value, name = context.params[param.name], max(param.opts, key=len)
        if isinstance(value, bool):
            yield name if value else param.secondary_opts[0]
            continue
        for each in value if isinstance(value, list | tuple) else [value]:
            yield from (name, str(each))


def _free_memory(jobs: int) -> int | None:
    """Return the bytes that are free now, shared out; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    kib = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    return None if kib is None else kib * 1024 // jobs


def run(todo: Sequence[Task], way: Way, *, as_json: bool, as_markdown: bool, quiet: bool) -> NoReturn:
    """Convert all, say what became of them, and end the command: with exit code 1 where one failed."""
    began, results = time.perf_counter(), list[Result]()
    if not quiet:
        bound = "" if way.memory is None else f", at most {way.memory / 2**30:.1f} GiB each"
        say(f"{plural(len(todo), 'checkpoint')}, {way.jobs} at a time, {plural(way.threads, 'thread')} each{bound}")
    try:
        with progress(quiet=quiet) as update:
            for result in convert_all(todo, way, update):
                results.append(result)
                if result.status == "failed" and not quiet:
                    say(f"failed: {result.source}: {result.said}")
    finally:
        seconds = time.perf_counter() - began
        if as_json:
            show_json("conversions", {"seconds": seconds, "results": [asdict(each) for each in results]})
        elif as_markdown:
            sys.stdout.write(markdown(results, seconds))
        elif not quiet:
            show(many_view(results, seconds))
    raise typer.Exit(EXIT_FAILED_CHECK if any(result.status == "failed" for result in results) else 0)


PRELOADED = ("repfuse.cli.conversion", "repfuse.readback.reading", "repfuse.report.convert_view")


def convert_all(todo: Sequence[Task], way: Way, update: Progress) -> Iterator[Result]:
    """Yield what became of each, as they end. One that fails stops no other; on an interrupt, whole results stay."""
    if way.dask:
        yield from _on_dask(todo, way, update)
        return
    known = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if known else "spawn")
    if known:
        context.set_forkserver_preload(list(PRELOADED))
    waiting, running = list(reversed(todo)), dict[Connection, tuple[Any, Task]]()
    done, began = 0, time.perf_counter()
    try:
        while waiting or running:
            while waiting and len(running) < way.jobs:
                task = waiting.pop()
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=_in_process, args=(there, task, way))
                process.start()
                there.close()
                running[here] = process, task
            update(_under_way(running.values(), done, len(todo), time.perf_counter() - began), done / len(todo))
            for ended in wait(list(running)):
                assert isinstance(ended, Connection)
                process, task = running.pop(ended)
                yield _result(ended, process, task)
                done += 1
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()


def _in_process(answer: Connection, task: Task, way: Way) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that the user interrupts ends this
    end_with_parent()
    os.environ[FORKED] = "1"
    answer.send(convert_one(task, way.options, lambda arguments: _here(arguments, way.threads, way.memory)))
    answer.close()


def _result(answer: Connection, process: Any, task: Task) -> Result:
    try:
        found: Result = answer.recv()
    except EOFError:
        process.join()
        code = process.exitcode
        why = f"its process was killed by {signal.Signals(-code).name}" if code and code < 0 else "its process ended"
        memory = ", as a system does that runs out of memory" if code == -signal.SIGKILL else ""
        return Result(str(task.source), str(task.target), "failed", why + memory)
    process.join()
    return found


def _under_way(running: Iterable[tuple[Any, Task]], done: int, of: int, seconds: float) -> str:
    names = ", ".join(str(task.source) for _, task in running)
    left = f", about {seconds / done * (of - done):.0f} s left" if done else ""
    return f"{done} of {of}{left}: {names}"


def _on_dask(todo: Sequence[Task], way: Way, update: Progress) -> Iterator[Result]:
    """Let the workers of a Dask cluster do it, which see the same folders; a task whose worker is lost is run again."""
    try:
        distributed = importlib.import_module("distributed")
    except ImportError as error:
        hint = "Install it: pip install 'repfuse[dask]'."
        raise RepfuseError("--dask needs a package that is not installed.", "Missing: distributed.", hint) from error
    try:
        client = distributed.Client(way.dask, timeout="10s")
    except Exception as error:
        raise RepfuseError(f"There is no Dask scheduler at {way.dask}.", str(error), "Check the address.") from error
    with client:
        here = [Task(task.source.absolute(), task.target.absolute()) for task in todo]
        task_of = dict(zip(client.map(_on_worker, here, way=way, retries=2, pure=False), here, strict=True))
        left = set(task_of)
        while left:
            with suppress(TimeoutError):  # then it is asked again whether the scheduler is still there
                distributed.wait(left, timeout=PATIENCE, return_when="FIRST_COMPLETED")
            ended = {future for future in left if future.status in ("finished", "error")}
            if client.status != "running" or any(future.status in ("lost", "cancelled") for future in left - ended):
                what = f"The Dask scheduler at {way.dask} is lost."
                raise RepfuseError(what, "What is done is whole.", "Give the command again: it goes on from there.", 1)
            for future in ended:
                yield future.result() if future.status == "finished" else _lost(task_of[future], future.exception())
            left -= ended
            update(f"{len(todo) - len(left)} of {len(todo)} on {way.dask}", 1 - len(left) / len(todo))


PATIENCE = 2.0  # seconds between two looks at the scheduler


def _lost(task: Task, error: object) -> Result:
    return Result(str(task.source), str(task.target), "failed", f"{type(error).__name__}: {error}")


def _on_worker(task: Task, way: Way) -> Result:
    return convert_one(task, way.options, lambda arguments: _below(arguments, way.threads))
