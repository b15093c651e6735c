"""One random network: fused, it computes the same, its own proof passes, and nothing in the original is touched."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from random import Random

import torch
from support.agreement import image, outputs, peak, randomised
from support.norms import unexplained
from support.programs import Step, program
from support.proving import prove_sites
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from repfuse.checking.comparison import reference
from repfuse.checking.drift import drift
from repfuse.checking.inputs import input_variants
from repfuse.checking.proof import prove
from repfuse.checking.results import Comparison, SiteProof
from repfuse.fusing import settled
from repfuse.planning.planner import plan
from repfuse.planning.replaying import Choice, again
from repfuse.plans import Measured, Plan, Policy
from repfuse.rewriting import rewrite

Shapes = Sequence[tuple[int, ...]]


def check(
    steps: Sequence[Step],
    shapes: Shapes,
    also: Sequence[int],
    policy: Policy,
    measured: Random | None = None,
    *,
    keep_affine: bool = False,
) -> Counter[str]:
    """Check the network of these steps on several input sizes; return how many sites of each form it has.

    With ``measured`` random places are merged, and others left in parts, whatever the policy says.
    """
    examples = [image(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    return check_module(randomised(program(steps, examples, also)), examples, policy, measured, keep_affine=keep_affine)


def check_module(
    original: nn.Module,
    examples: Sequence[Tensor],
    policy: Policy,
    measured: Random | None = None,
    *,
    keep_affine: bool = False,
) -> Counter[str]:
    """The same of any network in float64."""
    pristine = copy.deepcopy(original)
    made = plan(original, [x.clone() for x in examples], policy, keep_affine=keep_affine)
    if measured:
        outputs = sorted({site.output for site in made.sites} | made.live.declined.keys())
        chosen = [(output, measured.choice((0.5, 2.0))) for output in outputs if measured.random() < 0.8]
        made = again(original, made, Choice(policy), [Measured(output, by, by, by) for output, by in chosen])
    assert keep_affine or not unexplained(made), "normalisations stay without a refusal"
    result = settled(original, made)
    for seed, inputs in enumerate(_inputs(examples)):
        _equal(pristine, result.module, inputs, required=seed == 0)
    _untouched(original, pristine, result.module)
    _replays(original, result.module, result.plan)
    rounding = _rounding(pristine, examples)
    for site in prove_sites(original, result.module, result.plan):
        proven = _but_for_site(rounding, site)
        assert proven.passed, f"{site.path}: {site.comparison}"
    return Counter(site.form for site in result.plan.sites)


def check_in(
    dtype: torch.dtype, steps: Sequence[Step], shapes: Shapes, policy: Policy, *, keep_affine: bool = False
) -> None:
    """Convert the network of these steps in ``dtype`` as the command line does: what it then writes is proven."""
    examples = [image(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]
    original = randomised(program(steps, examples), dtype=dtype)
    try:
        outputs(original, *examples)
    except NotImplementedError:  # not every operator of half precision exists on a CPU
        return
    if _empties(original, examples):
        return
    found = plan(original, examples, policy, keep_affine=keep_affine)
    if not found.sites:
        return
    result = settled(original, found)
    found, fused = result.plan, result.module
    trials = [trial for trial in input_variants(examples) if not _empties(original, trial.inputs)]
    expected = reference(original, trials)
    proof = prove(original, found, fused, trials, expected)
    rounding = _rounding(copy.deepcopy(original).double(), [x.double() for x in examples])
    sites = tuple(_but_for_site(rounding, site) for site in proof.sites)
    proof = replace(proof, sites=sites, network=_but_for(rounding, proof.network))
    assert proof.passed, proof.reason
    measured = drift(original, fused, trials, expected)
    assert measured.passed or not measured.measured, measured


class _Empties(TorchFunctionMode):
    """Notes whether any function of torch returned a tensor without numbers."""

    found = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.found |= isinstance(result, Tensor) and not result.numel()
        return result


def _empties(original: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether a crop leaves nothing of these on the way, though the result may not depend on it.

    The convolution that crops itself refuses what is smaller than its kernel: nobody has a use for such a size.
    """
    with torch.no_grad(), _Empties() as mode:
        with suppress(RuntimeError, IndexError, ValueError):
            copy.deepcopy(original)(*inputs)
        return mode.found


def _rounding(module: nn.Module, examples: Sequence[Tensor]) -> float:
    """By how much rounding alone may change what a network in float64 computes, of terms that cancel as well."""
    return 1e-12 * max(peak(module, *examples), *(float(x.abs().max()) for x in examples))


def _but_for(rounding: float, comparison: Comparison) -> Comparison:
    """Pass what differs by so little where terms cancel: a random sum may be x - x, and a proof is relative."""
    errors = [output.max_abs for trial in comparison.compared for output in trial.outputs]
    return replace(comparison, tolerance=math.inf) if max(errors, default=math.inf) <= rounding else comparison


def _but_for_site(rounding: float, site: SiteProof) -> SiteProof:
    return SiteProof.of(site.path, _but_for(rounding, site.comparison), site.weights, site.drift)


def _inputs(examples: Sequence[Tensor]) -> list[list[Tensor]]:
    """The example, then tiny, odd, even and larger inputs, with other batch sizes."""
    batches = [examples]
    for number, sizes in enumerate(((1, 1, 1), (2, 3, 2), (8, 7, 5), (9, 9, 6))):
        shapes = [_resized(x, 1 + number, sizes) for x in examples]
        batches.append([image(*shape, seed=number) for shape in shapes])
    return [list(batch) for batch in batches]


def _resized(x: Tensor, batch: int, sizes: Sequence[int]) -> tuple[int, ...]:
    if x.ndim == 2:
        return (batch, x.shape[1])
    return (batch, x.shape[1], *sizes[: x.ndim - 2])


def _equal(original: nn.Module, fused: nn.Module, inputs: Sequence[Tensor], required: bool) -> None:
    try:
        wanted = outputs(original, *inputs)
    except (RuntimeError, IndexError, ValueError):
        assert not required
        return
    limit = 1e-12 * peak(original, *inputs)
    if not limit:
        return
    got = outputs(fused, *inputs)
    for one, other in zip(wanted, got, strict=True):
        assert one.shape == other.shape
        assert float((one - other).abs().max()) <= limit


def _untouched(original: nn.Module, pristine: nn.Module, fused: nn.Module) -> None:
    assert str(original) == str(pristine)
    assert [m.training for m in original.modules()] == [m.training for m in pristine.modules()]
    for (name, tensor), (_, before) in zip(
        original.state_dict(keep_vars=True).items(), pristine.state_dict(keep_vars=True).items(), strict=True
    ):
        assert torch.equal(tensor, before) and type(tensor) is type(before), name
    own = {tensor.untyped_storage().data_ptr() for tensor in original.state_dict().values()}
    assert own.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in fused.state_dict().values())


def _replays(original: nn.Module, fused: nn.Module, made: Plan) -> None:
    again = rewrite(original, Plan.from_dict(made.to_dict()))
    assert str(again) == str(fused)
    state = fused.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
