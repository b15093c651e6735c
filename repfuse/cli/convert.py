"""`repfuse convert`, and `repfuse inspect`, which does the first half of it."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from repfuse.checkpoint.formats import Format
from repfuse.cli import options
from repfuse.cli.output import (
    check_page,
    check_sources,
    check_targets,
    page_form,
    progress,
    show,
    show_json,
    write_pages,
)
from repfuse.errors import EXIT_FAILED_CHECK, RepfuseError
from repfuse.plan_file import read_plan_file, write_plan
from repfuse.plans import Policy
from repfuse.readback.process import Reader
from repfuse.report.convert_view import convert_view
from repfuse.report.schema import Told, report_path

many_option = partial(options.option, rich_help_panel="Many checkpoints")
int8 = partial(options.option, rich_help_panel="For quantisers")


def convert(
    context: typer.Context,
    source: options.Checkpoint,
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="The file to write; --dry-run needs none.", show_default=False),
    ] = None,
    others: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    *,
    network: options.OneNetwork,
    policy: Policy | None = options.POLICY,
    plan: Path | None = options.choosing(
        metavar="FILE",
        help="Merge exactly the sites of this plan, which `repfuse inspect --plan` wrote, and you may have dropped "
        "sites from.",
    ),
    merging: options.Merging,
    code: options.Code,
    file_format: Format | None = options.output(
        "--format",
        metavar="FORMAT",
        help="pt (the network, pickled), pt2 (torch.export), safetensors, state-dict (weights alone) or onnx. "
        "Without it: as OUT's suffix says, else as IN is.",
    ),
    keep_metadata: bool = options.output(
        "--keep-metadata/--drop-metadata",
        default=True,
        help="Keep what a training checkpoint holds beside the network (epochs, settings, metrics), or write the "
        "network alone. The optimizer's state never fits a fused network, and goes. The notes name it all.",
    ),
    force: bool = options.output(default=False, help="Replace OUT, and write it even if nothing was fused."),
    report_to: Path | None = options.output(
        "--report",
        metavar="PAGE",
        help="Also write the report as a page: PAGE.html (extra: report), or PAGE.md for a pull request. Of many "
        "it is the summary; as HTML it links to the page of each, beside its report.",
    ),
    effort: options.Thoroughness,
    tune: bool = options.choosing(
        default=False,
        help="Time the places where the prediction is in doubt both ways on this machine, as one layer and in "
        "parts, and keep the faster form.",
    ),
    equalize: bool = int8(
        default=False,
        help="Also rescale channels between layers, exactly, so that the result survives rounding to int8 better: "
        "across ReLU, pools, sums and the like. Better with --data.",
    ),
    powers_of_two: bool = int8(
        default=False, help="Let the scales be powers of two: the result computes the same bits."
    ),
    real: options.RealInputs,
    into: Path | None = many_option(
        metavar="FOLDER",
        help="Convert many: every file that IN names, a quoted pattern or several, into its place below FOLDER. "
        "What is done already is left alone.",
    ),
    listed: bool = many_option("--from", default=False, help="IN is a text file with a path a line."),
    jobs: int = many_option(default=1, min=1, help="How many at once."),
    job_memory: float | None = many_option(
        metavar="GIB", help="What each may take, on Linux. Without it: what is free, shared out."
    ),
    dask: str | None = many_option(
        metavar="ADDRESS",
        help="Let the workers of this Dask scheduler do it, as tcp://host:8786; they see the same folders.",
    ),
    dry_run: bool = options.option(default=False, help="Print the plan, write nothing."),
    as_json: bool = options.JSON,
    verbose: bool = options.VERBOSE,
    quiet: bool = options.QUIET,
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
      repfuse convert model.pt fused.pt --keep-affine --data train/ --limit 500
      repfuse convert model.pt fused.pt --equalize --data images/
      repfuse convert 'runs/*/best.pt' --into fused --jobs 2
      repfuse convert model.pt fused.pt --report fused.html

    Exit codes: 0 written, or nothing to fuse; 1 the check failed and nothing
    was written; 2 bad input.
    """
    if into is not None:
        from repfuse.cli import many

        given = [str(source), *([str(out)] if out else []), *(others or [])]
        way = many.way_of(context, jobs=jobs, memory=job_memory, dask=dask)
        check_page(report_to, (into,), force=force)
        named = many.tasks(many.lines_of(given) if listed else given, into, file_format)
        many.run(named, way, page=report_to, as_json=as_json, quiet=quiet)
    if others:
        raise typer.BadParameter("give one IN and one OUT, or --into FOLDER for many.", param_hint="OUT")
    if out is None and not dry_run:
        raise typer.BadParameter("give OUT, the file to write, or --dry-run.", param_hint="OUT")
    if tune and plan:
        what = "A plan says already what is merged, and --tune would measure it."
        raise RepfuseError(what, "", "Give one of them; the report of what was tuned holds its plan.")
    tried = effort.name
    if powers_of_two and not equalize:
        why, hint = "Nothing is to be equalised.", "Give --equalize too."
        raise RepfuseError("--powers-of-two is about how to equalise.", why, hint)
    target = None if dry_run else out
    if target:
        check_targets((target, report_path(target)), (source, *([plan] if plan else [])), force=force)
    check_page(report_to, [path for path in (source, target, plan) if path], force=force)
    check_sources((source,))
    loading = network.loading(code)
    libraries = {*(code.allow or ()), (network.model or "").partition(":")[0]}
    with Reader(named=libraries) if target else nullcontext() as reader, progress(quiet=quiet) as update:
        file = read_plan_file(plan) if plan else None
        from repfuse.cli.conversion import Request, run  # the reader imports torch by now, too

        request = Request(
            *(source, loading, merging.choice(policy, file), file, target, file_format, force, keep_metadata),
            *(tried, tune, equalize, powers_of_two, real.read()),
        )
        report = run(request, update, reader)
    if report_to:
        write_pages(Told(report, report.plan), [(page_form(report_to), report_to)])
    if as_json:
        show_json("conversion", report.to_dict())
    elif not quiet:
        show(convert_view(report, page=str(report_to or ""), verbose=verbose))
    raise typer.Exit(EXIT_FAILED_CHECK if report.status == "failed" else 0)


def inspect(
    source: options.Checkpoint,
    *,
    network: options.OneNetwork,
    policy: Policy | None = options.POLICY,
    merging: options.Merging,
    code: options.Code,
    plan: Path | None = options.output(
        metavar="FILE",
        help="Write the plan here too: drop sites from it as you like, then `repfuse convert --plan FILE`.",
    ),
    force: bool = options.output(default=False, help="Replace the plan FILE."),
    as_json: bool = options.JSON,
    verbose: bool = options.VERBOSE,
    quiet: bool = options.QUIET,
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
    loading = network.loading(code)
    with progress(quiet=quiet) as update:
        choice = merging.choice(policy)
        from repfuse.cli.conversion import Request, run

        report = run(Request(source, loading, choice), update)
    if plan:
        write_plan(report, plan)
    if as_json:
        show_json("inspection", report.to_dict())
    elif not quiet:
        show(convert_view(report, str(plan or ""), verbose=verbose))
