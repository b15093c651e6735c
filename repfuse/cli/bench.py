"""`repfuse bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from repfuse.cli import options, pair
from repfuse.cli.output import progress, show, show_json


def bench(
    original: options.Original,
    fused: options.Fused,
    *,
    batch_size: Annotated[
        list[int] | None,
        typer.Option("--batch-size", min=1, help="Samples per call; repeat it. Without it: the example's."),
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option("--threads", min=1, help="Threads of torch; repeat it. Without it: torch's choice."),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=4, help="Rounds in which both are timed.")] = 40,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0, help="At most this long for each batch size and thread count.")
    ] = 10.0,
    cold: Annotated[
        bool, typer.Option("--cold", help="Also show the notebook's method: one cold call each, no measurement.")
    ] = False,
    model: options.Model = None,
    model_arg: options.ModelArg = None,
    fused_model: pair.FusedModel = None,
    fused_model_arg: pair.FusedModelArg = None,
    weights: options.Weights = "auto",
    fused_weights: pair.FusedWeights = "auto",
    example: options.Input = None,
    allow: options.Allow = None,
    trust: options.Trust = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Time two checkpoints in one process, warm and interleaved.

    The speed-up is a ratio of medians with a 95 % bootstrap interval; where
    that holds 1 there is no difference.

    \b
    Examples:
      repfuse bench model.pt fused.pt
      repfuse bench model.pt fused.pt --batch-size 1 --batch-size 32 --threads 1
    """
    sources = (model, model_arg, weights), (fused_model, fused_model_arg, fused_weights)
    both = pair.sides((original, fused), *sources, example=example, allow=allow, trust=trust)
    with progress(quiet=quiet) as update:
        update("reading", 0.0)
        from repfuse.benching import bench as measure
        from repfuse.report.bench_view import bench_view
        from repfuse.saving import in_runtime

        loaded = pair.load_pair(*both)
    loaded.notes(quiet=quiet)
    with (
        progress(quiet=quiet) as update,
        in_runtime(loaded.original, loaded.original.module) as original_network,
        in_runtime(loaded.fused, loaded.fused.module) as fused_network,
    ):
        result = measure(
            original_network,
            fused_network,
            loaded.original.example_inputs,
            batch_sizes=batch_size,
            threads=threads,
            rounds=rounds,
            seconds=seconds,
            cold=cold,
            progress=update,
        )
    if as_json:
        show_json("benchmark", result.to_dict())
    elif not quiet:
        show(bench_view(result))
