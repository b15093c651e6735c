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
from repfuse.placing.edits import Layout
from repfuse.planning.cost import Policy
from repfuse.planning.keeping import kept, other_sites
from repfuse.planning.part_planner import PartPlanner
from repfuse.plans import AGAIN, Part, Plan, Site
from repfuse.tracing.arguments import Arguments, recreate
from repfuse.tracing.exporting import export
from repfuse.tracing.leaves import hooks_of
from repfuse.tracing.parts import Part as TracedPart
from repfuse.tracing.trace import DoesNotRun, Traced, Untraceable, trace


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
        raise other_sites([site for path in unknown for site in sites[path]])
    modules = {part.path: _module_of(module, part) for part in plan.parts}
    planners = _live(modules, plan) or [_made_again(modules[part.path], part, plan) for part in plan.parts]
    chosen = ((planner, kept(planner, sites[planner.part.path])) for planner in planners)
    return [
        Replayed(planner.part.path, modules[planner.part.path], planner, planner.lay_out(candidates))
        for planner, candidates in chosen
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
        raise _misfit(why) from error
    if traced.fingerprint() != part.fingerprint:
        why = "It was made for a model with another graph or other shapes."
        raise _misfit(why)
    return traced


def _module_of(module: nn.Module, part: Part) -> nn.Module:
    try:
        found: nn.Module | None = module.get_submodule(part.path)
    except AttributeError as error:
        raise _misfit(f"There is no module {part.path!r}.") from error
    if part.exported:
        assert found is not None
        found = export(found, _arguments(found, part))
    if found is None:
        raise _misfit(f"torch.export does not read {part.path!r}.")
    return found


def _misfit(why: str) -> RepfuseError:
    return RepfuseError("The plan does not fit this model.", why, AGAIN)


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
