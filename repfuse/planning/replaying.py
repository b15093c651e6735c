"""plan + module -> the edits again; what the user wants of a module -> plan: of all that can be merged, that."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from repfuse.errors import RepfuseError
from repfuse.globs import ROOT, as_globs
from repfuse.networks import is_plain, named_modules, own_tensors
from repfuse.planning.edits import Layout, owner_of, place_of
from repfuse.planning.planner import Planner
from repfuse.planning.planner import plan as make_plan
from repfuse.planning.region import Region
from repfuse.plans import AGAIN, Key, Measured, Plan, Policy, Refusal, Site
from repfuse.recording.arguments import Arguments, recreate
from repfuse.recording.recording import record
from repfuse.recording.stock import hooks_of

# Which of the places in a network a plan still holds: whoever edits a plan may drop sites, and nothing else.


def kept(planner: Planner, sites: list[Site]) -> list[Region]:
    """Return the candidates that a plan with these sites still holds. Raises RepfuseError where it holds others.

    A plan names a site once; in the other calls of its owner it stands at the same place. Several sites of one sum
    stand and fall together: each is written as a part of it.
    """
    wanted = {site.key for site in sites}
    known = {key for candidate in planner.candidates for key in _keys(planner, candidate)}
    if unknown := [site for site in sites if site.key not in known]:
        raise other_sites(unknown)
    for candidate in planner.candidates:
        if 0 < len(_keys(planner, candidate) & wanted) < len(candidate.written):
            raise _half_a_sum(planner, candidate, wanted)
    places = {_place(planner, candidate) for candidate in planner.candidates if _keys(planner, candidate) <= wanted}
    return [candidate for candidate in planner.candidates if _place(planner, candidate) in places]


def other_sites(sites: Sequence[Site]) -> RepfuseError:
    """Return the error for sites of a plan that the model does not have."""
    return RepfuseError(
        f"The plan names {len(sites)} sites that this model does not have, such as {sites[0].path or ROOT}.",
        "The model is another one, or the plan was edited by more than dropping sites.",
        AGAIN,
    )


def _half_a_sum(planner: Planner, candidate: Region, wanted: set[Key]) -> RepfuseError:
    kept, _, _ = next(iter(_keys(planner, candidate) & wanted))
    return RepfuseError(
        f"The plan holds only some of the sites of one sum, {planner.recording.where(candidate.root)}.",
        f"Several convolutions are written there, one for each tensor that the sum reads; that of {kept!r} is kept.",
        "Keep all sites with this output, or leave all of them out.",
    )


def _keys(planner: Planner, candidate: Region) -> set[Key]:
    names = planner.recording.names
    root = names[candidate.root]
    return {(names[group.source], root, frozenset(names[node] for node in group.nodes)) for group in candidate.written}


def _place(planner: Planner, candidate: Region) -> tuple[str, tuple[int, ...]]:
    return owner_of(planner.recording, candidate).path, place_of(planner.recording, candidate)


@dataclass(frozen=True)
class Replayed:
    """A network with a planner of it, or of one like it, and the edits that the sites of a plan are."""

    module: nn.Module
    planner: Planner
    layout: Layout


def replay(module: nn.Module, plan: Plan) -> Replayed:
    """Return the edits of ``module`` that a plan stands for. Raises RepfuseError where the plan does not fit."""
    planner = _live(module, plan)
    if planner is not None:
        return Replayed(module, planner, planner.lay_out(kept(planner, list(plan.sites))))
    misfit: RepfuseError | None = None
    for fill in (Tensor.zero_, _ones, _noise):
        try:
            planner = _made_again(module, plan, fill)
            return Replayed(module, planner, planner.lay_out(kept(planner, list(plan.sites))))
        except RepfuseError as error:
            misfit = misfit or error
            if planner is None or not planner.recording.depends_on_weights:
                break  # other numbers make no difference
    assert misfit is not None
    raise misfit


def _ones(x: Tensor) -> None:
    x.fill_(1)


def _noise(x: Tensor) -> None:
    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))


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
    try:
        recording = record(module, _arguments(module, plan, fill))
    except RepfuseError as error:
        raise _misfit(f"It was made for another model, or one with other shapes: {error.why}") from error
    if recording.fingerprint() != plan.fingerprint:
        raise _misfit("It was made for another model: with other modules or shapes.")
    kept = {"keep_class": plan.keep_class, "keep_affine": plan.keep_affine}
    return Planner(recording, plan.policy, plan.matching_borders, measured=plan.measured, **kept)


def _misfit(why: str) -> RepfuseError:
    return RepfuseError("The plan does not fit this model.", why, AGAIN)


def _arguments(module: nn.Module, plan: Plan, fill: Callable[[Tensor], object]) -> Arguments:
    """Return numbers in the shapes of the plan's example, its floats as the module holds them now."""
    held = next((x for x in chain(module.parameters(), module.buffers()) if x.is_floating_point()), None)
    try:
        args = recreate(plan.arguments, torch.empty(0) if held is None else held, fill)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise RepfuseError("The plan cannot be replayed.", f"Its example is not known: {error}.", AGAIN) from error
    return Arguments(args)


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
