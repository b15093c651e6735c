"""`repfuse convert`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from repfuse.checkpoint.formats import Format
from repfuse.cli import choosing, options
from repfuse.cli.output import check_sources, check_targets, progress, show, show_json
from repfuse.errors import EXIT_FAILED_CHECK
from repfuse.readback.process import Reader
from repfuse.report.schema import report_path


def convert(
    source: options.Checkpoint,
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="The file to write; --dry-run needs none.", show_default=False),
    ] = None,
    *,
    model: options.Model = None,
    model_arg: options.ModelArg = None,
    weights: options.Weights = "auto",
    example: options.Input = None,
    policy: choosing.Merging = None,
    plan: choosing.PlanIn = None,
    include: choosing.Include = None,
    exclude: choosing.Exclude = None,
    keep_class: choosing.KeepClass = None,
    allow: options.Allow = None,
    trust: options.Trust = False,
    file_format: Annotated[
        Format | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="pt (the network, pickled), pt2 (torch.export), safetensors, state-dict (weights alone) or onnx. "
            "Without it: as OUT's suffix says, else as IN is.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    keep_metadata: Annotated[
        bool,
        typer.Option(
            "--keep-metadata/--drop-metadata",
            help="Keep what a training checkpoint holds beside the network (epochs, settings, metrics), or write the "
            "network alone. The optimizer's state never fits a fused network, and goes. The notes name it all.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = True,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace OUT, and write it even if nothing was fused.", rich_help_panel=options.OUTPUT
        ),
    ] = False,
    quick: options.Quick = False,
    thorough: options.Thorough = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
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
      repfuse convert deployed.onnx merged.onnx
      repfuse convert last.ckpt fused.ckpt --model net.py:build --weights ema
      repfuse convert hf-hub:timm/repvgg_a0.rvgg_in1k fused.safetensors
      repfuse convert model.pt fused.pt --exclude head --exclude 'stages.3.*'
      repfuse convert model.pt fused.pt --plan plan.json

    Exit codes: 0 written, or nothing to fuse; 1 the check failed and nothing
    was written; 2 bad input.
    """
    if out is None and not dry_run:
        raise typer.BadParameter("give OUT, the file to write, or --dry-run.", param_hint="OUT")
    effort = options.effort_of(quick=quick, thorough=thorough)
    target = None if dry_run else out
    if target:
        check_targets((target, report_path(target)), (source, *([plan] if plan else [])), force=force)
    check_sources((source,))
    loading = options.for_load(model, model_arg, weights, example, allow, trust=trust)
    with Reader() if target else nullcontext() as reader, progress(quiet=quiet) as update:
        chosen = choosing.wanted(policy, plan, include, exclude, keep_class)
        from repfuse.cli.conversion import Request, run  # the reader imports torch by now, too
        from repfuse.report.convert_view import convert_view

        request = Request(source, target, loading, chosen, file_format, force, keep_metadata, effort)
        report = run(request, update, reader)
    if as_json:
        show_json("conversion", report.to_dict())
    elif not quiet:
        beside = str(report_path(target)) if target and report.output else ""
        show(convert_view(report, beside, verbose=verbose))
    raise typer.Exit(EXIT_FAILED_CHECK if report.status == "failed" else 0)
