"""plan + module -> the edits again: from the planners that made the plan, or from a new trace of the same parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from repfuse.errors import RepfuseError
from repfuse.globs import ROOT
from repfuse.networks import is_plain, own_tensors
from repfuse.placing.edits import Candidate, Layout, owner_of, place_of
from repfuse.planning.cost import Policy
from repfuse.planning.part_planner import PartPlanner
from repfuse.plans import Key, Part, Plan, Site
from repfuse.tracing.arguments import Arguments, recreate
from repfuse.tracing.exporting import export
from repfuse.tracing.leaves import hooks_of
from repfuse.tracing.parts import Part as TracedPart
from repfuse.tracing.trace import DoesNotRun, Traced, Untraceable, trace

AGAIN = "Make the plan again from this model."


@dataclass(frozen=True)
class Replayed:
    """One part of the model with the edits that the plan's sites in it are; paths in these are within ``module``.

    That is the model's own module, or torch.export's form of it, which then stands in its place.
    """

    path: str
    module: nn.Module
    planner: PartPlanner
    layout: Layout


def replay(module: nn.Module, plan: Plan) -> list[Replayed]:
    """Return the edits of each part of ``module`` that has sites. Raises RepfuseError where the plan does not fit."""
    with_sites = {site.part for site in plan.sites}
    return [part for part in replay_all(module, plan) if part.path in with_sites]


def replay_all(module: nn.Module, plan: Plan) -> list[Replayed]:
    """The same of every part: where the plan has no sites there are no edits."""
    sites: dict[str, list[Site]] = defaultdict(list)
    for site in plan.sites:
        sites[site.part].append(site)
    if unknown := sites.keys() - {part.path for part in plan.parts}:
        raise _other_sites([site for path in unknown for site in sites[path]])
    modules = {part.path: _module_of(module, part) for part in plan.parts}
    planners = _live(modules, plan) or [_made_again(modules[part.path], part, plan) for part in plan.parts]
    chosen = ((planner, _chosen(planner, sites[planner.part.path])) for planner in planners)
    return [
        Replayed(planner.part.path, modules[planner.part.path], planner, planner.lay_out(kept))
        for planner, kept in chosen
    ]


def _live(modules: Mapping[str, nn.Module], plan: Plan) -> list[PartPlanner] | None:
    """Return the planners that made the plan, where there are some and the modules are still what they planned."""
    planners: list[PartPlanner] = plan.live or []
    same = modules.keys() == {planner.part.path for planner in planners} and all(
        _structure(planner.traced.module) == _structure(modules[planner.part.path]) for planner in planners
    )
    return planners if same else None


def _made_again(module: nn.Module, part: Part, plan: Plan) -> PartPlanner:
    traced = TracedPart(part.path, _traced(module, part), part.arguments, frozenset(part.shared), part.exported)
    return PartPlanner(traced, Policy(plan.policy), part.matching_borders)


def _traced(module: nn.Module, part: Part) -> Traced:
    try:
        traced = trace(module, _arguments(module, part))
    except (Untraceable, DoesNotRun) as error:
        why = f"It was made for another model, or one with other shapes: {error}."
        raise RepfuseError("The plan does not fit this model.", why, AGAIN) from error
    if traced.fingerprint() != part.fingerprint:
        why = "It was made for a model with another graph or other shapes."
        raise RepfuseError("The plan does not fit this model.", why, AGAIN)
    return traced


def _module_of(module: nn.Module, part: Part) -> nn.Module:
    try:
        found: nn.Module | None = module.get_submodule(part.path)
    except AttributeError as error:
        raise RepfuseError("The plan does not fit this model.", f"There is no module {part.path!r}.", AGAIN) from error
    if part.exported:
        assert found is not None
        found = export(found, _arguments(found, part))
    if found is None:
        raise RepfuseError("The plan does not fit this model.", f"torch.export does not read {part.path!r}.", AGAIN)
    return found


def _arguments(module: nn.Module, part: Part) -> Arguments:
    """Return zeros in the shapes of the plan's example, their floats as the module holds them now."""
    held = next((x for x in chain(module.parameters(), module.buffers()) if x.is_floating_point()), None)
    try:
        args, kwargs = recreate(part.arguments, torch.empty(0) if held is None else held)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise RepfuseError("The plan cannot be replayed.", f"Its example is not known: {error}.", AGAIN) from error
    return Arguments(args, kwargs)


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
        for name, child in module.named_modules()
    ]


def _chosen(planner: PartPlanner, sites: list[Site]) -> list[Candidate]:
    """Return the candidates that the plan still holds: whoever edits a plan may drop sites.

    A plan names a site once; in the other calls of its owner it stands at the same place. Several sites of one sum
    stand and fall together: each is written as a part of it.
    """
    wanted = {site.key for site in sites}
    known = {key for candidate in planner.candidates for key in _keys(planner, candidate)}
    if unknown := [site for site in sites if site.key not in known]:
        raise _other_sites(unknown)
    for candidate in planner.candidates:
        if 0 < len(_keys(planner, candidate) & wanted) < len(candidate.groups):
            raise _half_a_sum(planner, candidate, wanted)
    places = {_place(planner, candidate) for candidate in planner.candidates if _keys(planner, candidate) <= wanted}
    return [candidate for candidate in planner.candidates if _place(planner, candidate) in places]


def _other_sites(sites: Sequence[Site]) -> RepfuseError:
    return RepfuseError(
        f"The plan names {len(sites)} sites that this model does not have, such as {sites[0].path or ROOT}.",
        "The model is another one, or the plan was edited by more than dropping sites.",
        AGAIN,
    )


def _half_a_sum(planner: PartPlanner, candidate: Candidate, wanted: set[Key]) -> RepfuseError:
    _, kept, _, _ = next(iter(_keys(planner, candidate) & wanted))
    return RepfuseError(
        f"The plan holds only some of the sites of one sum, {planner.where(candidate.region.root)}.",
        f"Several convolutions are written there, one for each tensor that the sum reads; that of {kept!r} is kept.",
        "Keep all sites with this output, or leave all of them out.",
    )


def _keys(planner: PartPlanner, candidate: Candidate) -> set[Key]:
    root = candidate.region.root.name
    part = planner.part.path
    return {(part, group.source.name, root, frozenset(node.name for node in group.nodes)) for group in candidate.groups}


def _place(planner: PartPlanner, candidate: Candidate) -> tuple[str, tuple[int, ...]]:
    region = candidate.region
    return owner_of(planner.traced, region).path, place_of(planner.traced, region)
