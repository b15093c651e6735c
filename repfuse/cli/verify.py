"""`repfuse verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repfuse.checkpoint.shapes import parse_shapes
from repfuse.cli.options import (
    NETWORK,
    Allow,
    Atol,
    DataPath,
    Fused,
    Json,
    Limit,
    Mean,
    Model,
    ModelArg,
    Original,
    Quick,
    Quiet,
    Rtol,
    Std,
    Thorough,
    Trust,
    Verbose,
    Weights,
    check_real,
    effort_of,
    wishes_of,
)
from repfuse.cli.output import notes, progress, show, show_json
from repfuse.cli.pair import FusedModel, FusedModelArg, FusedWeights, Source, load_pair, sides


def verify(
    original: Original,
    fused: Fused,
    *,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="SHAPE",
            help="An example input, as 1x3x224x224: many kinds and sizes around it are tried; repeat it. Without it: "
            "what the checkpoint, its report or the model source knows.",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option("--seed", help="A seed of the random inputs; repeat it.")] = None,
    data: DataPath = None,
    mean: Mean = None,
    std: Std = None,
    limit: Limit = None,
    quick: Quick = False,
    thorough: Thorough = False,
    rtol: Rtol = None,
    atol: Atol = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            metavar="FILE",
            help="The plan that made FUSED: then each site is proven by itself, and each stored weight. Without it: "
            "the one in FUSED or in the report beside it, if they have one.",
        ),
    ] = None,
    model: Model = None,
    model_arg: ModelArg = None,
    fused_model: FusedModel = None,
    fused_model_arg: FusedModelArg = None,
    weights: Weights = "auto",
    fused_weights: FusedWeights = "auto",
    allow: Allow = None,
    trust: Trust = False,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Say whether two checkpoints compute the same, and how far apart they are.

    Both run on the same inputs: first in float64, where only the rounding of
    the stored weights may show, then in the dtype they are stored in. What
    rounding explains is measured; --rtol and --atol overrule it. Where repfuse
    wrote FUSED, its plan is known, and each site and weight is proven too.

    \b
    Examples:
      repfuse verify model.pt fused.pt
      repfuse verify model.pt fused.pt --data images.npz
      repfuse verify model.pt fused.pt --data val/ --limit 1000
      repfuse verify model.pt fused.pt --thorough
      repfuse verify model.pt fused.pt --rtol 1e-3 --atol 1e-5
      repfuse verify model.pt fused.pt --input 1x3x64x64 --input 4x3x224x224
      repfuse verify weights.pth fused.pth --model timm:repvgg_a0

    Exit codes: 0 same, 1 different, 2 could not tell.
    """
    effort = effort_of(quick=quick, thorough=thorough)
    wanted = [parse_shapes(shape) for shape in shapes or ()]
    check_real(data, mean, std, limit)
    sources = Source(model, model_arg, weights), Source(fused_model, fused_model_arg, fused_weights)
    example = shapes[0] if shapes else None
    both = sides((original, fused), *sources, example=example, allow=allow, trust=trust)
    with progress(quiet=quiet) as update:
        update("reading", 0.0)
        from repfuse.checking.runs import enough_threads
        from repfuse.checking.tolerances import tolerances
        from repfuse.checking.verification import verify as compare
        from repfuse.checkpoint.example import make_inputs
        from repfuse.data import prepare, read_data
        from repfuse.memory import keep_little
        from repfuse.networks import using_threads
        from repfuse.plan_file import known_plan
        from repfuse.report.verify_view import verify_view

        keep_little()
        tolerances(rtol, atol)  # whether they are sound is said before the files are read
        wishes = wishes_of(mean, std, limit)
        found = read_data(data) if data else None
        pair = load_pair(both)
        known = known_plan(*pair, plan)
        samples, labels = prepare(found, pair.original, wishes) if found else (None, None)
        threads = enough_threads(pair.original.module, pair.original.example_inputs)
    pair.notes(quiet=quiet)
    notes(fused, known.notes, quiet=quiet)
    notes(data, samples.notes if samples else (), quiet=quiet)
    with progress(quiet=quiet) as update, using_threads(threads):
        result = compare(
            pair.original.module,
            pair.fused.module,
            pair.original.example_inputs,
            plan=known.plan,
            further_examples=[make_inputs(each, pair.original.module) for each in wanted[1:]],
            seeds=seed or None,
            effort=effort,
            rtol=rtol,
            atol=atol,
            data=samples,
            labels=labels,
            progress=update,
        )
    if as_json:
        show_json("verification", result.to_dict())
    elif not quiet:
        show(verify_view(result, verbose=verbose))
    raise typer.Exit(result.exit_code)
