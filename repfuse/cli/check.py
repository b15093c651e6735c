"""`repfuse check`: a gate for CI. Each finding is a line, and makes the exit code 1."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from repfuse.cli import options, pair
from repfuse.cli.output import check_page, check_sources, notes, progress, show_json, write_page
from repfuse.errors import EXIT_FAILED_CHECK, RepfuseError

if TYPE_CHECKING:
    from repfuse.benching.results import Benchmark
    from repfuse.loading import Checkpoint
    from repfuse.progress import Progress


class Form(StrEnum):
    """How findings are written."""

    TEXT = "text"
    GITHUB = "github"


class Finding(NamedTuple):
    """What is wrong with a file, and by what it is found."""

    path: str
    kind: str
    said: str


def check(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL", show_default=False, help="The checkpoint that is deployed, or several."),
    ],
    *,
    original: Annotated[
        Path | None,
        typer.Option("--original", metavar="FILE", help="What MODEL was made from: they have to compute the same."),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--baseline", metavar="FILE", help="An earlier `repfuse bench ORIGINAL MODEL --save`: it may be no slower."
        ),
    ] = None,
    max_sites: Annotated[
        int, typer.Option("--max-sites", min=0, help="As many places may be left that could be merged.")
    ] = 0,
    max_time: Annotated[
        float, typer.Option("--max-time", min=0, help="Or as many predicted milliseconds of a call, on one core.")
    ] = 0.0,
    form: Annotated[
        Form, typer.Option("--format", help="How the findings are printed: github makes annotations of them.")
    ] = Form.TEXT,
    markdown: Annotated[
        Path | None,
        options.output("--markdown", metavar="OUT", help="Also write them as a comment for a pull request."),
    ] = None,
    force: Annotated[bool, options.output("--force", help="Replace OUT.")] = False,
    quick: options.Quick = False,
    thorough: options.Thorough = False,
    model: options.Model = None,
    model_arg: options.ModelArg = None,
    fused_model: pair.FusedModel = None,
    fused_model_arg: pair.FusedModelArg = None,
    weights: options.Weights = "auto",
    example: options.Input = None,
    allow: options.Allow = None,
    trust: options.Trust = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Fail where a checkpoint could be fused and is not, or is not what it was made from, or got slower.

    \b
    Examples:
      repfuse check model.pt
      repfuse check fused.pt --original model.pt
      repfuse check fused.pt --original model.pt --baseline speed.json
      repfuse check fused.pt --original model.pt --format github --markdown comment.md

    Exit codes: 0 nothing found, 1 a line for each finding, 2 bad input.
    """
    effort = options.effort_of(quick=quick, thorough=thorough)
    if baseline is not None and original is None:
        raise RepfuseError("A baseline is of two files.", "", "Give --original too.")
    if original is not None and len(sources) > 1:
        raise RepfuseError("Several files have not one original.", "", "Check them one by one.")
    if markdown:
        check_page("markdown", markdown, sources, force=force)
    of_fused, of_original = (fused_model, fused_model_arg, "auto"), (model, model_arg, weights)
    if original is None:
        check_sources(sources)
        loading = options.for_load(*(of_fused if fused_model else of_original), example, allow, trust=trust)
    else:
        sides = pair.sides((original, sources[0]), of_original, of_fused, example=example, allow=allow, trust=trust)
    found: list[Finding] = []
    with progress(quiet=quiet) as update:
        update("reading", 0.0)
        from repfuse.loading import load
        from repfuse.plan_file import said_beside
        from repfuse.report.reading import read_benchmark

        then = read_benchmark(baseline) if baseline else None
        for source in sources:
            both = None if original is None else pair.load_pair(*sides)
            fused = both.fused if both else load(source, **loading, said=said_beside(source))
            notes(source, fused.notes, quiet=quiet)
            found += [*_changed(fused), *_could_be_fused(fused, max_sites, max_time / 1e3)]
            if both is not None:
                found += _differs(both, effort, update, quiet=quiet)
                found += _slower(both, then, baseline, update) if then and baseline else []
    if markdown:
        write_page(_comment(found, sources), markdown)
    if as_json:
        show_json("findings", {"findings": [finding._asdict() for finding in found]})
    else:
        lines = [_line(each, form) for each in found] or [f"{', '.join(map(str, sources))}: nothing found"]
        sys.stdout.writelines(f"{line}\n" for line in lines)
    raise typer.Exit(EXIT_FAILED_CHECK if found else 0)


BYTES_PER_SECOND = 12e9
"""Of the core for which the law of cost counts bytes, see ``planning.cost``."""


def _changed(fused: Checkpoint) -> Iterator[Finding]:
    """Yield a finding where the file is not the one that was proven, be it by one bit."""
    from repfuse.plan_file import is_of_other_bytes

    if is_of_other_bytes(fused):
        yield Finding(
            str(fused.path), "changed", "it is not the file that the report beside it is of: convert it again"
        )


def _could_be_fused(fused: Checkpoint, sites: int, seconds: float) -> Iterator[Finding]:
    """Yield a finding where more is left to merge than these budgets allow."""
    from repfuse.planning.choosing import Choice, choose
    from repfuse.planning.cost import price
    from repfuse.report.tables import plural

    left = choose(fused.module, fused.example_inputs, Choice()).sites
    gain = sum(price(site.before) - price(site.after) for site in left) / BYTES_PER_SECOND
    if len(left) > sites and gain > seconds:
        places = f"{plural(len(left), 'place')} could be merged, about {gain * 1e3:.2g} ms a call"
        yield Finding(str(fused.path), "could-be-fused", f"{places}: repfuse convert {fused.path} FUSED")


def _differs(both: pair.Pair, effort: str, update: Progress, *, quiet: bool) -> Iterator[Finding]:
    from repfuse.checking.runs import enough_threads
    from repfuse.checking.verification import verify
    from repfuse.networks import using_threads
    from repfuse.plan_file import known_plan

    (original, fused), known = both, known_plan(*both)
    notes(fused.path, known.notes, quiet=quiet)
    with using_threads(enough_threads(original.module, original.example_inputs)):
        modules = (original.module, fused.module)
        result = verify(*modules, original.example_inputs, plan=known.plan, effort=effort, progress=update)
    if result.verdict != "same":
        yield Finding(str(fused.path), result.verdict, f"against {original.path}: {result.reason}")


def _slower(both: pair.Pair, then: Benchmark, baseline: Path, update: Progress) -> Iterator[Finding]:
    from repfuse.checkpoint.example import shapes_of
    from repfuse.report.bench_view import where
    from repfuse.report.reading import compared

    example = shapes_of(both.original.example_inputs, both.original.module)
    inputs = dict.fromkeys(entry.shapes for entry in then.measurements if entry.shapes)
    now = pair.time_pair(
        both,
        list(dict.fromkeys(entry.runtime for entry in then.measurements)),
        [[replace(known, sizes=sizes) for known, sizes in zip(example, each, strict=False)] for each in inputs],
        batch_sizes=None if inputs else list(dict.fromkeys(entry.batch_size for entry in then.measurements)),
        threads=list(dict.fromkeys(entry.threads for entry in then.measurements)),
        progress=update,
    )
    for change in compared(now, then, baseline):
        if change.slower:
            times = f"{change.ratio.value:.2f} times as long as in the baseline"
            yield Finding(str(both.fused.path), "slower", f"a call takes {times} at {where(change.now)}")


def _line(finding: Finding, form: Form) -> str:
    path, kind, said = finding
    line = " ".join(said.split())
    if form is Form.TEXT:
        return f"{path}: {kind}: {line}"
    return f"::error file={_escaped(path)},title=repfuse {kind}::{line.replace('%', '%25')}"


def _comment(found: list[Finding], sources: list[Path]) -> str:
    from repfuse.report.markdown import code, text
    from repfuse.report.tables import plural

    if not found:
        return f"**repfuse**: nothing to say of {', '.join(code(str(source)) for source in sources)}\n"
    lines = (f"- {code(path)} **{kind}**: {text(said)}\n" for path, kind, said in found)
    return "".join([f"**repfuse**: {plural(len(found), 'finding')}\n\n", *lines])


def _escaped(text: str) -> str:
    """Return text as a property of GitHub's workflow commands."""
    for one, other in (("%", "%25"), ("\r", "%0D"), ("\n", "%0A"), (":", "%3A"), (",", "%2C")):
        text = text.replace(one, other)
    return text
