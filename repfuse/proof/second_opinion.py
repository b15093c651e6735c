"""A second opinion on each site, which shares no code with the algebra: see ``repfuse.probing``.

The original's own operations are probed as a black box in float64, and what they answer is held against the settings of
the fused modules and their weights before rounding; the stored weights have to be these, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from repfuse.networks import same_randomness
from repfuse.plans import Plan
from repfuse.probing import Kernel, Refused
from repfuse.probing.comparing import DRAWS, Opinion, compare, shows, sizes_for
from repfuse.proof.exact import ExactWeights, Weight
from repfuse.proof.opinions import EXHAUSTIVE, SecondOpinion, SiteProbe
from repfuse.proof.place_inputs import PlaceInputs
from repfuse.proof.places import Place, places
from repfuse.proof.sites import TOLERANCE
from repfuse.proof.weights import compared_weights


def second_opinion(
    original: nn.Module, plan: Plan, fused: nn.Module, progress: Callable[[float], None] = lambda _: None
) -> SecondOpinion:
    """Probe each site of ``plan`` in ``original`` and hold it against the modules of ``fused``.

    A place that cannot be probed does not pass. ``progress`` is told the fraction that is done. Raises RepfuseError
    where the plan does not fit.
    """
    found, sites = list(places(original, plan)), []
    exact = ExactWeights(fused, found)
    with same_randomness(original):
        for place in found:
            sites.append(_probed(place, fused, exact))
            progress(len(sites) / len(found))
    return SecondOpinion(tuple(sites), TOLERANCE)


def _probed(place: Place, fused: nn.Module, exact: ExactWeights) -> SiteProbe:
    try:
        opinions = list(_opinions(place, fused, exact))
    except Refused as refused:
        return SiteProbe(place.path, None, "", (), f"It could not be probed: {refused}.")
    worst = max(opinions, key=lambda opinion: opinion.error)
    least = min(opinions, key=lambda opinion: opinion.channels / opinion.of)
    sizes = tuple(dict.fromkeys(size for opinion in opinions for size in opinion.sizes))
    return SiteProbe(place.path, worst.error, _method(least), sizes, _failure(worst, exact.at(place), fused))


def _method(opinion: Opinion) -> str:
    if opinion.exhaustive:
        return EXHAUSTIVE
    return f"sketched, {DRAWS} draws, and {opinion.channels} of {opinion.of} channels exhaustively"


def _failure(worst: Opinion, weights: Sequence[Weight], fused: nn.Module) -> str:
    """Return why a site does not pass; "" where it does."""
    if not worst.error <= TOLERANCE:
        return f"Its kernel is not that of the original's operations: a relative error of {worst.error:.1e}."
    return next((weight.reason for weight in compared_weights(weights, fused) if not weight.passed), "")


def _opinions(place: Place, fused: nn.Module, exact: ExactWeights) -> Iterator[Opinion]:
    """Yield the opinion on each source, with the others at zero; their biases add up, so each is asked for all."""
    inputs = PlaceInputs(place, fused)
    kernels = [inputs.kernels(index, exact) for index in range(len(inputs.shapes))]
    for index, own in enumerate(kernels):
        others = [kernel for number, others in enumerate(kernels) if number != index for kernel in others]
        bias = torch.stack([own[0].bias, *(kernel.bias for kernel in others)]).sum(0)
        yield _asked(inputs, index, [replace(own[0], bias=bias), *own[1:]])


def _asked(inputs: PlaceInputs, index: int, kernels: Sequence[Kernel]) -> Opinion:
    """Compare at small sizes, or at the example's where the operations take no others."""
    box = inputs.box(index, free=True)
    sizes = [size for size in sizes_for(kernels) if box.runs(size)]
    if not sizes or not shows(kernels, sizes[0]):
        box, sizes = inputs.box(index, free=False), [inputs.size(index)]
    if not shows(kernels, sizes[0]):
        raise Refused("no input that it takes shows every tap of the kernel")
    return compare(box, kernels, sizes)
