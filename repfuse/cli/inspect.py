"""`repfuse inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from repfuse.cli import options
from repfuse.cli.output import check_sources, check_targets, progress, show, show_json


def inspect(
    source: options.Checkpoint,
    *,
    model: options.Model = None,
    model_arg: options.ModelArg = None,
    weights: options.Weights = "auto",
    example: options.Input = None,
    policy: options.Merging = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    keep_class: options.KeepClass = None,
    keep_affine: options.KeepAffine = False,
    allow: options.Allow = None,
    trust: options.Trust = False,
    plan: Annotated[
        Path | None,
        options.output(
            "--plan",
            metavar="FILE",
            help="Write the plan here too: drop sites from it as you like, then `repfuse convert --plan FILE`.",
        ),
    ] = None,
    force: Annotated[bool, options.output("--force", help="Replace the plan FILE.")] = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """List what can be fused in a checkpoint, and what not and why.

    Nothing is written but the plan, with --plan.

    \b
    Examples:
      repfuse inspect model.pt
      repfuse inspect weights.safetensors --model torchvision:resnet18
      repfuse inspect model.pt --plan plan.json
    """
    if plan:
        check_targets((plan,), (source,), force=force)
    check_sources((source,))
    loading = options.for_load(model, model_arg, weights, example, allow, trust=trust)
    with progress(quiet=quiet) as update:
        chosen = options.wanted(policy, None, include, exclude, keep_class, keep_affine=keep_affine)
        from repfuse.cli.conversion import Request, run
        from repfuse.plan_file import write_plan
        from repfuse.report.convert_view import convert_view

        report = run(Request(source, None, loading, chosen, None, force=False), update)
    if plan:
        write_plan(report, plan)
    if as_json:
        show_json("inspection", report.to_dict())
    elif not quiet:
        show(convert_view(report, plan_path=str(plan or ""), verbose=verbose))
