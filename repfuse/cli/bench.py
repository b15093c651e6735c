"""`repfuse bench`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import typer

from repfuse.benching.results import Change, Runtime
from repfuse.checkpoint.spec import parse_shapes
from repfuse.cli import options, pair
from repfuse.cli.output import check_targets, progress, show, show_json
from repfuse.errors import EXIT_FAILED_CHECK, RepfuseError
from repfuse.plan_file import known_plan
from repfuse.plans import Plan
from repfuse.report.bench_view import bench_view, changes_view, notebook_view
from repfuse.report.schema import compared, read_benchmark, write

DTYPES = ("float32", "float16", "bfloat16", "float64")


def _experiment(asked: bool) -> None:
    """Do the notebook's experiment, and no more."""
    if not asked:
        return
    with progress(quiet=False) as update:
        from repfuse.benching.benchmark import experiments

        found = experiments(progress=update)
    show(notebook_view(found))
    raise typer.Exit


def bench(
    original: options.Original,
    fused: options.Fused,
    *,
    runtime: list[str] | None = options.option(
        metavar="NAME", help=f"Where to run both: {', '.join(Runtime)}; several by commas."
    ),
    batch_size: list[int] | None = options.option(
        min=1, help="Samples per call; repeat it. Without it: the example's."
    ),
    threads: list[int] | None = options.option(min=1, help="Threads of torch; repeat it. Without it: torch's choice."),
    rounds: int = options.option(default=40, min=8, help="Rounds in which both are timed."),
    seconds: float = options.option(
        default=10.0, min=0, help="At most this long for each input, batch size and thread count."
    ),
    budget: str | None = options.option(
        metavar="TIME", help="At most this long in all, as 30s or 2m, in place of --seconds."
    ),
    dtype: str | None = options.option(help=f"Time copies in this dtype, of {', '.join(DTYPES)}."),
    device: str | None = options.option(help="Time copies there, as on cuda. Without it: where each is."),
    channels_last: bool = options.option(
        default=False, help="Time copies whose images and kernels have their channels last."
    ),
    sites: bool = options.option(
        default=False, help="Also time each merged place in eager mode: by itself, and what the network gains by it."
    ),
    save: Path | None = options.option(metavar="FILE", help="Write the result there, for a later --compare."),
    compare: Path | None = options.option(
        metavar="FILE",
        help="Against an earlier --save: exit code 1 where FUSED got slower, beyond both intervals and by more "
        "than the original did.",
    ),
    cold: bool = options.option(
        default=False, help="Also show the notebook's method: one cold call each, no measurement."
    ),
    _notebook: bool = options.option(
        "--notebook",
        default=False,
        is_eager=True,
        callback=_experiment,
        help="Alone: the experiment that repfuse began with, as it was done there and as it should be.",
    ),
    networks: options.TwoNetworks,
    fused_weights: str = options.FUSED_WEIGHTS,
    example: list[str] | None = options.building(
        "--input", metavar="SHAPE", help=f"{options.INPUT} Repeat it to time several."
    ),
    code: options.Code,
    as_json: bool = options.JSON,
    quiet: bool = options.QUIET,
) -> None:
    """Time two checkpoints in one process, warm and interleaved.

    The speed-up is a ratio of medians with a 95 % bootstrap interval; where
    that holds 1 there is no difference.

    \b
    Examples:
      repfuse bench model.pt fused.pt
      repfuse bench model.pt fused.pt --batch-size 1 --batch-size 32 --threads 1
      repfuse bench model.pt fused.pt --runtime eager,onnxruntime --threads 1
      repfuse bench model.pt fused.pt --save baseline.json
      repfuse bench model.pt fused.pt --compare baseline.json
    """
    runtimes = _runtimes(runtime or [])
    if budget is not None:
        settings = len(batch_size or [1]) * len(threads or [1]) * len(example or [1])
        seconds = _seconds(budget) / (settings + 2 * sites)
    if dtype is not None and dtype not in DTYPES:
        raise RepfuseError(f"There is no dtype {dtype!r} to time in.", f"There are {', '.join(DTYPES)}.", "Name one.")
    if sites and (dtype or device or channels_last):
        what = "--sites times the network as it is, and --dtype, --device and --channels-last time copies."
        raise RepfuseError(what, "", "Leave --sites out, or these.")
    if save is not None:
        check_targets([save], [original, fused], force=True)
    inputs = [parse_shapes(text) for text in dict.fromkeys(example or [])]
    both = pair.sides((original, fused), networks.both(example[0] if example else None, fused_weights), code)
    with progress(quiet=quiet) as update:
        update("reading", 0.0)
        import torch

        then = read_benchmark(compare) if compare else None
        loaded = pair.load_pair(*both)
    loaded.notes(quiet=quiet)
    plan = _plan(loaded) if sites else None
    with progress(quiet=quiet) as update:
        result = pair.time_pair(
            loaded,
            runtimes,
            inputs if len(inputs) > 1 else (),
            batch_sizes=batch_size,
            threads=threads,
            rounds=rounds,
            seconds=seconds,
            cold=cold,
            dtype=getattr(torch, dtype) if dtype else None,
            device=device,
            channels_last=channels_last,
            progress=update,
        )
        if plan is not None:
            from repfuse.benching.sites import time_sites
            from repfuse.networks import using_threads

            those = loaded.original.module, loaded.fused.module, plan, loaded.original.example_inputs
            with using_threads(result.measurements[0].threads):
                timed = time_sites(*those, seconds=seconds, progress=lambda done: update("places", done))
            result = replace(result, sites=timed)
    if save is not None:
        write("benchmark", loaded.files | result.to_dict(), save)
    if as_json:
        show_json("benchmark", loaded.files | result.to_dict())
    elif not quiet:
        show(bench_view(result))
    if then is not None and compare is not None:
        _say_changes(compared(result, then, compare), quiet=quiet or as_json)


def _plan(loaded: pair.Pair) -> Plan:
    """Return the plan by which FUSED was made. Raises RepfuseError where none is known."""
    known = known_plan(loaded.original, loaded.fused)
    if known.plan is None or not known.plan.sites:
        why = "; ".join(known.notes) or "neither the file nor a report beside it says what was merged"
        raise RepfuseError("The places that were merged are not known.", f"{why}.", "Leave --sites out.")
    return known.plan


def _say_changes(changes: Sequence[Change], *, quiet: bool) -> None:
    """Say how the fused network's times changed. Raises typer.Exit where it got slower."""
    if not quiet:
        show(changes_view(changes))
    if any(change.slower for change in changes):
        raise typer.Exit(EXIT_FAILED_CHECK)


def _runtimes(given: list[str]) -> tuple[str, ...]:
    """Return the runtimes that are named, by commas or one by one. Raises RepfuseError for another name."""
    names = [name.strip() for text in given for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in tuple(Runtime)]:
        raise RepfuseError(f"There is no runtime {unknown[0]!r}.", f"There are {', '.join(Runtime)}.", "Name one.")
    return tuple(dict.fromkeys(names))


def _seconds(text: str) -> float:
    """Return the seconds that a text as 30s, 2m or 90 means. Raises RepfuseError for another text."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("s", "m") else (text, "s")
    try:
        amount = float(number) * {"s": 1, "m": 60}[unit]
    except ValueError:
        amount = float("nan")
    if not 0 <= amount < float("inf"):
        raise RepfuseError(f"{text!r} is no time.", "", "Give seconds or minutes: --budget 30s, --budget 2m.")
    return amount
