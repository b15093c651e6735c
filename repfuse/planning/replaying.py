"""plan + module -> the edits again; what the user wants of a module -> plan: of all that can be merged, that."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from repfuse.errors import RepfuseError
from repfuse.networks import is_plain, named_modules, own_tensors
from repfuse.planning.edits import Layout, place_of
from repfuse.planning.planner import Planner
from repfuse.planning.planner import plan as make_plan
from repfuse.planning.region import Region
from repfuse.plans import AGAIN, ROOT, Key, Measured, Plan, Policy, Site, as_globs, check_globs
from repfuse.recording.arguments import Arguments, recreate
from repfuse.recording.recording import record
from repfuse.recording.stock import hooks_of


def replay(module: nn.Module, plan: Plan) -> tuple[Planner, Layout]:
    """Return a planner of ``module``, or of one like it, and the edits that the sites of a plan are.

    Raises RepfuseError where the plan does not fit.
    """
    planner, misfit = _live(module, plan), None
    if planner is not None:
        return planner, planner.lay_out(_kept(planner, plan))
    for fill in _FILLS:
        try:
            planner = _made_again(module, plan, fill)
            return planner, planner.lay_out(_kept(planner, plan))
        except RepfuseError as error:
            misfit = misfit or error
            if planner is None or not planner.recording.depends_on_weights:
                break  # other numbers make no difference
    assert misfit is not None
    raise misfit


_FILLS: tuple[Callable[[Tensor], object], ...] = (
    lambda x: x.zero_(),
    lambda x: x.fill_(1),
    lambda x: x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(0))),
)


def _kept(planner: Planner, plan: Plan) -> list[Region]:
    """Return the candidates that a plan still holds: whoever edits it may drop sites, and nothing else.

    A plan names a site once; in the other calls of its owner it stands at the same place. Several sites of one sum
    stand and fall together: each is written as a part of it. Raises RepfuseError where it holds others.
    """
    recording, wanted = planner.recording, {site.key for site in plan.sites}
    keys = {region: region.keys(recording.names) for region in planner.candidates}
    known = set(chain.from_iterable(keys.values()))
    if unknown := [site for site in plan.sites if site.key not in known]:
        raise RepfuseError(
            f"The plan names {len(unknown)} sites that this model does not have, such as {unknown[0].path or ROOT}.",
            "The model is another one, or the plan was edited by more than dropping sites.",
            AGAIN,
        )
    for region, own in keys.items():
        if (some := own & wanted) and len(some) < len(own):
            kept, where = next(iter(some))[0], recording.where(region.root)
            raise RepfuseError(
                f"The plan holds only some of the sites that make {where}.",
                f"Several convolutions are written there, one for each tensor that is read; that of {kept!r} is kept.",
                "Keep all sites with this output, or leave all of them out.",
            )
    if known == wanted:
        return planner.candidates
    owners = {region: place_of(recording, region) for region in keys}
    places = {region: (owner.path, place) for region, (owner, place) in owners.items()}
    there = {places[region] for region, own in keys.items() if own <= wanted}
    return [region for region in keys if places[region] in there]


def _live(module: nn.Module, plan: Plan) -> Planner | None:
    """Return the planner that made the plan, where there is one and the module is still what it planned."""
    planner: Planner | None = plan.live
    if planner is None or planner.keep_affine is not plan.keep_affine:
        return None
    if planner.recording.depends_on_weights and planner.recording.module is not module:
        return None
    planned = planner.recording.module
    return planner if planned is module or _structure(planned) == _structure(module) else None


def _made_again(module: nn.Module, plan: Plan, fill: Callable[[Tensor], object]) -> Planner:
    """Plan anew, with numbers in the shapes of the plan's example, its floats as the module holds them now."""
    held = next((x for x in chain(module.parameters(), module.buffers()) if x.is_floating_point()), torch.empty(0))
    try:
        arguments = Arguments(recreate(plan.arguments, held, fill))
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise RepfuseError("The plan cannot be replayed.", f"Its example is not known: {error}.", AGAIN) from error
    misfit = "The plan does not fit this model."
    try:
        recording = record(module, arguments)
    except RepfuseError as error:
        why = f"It was made for another model, or one with other shapes: {error.why}"
        raise RepfuseError(misfit, why, AGAIN) from error
    if recording.fingerprint() != plan.fingerprint:
        raise RepfuseError(misfit, "It was made for another model: with other modules or shapes.", AGAIN)
    kept = {"keep_class": plan.keep_class, "keep_affine": plan.keep_affine}
    overflowing = {refusal.where for refusal in plan.refusals if refusal.code == "overflow"}
    return Planner(recording, plan.policy, plan.matching_borders, overflowing, measured=plan.measured, **kept)


def _structure(module: nn.Module) -> list[tuple[Any, ...]]:
    """Return what a graph of the module depends on, its weights apart: classes, shapes and settings such as strides."""
    return [
        (
            name,
            type(child),
            [(key, tensor.shape) for key, tensor in own_tensors(child).items()],
            {key: value for key, value in vars(child).items() if is_plain(value)},
            len(hooks_of(child)),
        )
        for name, child in named_modules(module)
    ]


# What is wanted.

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
        kept: dict[str, Any] = {"keep_class": choice.keep_class, "keep_affine": choice.keep_affine}
        given = found = make_plan(module, example_inputs, choice.policy or Policy.COST, **kept)
    else:
        found = fitted(module, choice.plan)
        given = replace(choice.plan, live=found.live)  # with the names that the user sees in it
    globs = (*as_globs(choice.include), *as_globs(choice.exclude))
    check_globs(globs, chain.from_iterable(site.names for site in given.sites))
    return _chosen(module, given, choice) or found


def again(module: nn.Module, plan: Plan, choice: Choice, measured: Sequence[Measured]) -> Plan:
    """Return a plan of ``choice`` made again with what was ``measured``; it leaves out what the choice leaves out."""
    kept: dict[str, Any] = {"keep_class": choice.keep_class, "keep_affine": plan.keep_affine}
    # Who replays the plan does not know what the first one came not to rely on any more.
    recording = plan.live.recording.relied_on_again()
    made = Planner(recording, plan.policy, measured=measured, **kept).plan(plan.arguments)
    return _chosen(module, made, choice) or made


def _chosen(module: nn.Module, plan: Plan, choice: Choice) -> Plan | None:
    """Return a plan without the sites that the globs leave out; None where they leave out nothing."""
    include, exclude = as_globs(choice.include), as_globs(choice.exclude)
    reasons = {site.key: why for site in plan.sites if (why := site.left_out(include, exclude))}
    sites = tuple(site for site in plan.sites if site.key not in reasons)
    return _laid_out(module, replace(plan, sites=sites), reasons) if reasons else None


def fitted(module: nn.Module, plan: Plan) -> Plan:
    """Return a plan as it is on ``module``, where somebody may have dropped sites and changed nothing else.

    Raises RepfuseError where it does not fit.
    """
    found = _laid_out(module, plan, {})
    possible: dict[Key, list[Site]] = {}
    for site in (*found.live.sites(), *found.sites):
        possible.setdefault(site.key, []).append(site)
    for site in plan.sites:
        changes = (
            [name for name in DESCRIPTION if getattr(site, name) != getattr(other, name)]
            for other in possible[site.key]
        )
        if wrong := min(changes, key=len):
            why = f"Its {' and '.join(wrong)} changed; a site can be dropped, and nothing else."
            raise RepfuseError(f"The plan was edited: the site {site.path or ROOT} is another one.", why, AGAIN)
    return found


def _laid_out(module: nn.Module, plan: Plan, reasons: Mapping[Key, str]) -> Plan:
    """Return the plan with its sites where they are written while the others are left alone; those are refusals, with
    the ``reasons`` that are given here, or by the plan.

    A block that loses a site may become plainer, and what is left in it stands elsewhere.
    """
    planner, layout = replay(module, plan)
    sites = planner.sites(layout)
    there, wanted = {site.key for site in sites}, {site.key: site for site in plan.sites}
    if lost := [site for key, site in wanted.items() if key not in there]:
        why = "Its place depends on a site that is left out."
        raise RepfuseError(f"The site {lost[0].path or ROOT} cannot be merged alone.", why, "Leave this one out too.")
    said = {refusal.where: refusal.reason for refusal in plan.refusals if refusal.code == "excluded"}
    left_out = (
        site.without("excluded", reasons.get(site.key) or said.get(site.path or ROOT, "the plan does not hold it"))
        for site in planner.sites()
        if site.key not in wanted
    )
    others = (refusal for refusal in plan.refusals if refusal.code != "excluded")
    return replace(plan, sites=sites, refusals=(*others, *left_out), live=planner)
