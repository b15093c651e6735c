"""`repfuse convert`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from repfuse.checkpoint.formats import Format
from repfuse.cli.choosing import Exclude, Include, KeepClass, Merging, PlanIn, wanted
from repfuse.cli.options import (
    OUTPUT,
    Allow,
    Checkpoint,
    Input,
    Json,
    Model,
    ModelArg,
    Quick,
    Quiet,
    Thorough,
    Trust,
    Verbose,
    Weights,
    effort_of,
    for_load,
)
from repfuse.cli.output import check_sources, check_targets, progress, show, show_json
from repfuse.errors import EXIT_FAILED_CHECK
from repfuse.readback.process import Reader
from repfuse.report.schema import report_path


def convert(
    source: Checkpoint,
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="The file to write; --dry-run needs none.", show_default=False),
    ] = None,
    *,
    model: Model = None,
    model_arg: ModelArg = None,
    weights: Weights = "auto",
    example: Input = None,
    policy: Merging = None,
    plan: PlanIn = None,
    include: Include = None,
    exclude: Exclude = None,
    keep_class: KeepClass = None,
    allow: Allow = None,
    trust: Trust = False,
    file_format: Annotated[
        Format | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="pt (the network, pickled), pt2 (torch.export), safetensors, state-dict (weights alone) or onnx. "
            "Without it: as OUT's suffix says, else as IN is.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    keep_metadata: Annotated[
        bool,
        typer.Option(
            "--keep-metadata/--drop-metadata",
            help="Keep what a training checkpoint holds beside the network (epochs, settings, metrics), or write the "
            "network alone. The optimizer's state never fits a fused network, and goes. The notes name it all.",
            rich_help_panel=OUTPUT,
        ),
    ] = True,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace OUT, and write it even if nothing was fused.", rich_help_panel=OUTPUT),
    ] = False,
    quick: Quick = False,
    thorough: Thorough = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Fuse the branches of a checkpoint, prove the result and write it.

    Beside OUT goes its report: fused.pt, fused.pt.report.json. IN is never changed.

    \b
    Examples:
      repfuse convert model.pt fused.pt
      repfuse convert model.pt --dry-run --policy always
      repfuse convert weights.pth fused.pth --model timm:repvgg_a0
      repfuse convert weights.pth fused.pth --model net.py:build --model-arg n=3
      repfuse convert model.pt2 fused.pt2
      repfuse convert model.pt fused.onnx
      repfuse convert last.ckpt fused.ckpt --model net.py:build --weights ema
      repfuse convert hf-hub:timm/repvgg_a0.rvgg_in1k fused.safetensors
      repfuse convert model.pt fused.pt --exclude head --exclude 'stages.3.*'
      repfuse convert model.pt fused.pt --plan plan.json

    Exit codes: 0 written, or nothing to fuse; 1 the check failed and nothing
    was written; 2 bad input.
    """
    if out is None and not dry_run:
        raise typer.BadParameter("give OUT, the file to write, or --dry-run.", param_hint="OUT")
    effort = effort_of(quick=quick, thorough=thorough)
    target = None if dry_run else out
    if target:
        check_targets((target, report_path(target)), (source, *([plan] if plan else [])), force=force)
    check_sources((source,))
    loading = for_load(model, model_arg, weights, example, allow, trust=trust)
    with Reader() if target else nullcontext() as reader, progress(quiet=quiet) as update:
        chosen = wanted(policy, plan, include, exclude, keep_class)
        from repfuse.cli.conversion import Job, run  # the reader imports torch by now, too
        from repfuse.report.convert_view import convert_view

        job = Job(source, target, loading, chosen, file_format, force, keep_metadata, effort)
        report = run(job, update, reader)
    if as_json:
        show_json("conversion", report.to_dict())
    elif not quiet:
        beside = str(report_path(target)) if target and report.output else ""
        show(convert_view(report, beside, verbose=verbose))
    raise typer.Exit(EXIT_FAILED_CHECK if report.status == "failed" else 0)
