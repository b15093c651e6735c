"""The report of a conversion as data. This is the one place that says what `OUT.report.json` holds.

Everything that repfuse prints as JSON has a ``kind`` and this ``schema``, which grows whenever a field changes its
meaning or goes away; new fields alone do not change it. It is read back here, too: anybody may have written it. And a
benchmark is held against an earlier one: did the fused network get slower?
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from repfuse.benching.results import Benchmark, Change, Measurement
from repfuse.checking.results import Drift, Equalization, Proof, Verification, Verified
from repfuse.checkpoint.files import read_json, replacing
from repfuse.errors import RepfuseError
from repfuse.health import Anomaly
from repfuse.plans import Count, Plan, Text, read_as
from repfuse.quantization import SiteKernels
from repfuse.report.tables import plural
from repfuse.wording import Result, first_line

SCHEMA = 1

Status = Literal["converted", "failed", "nothing-to-fuse", "planned"]


@dataclass(frozen=True)
class Environment:
    """The versions that the result depends on. ``platform`` is Python's name of the system and machine."""

    repfuse: str
    torch: str
    python: str
    platform: str

    def __str__(self) -> str:
        return f"repfuse {self.repfuse}, torch {self.torch}, Python {self.python}, {self.platform}"


@dataclass(frozen=True)
class Input:
    """The checkpoint read. ``model`` is how the network was built, None where the file holds the module itself, with
    ``model_args`` as --model-arg takes them: None where they have no such form.

    ``shapes`` and ``dtypes`` are those of the example inputs, ``input_origin`` says where they come from. Raises
    ValueError where there are not as many of one as of the other.
    """

    path: Text
    digest: Text
    format: str
    model: str | None
    shapes: tuple[tuple[Count, ...], ...]
    dtypes: tuple[Text, ...]
    input_origin: str
    model_args: tuple[Text, ...] | None = ()

    def __post_init__(self) -> None:
        if len(self.shapes) != len(self.dtypes):
            raise ValueError("it has not as many dtypes as shapes")


@dataclass(frozen=True)
class Output:
    """The checkpoint written, and the lines of Python that ``use`` it.

    ``verified`` says how the file was read again and run before it took its place.
    """

    path: str
    digest: str
    format: str
    verified: Verified | None = None
    use: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chosen:
    """What the user chose of what can be merged: the file of a plan, with its digest, and globs on module paths."""

    plan: str | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report(Result):
    """One conversion.

    ``status`` is ``planned`` where only a plan was asked for, ``failed`` where proof or drift did not pass: then
    nothing was written. ``seconds`` is the time since the command began, as a clock at the terminal shows it: to the
    written file, where there is one. ``equalization`` is what was rescaled, where that was asked for. ``timing`` is
    short: `repfuse bench` measures properly. ``notes`` are what the user must be told, ``health`` is what looks wrong
    in the weights that were read. ``chosen`` is None where nothing was left out on demand. ``command`` is what was
    typed, for a shell. ``quantization`` is what rounding to few bits leaves of the kernels, worst first.
    """

    status: Status
    environment: Environment
    command: str = ""
    input: Input
    output: Output | None = None
    chosen: Chosen | None = None
    seconds: float
    notes: tuple[str, ...] = ()
    health: tuple[Anomaly, ...] = ()
    plan: Plan
    proof: Proof | None = None
    equalization: Equalization | None = None
    drift: Drift | None = None
    timing: Benchmark | None = None
    quantization: tuple[SiteKernels, ...] = ()


def report_path(out: Path) -> Path:
    """Return where the report of ``out`` goes: fused.pt -> fused.pt.report.json, so that each file has its own."""
    return out.with_name(f"{out.name}.report.json")


def envelope(kind: str, data: dict[str, Any]) -> dict[str, Any]:
    """Return ``data`` as a document of its own; kinds are conversion, conversions, verification, benchmark,
    inspection, plan, refusals, findings.
    """
    return {"schema": SCHEMA, "kind": f"repfuse.{kind}", **data}


def to_json(data: dict[str, Any]) -> str:
    """Return strict JSON (no NaN, no infinity) with a final newline."""
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write(kind: str, data: dict[str, Any], path: Path) -> None:
    """Write a document as a whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(to_json(envelope(kind, data)), encoding="utf-8")


# What was printed, read back.


LARGEST = 64 * 2**20
"""Bytes; the reports of the largest networks have a few millions."""

HINT = "Give the report that `repfuse convert` wrote beside its result, or what --json printed or `bench --save` wrote."


@dataclass(frozen=True)
class Files:
    """The digests of the two checkpoints that a document is of."""

    original: str
    fused: str


@dataclass(frozen=True)
class ReadConversion(Report):
    """A conversion as it is told. Its plan has a reader of its own."""

    plan: Any = None


@dataclass(frozen=True)
class Told:
    """All that a page tells: a conversion with its plan, and what was measured of the two checkpoints later."""

    conversion: Report
    plan: Plan
    verification: Verification | None = None
    benchmarks: tuple[Benchmark, ...] = ()

    @property
    def timings(self) -> tuple[Benchmark, ...]:
        """The proper measurements; without any, the short one of the conversion."""
        short = (self.conversion.timing,) if self.conversion.timing else ()
        return self.benchmarks or short


KINDS: dict[str, Any] = {
    "repfuse.conversion": ReadConversion,
    "repfuse.inspection": ReadConversion,
    "repfuse.verification": Verification,
    "repfuse.benchmark": Benchmark,
}


def told(documents: Sequence[tuple[str, Any]]) -> Told:
    """Return what several documents, each with its name, tell of one conversion.

    Raises RepfuseError where one is not what repfuse prints, or not of the same checkpoints as the conversion.
    """
    found = [(name, data, _read(name, data)) for name, data in documents]
    conversions = [(name, data, entry) for name, data, entry in found if isinstance(entry, ReadConversion)]
    verifications = tuple(entry for *_, entry in found if isinstance(entry, Verification))
    if len(conversions) != 1 or len(verifications) > 1:
        what = f"These are {plural(len(conversions), 'conversion')} and {plural(len(verifications), 'verification')}."
        raise RepfuseError(what, "A page is of one conversion, and of one verification at most.", HINT)
    ((name, data, conversion),) = conversions
    for other, later, entry in found:
        if entry is not conversion:
            _check_files(other, later.get("files"), conversion)
    plan = _said(name, Plan.from_dict, data)
    benchmarks = tuple(entry for *_, entry in found if isinstance(entry, Benchmark))
    return Told(conversion, plan, next(iter(verifications), None), benchmarks)


def read_benchmark(path: Path) -> Benchmark:
    """Return the benchmark in a file. Raises RepfuseError where there is none."""
    found = _read(*read(path))
    if not isinstance(found, Benchmark):
        raise _unreadable(path, "It is no benchmark.")
    return found


def changes(now: Benchmark, then: Benchmark) -> list[Change]:
    """Return what changed at the settings that both runs have: by itself, and beside the original's times."""
    from repfuse.benching.timing import ratio_of_samples  # torch takes a second to import

    def by_setting(run: Benchmark) -> dict[tuple[object, ...], Measurement]:
        entries = run.measurements
        return {(each.runtime, each.shapes or run.shapes, each.batch_size, each.threads): each for each in entries}

    def beside(each: Measurement) -> list[float]:
        return [x / each.original.median for x in each.fused.times]

    known = by_setting(then)
    pairs = [(each, known[setting]) for setting, each in by_setting(now).items() if setting in known]
    return [
        Change(one, ratio_of_samples(one.fused.times, two.fused.times), ratio_of_samples(beside(one), beside(two)))
        for one, two in pairs
    ]


def compared(now: Benchmark, then: Benchmark, path: Path) -> list[Change]:
    """Return what changed since the run in the file at ``path``. Raises RepfuseError where it is of something else."""
    found = changes(now, then)
    if not found or (now.dtype, now.device) != (then.dtype, then.device):
        what = f"{path} holds no times to compare with."
        why = f"They are of {then.dtype} on {then.device}, or of other shapes, batch sizes, threads or runtimes."
        raise RepfuseError(what, why, "Time the same as then.")
    return found


def read(path: Path) -> tuple[str, Any]:
    """Return the name of a file and the JSON in it. Raises RepfuseError where it is none."""
    try:
        return str(path), read_json(path, LARGEST)
    except OSError as error:
        raise RepfuseError(f"{path} cannot be read.", error.strerror or str(error), HINT) from error
    except json.JSONDecodeError as error:
        raise _unreadable(path, f"line {error.lineno}, column {error.colno}: {error.msg}.") from error
    except ValueError as error:
        raise _unreadable(path, f"{first_line(error)}.") from error


def _read(name: str, data: Any) -> Any:
    if not isinstance(data, dict) or not isinstance(data.get("kind"), str):
        raise _unreadable(name, "It does not say what kind of document it is.")
    if data.get("schema") != SCHEMA:
        raise _unreadable(name, f"It was written by another version of repfuse: its schema is not {SCHEMA}.")
    if data["kind"] not in KINDS:
        raise _unreadable(name, f"It is {data['kind']}.")
    return _said(name, partial(read_as, KINDS[data["kind"]], strict=False), data)


def _said(name: str, reader: Callable[[Any], Any], data: Any) -> Any:
    """Return what a reader makes of a document, or say that it is none."""
    try:
        return reader(data)
    except RepfuseError as error:
        raise _unreadable(name, error.why) from error


def _check_files(name: str, said: Any, conversion: ReadConversion) -> None:
    """Raise RepfuseError where what a document says of its files is not of those of the conversion."""
    files = _said(name, partial(read_as, Files | None), said)
    hint = "Give what was printed of the very files of the conversion, as they are now."
    made = conversion.output.digest if conversion.output else ""
    if files is None:
        raise RepfuseError(f"{name} does not say of which files it is.", "", hint)
    if (files.original, files.fused) != (conversion.input.digest, made):
        raise RepfuseError(f"{name} is of other files than the conversion.", "Their digests differ.", hint)


def _unreadable(name: object, why: str) -> RepfuseError:
    return RepfuseError(f"{name} is not a report that this version of repfuse can read.", why, HINT)
