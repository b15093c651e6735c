"""The proof of a fused network: each site against the part of the graph that it replaces, then all of it.

Of a site its algebra, its stored weights and its drift; then the whole network, and what it holds beside its sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from math import prod

import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.nn.modules.conv import _ConvTransposeNd

from repfuse.algebra.expression import Selected, Through
from repfuse.algebra.geometry import Geometry, Ints
from repfuse.algebra.layers import Phases
from repfuse.checking.comparison import TOLERANCE, answers_in_float64, informative, level, reference, tabulate
from repfuse.checking.inputs import SCOPES, Effort, Trial, rounded_through
from repfuse.checking.places import ExactWeights, Place, StoredWeight, compare_exact, convolution_at, exactly, places
from repfuse.checking.results import Level, Proof, SiteDrift, SiteProof, WeightProof
from repfuse.checking.rounding import half_spacing
from repfuse.checking.runs import Outcome, in_float64, run, run_float64
from repfuse.memory import give_back
from repfuse.networks import equal, main_dtype, named_tensors, stored_tensors
from repfuse.ops.meaning import Rearranged, inputs_of
from repfuse.plans import Plan
from repfuse.recording.stock import is_stock
from repfuse.rewriting import rewrite
from repfuse.wording import dtype_name

# How far a fused convolution in its stored dtype may be from itself in exact arithmetic: an a-priori bound.
#
# A sum of n products in arithmetic of unit roundoff u, in whatever order, is computed with an error of at most
# ``g(n) sum |w_i| |x_i|``, with ``g(n) = n u / (1 - n u)`` (Higham, Accuracy and Stability of Numerical Algorithms,
# 2nd ed., sections 3.1 and 4.2). A stored weight is off by half a spacing e of its dtype at most: u |W|, or that of the
# smallest normal number. The result is rounded before its bias is added, at worst, and then m times, for
# m convolutions that add up. So, element by element,
#
# |y' - y| <= (e + k (|W| + e)) * |x|,    k = (1 + g(n)) (1 + u)^(1 + m) - 1.
#
# This is a convolution itself: of |x|, with the weights ``e + k (|W| + e)``. A norm behind it, ``s (y - m) + t``, takes
# eight more roundings, of s and of the sums; the bound of y and that of m, added up, are multiplied by ``|s| + e``.
# Means of p values, before the convolution or behind it, are sums too: they make 1 + k ``(1 + g(p)) (1 + u)`` as large.


TF32 = 2.0**-11
"""Unit roundoff of the factors of a product, where the device rounds float32 to TF32 for it."""


def bound(place: Place, fused: nn.Module, trial: Trial, dtype: torch.dtype) -> torch.Tensor | None:
    """Return the largest error of each output element on a trial; None where it does not run."""
    growth = _growth(place, fused, dtype, *_averaged(place, trial))
    bounded = place.after(fused, lambda factor: growth * abs(factor))
    of_norms = {id(x): name for norm in place.norms(fused).values() for name, x in named_tensors(norm)}
    kinds = {name: of_norms.get(id(x), "") for name, x in named_tensors(bounded)}

    def bounding(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if kinds[name] in ("running_var", "num_batches_tracked"):  # they are what they are
            return tensor.clone()
        info = torch.finfo(tensor.dtype)
        unit, least = info.eps / 2, info.smallest_normal * info.eps / 2
        size = in_float64(name, tensor).abs_()
        if kinds[name] == "weight":  # it multiplies what has grown already
            return size.mul_(1 + unit).add_(least)
        grown = size.mul_(unit + growth * (1 + unit)).add_((1 + growth) * least)
        return grown.neg_() if kinds[name] == "running_mean" else grown

    magnitudes = Trial(trial.label, tuple(x.abs() for x in trial.inputs))
    (outcome,) = run_float64(bounded, [magnitudes], bounding)
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2  # which no relative bound covers
    return None if outcome.error else outcome.outputs["out"] + least


def _averaged(place: Place, trial: Trial) -> tuple[int, bool]:
    """Return how many values the means of a region may add up, at most all of one channel of one sample, and whether
    any of them does that in its own dtype: of half precision PyTorch sums what is averaged in float32, but for adaptive
    windows over three axes.
    """
    recording, meanings = place.planner.recording, place.planner.meanings

    def resizes(node: fx.Node) -> bool:
        return len({prod(recording.shape_of[x]) for x in (node, *inputs_of(meanings[node]))}) > 1

    means = [node for node in place.region.passing if isinstance(meanings[node], Rearranged) and resizes(node)]
    channels = place.region.groups[0].expression.geometry.in_channels
    count = int(trial.inputs[0][0].numel()) // channels if means else 0
    return count, any("adaptive_avg_pool3d" in getattr(node.target, "__name__", "") for node in means)


def _growth(place: Place, fused: nn.Module, dtype: torch.dtype, averaged: int, in_own_dtype: bool) -> float:
    """Return k. PyTorch sums products of half precision in float32, those of a transposed convolution in half.

    Of a sum with n u >= 1 nothing is known beforehand: then k is as large as the format's numbers.
    """
    unit = torch.finfo(dtype).eps / 2
    convolutions = [convolution_at(fused, item.path) for item in place.written.values()]
    in_half = any(isinstance(convolution, _ConvTransposeNd) for convolution in convolutions)
    wide = min(unit, torch.finfo(torch.float32).eps / 2)
    lost = (unit if in_half else wide) * (sum(map(_terms, convolutions)) + 2 * len(place.region.groups))
    of_means = (unit if in_own_dtype else wide) * averaged
    if max(lost, of_means) >= 1:
        return torch.finfo(dtype).max
    # Before the bias, with each convolution that is added, and in each norm.
    rounded = (1 + unit) ** (1 + len(place.region.groups) + 8 * len(place.norms(fused)) + (averaged > 0))
    grown = (1 + lost / (1 - lost)) * (1 + of_means / (1 - of_means)) * rounded
    on_cuda = any(weight.is_cuda for convolution in convolutions for weight in convolution.parameters())
    allowed = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    of_factors = TF32 if on_cuda and dtype is torch.float32 and allowed else 0.0
    return grown * (1 + of_factors) ** 2 - 1


def _terms(convolution: nn.Module) -> int:
    """Return how many products a sum has at most, the bias counted."""
    weight = convolution.weight
    assert isinstance(weight, torch.Tensor)
    linear = isinstance(convolution, nn.Linear)
    outputs: int = getattr(convolution, "out_features" if linear else "out_channels")
    return weight.numel() // max(1, outputs) + 1


# Inputs for one site: small enough that every output lies at a border.


def site_trials(place: Place, count: int) -> Iterator[Trial]:
    """Yield inputs from one pixel to just beyond the kernel's reach, even and odd, not all square, one nearly constant.

    Of these sizes the last ``count``: at the reach itself every tap has met the border and the interior. Of one size
    there is noise alone.

    Of a constant, kernels whose weights sum to 0 (standardised ones, a Laplacian) would leave nothing but rounding.
    """
    sources, recording = place.sources, place.planner.recording
    if len(sources) > 1 or _has_fixed_sizes(place):  # their sizes depend on each other: the example's fit
        yield at_the_example(place)
    if len(sources) > 1:
        return
    geometry = place.region.groups[0].expression.geometry
    recorded = recording.shapes(sources[0]) if place.pieces else None
    example = recording.shape_of[sources[0]]
    kept = [_has_fixed_sizes(place) and recording.is_fixed(sources[0], axis) for axis in range(len(example))]
    for number, wanted in enumerate([*(recorded or _shapes(example, geometry))][-count:]):
        shape = tuple(n if keeps else other for n, other, keeps in zip(example, wanted, kept, strict=True))
        label = f"input {'x'.join(map(str, shape))}"
        yield Trial(label, (_random(shape, number),))
        if number == 0 and count > 1:
            yield Trial(f"{label}, nearly constant", (1 + _random(shape, number) / 4,))


def at_the_example(place: Place) -> Trial:
    """Return random inputs of the sizes that the sources have for the network's example."""
    shapes = [place.planner.recording.shape_of[source] for source in place.sources]
    return Trial("the example's size", tuple(_random(shape, seed) for seed, shape in enumerate(shapes)))


def _has_fixed_sizes(place: Place) -> bool:
    """Whether an operation of the region may hold sizes as numbers, so that no other size runs."""
    meanings = [place.planner.meanings[node] for node in place.region.nodes]
    parted = any(isinstance(meaning, Through) and isinstance(meaning.layer, Phases) for meaning in meanings)
    return parted or any(isinstance(meaning, Selected) for meaning in meanings)


def _shapes(example: Ints, geometry: Geometry) -> Iterator[Ints]:
    """Yield shapes of the source: of a linear layer with other leading axes, of a convolution with other sizes."""
    if not geometry.ndim:
        for number in range(4):
            yield (*(1 + (number + axis) % 3 for axis in range(len(example) - 1)), geometry.in_channels)
        return
    for number, size in enumerate(_sizes(geometry)):
        batch = (1 + number % 2,) if len(example) == geometry.ndim + 2 else ()
        yield (*batch, geometry.in_channels, *size)


def _sizes(geometry: Geometry) -> list[Ints]:
    """Return input sizes counted from the smallest that has an output, the next ones that fit."""
    least = geometry.smallest_input
    reach = max(taps[-1] - taps[0] + 1 for taps in geometry.taps)
    steps = [[1, 2], [0, 0], [2, 0], [reach, reach + 1]]
    sizes = (tuple(low + step[axis % 2] for axis, low in enumerate(least)) for step in steps)
    return [*map(geometry.next_fitting, sizes)]


def _random(shape: Ints, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The drift of one site: what rounding did to it in its stored dtype, against what arithmetic allows.


def site_drift(place: Place, fused: nn.Module, after: nn.Module, trial: Trial, expected: Outcome) -> SiteDrift | None:
    """Run a site before and ``after`` the rewrite in its stored dtype, against its outcome in float64, ``expected``.

    None where that is float64, which is the proof's, or where the original's operations do not run in it here, or
    overflow; and where a weight is no finite number and that shows, since some kernels multiply it by what pads.
    """
    dtype = main_dtype(after)
    if dtype in (None, torch.float64):
        return None
    own, found = (run(network, [trial], {torch.float64: dtype})[0] for network in (place.before, after))
    if own.error or not bool(own.outputs["out"].isfinite().all()):
        return None
    wanted, original, most = expected.outputs["out"], own.outputs["out"], bound(place, fused, trial, dtype)
    own_level, name = level(wanted, original), dtype_name(original.dtype)
    if found.error or most is None:
        return SiteDrift(trial.label, name, own_level, WORST, WORST, WORST.max)
    if wanted.numel():  # what cancels in the original leaves a weight of float64's own rounding
        most += TOLERANCE * wanted.abs().max()
    error = (found.outputs["out"].double() - wanted).abs()
    over = float((error / most).nan_to_num(nan=float("inf")).max()) if error.numel() else 0.0
    if over > 1 and not all(bool(x.isfinite().all()) for _, x in named_tensors(after)):
        return None
    allowed = level(wanted, wanted + most)
    return SiteDrift(trial.label, name, own_level, level(wanted, found.outputs["out"]), allowed, over)


WORST = Level(float("inf"), float("inf"))


# Each stored weight against the one computed in float64: it has to be that, rounded once.


NEAR_HALF = 0.5 + 2.0**-16
"""Spacings between a number and its rounding. Another machine sums in another order, which moves a number in float64 by
1e-15 of itself: 1e-7 spacings of float32. On its way to bfloat16 it is rounded to float32 first: 2^-17 spacings."""


def _compared(name: str, stored: torch.Tensor, exact: torch.Tensor) -> WeightProof:
    """Compare a stored tensor of a site with what it was computed to be."""
    stored = stored.detach()
    found = partial(WeightProof, name, dtype_name(stored.dtype), tuple(stored.shape))
    if stored.shape != exact.shape:
        return found(stored.numel(), float("inf"))
    rounded = exact.to(stored.dtype)
    equal = stored == rounded
    if not bool(equal.all()):  # as few are
        equal |= stored.isnan() & rounded.isnan()
    if bool(equal.all()):
        return found(0, 0.5)
    stored, unequal = stored[~equal], exact[~equal]
    difference, spacing = (stored.double() - unequal).abs(), 2 * half_spacing(stored)
    allowed = TOLERANCE * float(exact.abs().max()) if stored.dtype is torch.float64 else spacing * NEAR_HALF
    wrong = int((~(difference <= allowed)).sum())
    return found(wrong, max(0.5, float((difference / spacing).nan_to_num(nan=float("inf")).max())))


LARGE_SITE = 1 << 18  # weights


def prove_site(place: Place, fused: nn.Module, exact: ExactWeights, effort: Effort = Effort.DEFAULT) -> SiteProof:
    """Compare one site of ``fused`` with the nodes of the original's graph that it replaces.

    In float64 with the weights before they were rounded, which is the proof; each stored weight with that; and in the
    stored dtype, which is the drift, as the ``effort`` says.
    """
    after, scope = place.after(fused), SCOPES[effort]
    computed_once = [StoredWeight(stored, cache(compute)) for stored, compute in exact.of_place[place.path]]
    weights_held = sum(x.numel() for _, x in named_tensors(after))
    trials, expected = _runs(place, after, scope.of_large_site if weights_held > LARGE_SITE else scope.of_site)
    answers = answers_in_float64(after, trials, expected, exactly(computed_once, after))
    comparison = tabulate(trials, expected, answers)
    weights = tuple(_compared(exact.name_of[id(stored)], stored, compute()) for stored, compute in computed_once)
    drift = None
    if comparison.passed and scope.drift_of_site:  # on the largest input that does not overflow
        ran = [pair for pair in zip(trials, expected, strict=True) if not pair[1].error]
        ran.sort(key=lambda pair: pair[0].work, reverse=True)
        drift = next((found for pair in ran if (found := site_drift(place, fused, after, *pair))), None)
    return SiteProof.of(place.path, comparison, weights, drift)


def _runs(place: Place, after: nn.Module, count: int) -> tuple[Sequence[Trial], list[Outcome]]:
    """Return trials that the original's operations take, and what they give; at the example's size if need be.

    Reflection needs more than the pixels it pads, an average pool over a volume more than its kernel. The inputs are
    such that the stored dtype holds them, so that the drift is the networks' own.
    """
    before, dtype = place.before, main_dtype(after)
    trials = [rounded_through(trial, dtype) for trial in site_trials(place, count)]
    expected = run_float64(before, trials)
    if not all(outcome.error for outcome in expected):
        return trials, expected
    trials = [rounded_through(at_the_example(place), dtype)]
    return trials, reference(before, trials)


# What two networks hold beside their fused weights: modules with their settings, and the other tensors.


def differing(wanted: nn.Module, fused: nn.Module, exact: ExactWeights) -> Iterator[str]:
    """Yield the names of modules and tensors that are not the same in both, the fused weights apart.

    Of those the dtypes and shapes have to agree.
    """
    known, built = _settings(wanted), _settings(fused)
    yield from (name for name in known.keys() | built.keys() if known.get(name) != built.get(name))
    right, stored = dict(stored_tensors(wanted)), dict(stored_tensors(fused))
    yield from right.keys() ^ stored.keys()
    for name in right.keys() & stored.keys():
        wanted_one, one = right[name], stored[name]
        alike = wanted_one.dtype == one.dtype and wanted_one.shape == one.shape
        if not (alike if id(one) in exact.name_of else equal(wanted_one, one)):
            yield name


def _settings(network: nn.Module) -> dict[str, str]:
    """Return what each module computes, its tensors apart: class and settings, or the steps of a graph."""

    def body(module: nn.Module) -> str:
        if isinstance(module, fx.GraphModule):
            return _steps(module.graph)
        return module.extra_repr() if is_stock(module) else ""

    return {name: f"{type(module).__qualname__} {body(module)}" for name, module in network.named_modules()}


def _steps(graph: fx.Graph) -> str:
    """Return the graph with its nodes by number: their names are others when it is read back from a file."""
    number = {node: f"%{index}" for index, node in enumerate(graph.nodes)}
    lines = (
        f"{node.op} {getattr(node.target, '__name__', node.target)} "
        f"{map_arg(node.args, number.__getitem__)} {map_arg(node.kwargs, number.__getitem__)}"
        for node in graph.nodes
    )
    return "\n".join(lines)


def prove(
    original: nn.Module,
    plan: Plan,
    fused: nn.Module,
    trials: Sequence[Trial],
    expected: Sequence[Outcome],
    *,
    effort: Effort = Effort.DEFAULT,
    progress: Callable[[float], None] = lambda _: None,
) -> Proof:
    """Prove that ``fused``, made from ``original`` by ``plan``, computes the same.

    ``expected`` are the original's outcomes in float64 on ``trials``. Each site is proven by itself, on as many inputs
    as the ``effort`` says; then the whole network, in float64 with weights that are not rounded. What ``fused`` stores
    beside its sites, and what stock modules show of their settings, has to be what the plan, carried out a second time,
    makes of it; other settings show in the runs of the whole network alone. ``progress`` is told the fraction that is
    done. Raises RepfuseError where a network cannot be copied.
    """
    found = list(places(original, plan))
    exact = ExactWeights(fused, found)
    sites = []
    for place in found:
        sites.append(prove_site(place, fused, exact, effort))
        progress(0.5 * len(sites) / len(found))
    unproven = tuple(sorted(differing(rewrite(original, plan, weights=False), fused, exact)))
    give_back(original)
    network = compare_exact(
        fused, exact.change(fused), trials, expected, sound=all(site.comparison.passed for site in sites)
    )
    progress(1.0)
    tells = any(informative(output) for outcome in expected for output in outcome.outputs.values())
    return Proof(tuple(sites), network, unproven, tells)
