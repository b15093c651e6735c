"""module -> fused module, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from repfuse.planning.cost import Policy
from repfuse.planning.planner import plan
from repfuse.plans import Plan
from repfuse.rewriting import rewrite


@dataclass(frozen=True)
class FuseResult:
    """A fused module and the plan that made it."""

    module: nn.Module
    plan: Plan


def fuse(module: nn.Module, example_inputs: Sequence[Tensor], policy: Policy = Policy.COST) -> FuseResult:
    """Plan by ``policy`` and rewrite ``module``, which is untouched.

    ``example_inputs`` are the arguments of one call.
    """
    made = plan(module, example_inputs, policy)
    return FuseResult(rewrite(module, made), made)
