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
    plural,
    shape,
    size,
    table,
)

if TYPE_CHECKING:
    from repfuse.benching.results import Benchmark, Measurement

FEW = 2  # times: below, a second decimal says something
STYLES = {"faster": GOOD, "slower": BAD, "no difference": UNSURE}


def bench_view(benchmark: Benchmark) -> Iterator[RenderableType]:
    """Yield the costs, the measurements, the warnings and one sentence per measurement."""
    shapes = ", ".join(shape(sizes) for sizes in benchmark.shapes)
    yield heading(f"Cost at {shapes} {benchmark.dtype}")
    yield _costs(benchmark)
    yield heading(f"Time of a call on {benchmark.device}")
    columns = (("Batch", NUMBER), ("Threads", NUMBER), ("Original", NUMBER), ("Fused", NUMBER), "Speed-up (95 %)")
    rows = (
        (
            str(each.batch_size),
            str(each.threads),
            *map(duration, (each.original.median, each.fused.median)),
            speedup(each),
        )
        for each in benchmark.measurements
    )
    yield table(columns, rows)
    if benchmark.cold:
        cold = benchmark.cold
        yield heading("The notebook's method: one cold call each")
        yield facts([("original", duration(cold.original)), ("fused", duration(cold.fused)), ("note", cold.note)])
    yield Text()
    telling = (entry for entry in benchmark.measurements if not entry.says_nothing)
    yield from notes(f"{_where(entry)}: {text}" for entry in telling for text in entry.warnings)
    for measurement in benchmark.measurements:
        yield Text(f"{speed(measurement)} at {_where(measurement)}", style=STYLES[measurement.verdict])


def speedup(measurement: Measurement) -> str:
    """Return ``2.31x (2.20 to 2.40)`` for a table: always the interval, and a number where one can stand for it."""
    if measurement.says_nothing:
        return "too noisy"
    interval = f"({measurement.low:.2f} to {measurement.high:.2f})"
    if measurement.verdict == "no difference":
        return f"no difference {interval}"
    return f"{measurement.speedup:.2f}x {interval}" if measurement.steady else f"unsteady {interval}"


def speed(entry: Measurement) -> str:
    """Return ``5.0x faster (4.9 to 5.1)``, or what else the timing says; where that is nothing, this alone."""
    if entry.says_nothing:
        return "timing too noisy to say anything"
    if entry.verdict == "no difference":
        return f"no difference in speed ({entry.low:.2f} to {entry.high:.2f})"
    times = (entry.speedup, entry.low, entry.high)
    factor, low, high = times if entry.verdict == "faster" else (1 / each for each in (times[0], times[2], times[1]))
    digits = 2 if factor < FEW else 1
    interval = f"({low:.{digits}f} to {high:.{digits}f})"
    known = f"{factor:.{digits}f}x {entry.verdict}" if entry.steady else f"{entry.verdict}, unsteady"
    return f"{known} {interval}"


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


def _where(entry: Measurement) -> str:
    return f"batch {entry.batch_size}, {plural(entry.threads, 'thread')}"
