"""A benchmark as a file, and against an earlier one: did the fused network get slower?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from repfuse.benching.results import Benchmark, Change, Measurement, Ratio
from repfuse.benching.statistics import ratio_of_samples
from repfuse.checkpoint.files import replacing
from repfuse.errors import RepfuseError
from repfuse.report.schema import envelope, to_json


def write_benchmark(benchmark: Benchmark, path: Path, of: dict[str, Any] | None = None) -> None:
    """Write a benchmark ``of`` some files as `repfuse bench --json` prints it, as a whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(to_json(envelope("benchmark", (of or {}) | benchmark.to_dict())), encoding="utf-8")


def changes(now: Benchmark, then: Benchmark) -> list[Change]:
    """Return what changed at the settings that both runs have."""
    known = _by_setting(then)
    pairs = [(each, known[setting]) for setting, each in _by_setting(now).items() if setting in known]
    return [
        Change(each, ratio_of_samples(each.fused.times, before.fused.times), _beside_original(each, before))
        for each, before in pairs
    ]


def _by_setting(run: Benchmark) -> dict[tuple[object, ...], Measurement]:
    entries = run.measurements
    return {(each.runtime, each.shapes or run.shapes, each.batch_size, each.threads): each for each in entries}


def compared(now: Benchmark, then: Benchmark, path: Path) -> list[Change]:
    """Return what changed since the run in the file at ``path``. Raises RepfuseError where it is of something else."""
    found = changes(now, then)
    if not found or (now.dtype, now.device) != (then.dtype, then.device):
        what = f"{path} holds no times to compare with."
        why = f"They are of {then.dtype} on {then.device}, or of other shapes, batch sizes, threads or runtimes."
        raise RepfuseError(what, why, "Time the same as then.")
    return found


def _beside_original(now: Measurement, then: Measurement) -> Ratio:
    one, other = ([x / each.original.median for x in each.fused.times] for each in (now, then))
    return ratio_of_samples(one, other)
