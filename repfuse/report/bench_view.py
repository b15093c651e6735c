"""A benchmark for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from repfuse.report.tables import (
    BAD,
    GOOD,
    NOTHING,
    NUMBER,
    UNSURE,
    count,
    duration,
    facts,
    heading,
    notes,
    shape,
    size,
    table,
)

if TYPE_CHECKING:
    from repfuse.benching.results import Benchmark, ColdCalls, Measurement

STYLES = {"faster": GOOD, "slower": BAD, "no difference": UNSURE}


def bench_view(benchmark: Benchmark) -> Iterator[RenderableType]:
    """Yield the costs, the measurements, the warnings and one sentence per measurement."""
    shapes = ", ".join(shape(sizes) for sizes in benchmark.shapes)
    yield heading(f"Cost at {shapes} {benchmark.dtype}")
    yield _costs(benchmark)
    yield heading(f"Time of a call on {benchmark.device}")
    columns = (("Batch", NUMBER), ("Threads", NUMBER), ("Original", NUMBER), ("Fused", NUMBER), "Speed-up (95 %)")
    yield table(columns, (_row(measurement) for measurement in benchmark.measurements))
    if benchmark.cold:
        yield from _cold(benchmark.cold)
    yield Text()
    yield from notes(f"{_where(entry)}: {text}" for entry in benchmark.measurements for text in entry.warnings)
    for measurement in benchmark.measurements:
        yield Text(_sentence(measurement), style=STYLES[measurement.verdict])


def speedup(measurement: Measurement) -> str:
    """Return ``2.31x faster (2.20 to 2.40)``, or that there is no difference, always with the interval."""
    interval = f"({measurement.low:.2f} to {measurement.high:.2f})"
    if measurement.verdict == "no difference":
        return f"no difference {interval}"
    return f"{measurement.speedup:.2f}x {interval}" if measurement.steady else f"unsteady {interval}"


def _costs(benchmark: Benchmark) -> RenderableType:
    before, after = benchmark.before, benchmark.after
    rows = [
        ("parameters", count(before.parameters), count(after.parameters)),
        ("multiply-accumulates", count(before.macs), count(after.macs)),
        ("bytes of weights", size(before.weight_bytes), size(after.weight_bytes)),
        ("peak device memory", size(before.peak_bytes), size(after.peak_bytes)),
    ]
    known = (row for row in rows if row[1:] != (NOTHING, NOTHING))
    return table(("", ("Original", NUMBER), ("Fused", NUMBER)), known)


def _row(entry: Measurement) -> tuple[str, ...]:
    times = (duration(entry.original.median), duration(entry.fused.median))
    return (str(entry.batch_size), str(entry.threads), *times, speedup(entry))


def _cold(cold: ColdCalls) -> Iterator[RenderableType]:
    yield heading("The notebook's method: one cold call each")
    yield facts([("original", duration(cold.original)), ("fused", duration(cold.fused)), ("note", cold.note)])


def _sentence(entry: Measurement) -> str:
    where = _where(entry).capitalize()
    if entry.verdict == "no difference":
        return f"{where}: no difference that this measurement can see."
    if not entry.steady:
        return f"{where}: the fused network is {entry.verdict}; how much, this measurement is too unsteady to say."
    factor = entry.speedup if entry.verdict == "faster" else 1 / entry.speedup
    return f"{where}: the fused network is {factor:.2f} times {entry.verdict}."


def _where(entry: Measurement) -> str:
    return f"batch {entry.batch_size}, threads {entry.threads}"
