"""checkpoint -> plan -> fused module -> proof and drift: the middle of a conversion, without files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from repfuse.checking.agreement import Data, chunks
from repfuse.checking.comparison import with_fallbacks
from repfuse.checking.drift import drift
from repfuse.checking.inputs import SCOPES, Effort, Trial, input_variants, known_effort
from repfuse.checking.places import ExactWeights, compare_exact, places
from repfuse.checking.proof import prove
from repfuse.checking.results import Drift, Equalization, Proof
from repfuse.checking.runs import Outcome, as_stored, copied, run_copy
from repfuse.equalizing import Equalized, equalize
from repfuse.errors import RepfuseError
from repfuse.fusing import recorded, settled
from repfuse.loading import Checkpoint
from repfuse.memory import give_back
from repfuse.networks import why_refused
from repfuse.planning.replaying import Choice, choose
from repfuse.plans import ROOT, Plan, Policy, Refusal
from repfuse.rewriting import rewrite
from repfuse.wording import Progress


@dataclass(frozen=True)
class Conversion:
    """A fused module with the plan that made it and what was measured of it; ``proof`` and ``drift`` are None where
    nothing was fused, ``equalization`` where none was asked for.
    """

    checkpoint: Checkpoint
    plan: Plan
    module: nn.Module
    proof: Proof | None
    drift: Drift | None
    equalization: Equalization | None = None

    @property
    def passed(self) -> bool:
        """Whether the result may be written: proven in float64, and no further off in its own dtype than arithmetic
        allows.

        A drift that this machine cannot measure (half precision that a CPU does not compute) does not fail a proven
        result.
        """
        proven = self.proof is None or self.proof.passed
        return proven and (self.drift is None or self.drift.passed or not self.drift.measured)


def convert(
    checkpoint: Checkpoint,
    policy: Policy | None = None,
    progress: Progress = lambda _stage, _fraction: None,
    *,
    plan: Plan | None = None,
    include: str | Collection[str] = (),
    exclude: str | Collection[str] = (),
    keep_class: bool | None = None,
    keep_affine: bool = False,
    data: Data | None = None,
    effort: Effort | str = Effort.DEFAULT,
    equalizing: bool = False,
    powers_of_two: bool = False,
    proven: Callable[[Plan, nn.Module], object] = lambda _plan, _fused: None,
) -> Conversion:
    """Plan by ``policy`` (by cost, where none is given), rewrite and prove a checkpoint.

    Instead of a policy there may be a ``plan``: exactly its sites are rewritten. ``include`` and ``exclude`` are globs
    that narrow either, see Plan.select; for ``keep_class`` and ``keep_affine`` see ``repfuse.fuse``: the norms that
    stay get the statistics of ``data``, where there is some. ``equalizing`` asks for scales between the layers of the
    result, solved on the data too, or for ``powers_of_two``. ``effort`` is how much is tried to find a mistake, see
    ``repfuse.checking.inputs.Effort``. ``progress`` is told the stage and the fraction of the work that is done,
    ``proven`` what is final, once it is proven: its drift is measured then.

    Raises RepfuseError where the model cannot be copied or run, or where the plan or a glob does not fit it.
    """
    effort = known_effort(effort)
    choice = Choice(policy, plan, include, exclude, keep_class, keep_affine)
    original, example = checkpoint.module, checkpoint.example_inputs
    progress("planning", 0.0)
    found = choose(original, example, choice)
    if data is not None and not (found.keep_affine or equalizing):
        what = "There is data, and no norm that needs its statistics, nor scales to solve."
        hint = "Say --keep-affine or --equalize too (keep_affine, equalizing in Python), or leave the data out."
        raise RepfuseError(what, "All norms are merged.", hint)
    if not (found.sites or equalizing):
        return Conversion(checkpoint, found, original, None, None)
    progress("rewriting", 0.1)
    fused = _rewritten(original, found, data)
    progress("running the original in float64", 0.15)
    trials, expected = _tried(original, found, input_variants(example, effort=effort))

    def proof_of_it() -> Proof:
        progress("proving", 0.3)
        shown = lambda done: progress("proving", 0.3 + 0.4 * done)  # noqa: E731
        return prove(original, found, fused, trials, expected, effort=effort, progress=shown)

    proof = proof_of_it() if found.sites else None
    if proof is not None and not proof.passed and plan is None:
        result = settled(original, found)
        if result.plan.sites != found.sites:
            found = result.plan
            fused = _rewritten(original, found, data)
            proof = proof_of_it() if found.sites else None
    done: Equalization | None = None
    if equalizing and (proof is None or proof.passed):
        progress("equalising", 0.6)
        exact = ExactWeights(fused, places(original, found) if found.sites else ()).change(fused)
        made = equalize(fused, example, data, powers_of_two=powers_of_two, exact=exact)
        done = _held(made, trials, expected)
        fused = made.module if done.tensors else fused
        found = replace(found, equalized=bool(done.tensors))
    if fused is original:
        return Conversion(checkpoint, found, original, None, None, done)
    if proof is None or proof.passed:
        proven(found, fused)
    give_back(original, circles=False)
    progress("measuring the drift", 0.8)
    count = SCOPES[effort].of_drift
    measured = drift(original, fused, trials[:count], expected[:count])
    progress("done", 1.0)
    return Conversion(checkpoint, found, fused, proof, measured, done)


def _tried(original: nn.Module, plan: Plan, variants: Sequence[Trial]) -> tuple[list[Trial], list[Outcome]]:
    """Run the original in float64 on these inputs, and on those that it was recorded at which are larger along an axis
    than all that it took of these.
    """
    trials, expected = with_fallbacks(original, variants)
    taken = [trial.shapes for trial, outcome in zip(trials, expected, strict=True) if not outcome.error]
    largest = [[max(sizes) for sizes in zip(*shapes, strict=True)] for shapes in zip(*taken, strict=True)]

    def goes_beyond(trial: Trial) -> bool:
        pairs = zip(trial.shapes, largest, strict=True)
        return any(n > most for shape, of_axes in pairs for n, most in zip(shape, of_axes, strict=True))

    if beyond := [*filter(goes_beyond, recorded(plan)[1:])]:
        more, outcomes = with_fallbacks(original, beyond)
        return trials + more, expected + outcomes
    return trials, expected


def _rewritten(original: nn.Module, plan: Plan, data: Data | None) -> nn.Module:
    """Return the fused module, its norms with the statistics of the data; the original where there is no site."""
    if not plan.sites:
        return original
    fused = rewrite(original, plan)
    if data is not None and plan.keep_affine:
        _set_statistics(original, plan, fused, data)
    return fused


def _held(made: Equalized, trials: Sequence[Trial], expected: Sequence[Outcome]) -> Equalization:
    """Return what was equalised, held against the original: nothing, where the result differs from that."""
    done = made.equalization
    if not done.tensors:
        return done
    comparison = compare_exact(made.module, made.exact, trials, expected)
    if comparison.passed:
        return replace(done, comparison=comparison)
    refusal = Refusal("differs", ROOT, "equalised, the network computes something else")
    return replace(done, tensors=(), gains=(), refusals=(*done.refusals, refusal), comparison=comparison)


def _set_statistics(original: nn.Module, plan: Plan, fused: nn.Module, data: Data) -> None:
    """Give the norms that ``plan`` leaves in ``fused`` the mean and variance of what they are given on ``data``.

    What they multiply and add is computed anew, so that the network stays what it is. Raises RepfuseError where it
    does not run on the data.
    """
    found = list(places(original, plan))
    norms = {path: norm for place in found for path, norm in place.norms(fused).items()}
    for path, (mean, var) in _statistics(fused, list(norms), data).items():
        for stored, wanted in ((norms[path].running_mean, mean), (norms[path].running_var, var)):
            assert stored is not None
            stored.copy_(wanted)
    with torch.no_grad():
        for weight in ExactWeights(fused, found).all:
            weight.stored.copy_(weight.exact())


def _statistics(network: nn.Module, paths: list[str], data: Data) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return mean and unbiased variance, in float64, of each channel that the norms at ``paths`` are given."""
    sums: dict[str, torch.Tensor] = {}
    counts = dict.fromkeys(paths, 0)

    def watching(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def watch(_norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].double().transpose(0, 1).flatten(1)
            sums[path] = torch.stack([x.sum(1), x.square().sum(1)]) + sums.get(path, 0)
            counts[path] += x.shape[1]

        return watch

    with copied(network, as_stored) as copy:
        for path in paths:
            copy.get_submodule(path).register_forward_pre_hook(watching(path))
        for inputs in chunks(data):
            if error := run_copy(copy, [Trial("the data", inputs)], {})[0].error:
                why = why_refused(network, inputs, error)[0]
                raise RepfuseError("The network cannot run on the data.", why, "Give data of its shape and dtype.")
    found = {}
    for path, (total, squares) in sums.items():
        mean, count = total / counts[path], counts[path]
        found[path] = mean, (squares / count - mean.square()).clamp(min=0) * count / max(1, count - 1)
    return found
