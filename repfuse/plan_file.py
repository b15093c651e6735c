"""The plan as a file: what `repfuse inspect --plan` writes, people edit, and `repfuse convert --plan` applies.

It is the document that `repfuse inspect --json` prints, without what was measured and with a site's fields on a line
each; that document, and the report of a conversion, are read as well. Where the plan that made one checkpoint from
another is known, each site can be proven by itself. It knows no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from repfuse.checkpoint.files import digest_of, read_json, replacing
from repfuse.checkpoint.spec import Said, Shape, model_source, render
from repfuse.errors import RepfuseError
from repfuse.plans import Plan, Text, read_as
from repfuse.report.schema import Input, Report, envelope, report_path
from repfuse.wording import first_line, json_ready

if TYPE_CHECKING:  # it imports torch
    from repfuse.loading import Checkpoint

LARGEST = 16 * 2**20
"""Bytes; the plans of the largest networks have less than one million."""

AGAIN = "Make it again: repfuse inspect IN --plan FILE"


@dataclass(frozen=True)
class Made:
    """The file that a plan was written with: its digest."""

    digest: Text


@dataclass(frozen=True)
class Origin:
    """Which checkpoint a plan was made for, and which was made by it, as far as its document says so."""

    input: Input | None = None
    output: Made | None = None


@dataclass(frozen=True)
class PlanFile:
    """A plan that was read, and from where."""

    path: Path
    plan: Plan
    origin: Origin

    @property
    def said(self) -> Said | None:
        """What it says of the checkpoint that it was made for."""
        source = self.origin.input
        if source is None:
            return None
        sayable = source.model if source.model_args is not None else None
        built = model_source(sayable, source.model_args) if sayable else None
        if source.input_origin == "guess":
            return Said("the plan", built)
        named = [None if "float" in dtype else dtype for dtype in source.dtypes]  # floats follow the network
        shapes = render(map(Shape, source.shapes, named))
        return Said("the plan", built, shapes, asked=source.input_origin == "given")


def said_beside(path: Path, of: Path | None = None) -> Said | None:
    """Return what the report beside the checkpoint at ``path`` says of it, or of the one that it was made from: ``of``.

    It counts where the digest is that of the file. One that cannot be read says nothing.
    """
    subject, report = of or path, report_path(path)
    if not report.is_file() or not subject.is_file():
        return None
    try:
        file = read_plan_file(report)
        said = file.said
    except RepfuseError:
        return None
    known, weights = file.origin.input if of else file.origin.output, subject.with_name(f"{subject.name}.data")
    digests = [digest_of(subject), *([digest_of(subject, weights)] if weights.is_file() else [])]  # of ONNX, of both
    if said is None or known is None or known.digest not in digests:
        return None
    return replace(said, by=report.name, source=said.source if of else None)  # which builds no fused network


class KnownPlan(NamedTuple):
    """A plan, or None, and what to say of where it is from or of why there is none."""

    plan: Plan | None
    notes: tuple[str, ...] = ()


def write_plan(report: Report, path: Path) -> None:
    """Write the plan of a report to ``path``, as a whole or not at all. The same plan gives the same bytes."""
    parts = {"environment": report.environment, "input": report.input, "plan": report.plan}
    with replacing(path) as temporary:
        temporary.write_text(_laid_out(envelope("plan", json_ready(parts))) + "\n", encoding="utf-8")


def read_plan_file(path: Path) -> PlanFile:
    """Return the plan in a file. Raises RepfuseError with what is wrong with it."""
    try:
        data = read_json(path, LARGEST)
    except OSError as error:
        raise RepfuseError(f"The plan {path} cannot be read.", error.strerror or str(error), AGAIN) from error
    except ValueError as error:
        why, hint = first_line(error), AGAIN
        if isinstance(error, json.JSONDecodeError):
            why = f"line {error.lineno}, column {error.colno}: {error.msg}"
            hint = f"Mend it there (no comma stands before a closing bracket). {AGAIN}"
        raise RepfuseError(f"{path} is not a plan that repfuse can read.", f"{why}.", hint) from error
    try:
        plan = Plan.from_dict(data)
        return PlanFile(path, plan, read_as(Origin, {name: data.get(name) for name in ("input", "output")}))
    except RepfuseError as error:
        raise RepfuseError(f"{path}: {error.what}", error.why, error.hint) from error


def known_plan(original: Checkpoint, fused: Checkpoint, given: Path | None = None) -> KnownPlan:
    """Return the plan in the file ``given``, else that in the file of ``fused``, else that in the report beside it.

    A document counts where it is of these very files, as far as it says of which it is: by another plan a right file
    would be judged wrong, and so would be one whose weights were rescaled later. Raises RepfuseError where the file
    that was given is no plan, or one of other files.
    """
    found = _said_plan(original, fused, given)
    if found.plan is None or not found.plan.equalized:
        return found
    return KnownPlan(None, (*found.notes, f"{fused.path} was equalised: it is compared as a whole, not site by site"))


def _said_plan(original: Checkpoint, fused: Checkpoint, given: Path | None) -> KnownPlan:
    if given is not None:
        file = read_plan_file(given)
        if other := _of_others(file.origin, original, fused):
            hint = "Leave --plan out: what repfuse wrote has its plan with it, in the file or in the report beside it."
            raise RepfuseError(f"The plan {given} is not of these files.", f"It is of {other}.", hint)
        said = () if file.plan.sites else (f"the plan {given} has no sites: there is nothing to prove by it",)
        return KnownPlan(file.plan, said)
    if fused.plan is not None and fused.plans[:-1] == original.plans:
        return KnownPlan(fused.plan)
    path = report_path(fused.path)
    exported = fused.program is not None or (fused.format == "onnx" and original.format != "onnx")
    if not path.is_file() or exported:  # they hold layers in other forms
        return KnownPlan(None)
    try:
        report = read_plan_file(path)
    except RepfuseError as error:
        return KnownPlan(None, (f"the report {path.name} beside it cannot be used: {error.why}",))
    if other := _of_others(report.origin, original, fused):
        note = f"the report {path.name} beside it is not used: it is of {other}"
    elif not report.plan.sites:
        note = f"by the report {path.name} beside it nothing was fused: there are no sites to prove"
    else:
        return KnownPlan(report.plan if report.origin.input else None)
    return KnownPlan(None, (note,))


def is_of_other_bytes(fused: Checkpoint) -> bool:
    """Whether the report beside a checkpoint is of other bytes than it has. One that cannot be read says nothing."""
    try:
        made = read_plan_file(report_path(fused.path)).origin.output
    except RepfuseError:  # also where there is none
        return False
    return made is not None and made.digest != fused.digest


def _of_others(origin: Origin, original: Checkpoint, fused: Checkpoint) -> str:
    """Say of which other file than these two a document is; nothing where it is of these, or does not tell."""
    if origin.input is not None and origin.input.digest != original.digest:
        return f"another original than {original.path}: {origin.input.path} as it was then"
    if origin.output is not None and origin.output.digest != fused.digest:
        return f"another file than {fused.path} is now"
    return ""


def _laid_out(value: Any, margin: str = "") -> str:
    """Return JSON text in which whatever holds no mapping stands on one line: one line for a list of branches."""
    if not _holds_mappings(value):
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    inner = f"{margin}  "
    if isinstance(value, dict):
        (begin, end), lines = "{}", [f"{json.dumps(key)}: {_laid_out(item, inner)}" for key, item in value.items()]
    else:
        (begin, end), lines = "[]", [_laid_out(item, inner) for item in value]
    return f"{begin}\n{inner}" + f",\n{inner}".join(lines) + f"\n{margin}{end}"


def _holds_mappings(value: Any) -> bool:
    """Whether a list holds mappings, or a mapping other mappings or lists."""
    if isinstance(value, dict):
        return any(isinstance(item, dict | list) for item in value.values())
    return isinstance(value, list) and any(isinstance(item, dict) or _holds_mappings(item) for item in value)
