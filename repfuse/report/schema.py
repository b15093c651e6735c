"""The report of a conversion as data. This is the one place that says what `OUT.report.json` holds.

Everything that repfuse prints as JSON has a ``kind`` and this ``schema``, which grows whenever a field changes its
meaning or goes away; new fields alone do not change it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from repfuse.benching.results import Benchmark
from repfuse.checking.results import Drift, Equalization, Proof, Verified
from repfuse.health import Anomaly
from repfuse.jsonready import json_ready
from repfuse.plans import Count, Plan, Text
from repfuse.quantization import SiteKernels

SCHEMA = 1

Status = Literal["converted", "failed", "nothing-to-fuse", "planned"]


@dataclass(frozen=True)
class Environment:
    """The versions that the result depends on. ``platform`` is Python's name of the system and machine."""

    repfuse: str
    torch: str
    python: str
    platform: str


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


@dataclass(frozen=True)
class Report:
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
    input: Input
    plan: Plan
    seconds: float
    proof: Proof | None = None
    drift: Drift | None = None
    equalization: Equalization | None = None
    output: Output | None = None
    timing: Benchmark | None = None
    notes: tuple[str, ...] = ()
    health: tuple[Anomaly, ...] = ()
    chosen: Chosen | None = None
    command: str = ""
    quantization: tuple[SiteKernels, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        first = ("status", "environment", "command", "input", "output", "chosen", "seconds", "notes", "health")
        names = (*first, "plan", "proof", "equalization", "drift", "timing", "quantization")
        return {name: json_ready(getattr(self, name)) for name in names}


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
