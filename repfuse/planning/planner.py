"""module -> plan: which regions become one convolution each, which do not, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from repfuse.globs import ROOT
from repfuse.planning.cost import Policy
from repfuse.planning.part_planner import PartPlanner
from repfuse.plans import Plan, Refusal, Site
from repfuse.tracing.arguments import Arguments
from repfuse.tracing.parts import trace_parts


def plan(module: nn.Module, example_inputs: Sequence[Any], policy: Policy = Policy.COST) -> Plan:
    """Find what repfuse would rewrite in ``module``, without changing it.

    ``example_inputs`` are the positional arguments of one call; their shapes decide the costs, ``policy`` what to make
    of these. Modules that cannot be traced are refusals, and what they call is searched for itself. Raises RepfuseError
    where the model does not take the example.
    """
    policy = Policy(policy)
    found = trace_parts(module, Arguments(tuple(example_inputs)))
    planners = [PartPlanner(part, policy) for part in found.parts]
    for part in found.exports:
        planners = _better(planners, PartPlanner(part, policy))
    sites = tuple(site for planner in planners for site in planner.sites())
    parts = tuple(planner.planned() for planner in planners)
    exported = {part.path for part in parts if part.exported}
    opaque = ((path, why) for path, why in found.opaque.items() if path not in exported)
    untraceable = [Refusal("untraceable", path or ROOT, why) for path, why in opaque]
    refusals = (*untraceable, *(refusal for planner in planners for refusal in planner.refusals.values()))
    return Plan(sites, refusals, parts, str(policy), planners)


def _better(planners: list[PartPlanner], block: PartPlanner) -> list[PartPlanner]:
    """Let an exported block stand for the parts within it where it saves more kernels than they do.

    It costs the block its class, which is why a draw goes to them.
    """
    within = [planner for planner in planners if f"{planner.part.path}.".startswith(f"{block.part.path}.")]
    if sum(_saved(site) for site in block.sites()) <= sum(
        _saved(site) for planner in within for site in planner.sites()
    ):
        return planners
    return [planner for planner in planners if planner not in within] + [block]


def _saved(site: Site) -> int:
    return site.before.launches - site.after.launches
