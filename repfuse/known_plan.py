"""The plan that made one checkpoint from another, where it is known: then each site can be proven by itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from repfuse.errors import RepfuseError
from repfuse.loading import Checkpoint
from repfuse.plan_file import PlanFile, read_plan_file
from repfuse.plans import Plan
from repfuse.report.schema import report_path


@dataclass(frozen=True)
class KnownPlan:
    """A plan, or None, and what to say of where it is from or of why there is none."""

    plan: Plan | None
    notes: tuple[str, ...] = ()


def known_plan(original: Checkpoint, fused: Checkpoint, given: Path | None = None) -> KnownPlan:
    """Return the plan in the file ``given``, else that in the file of ``fused``, else that in the report beside it.

    A report counts where it is of this original; that the fused file is still what it was then is for the proof to
    find. Raises RepfuseError where the file that was given is no plan.
    """
    if given is not None:
        return KnownPlan(read_plan_file(given).plan)
    if fused.plan is not None and fused.plans[:-1] == original.plans:
        return KnownPlan(fused.plan)
    path = report_path(fused.path)
    if not path.is_file() or fused.program is not None:  # a program holds its layers in another form
        return KnownPlan(None)
    try:
        return _of_report(read_plan_file(path), original, fused)
    except RepfuseError as error:
        return KnownPlan(None, (f"the report {path.name} beside it cannot be used: {error.why}",))


def _of_report(report: PlanFile, original: Checkpoint, fused: Checkpoint) -> KnownPlan:
    if report.digest != original.digest or not report.plan.sites:
        return KnownPlan(None)
    if report.made != fused.digest:
        return KnownPlan(report.plan, (f"it is not the file that {report.path.name} is of: one of them was changed",))
    return KnownPlan(report.plan)
