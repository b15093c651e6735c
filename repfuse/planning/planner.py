"""module -> plan: which regions become one convolution each, which do not, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from repfuse.planning.cost import Policy
from repfuse.planning.part_planner import PartPlanner
from repfuse.plans import Plan, Refusal
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
    sites = tuple(site for planner in planners for site in planner.sites())
    parts = tuple(planner.planned() for planner in planners)
    untraceable = [Refusal("untraceable", path or "(root)", why) for path, why in found.opaque.items()]
    refusals = (*untraceable, *(refusal for planner in planners for refusal in planner.refusals.values()))
    return Plan(sites, refusals, parts, str(policy), planners)
