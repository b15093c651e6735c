"""A conversion for people: the plan, then the facts, with the verdict last where the eye is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from repfuse.report.bench_view import speedup
from repfuse.report.checks_view import checks_table, of_drift, of_proof, of_site_drift
from repfuse.report.plan_view import health_view, plan_view, summary
from repfuse.report.schema import Chosen, Input, Report, Status
from repfuse.report.tables import BAD, GOOD, UNSURE, change, duration, error, facts, heading, notes, plural, shape

if TYPE_CHECKING:
    from repfuse.benching.results import Benchmark
    from repfuse.checking.proof_results import Proof
    from repfuse.checking.results import Drift, Verified

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
    if report.proof and report.drift:
        yield heading("Checks")
        yield checks_table([*of_proof(report.proof), *of_site_drift(report.proof), *of_drift(report.drift)])
        yield from notes(check_notes(report.proof, report.drift))
    yield heading("Result")
    yield facts(
        [
            ("input", file_line(report.input.path, report.input.format, report.input.digest)),
            ("example", example_line(report.input)),
            ("model", report.input.model or ""),
            ("chosen", chosen_line(report.chosen) if report.chosen else ""),
            ("plan", summary(report.plan)),
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


def check_notes(proof: Proof, drift: Drift) -> Iterator[str]:
    """Yield what the table of checks does not say."""
    if not proof.passed:
        yield proof.reason
    if not proof.informative:
        yield "the network's outputs are 0 or not finite on every input: only its sites tell"
    if proof.network.limits:
        yield proof.network.limits
    if proof.network.skipped:
        yield f"{plural(len(proof.network.skipped), 'input')} left out that not both networks are for"
    if not drift.measured:
        yield f"the drift was not measured: {drift.problem}"


def verified_line(verified: Verified) -> str:
    """Return where the file was read again and run before it counted, and what was found."""
    told = (
        f"in {verified.where}" if verified.where else "",
        f"{plural(verified.tensors, 'tensor')} the same bit by bit" if verified.tensors else "",
        f"{verified.runtime} on {plural(len(verified.compared), 'input')}: {_outputs_line(verified)}"
        if verified.compared
        else "not run",
        f"takes {', '.join(verified.shapes)}" if verified.shapes else "",
        f"does not take {', '.join(verified.refused)}" if verified.refused else "",
        {True: "torch.load needs no repfuse", False: "torch.load needs repfuse", None: ""}[verified.alone],
        f"took {duration(verified.seconds)}" if verified.seconds else "",
    )
    return "; ".join(filter(None, told))


def _outputs_line(verified: Verified) -> str:
    if verified.error is None or verified.own is None or verified.allowed is None:
        return "the outputs are those of the proven network, bit by bit"
    own, allowed = error(verified.own), error(verified.allowed)
    return f"relative error {error(verified.error)} (the original's own {own}, allowed {allowed})"


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
