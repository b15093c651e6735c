"""checkpoint -> plan -> fused module -> proof and drift: the middle of a conversion, without files."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from repfuse.checking.comparison import with_fallbacks
from repfuse.checking.drift import drift
from repfuse.checking.inputs import input_variants
from repfuse.checking.proof import prove
from repfuse.checking.results import Drift, Proof
from repfuse.checking.trial import Effort, known_effort
from repfuse.fusing import recorded, settled
from repfuse.loading import Checkpoint
from repfuse.planning.choosing import Choice, choose
from repfuse.plans import Plan, Policy
from repfuse.progress import Progress
from repfuse.rewriting import rewrite


@dataclass(frozen=True)
class Conversion:
    """A fused module with the plan that made it and what was measured of it; ``proof`` and ``drift`` are None where
    nothing was fused.
    """

    checkpoint: Checkpoint
    plan: Plan
    module: nn.Module
    proof: Proof | None
    drift: Drift | None

    @property
    def passed(self) -> bool:
        """Whether the result may be written: proven in float64, and no further off in its own dtype than arithmetic
        allows.

        A drift that this machine cannot measure (half precision that a CPU does not compute) does not fail a proven
        result.
        """
        if self.proof is None or self.drift is None:
            return True
        return self.proof.passed and (self.drift.passed or not self.drift.measured)


def convert(
    checkpoint: Checkpoint,
    policy: Policy | None = None,
    progress: Progress = lambda _stage, _fraction: None,
    *,
    plan: Plan | None = None,
    include: str | Collection[str] = (),
    exclude: str | Collection[str] = (),
    keep_class: bool | None = None,
    effort: Effort | str = Effort.DEFAULT,
) -> Conversion:
    """Plan by ``policy`` (by cost, where none is given), rewrite and prove a checkpoint.

    Instead of a policy there may be a ``plan``: exactly its sites are rewritten. ``include`` and ``exclude`` are globs
    that narrow either, see Plan.select; for ``keep_class`` see ``repfuse.fuse``. ``effort`` is how much is tried to
    find a mistake, see ``repfuse.checking.trial.Effort``. ``progress`` is told the stage and the fraction of the
    work that is done.

    Raises RepfuseError where the model cannot be copied or run, or where the plan or a glob does not fit it.
    """
    effort = known_effort(effort)
    choice = Choice(policy, plan, include, exclude, keep_class)
    original, example = checkpoint.module, checkpoint.example_inputs
    progress("planning", 0.0)
    found = choose(original, example, choice)
    if not found.sites:
        return Conversion(checkpoint, found, original, None, None)
    progress("rewriting", 0.1)
    fused = rewrite(original, found)
    variants = (*input_variants(example, effort=effort), *recorded(found)[1:])
    progress("running the original in float64", 0.15)
    trials, expected = with_fallbacks(original, variants)

    def proven() -> Proof:
        shown = lambda done: progress("proving", 0.3 + 0.4 * done)  # noqa: E731
        return prove(original, found, fused, trials, expected, effort=effort, progress=shown)

    proof = proven()
    if not proof.passed and plan is None:
        result = settled(original, found)
        if result.plan.sites != found.sites:
            found, fused = result.plan, result.module
            if not found.sites:
                return Conversion(checkpoint, found, original, None, None)
            proof = proven()
    progress("measuring the drift", 0.7)
    measured = drift(original, fused, trials, expected)
    progress("done", 1.0)
    return Conversion(checkpoint, found, fused, proof, measured)
