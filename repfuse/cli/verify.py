"""`repfuse verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repfuse.checkpoint.spec import parse_shapes
from repfuse.cli import options, pair
from repfuse.cli.output import notes, progress, show, show_json


def verify(
    original: options.Original,
    fused: options.Fused,
    *,
    shapes: Annotated[
        list[str] | None,
        options.network(
            "--input",
            metavar="SHAPE",
            help="An example input, as 1x3x224x224: many kinds and sizes around it are tried; repeat it. Without it: "
            "what the checkpoint, its report or the model source knows.",
        ),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option("--seed", help="A seed of the random inputs; repeat it.")] = None,
    data: options.DataPath = None,
    mean: options.Mean = None,
    std: options.Std = None,
    limit: options.Limit = None,
    bits: Annotated[
        int | None,
        options.checking(
            "--bits",
            metavar="N",
            min=2,
            max=16,
            help="Also round the weights of both networks to N bits, per tensor and per channel, and say what that "
            "does to the outputs of each (with --data: to the accuracy), and which layer costs most. It decides "
            "nothing: verdict and exit code stay what they are.",
        ),
    ] = None,
    quick: options.Quick = False,
    thorough: options.Thorough = False,
    rtol: options.Rtol = None,
    atol: options.Atol = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            metavar="FILE",
            help="The plan that made FUSED: then each site is proven by itself, and each stored weight. Without it: "
            "the one in FUSED or in the report beside it, if they have one.",
        ),
    ] = None,
    model: options.Model = None,
    model_arg: options.ModelArg = None,
    fused_model: pair.FusedModel = None,
    fused_model_arg: pair.FusedModelArg = None,
    weights: options.Weights = "auto",
    fused_weights: pair.FusedWeights = "auto",
    allow: options.Allow = None,
    trust: options.Trust = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
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
      repfuse verify model.pt fused.pt --data val/ --bits 8
      repfuse verify model.pt fused.pt --thorough
      repfuse verify model.pt fused.pt --rtol 1e-3 --atol 1e-5
      repfuse verify model.pt fused.pt --input 1x3x64x64 --input 4x3x224x224
      repfuse verify weights.pth fused.pth --model timm:repvgg_a0

    Exit codes: 0 same, 1 different, 2 could not tell.
    """
    effort = options.effort_of(quick=quick, thorough=thorough)
    wanted = [parse_shapes(shape) for shape in shapes or ()]
    options.check_real(data, mean, std, limit)
    sources = (model, model_arg, weights), (fused_model, fused_model_arg, fused_weights)
    example = shapes[0] if shapes else None
    both = pair.sides((original, fused), *sources, example=example, allow=allow, trust=trust)
    with progress(quiet=quiet) as update:
        update("reading", 0.0)
        from repfuse.checking.runs import enough_threads
        from repfuse.checking.verification import tolerances
        from repfuse.checking.verification import verify as compare
        from repfuse.checkpoint.example import make_inputs
        from repfuse.data import Wishes, parse_numbers, prepare, read_data
        from repfuse.memory import keep_little
        from repfuse.networks import using_threads
        from repfuse.plan_file import known_plan
        from repfuse.report.verify_view import verify_view

        keep_little()
        tolerances(rtol, atol)  # whether they are sound is said before the files are read
        wishes = Wishes(parse_numbers(mean), parse_numbers(std), limit)
        found = read_data(data) if data else None
        loaded = pair.load_pair(*both)
        known = known_plan(*loaded, plan)
        samples, labels = prepare(found, loaded.original, wishes) if found else (None, None)
        threads = enough_threads(loaded.original.module, loaded.original.example_inputs)
    loaded.notes(quiet=quiet)
    notes(fused, known.notes, quiet=quiet)
    notes(data, samples.notes if samples else (), quiet=quiet)
    with progress(quiet=quiet) as update, using_threads(threads):
        result = compare(
            loaded.original.module,
            loaded.fused.module,
            loaded.original.example_inputs,
            plan=known.plan,
            further_examples=[make_inputs(each, loaded.original.module) for each in wanted[1:]],
            seeds=seed or None,
            effort=effort,
            rtol=rtol,
            atol=atol,
            data=samples,
            labels=labels,
            bits=bits,
            progress=update,
        )
    if as_json:
        show_json("verification", loaded.files | result.to_dict())
    elif not quiet:
        show(verify_view(result, verbose=verbose))
    raise typer.Exit(result.exit_code)
