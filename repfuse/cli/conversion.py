"""The steps of `repfuse convert` and `repfuse inspect` between the options and what is shown."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repfuse.benching import bench
from repfuse.checkpoint.atomic import replacing
from repfuse.cli.target import report_path
from repfuse.converting import convert
from repfuse.loading import Checkpoint, load, save
from repfuse.planning.choosing import choose
from repfuse.plans import Plan
from repfuse.report.build import environment, input_of, output_of
from repfuse.report.schema import Report, Status, envelope, to_json

if TYPE_CHECKING:
    from torch import nn

    from repfuse.cli.choosing import Wanted
    from repfuse.cli.output import Progress

TIMING_SECONDS = 1.0


@dataclass(frozen=True)
class Job:
    """What to convert and where to; ``loading`` is for repfuse.load. ``out`` is None in a dry run."""

    source: Path
    out: Path | None
    loading: dict[str, Any]
    wanted: Wanted
    format: str | None
    force: bool


def run(job: Job, progress: Progress) -> Report:
    """Do all of it, and return the report, which is also written beside the result."""
    progress("reading", 0.0)
    checkpoint = _loaded(job)
    if job.out is None:
        return _planned(checkpoint, job.wanted)
    report, module = _proven(checkpoint, job.wanted, progress)
    if report.status == "failed" or (report.status == "nothing-to-fuse" and not job.force):
        return report
    progress("timing", 0.7)
    timing = bench(checkpoint.module, module, checkpoint.example_inputs, seconds=TIMING_SECONDS)
    progress("writing", 0.9)
    saved = save(checkpoint, module, job.out, plan=report.plan, format=job.format, force=job.force)
    report = replace(report, timing=timing, output=output_of(saved), notes=(*report.notes, *saved.notes))
    _write(report, report_path(job.out))
    return report


def _loaded(job: Job) -> Checkpoint:
    """Load the checkpoint, with the input that was given for the plan; notes say what the plan was made for."""
    file = job.wanted.file
    given = file.example if file and job.loading["input"] is None else None
    checkpoint = load(job.source, **job.loading | ({"input": given} if given else {}))
    notes = [f"the input {given} is that of the plan"] if given else []
    if file and file.digest and file.digest != checkpoint.digest:
        notes.append(f"the plan was made for another file, {file.made_for}: its sites are merged with these weights")
    return replace(checkpoint, notes=(*checkpoint.notes, *notes))


def _planned(checkpoint: Checkpoint, wanted: Wanted) -> Report:
    started = time.perf_counter()
    found = choose(checkpoint.module, checkpoint.example_inputs, wanted.choice)
    status: Status = "planned" if found.sites else "nothing-to-fuse"
    return _report(status, checkpoint, found, wanted, time.perf_counter() - started)


def _proven(checkpoint: Checkpoint, wanted: Wanted, progress: Progress) -> tuple[Report, nn.Module]:
    started = time.perf_counter()
    conversion = convert(
        checkpoint, progress=lambda stage, fraction: progress(stage, 0.1 + 0.6 * fraction), **vars(wanted.choice)
    )
    status: Status = "failed" if not conversion.passed else "converted" if conversion.plan.sites else "nothing-to-fuse"
    report = _report(status, checkpoint, conversion.plan, wanted, time.perf_counter() - started)
    return replace(report, proof=conversion.proof, drift=conversion.drift), conversion.module


def _report(status: Status, checkpoint: Checkpoint, found: Plan, wanted: Wanted, seconds: float) -> Report:
    source = input_of(checkpoint)
    return Report(status, environment(), source, found, seconds, notes=checkpoint.notes, chosen=wanted.chosen)


def _write(report: Report, path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text(to_json(envelope("conversion", report.to_dict())), encoding="utf-8")
