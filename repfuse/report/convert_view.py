"""A conversion for people: the plan, then the facts, with the verdict last where the eye is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from repfuse.report.bench_view import speedup
from repfuse.report.health_view import health_view
from repfuse.report.numbers import change, duration, error, plural, shape
from repfuse.report.plan_view import plan_view, summary
from repfuse.report.schema import Chosen, Input, Report, Status
from repfuse.report.tables import BAD, GOOD, UNSURE, facts, heading, notes

if TYPE_CHECKING:
    from repfuse.benching.results import Benchmark
    from repfuse.proof.opinions import SecondOpinion
    from repfuse.proof.results import Proof
    from repfuse.verifying.results import Drift, Verified

DIGEST_SHOWN = len("sha256:") + 12
VERDICTS: dict[Status, tuple[str, str]] = {
    "converted": ("Converted and proven.", GOOD),
    "failed": ("Not converted: the check failed, and nothing was written.", BAD),
    "nothing-to-fuse": ("Nothing to fuse.", UNSURE),
    "planned": ("Nothing was written.", UNSURE),
}


def convert_view(report: Report, report_path: str = "", plan_path: str = "") -> Iterator[RenderableType]:
    """Yield the whole report; ``report_path`` is where it was saved as JSON, ``plan_path`` where its plan was."""
    yield from plan_view(report.plan)
    yield from health_view(report.health)
    yield heading("Result")
    yield facts(
        [
            ("input", file_line(report.input.path, report.input.format, report.input.digest)),
            ("example", example_line(report.input)),
            ("model", report.input.model or ""),
            ("chosen", chosen_line(report.chosen) if report.chosen else ""),
            ("plan", summary(report.plan)),
            ("proof", proof_line(report.proof) if report.proof else ""),
            ("probe", probe_line(report.probe) if report.probe else ""),
            ("drift", drift_line(report.drift) if report.drift else ""),
            ("timing", timing_line(report.timing) if report.timing else ""),
            ("output", file_line(*_output(report)) if report.output else ""),
            ("verified", verified_line(report.output.verified) if report.output and report.output.verified else ""),
            ("report", report_path if report.output else ""),
            ("written", plan_path),
            ("with", environment_line(report)),
        ]
    )
    yield from notes(report.notes)
    verdict, style = VERDICTS[report.status]
    if plan_path:
        verdict = f"The plan was written; `repfuse convert --plan {plan_path}` applies it."
    elif report.status == "nothing-to-fuse" and not report.output:
        verdict = f"{verdict} Nothing was written."
    yield Text(f"\n{verdict}", style=style)


def file_line(path: str, kind: str, digest: str) -> str:
    """Return ``PATH (FORMAT, DIGEST)``, of the digest so much that two files are told apart; the JSON has all of it."""
    return f"{path} ({kind}, {digest[:DIGEST_SHOWN]}...)"


def example_line(source: Input) -> str:
    """Return the example inputs and where they come from: ``1x3x224x224 float32 (from the checkpoint)``."""
    tensors = (f"{shape(sizes)} {dtype}" for sizes, dtype in zip(source.shapes, source.dtypes, strict=True))
    origin = {"given": "given", "guess": "a guess"}.get(source.input_origin, f"from the {source.input_origin}")
    return f"{', '.join(tensors)} ({origin})"


def chosen_line(chosen: Chosen) -> str:
    """Return what was chosen, as the options that say it."""
    plan = [f"--plan {chosen.plan}"] if chosen.plan else []
    globs = (f"--{name} {glob}" for name in ("include", "exclude") for glob in getattr(chosen, name))
    return " ".join([*plan, *globs])


def proof_line(proof: Proof) -> str:
    """Return the verdict in float64: the largest error, against which bound, of what and on how many inputs."""
    if not proof.passed:
        return f"FAILED: {proof.reason}"
    network = proof.network
    skipped = f" ({len(network.skipped)} more that not both are for)" if network.skipped else ""
    return (
        f"passed: relative error at most {error(proof.error)} in float64 (allowed {error(network.tolerance)}), each of "
        f"{plural(len(proof.sites), 'site')} alone and the whole network on {plural(len(network.compared), 'input')}"
        f"{skipped}; the weights to be stored are the proven ones, rounded once"
    )


def probe_line(probe: SecondOpinion) -> str:
    """Return the second opinion: the largest error, and how the channels were told apart."""
    if not probe.passed:
        return f"FAILED: {probe.reason}"
    whole = sum(site.exhaustive for site in probe.sites)
    rest = len(probe.sites) - whole
    how = f"{plural(whole, 'site')} exhaustively" + (f", {rest} by sketches" if rest else "")
    alone = f"; {plural(len(probe.stand_ins), 'module')} by probing alone" if probe.stand_ins else ""
    return f"passed: read off impulses, {how}; relative error at most {error(probe.error)} in float64{alone}"


def drift_line(drift: Drift) -> str:
    """Return what rounding did in the checkpoint's own dtype, beside what it did to the original already."""
    if not drift.measured or drift.problem or drift.worst is None:
        return f"{'FAILED' if drift.measured else 'not measured'}: {drift.problem}"
    worst = drift.worst
    return (
        f"{'passed' if drift.passed else 'FAILED'}: relative error {error(worst.fused.rms)} in {worst.dtype} "
        f"(the original's own {error(worst.own.rms)}, allowed {error(worst.allowed.rms)})"
    )


def verified_line(verified: Verified) -> str:
    """Return where the file itself was run, which shapes it takes, and how far it is from the original."""
    refused = f"; it does not take {', '.join(verified.refused)}" if verified.refused else ""
    return (
        f"in {verified.runtime} on {plural(len(verified.compared), 'input')}: relative error {error(verified.error)} "
        f"(the original's own {error(verified.own)}, allowed {error(verified.allowed)}); "
        f"it takes {', '.join(verified.shapes)}{refused}"
    )


def timing_line(timing: Benchmark) -> str:
    """Return the first measurement on one line."""
    first = timing.measurements[0]
    times = change(duration(first.original.median), duration(first.fused.median))
    where = f"batch {first.batch_size}, {plural(first.threads, 'thread')}, {timing.device}"
    return f"{times} a call: {speedup(first)} ({where}; `repfuse bench` measures longer)"


def environment_line(report: Report) -> str:
    """Return the versions, and how long the conversion took."""
    versions = report.environment
    return (
        f"repfuse {versions.repfuse}, torch {versions.torch}, Python {versions.python}, {versions.platform}; "
        f"took {duration(report.seconds)}"
    )


def _output(report: Report) -> tuple[str, str, str]:
    assert report.output is not None
    return report.output.path, report.output.format, report.output.digest
