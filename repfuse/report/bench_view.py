"""A benchmark for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from repfuse.benching.results import COLD_NOTE, Benchmark, Change, Experiment, Measurement, Ratio, Runtime, SiteTiming
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
    interval,
    notes,
    percent,
    plural,
    shape,
    size,
    table,
    times,
)

STYLES = {"faster": GOOD, "slower": BAD, "no difference": UNSURE}


def bench_view(benchmark: Benchmark) -> Iterator[RenderableType]:
    """Yield the costs, the measurements, the warnings and one sentence per measurement."""
    shapes = ", ".join(shape(sizes) for sizes in benchmark.shapes)
    yield heading(f"Cost at {shapes} {benchmark.dtype}")
    yield _costs(benchmark)
    yield heading(f"Time of a call on {benchmark.device}")
    yield from _times(benchmark.measurements)
    if benchmark.sites:
        yield from _sites(benchmark.sites)
    if cold := benchmark.cold:
        yield heading("The notebook's method: one cold call each")
        yield facts([("original", duration(cold.original)), ("fused", duration(cold.fused)), ("note", cold.note)])
    yield Text()
    yield from notes(f"not timed in {reason}" for reason in benchmark.left_out)
    telling = (entry for entry in benchmark.measurements if not entry.says_nothing)
    yield from notes(f"{where(entry)}: {text}" for entry in telling for text in entry.warnings)
    for measurement in benchmark.measurements:
        yield Text(f"{speed(measurement)} at {where(measurement)}", style=STYLES[measurement.verdict])


def notebook_view(found: Sequence[Experiment]) -> Iterator[RenderableType]:
    """Yield the notebook's experiment: what it would claim, and what holds."""
    yield heading("conv3(x) + conv1(x) + x as one convolution: how many times as fast")
    columns = ("Input", ("One cold call", NUMBER), ("Warm (95 %)", NUMBER), ("Without padding='same'", NUMBER))
    rows = ((shape(each.shape), times(each.cold), ratio(each.warm), ratio(each.integers)) for each in found)
    yield table(columns, rows)
    yield from notes([COLD_NOTE])


def speedup(measurement: Measurement) -> str:
    """Return ``2.31x (2.20 to 2.40)`` for a table: the interval wherever it says something."""
    known = f"{gain(measurement)} ({interval(measurement.low, measurement.high)})"
    return gain(measurement) if measurement.says_nothing else known


def gain(entry: Measurement) -> str:
    """Return ``2.31x``, or why no number can stand for the interval."""
    if entry.says_nothing:
        return "too noisy"
    if entry.verdict == "no difference":
        return entry.verdict
    return times(entry.speedup) if entry.steady else "unsteady"


def speed(entry: Measurement) -> str:
    """Return ``5.0x faster (4.9 to 5.1)``, or what else the timing says; where that is nothing, this alone."""
    if entry.says_nothing:
        return "timing too noisy to say anything"
    if entry.verdict == "no difference":
        return f"no difference in speed ({entry.low:.2f} to {entry.high:.2f})"
    known = (entry.speedup, entry.low, entry.high)
    factor, low, high = known if entry.verdict == "faster" else (1 / each for each in (known[0], known[2], known[1]))
    digits = 2 if factor < 2 else 1  # below, a second decimal says something
    said = f"{factor:.{digits}f}x {entry.verdict}" if entry.steady else f"{entry.verdict}, unsteady"
    return f"{said} ({low:.{digits}f} to {high:.{digits}f})"


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


def _times(entries: Sequence[Measurement]) -> Iterator[RenderableType]:
    several = any(entry.runtime != Runtime.EAGER for entry in entries)
    first = 0 if several else 1
    sizes = "Input" if any(entry.shapes for entry in entries) else ("Batch", NUMBER)
    columns = ("Runtime", sizes, ("Threads", NUMBER), ("Original", NUMBER), ("Fused", NUMBER))[first:]

    def row(entry: Measurement, *said: str) -> tuple[str, ...]:
        return (entry.runtime, _inputs(entry), str(entry.threads), *said)[first:]

    times = [row(each, duration(each.original.median), duration(each.fused.median), speedup(each)) for each in entries]
    yield table((*columns, "Speed-up (95 %)"), times)
    known = [entry for entry in entries if entry.fused.of_machine is not None]
    if known:
        yield heading("Share of the speed of a plain matrix product, in the same rounds")
        shares = []
        for each in known:
            over = [ratio(each.over_eager) if each.over_eager else ""] if several else []
            shares.append(row(each, percent(each.original.of_machine), percent(each.fused.of_machine), *over))
        yield table((*columns, *(["Fused over eager original"] if several else [])), shares)


def _sites(sites: Sequence[SiteTiming]) -> Iterator[RenderableType]:
    """Yield the places by what they gain, and how much of that is the network's."""
    yield heading("In eager mode, each place by itself and what the network gains by it, most first")
    columns = ("Place", ("Before", NUMBER), ("After", NUMBER), ("Predicted", NUMBER), ("Measured", NUMBER))
    ordered = sorted(sites, key=lambda site: -site.gain.value if site.gain else 0.0)
    yield table((*columns, "Gain (95 %)"), map(_site, ordered))
    alone = sum(site.before - site.after for site in sites)
    gained = sum(site.gain.value for site in sites if site.gain)
    yield Text(f"  With all of them the network gains {duration(gained)} a call; alone they gain {duration(alone)}.")


def _site(site: SiteTiming) -> tuple[str, ...]:
    predicted = NOTHING if site.predicted is None else f"{site.predicted:.1f}x"
    both = (duration(site.before), duration(site.after))
    gain = site.gain
    gained = f"{duration(gain.value)} ± {duration((gain.high - gain.low) / 2)}" if gain else NOTHING
    return (site.path, *both, predicted, f"{site.speedup.value:.1f}x", gained)


def changes_view(changes: Sequence[Change]) -> Iterator[RenderableType]:
    """Yield what became of the fused network's times since an earlier run."""
    yield heading("Since the earlier run, the fused network's time")
    for change in changes:
        beside = f"{ratio(change.beside_original)} beside the original's"
        text = f"  {ratio(change.ratio)}, {beside}, at {where(change.now)}"
        yield Text(text, style=BAD if change.slower else "")
    slower = sum(change.slower for change in changes)
    verdict = f"slower at {plural(slower, 'setting')}" if slower else "no slower"
    yield Text(f"\n{verdict.capitalize()} than then", style=BAD if slower else GOOD)


def ratio(found: Ratio) -> str:
    """Return ``2.31x (2.20 to 2.40)``."""
    return f"{times(found.value)} ({interval(found.low, found.high)})"


def where(entry: Measurement) -> str:
    """Return the setting of a measurement: ``batch 1, 2 threads in onnxruntime``."""
    within = "" if entry.runtime == Runtime.EAGER else f" in {entry.runtime}"
    sizes = f"batch {entry.batch_size}" if not entry.shapes else _inputs(entry)
    return f"{sizes}, {plural(entry.threads, 'thread')}{within}"


def _inputs(entry: Measurement) -> str:
    """Return the shapes of the inputs, or the batch size, where that is what differs."""
    return ", ".join(map(shape, entry.shapes)) or str(entry.batch_size)
