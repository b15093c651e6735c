"""`repfuse verify`, which says whether two checkpoints compute the same, and `repfuse check`, a gate for CI."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from repfuse.benching.results import Benchmark
from repfuse.checkpoint.spec import parse_shapes
from repfuse.cli import options, pair
from repfuse.cli.output import check_page, check_sources, notes, progress, show, show_json, write_page
from repfuse.errors import EXIT_FAILED_CHECK, RepfuseError
from repfuse.plan_file import is_of_other_bytes, known_plan, said_beside
from repfuse.report.bench_view import where
from repfuse.report.schema import compared, read_benchmark
from repfuse.report.tables import plural
from repfuse.report.verify_view import verify_view
from repfuse.wording import Progress

if TYPE_CHECKING:
    from repfuse.loading import Checkpoint


def verify(
    original: options.Original,
    fused: options.Fused,
    *,
    shapes: list[str] | None = options.building(
        "--input",
        metavar="SHAPE",
        help="An example input, as 1x3x224x224: many kinds and sizes around it are tried; repeat it. Without it: "
        "what the checkpoint, its report or the model source knows.",
    ),
    seed: list[int] | None = options.option(help="A seed of the random inputs; repeat it."),
    real: options.RealInputs,
    bits: int | None = options.checking(
        metavar="N",
        min=2,
        max=16,
        help="Also round the weights of both networks to N bits, per tensor and per channel, and say what that "
        "does to the outputs of each (with --data: to the accuracy), and which layer costs most. It decides "
        "nothing: verdict and exit code stay what they are.",
    ),
    effort: options.Thoroughness,
    rtol: float | None = options.tolerance(
        metavar="NUMBER",
        help="Call the networks the same where |a - b| <= atol + rtol |a| for every element, in float64 and as "
        "stored, a being the original's. Without --atol, that is 0.",
    ),
    atol: float | None = options.tolerance(metavar="NUMBER", help="As --rtol. Without --rtol, that is 0."),
    plan: Path | None = options.option(
        metavar="FILE",
        help="The plan that made FUSED: then each site is proven by itself, and each stored weight. Without it: "
        "the one in FUSED or in the report beside it, if they have one.",
    ),
    networks: options.TwoNetworks,
    fused_weights: str = options.FUSED_WEIGHTS,
    code: options.Code,
    as_json: bool = options.JSON,
    verbose: bool = options.VERBOSE,
    quiet: bool = options.QUIET,
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
    settings = {"effort": effort.name, "rtol": rtol, "atol": atol, "seeds": seed or None, "bits": bits}
    wanted = [parse_shapes(shape) for shape in shapes or ()]
    both = pair.sides((original, fused), networks.both(shapes[0] if shapes else None, fused_weights), code)
    with progress(quiet=quiet) as update:
        update("reading", 0.0)
        from repfuse.checking.verification import tolerances
        from repfuse.checkpoint.build import make_inputs
        from repfuse.memory import keep_little

        keep_little()
        tolerances(rtol, atol)  # whether they are sound is said before the files are read
        prepared = real.read()
        loaded = pair.load_pair(*both)
        known = known_plan(*loaded, plan)
        samples, labels = prepared(loaded.original) if prepared else (None, None)
    loaded.notes(quiet=quiet)
    notes(fused, known.notes, quiet=quiet)
    notes(real.data, samples.notes if samples else (), quiet=quiet)
    with progress(quiet=quiet) as update:
        further = [make_inputs(each, loaded.original.module) for each in wanted[1:]]
        given: dict[str, Any] = {**settings, "further_examples": further, "data": samples, "labels": labels}
        result = pair.compare_pair(loaded, known.plan, **given, progress=update)
    if as_json:
        show_json("verification", loaded.files | result.to_dict())
    elif not quiet:
        show(verify_view(result, verbose=verbose))
    raise typer.Exit(result.exit_code)


# The gate: each finding is a line, and makes the exit code 1.


class Style(StrEnum):
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
    original: Path | None = options.option(
        metavar="FILE", help="What MODEL was made from: they have to compute the same."
    ),
    baseline: Path | None = options.option(
        metavar="FILE", help="An earlier `repfuse bench ORIGINAL MODEL --save`: it may be no slower."
    ),
    max_sites: int = options.option(default=0, min=0, help="As many places may be left that could be merged."),
    max_time: float = options.option(
        default=0.0, min=0, help="Or as many predicted milliseconds of a call, on one core."
    ),
    form: Style = options.option(
        "--format", default=Style.TEXT, help="How the findings are printed: github makes annotations of them."
    ),
    markdown: Path | None = options.output(metavar="OUT", help="Also write them as a comment for a pull request."),
    force: bool = options.output(default=False, help="Replace OUT."),
    effort: options.Thoroughness,
    networks: options.TwoNetworks,
    example: str | None = options.building("--input", metavar="SHAPE", help=options.INPUT),
    code: options.Code,
    as_json: bool = options.JSON,
    quiet: bool = options.QUIET,
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
    tried = effort.name
    if baseline is not None and original is None:
        raise RepfuseError("A baseline is of two files.", "", "Give --original too.")
    if original is not None and len(sources) > 1:
        raise RepfuseError("Several files have not one original.", "", "Check them one by one.")
    check_page(markdown, sources, "markdown", force=force)
    of_both = networks.both(example)
    if original is None:
        check_sources(sources)
        loading = of_both[1 if networks.fused_model else 0].loading(code)
    else:
        sides = pair.sides((original, sources[0]), of_both, code)
    found: list[Finding] = []
    with progress(quiet=quiet) as update:
        update("reading", 0.0)
        from repfuse.loading import load

        then = read_benchmark(baseline) if baseline else None
        for source in sources:
            both = None if original is None else pair.load_pair(*sides)
            fused = both.fused if both else load(source, **loading, said=said_beside(source))
            notes(source, fused.notes, quiet=quiet)
            if is_of_other_bytes(fused):
                found.append(Finding(str(fused.path), "changed", CHANGED))
            found += _could_be_fused(fused, max_sites, max_time / 1e3)
            if both is not None:
                found += _differs(both, tried, update, quiet=quiet)
                found += _slower(both, then, baseline, update) if then and baseline else []
    if markdown:
        write_page(_comment(found, sources), markdown)
    if as_json:
        show_json("findings", {"findings": [finding._asdict() for finding in found]})
    else:
        lines = [_line(each, form) for each in found] or [f"{', '.join(map(str, sources))}: nothing found"]
        sys.stdout.writelines(f"{line}\n" for line in lines)
    raise typer.Exit(EXIT_FAILED_CHECK if found else 0)


CHANGED = "it is not the file that the report beside it is of: convert it again"
BYTES_PER_SECOND = 12e9
"""Of the core for which the law of cost counts bytes, see ``planning.cost``."""


def _could_be_fused(fused: Checkpoint, sites: int, seconds: float) -> Iterator[Finding]:
    """Yield a finding where more is left to merge than these budgets allow."""
    from repfuse.planning.cost import price
    from repfuse.planning.replaying import Choice, choose

    left = choose(fused.module, fused.example_inputs, Choice()).sites
    gain = sum(price(site.before) - price(site.after) for site in left) / BYTES_PER_SECOND
    if len(left) > sites and gain > seconds:
        places = f"{plural(len(left), 'place')} could be merged, about {gain * 1e3:.2g} ms a call"
        yield Finding(str(fused.path), "could-be-fused", f"{places}: repfuse convert {fused.path} FUSED")


def _differs(both: pair.Pair, effort: str, update: Progress, *, quiet: bool) -> Iterator[Finding]:
    known = known_plan(*both)
    notes(both.fused.path, known.notes, quiet=quiet)
    result = pair.compare_pair(both, known.plan, effort=effort, progress=update)
    if result.verdict != "same":
        yield Finding(str(both.fused.path), result.verdict, f"against {both.original.path}: {result.reason}")


def _slower(both: pair.Pair, then: Benchmark, baseline: Path, update: Progress) -> Iterator[Finding]:
    from repfuse.checkpoint.build import shapes_of

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


def _line(finding: Finding, form: Style) -> str:
    path, kind, said = finding
    line = " ".join(said.split())
    if form is Style.TEXT:
        return f"{path}: {kind}: {line}"
    for one, other in (("%", "%25"), ("\r", "%0D"), ("\n", "%0A"), (":", "%3A"), (",", "%2C")):
        path = path.replace(one, other)  # a property of GitHub's workflow commands
    return f"::error file={path},title=repfuse {kind}::{line.replace('%', '%25')}"


def _comment(found: list[Finding], sources: list[Path]) -> str:
    from repfuse.report.page import code, text

    if not found:
        return f"**repfuse**: nothing to say of {', '.join(code(str(source)) for source in sources)}\n"
    lines = (f"- {code(path)} **{kind}**: {text(said)}\n" for path, kind, said in found)
    return "".join([f"**repfuse**: {plural(len(found), 'finding')}\n\n", *lines])
