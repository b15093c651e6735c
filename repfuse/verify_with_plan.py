"""Whether two networks compute the same; where the plan that made one from the other is known, site by site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from repfuse.checking.proof import prove
from repfuse.checking.results import Verification
from repfuse.checking.verification import verify as verify_any
from repfuse.plans import Plan


def verify(
    original: nn.Module,
    fused: nn.Module,
    example_inputs: Sequence[Any],
    *,
    plan: Plan | None = None,
    **options: Any,
) -> Verification:
    """Say whether ``fused`` computes what ``original`` does, up to the rounding of its weights.

    With the ``plan`` that made it, each site is proven by itself in float64 and each stored weight is held against the
    one computed again from the original: far smaller mistakes show than in the outputs. The ``options`` are those of
    ``repfuse.checking.verification.verify``: ``shapes``, ``seeds``, ``effort``, ``rtol``, ``atol``, ``data``,
    ``labels``, ``progress``.

    Raises RepfuseError where the original cannot run the example, an option does not fit, a network cannot be copied,
    or the plan is of other networks.
    """
    prover = None
    if plan is not None and plan.sites:
        made: Plan = plan
        prover = lambda trials, expected, told: prove(original, made, fused, trials, expected, progress=told)  # noqa: E731
    return verify_any(original, fused, example_inputs, prove=prover, **options)
