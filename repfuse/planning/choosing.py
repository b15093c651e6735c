"""module + what the user wants of it -> plan: of all that can be merged, exactly that."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from repfuse.errors import RepfuseError
from repfuse.globs import ROOT, as_globs
from repfuse.planning.planner import Planner
from repfuse.planning.planner import plan as make_plan
from repfuse.planning.replaying import replay
from repfuse.plans import AGAIN, Key, Measured, Plan, Policy, Refusal, Site

DESCRIPTION = ("path", "owner", "form", "branches", "kernel")
"""What a plan says of a site besides its place in the graph. Costs depend on the dtype, which may be another."""


@dataclass(frozen=True)
class Choice:
    """What is to be merged: as ``policy``, ``keep_class`` and ``keep_affine`` say, or the sites of ``plan``; of these,
    as the globs say.

    See Plan.select for the globs. Raises RepfuseError where there is a plan and one of what it settles.
    """

    policy: Policy | None = None
    plan: Plan | None = None
    include: str | Collection[str] = ()
    exclude: str | Collection[str] = ()
    keep_class: bool | None = None
    keep_affine: bool = False

    @property
    def keeps_affine(self) -> bool:
        """Whether norms stay behind the convolutions that are merged."""
        return self.keep_affine or (self.plan is not None and self.plan.keep_affine)

    def __post_init__(self) -> None:
        if self.plan is None:
            return
        if self.policy is not None:
            why = "A policy decides what is merged; a plan says it already."
            raise RepfuseError("A policy and a plan contradict each other.", why, "Give --policy or --plan, not both.")
        if self.keep_affine:
            raise RepfuseError(
                "A plan says already whether a norm stays behind each convolution.",
                "With one, a convolution and its own norm are no site.",
                "Leave --keep-affine to `repfuse inspect --plan`, which makes the plan.",
            )
        if self.keep_class is not None:
            raise RepfuseError(
                "A plan says already whether the outermost class is kept.",
                "It is lost where a site of the plan stands in the outermost module itself.",
                "Leave --keep-class and --drop-class to `repfuse inspect --plan`, which makes the plan.",
            )


def choose(module: nn.Module, example_inputs: Sequence[Any], choice: Choice) -> Plan:
    """Return the plan of what is wanted: its sites are exactly those, and what is left out are refusals.

    A plan that was made before replays at the shapes it was made with. Raises RepfuseError where it does not fit
    ``module``, where it was edited by more than dropping sites, or where a glob matches nothing.
    """
    if choice.plan is None:
        policy = choice.policy or Policy.COST
        given = found = make_plan(
            module, example_inputs, policy, keep_class=choice.keep_class, keep_affine=choice.keep_affine
        )
    else:
        found = fitted(module, choice.plan)
        given = replace(choice.plan, live=found.live)  # with the names that the user sees in it
    include, exclude = as_globs(choice.include), as_globs(choice.exclude)
    if not include and not exclude:
        return found
    reasons = {site.key: site.left_out(include, exclude) or "" for site in given.sites}
    chosen = given.select(include, exclude)
    return _laid_out(module, replace(chosen, refusals=given.refusals), reasons)


def again(module: nn.Module, plan: Plan, choice: Choice, measured: Sequence[Measured]) -> Plan:
    """Return a plan of ``choice`` made again with what was ``measured``; it leaves out what the choice leaves out."""
    live: Planner = plan.live
    planner = Planner(
        live.recording, plan.policy, keep_class=choice.keep_class, keep_affine=plan.keep_affine, measured=measured
    )
    made = planner.plan(plan.arguments)
    include, exclude = as_globs(choice.include), as_globs(choice.exclude)
    reasons = {site.key: why for site in made.sites if (why := site.left_out(include, exclude))}
    return without(module, made, reasons) if reasons else made


def without(module: nn.Module, plan: Plan, reasons: Mapping[Key, str]) -> Plan:
    """Return a plan without the sites that there are ``reasons`` to leave alone; they become refusals.

    Raises RepfuseError where one that stays depends on one that does not.
    """
    sites = tuple(site for site in plan.sites if site.key not in reasons)
    return _laid_out(module, replace(plan, sites=sites), reasons)


def fitted(module: nn.Module, plan: Plan) -> Plan:
    """Return a plan as it is on ``module``, where somebody may have dropped sites and changed nothing else.

    Raises RepfuseError where it does not fit.
    """
    again = _laid_out(module, plan)
    possible = {site.key: [site] for site in again.live.sites()}
    for site in again.sites:
        possible.setdefault(site.key, []).append(site)
    for site in plan.sites:
        if wrong := min((_changed(site, other) for other in possible[site.key]), key=len):
            why = f"Its {' and '.join(wrong)} changed; a site can be dropped, and nothing else."
            raise RepfuseError(f"The plan was edited: the site {site.path or ROOT} is another one.", why, AGAIN)
    return again


def _changed(site: Site, other: Site) -> list[str]:
    return [name for name in DESCRIPTION if getattr(site, name) != getattr(other, name)]


def _laid_out(module: nn.Module, plan: Plan, reasons: Mapping[Key, str] | None = None) -> Plan:
    """Return the plan with its sites where they are written while the others are left alone; those are refusals.

    A block that loses a site may become plainer, and what is left in it stands elsewhere. ``reasons`` say why some
    are left out.
    """
    replayed = replay(module, plan)
    planner = replayed.planner
    sites = planner.sites(replayed.layout)
    wanted = {site.key: site for site in plan.sites}
    if lost := [site for key, site in wanted.items() if key not in {site.key for site in sites}]:
        why = "Its place depends on a site that is left out."
        raise RepfuseError(f"The site {lost[0].path or ROOT} cannot be merged alone.", why, "Leave this one out too.")
    left_out = [site for site in planner.sites() if site.key not in wanted]
    refusals = (*_others(plan), *_excluded(plan, left_out, reasons or {}))
    return replace(plan, sites=sites, refusals=refusals, live=planner)


def _others(plan: Plan) -> list[Refusal]:
    return [refusal for refusal in plan.refusals if refusal.code != "excluded"]


def _excluded(plan: Plan, sites: Sequence[Site], reasons: Mapping[Key, str]) -> list[Refusal]:
    """Return a refusal for each site, with the reason that ``reasons`` or the plan gives."""
    given = {refusal.where: refusal.reason for refusal in plan.refusals if refusal.code == "excluded"}
    unsaid = "the plan does not hold it"
    return [site.excluded(reasons.get(site.key) or given.get(site.path or ROOT, unsaid)) for site in sites]
