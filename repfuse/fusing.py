"""module -> fused module, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from repfuse.checking.comparison import half_the_digits, reference, tabulate
from repfuse.checking.inputs import Trial
from repfuse.checking.places import ExactWeights, compare_exact, places
from repfuse.checking.runs import Outcome, run
from repfuse.errors import RepfuseError
from repfuse.planning.planner import plan
from repfuse.plans import Plan, Policy
from repfuse.rewriting import rewrite


@dataclass(frozen=True)
class FuseResult:
    """A fused module and the plan that made it."""

    module: nn.Module
    plan: Plan


def fuse(
    module: nn.Module,
    example_inputs: Sequence[Any] | torch.Tensor,
    policy: Policy = Policy.COST,
    *,
    keep_class: bool | None = None,
    keep_affine: bool = False,
) -> FuseResult:
    """Plan by ``policy`` and rewrite ``module``, which is untouched.

    ``example_inputs`` are the arguments of one call, or the one tensor that it takes. Original and fused network are
    compared in float64 on them, and on inputs of the other sizes that the network takes; where they differ, the places
    that make the difference are left alone, which the plan then says. ``keep_class`` says whether the outermost module
    goes on being what it is; without it, it does where little is to be gained. ``keep_affine`` leaves a BatchNorm
    behind each convolution that is merged: with neutral statistics, so the result is for inference until it has others,
    see ``repfuse.convert``. Raises RepfuseError where the model does not take the example.
    """
    return settled(module, plan(module, example_inputs, policy, keep_class=keep_class, keep_affine=keep_affine))


def settled(module: nn.Module, made: Plan) -> FuseResult:
    """Carry out a plan, without those of its sites with which the network computes something else than before.

    What no recording shows may be behind that: a forward that reads attributes of a module that is no longer there.
    """
    check = _Check(module, made) if made.sites else None
    while check is not None and made.sites:
        fused = rewrite(module, made)
        if check.passes(fused, made):
            return FuseResult(fused, made)
        # Where each half of the sites makes no difference by itself, it takes sites of both: none of them is certain.
        outputs = list(dict.fromkeys(site.output for site in made.sites))  # the sites of a sum stand and fall together
        wrong = check.wrong(made, outputs) or outputs
        why = "differs", "with it the network computes something else"
        refusals = (site.without(*why) for site in made.sites if site.output in wrong)
        kept = tuple(site for site in made.sites if site.output not in wrong)
        made = replace(made, sites=kept, refusals=(*made.refusals, *refusals))
    return FuseResult(rewrite(module, made), made)


def recorded(plan: Plan) -> list[Trial]:
    """Return the inputs that the network was recorded at, the example first: what the plan relies on holds there."""
    inputs = (arguments.args for arguments in plan.live.recording.inputs)
    return [Trial(f"recorded size {number}", each, sampled=False) for number, each in enumerate(inputs)]


class _Check:
    """Holds fused networks against the original at the sizes that it was recorded at."""

    def __init__(self, module: nn.Module, made: Plan) -> None:
        self.module = module
        self.trials = recorded(made)
        self.expected: list[Outcome] | None = None
        with suppress(RepfuseError):  # it does not run in float64
            self.expected = reference(module, self.trials)

    def passes(self, fused: nn.Module, made: Plan) -> bool:
        """Whether ``fused``, made by a plan, computes the same."""
        if self.expected is not None:
            exact = ExactWeights(fused, places(self.module, made))
            return compare_exact(fused, exact.change(fused), self.trials, self.expected).passed
        # As stored, the outputs agree to half the digits of their dtype, which they do not by wrong algebra.
        table = tabulate(self.trials, run(self.module, self.trials, {}), run(fused, self.trials, {}))
        errors = [(each.relative.max, getattr(torch, each.dtype)) for _, each in table.by_output]
        return not table.mismatches and all(error <= half_the_digits(dtype) for error, dtype in errors)

    def wrong(self, made: Plan, outputs: list[str]) -> list[str]:
        """Return which of the outputs of sites, which make a difference together, make one: by halves, so that one is
        found in few steps. None, where it takes sites of both halves.
        """
        if len(outputs) == 1:
            return outputs
        half, found = len(outputs) // 2, list[str]()
        for part in (outputs[:half], outputs[half:]):
            alone = replace(made, sites=tuple(site for site in made.sites if site.output in part))
            try:
                found += [] if self.passes(rewrite(self.module, alone), alone) else self.wrong(made, part)
            except RepfuseError:  # one that cannot be merged without another
                found += part
        return found
