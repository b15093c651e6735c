"""plan + module -> the edits again: from the planners that made the plan, or from a new trace of the same parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from repfuse.errors import RepfuseError
from repfuse.networks import is_plain, own_tensors
from repfuse.placing.edits import Candidate, Layout, owner_of, place_of
from repfuse.planning.cost import Policy
from repfuse.planning.part_planner import PartPlanner
from repfuse.plans import Part, Plan, Site
from repfuse.tracing.arguments import Arguments, recreate
from repfuse.tracing.exporting import export
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
    sites: dict[str, list[Site]] = defaultdict(list)
    for site in plan.sites:
        sites[site.part].append(site)
    if unknown := sites.keys() - {part.path for part in plan.parts}:
        raise _other_sites(sum(len(sites[path]) for path in unknown))
    modules = {part.path: _module_of(module, part) for part in plan.parts}
    planners = _live(modules, plan) or [_made_again(modules[part.path], part, plan) for part in plan.parts]
    chosen = ((planner, _chosen(planner, sites[planner.part.path])) for planner in planners)
    return [
        Replayed(planner.part.path, modules[planner.part.path], planner, planner.lay_out(kept))
        for planner, kept in chosen
        if kept
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
        raise RepfuseError("The plan does not fit this model.", str(error), AGAIN) from error
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
            len(child._forward_hooks) + len(child._forward_pre_hooks),
        )
        for name, child in module.named_modules()
    ]


def _chosen(planner: PartPlanner, sites: list[Site]) -> list[Candidate]:
    """Return the candidates that the plan still holds: whoever edits a plan may drop sites.

    A plan names a site once; in the other calls of its owner it stands at the same place.
    """
    wanted = {(site.source, site.output, frozenset(site.nodes)) for site in sites}
    known = {key for candidate in planner.candidates for key in _keys(candidate)}
    if not wanted <= known:
        raise _other_sites(len(wanted - known))
    places = {_place(planner, candidate) for candidate in planner.candidates if _keys(candidate) <= wanted}
    return [candidate for candidate in planner.candidates if _place(planner, candidate) in places]


def _other_sites(count: int) -> RepfuseError:
    return RepfuseError(
        f"The plan names {count} sites that this model does not have.",
        "The model is another one, or the plan was edited by more than dropping sites.",
        AGAIN,
    )


def _keys(candidate: Candidate) -> set[tuple[str, str, frozenset[str]]]:
    root = candidate.region.root.name
    return {(group.source.name, root, frozenset(node.name for node in group.nodes)) for group in candidate.groups}


def _place(planner: PartPlanner, candidate: Candidate) -> tuple[str, tuple[int, ...]]:
    region = candidate.region
    return owner_of(planner.traced, region).path, place_of(planner.traced, region)
