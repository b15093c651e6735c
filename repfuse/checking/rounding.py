"""What rounding does to a network's outputs: the measure that separates rounding from wrong algebra.

The question is: by how much may two networks differ in exact arithmetic and still be the same network, their
weights stored with rounding? Each stored number that is not the same in both networks is known only up to one
rounding: it may be off by half the spacing of its dtype at its size. To first order the output error is ``e =
J d``, with ``J`` the derivative by the weights and ``d`` the independent rounding errors, uniform within half
a spacing. We draw such ``d`` SAMPLES times, run the network in float64 each time, and so measure the root
mean square of ``|e|`` without ever forming ``J``. Nothing in it is fitted to networks that happen to pass.

How much larger than this may a true rounding error be? ``|e|^2 / E|e|^2`` is a weighted mean of chi-squared
variables; its tail is heaviest where the output has one degree of freedom, ``e ~ N(0, s^2)``. With SAFETY
times the estimated s allowed, a false alarm then is ``|t| > SAFETY`` of Student's t with SAMPLES degrees of
freedom, 4e-3 for one scalar output on one input, and far less for each further element, which adds degrees of
freedom. A trial on which the drawn errors happen to cancel borrows the median of the other trials.

A network folded in its own dtype instead of float64 has rounded the original's weights before it combined
them, so the effect on the original counts like that on the fused network; the two are independent and add as squares.
"""

from __future__ import annotations

import math
import statistics
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial

import torch
from torch import nn

from repfuse.checking.comparison import TOLERANCE, level
from repfuse.checking.inputs import Trial
from repfuse.checking.results import Level
from repfuse.checking.runs import Change, Key, Outcome, by_key, in_float64, run_float64
from repfuse.networks import equal, named_tensors

SAMPLES = 4
SAFETY = 6.0
# Small enough that its effect is proportional, 2^-33 of each number; large enough for float64 to hold it.
DRAWN = 2.0**20
BLOCK = 1 << 18  # numbers that are moved at a time, so that what is needed for it stays small

Run = Callable[[nn.Module, Change], list[Outcome]]
Levels = dict[Key, Level]
NONE = Level(0.0, 0.0)


def unchanged(a: nn.Module, b: nn.Module) -> frozenset[str]:
    """Return the names of the tensors that both networks store under the same name with the same values.

    Nothing rounded them on the way from one network to the other.
    """
    others = dict(named_tensors(b))
    return frozenset(name for name, x in named_tensors(a) if name in others and equal(x, others[name]))


def rounding(
    network: nn.Module,
    run: Run,
    outcomes: Sequence[Outcome],
    exact: frozenset[str],
    scale: Sequence[Outcome] | None = None,
) -> Levels:
    """Return, per trial and output, the rms change that one rounding of each stored number makes.

    ``run`` runs it in float64 on all trials with its tensors changed; ``outcomes`` is what it gives for the network as
    it is. The tensors named in ``exact`` are not rounded. The change is relative to the outputs in ``scale``, of the
    same trials: its own, unless another network's are given. Of a network that gives nothing but 0 where the other
    does not, any change would be infinite.
    """
    if all(name in exact for name, _ in named_tensors(network)):
        return dict.fromkeys(by_key(outcomes), NONE)
    return _effect(network, run, outcomes, lambda seed: rounded_once(seed, exact), scale)


def summation(network: nn.Module, run: Run, outcomes: Sequence[Outcome], exact: Change = in_float64) -> Levels:
    """Return, per trial and output, the rms change that the order of summation makes in a network in float64.

    ``exact`` gives its tensors in float64.

    A sum of n products rounds each partial sum, and two orders of summing differ by about sqrt(n) roundings of the
    result: as if each weight were off by that. Such errors are drawn, as many times larger as it takes for float64 to
    hold them, and their effect is divided by that.
    """
    drawn = _effect(network, run, outcomes, lambda seed: summed_anew(seed, exact))
    return {key: Level(effect.rms / DRAWN, effect.max / DRAWN) for key, effect in drawn.items()}


def _effect(
    network: nn.Module,
    run: Run,
    outcomes: Sequence[Outcome],
    change: Callable[[int], Change],
    scale: Sequence[Outcome] | None = None,
) -> Levels:
    outputs, references, samples = by_key(outcomes), by_key(scale or outcomes), []
    for seed in range(SAMPLES):
        changed = by_key(run(network, change(seed)))
        samples.append({key: _change(x, changed.get(key), references.get(key)) for key, x in outputs.items()})
    return {key: rms([sample[key] for sample in samples]) for key in outputs}


def on(trials: Sequence[Trial]) -> Run:
    """Return what runs a network in float64, its tensors changed, on these trials."""
    return lambda network, change: run_float64(network, trials, change, whole=True)


def rounded_once(seed: int, exact: frozenset[str]) -> Change:
    """Return a change that widens to float64 and moves each number by a random part of half its spacing.

    Tensors named in ``exact``, sparse ones, and those that are not floating, are only widened.
    """

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        wide = in_float64(name, tensor)
        moves = tensor.is_floating_point() and tensor.layout is torch.strided and name not in exact
        return _moved(wide, tensor, 1.0, f"{seed} {name}") if moves else wide

    return change


def summed_anew(seed: int, exact: Change) -> Change:
    """Return a change that moves each number of a weight of n terms by a random part of DRAWN sqrt(n) half spacings.

    ``exact`` gives the tensors in float64, whose spacings these are.
    """

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        wide = exact(name, tensor)
        if not wide.is_floating_point() or wide.layout is not torch.strided:
            return wide
        terms = wide[0].numel() if wide.dim() > 1 else 1
        return _moved(wide.clone(), wide, DRAWN * math.sqrt(terms), f"{seed} {name}")

    return change


def _moved(wide: torch.Tensor, stored: torch.Tensor, factor: float, seed: str) -> torch.Tensor:
    """Move each number of ``wide`` by a random part of ``factor`` half spacings of ``stored``; a block at a time.

    The part is ``(k + 1/2) / 128`` with k a random byte: evenly between -1 and 1, as nearly as it matters, and a byte
    is drawn in an eighth of the time of a floating number.
    """
    if not stored.dim():
        return _moved(wide[None], stored[None], factor, seed)[0]
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))  # the same whenever a tensor is read
    rows = max(1, BLOCK * len(stored) // max(1, stored.numel()))
    for whole, part in zip(torch.split(wide, rows), torch.split(stored, rows), strict=True):
        words = torch.empty((part.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None, generator=generator)
        steps = words.view(torch.int8)[: part.numel()].reshape(part.shape).to(part.device, torch.float64).add_(0.5)
        whole.add_(half_spacing(part).mul_(steps), alpha=factor / 128)
    return wide


def half_spacing(tensor: torch.Tensor) -> torch.Tensor:
    """Return half the distance to the next number of the tensor's dtype, at each element, in float64.

    A number of exponent e has the spacing ``eps 2^e``, and no spacing is smaller than that of the smallest normal one.
    """
    info = torch.finfo(tensor.dtype)
    bits, exponent = _BITS[torch.float64 if tensor.dtype is torch.float64 else torch.float32]
    held = tensor if tensor.dtype in _BITS else tensor.float()
    power = (held.view(bits) & exponent).view(held.dtype).double()
    return power.clamp_(info.smallest_normal, info.max).mul_(info.eps / 2)


_BITS = {torch.float32: (torch.int32, 0x7F80_0000), torch.float64: (torch.int64, 0x7FF0_0000_0000_0000)}
"""The integers of the same size, and where in them the exponent is; float32 holds what the smaller formats do."""


def allowed(effects: Sequence[Levels]) -> Levels:
    """Return what independent effects, adding as squares, explain per trial and output (see this module)."""
    total = combined(effects)
    of_name = {name: [total[key] for key in total if key[1] == name] for _, name in total}
    typical = {name: _each_norm(statistics.median, levels) for name, levels in of_name.items()}
    both = {key: [value, typical[key[1]]] for key, value in total.items()}
    return {key: _each_norm(lambda norms: SAFETY * max(norms) + TOLERANCE, levels) for key, levels in both.items()}


def combined(effects: Sequence[Levels]) -> Levels:
    """Return the levels of sums of independent errors."""
    return {key: _each_norm(lambda norms: math.hypot(*norms), [each[key] for each in effects]) for key in effects[0]}


def rms(levels: Sequence[Level]) -> Level:
    """Return the root mean square of several draws of the same error."""
    return _each_norm(lambda norms: math.hypot(*norms) / math.sqrt(len(norms)), levels)


def _each_norm(function: Callable[[list[float]], float], levels: Sequence[Level]) -> Level:
    return Level(function([level.rms for level in levels]), function([level.max for level in levels]))


def _change(before: torch.Tensor, after: torch.Tensor | None, reference: torch.Tensor | None) -> Level:
    if after is None or after.shape != before.shape:  # the number of detections, say, may hang on a rounding
        return Level(math.inf, math.inf)
    if reference is None or reference is before or reference.shape != before.shape:
        return level(before, after)
    before, after, reference = before.double(), after.double(), reference.double()
    return level(reference, reference + torch.where(before == after, 0.0, after - before))


# The effect of rounding, measured on few trials.
#
# Measuring takes several runs of a network, so it is done on few and small inputs, which are ``sampled``. The other
# trials borrow the median of what was measured there, until somebody asks for more.


class RoundingEffects:
    """The effect of rounding on one network's outputs, relative, by position of the trial and name of the output.

    ``other`` is the network that it is compared with: tensors that are the same in both were not rounded between them.
    The effect is relative to the outputs in ``scale``, of the same ``trials``, on which it is measured that have any.
    ``outcomes`` are what the network itself gives in float64; without them it is run where the effect is measured.
    """

    def __init__(
        self,
        network: nn.Module,
        other: nn.Module,
        trials: Sequence[Trial],
        scale: Sequence[Outcome],
        outcomes: Sequence[Outcome] | None = None,
    ) -> None:
        self._network, self._trials, self._scale, self._outcomes = network, trials, scale, outcomes
        self._stored_alike = cache(partial(unchanged, network, other))  # few drifts need it, and it reads all weights
        self._levels: Levels = {}
        self._lent: list[tuple[Key, Level]] = []
        self.measured: set[int] = set()

    def measure_usual(self) -> None:
        """Measure on the sampled inputs among the trials that the network took, or else on the cheapest of these."""
        taken = [position for position, outcome in enumerate(self._scale) if outcome.outputs]
        marked = [position for position in taken if self._trials[position].sampled]
        if taken and not self._lent:
            self.measure(marked or [self.cheapest(taken)])
            self._lent = list(self._levels.items())

    def measure(self, positions: Iterable[int]) -> None:
        """Measure on the trials at these positions, where that was not done yet."""
        at = [position for position in positions if position not in self.measured]
        if not at:
            return
        run, scale = on([self._trials[position] for position in at]), [self._scale[position] for position in at]
        found = rounding(self._network, run, self._own(at), self._stored_alike(), scale)
        self._levels |= {(at[index], name): level for (index, name), level in found.items()}
        self.measured |= set(at)

    def order(self, position: int) -> Levels:
        """Return the effect of the order of summation on one trial."""
        found = summation(self._network, on([self._trials[position]]), self._own([position]))
        return {(position, name): level for (_, name), level in found.items()}

    def _own(self, positions: Sequence[int]) -> list[Outcome]:
        """Return what the network itself gives on the trials at these positions."""
        if self._outcomes is None:
            return run_float64(self._network, [self._trials[position] for position in positions])
        return [self._outcomes[position] for position in positions]

    def cheapest(self, positions: Iterable[int]) -> int:
        """Return the position of the trial that takes the least work."""
        return min(positions, key=lambda position: self._trials[position].work)

    def levels(self, keys: Iterable[Key]) -> Levels:
        """Return what was measured, and for the rest of the keys the median of the sampled inputs.

        What was measured elsewhere, where there was doubt, is lent to nobody.
        """
        return {key: self._levels.get(key) or self._borrowed(key[1]) for key in keys}

    def _borrowed(self, name: str) -> Level:
        levels = [level for (_, other), level in self._lent if other == name] or [level for _, level in self._lent]
        return _each_norm(statistics.median, levels)


# Errors in float64 against what rounding explains of them, measured where few sampled inputs do not settle it.
#
# Where an error exceeds what its trial borrowed, the effect of rounding is measured on that very trial before anything
# is judged, and that of the order of summation with it; the cheapest first, until one error stands. So a correct
# network is never flagged by another input's sample, and a wrong one never excused by the largest.


def explained(original: RoundingEffects, fused: RoundingEffects, errors: Levels) -> tuple[list[Levels], set[int]]:
    """Return the effects that explain the ``errors`` of ``fused``, and the trials on which all of them are measured."""
    order = dict.fromkeys(errors, NONE)

    def effects() -> list[Levels]:
        return [original.levels(errors), fused.levels(errors), order]

    def excessive() -> set[int]:
        limits = allowed(effects())
        return {key[0] for key, error in errors.items() if error.over(limits[key]) > 1}

    def measure(position: int) -> None:
        original.measure([position])
        fused.measure([position])
        order.update(fused.order(position))

    original.measure_usual()
    fused.measure_usual()
    settled = settle(excessive, measure, fused.cheapest)
    return effects(), settled


def settle(
    excessive: Callable[[], set[int]], measure: Callable[[int], None], cheapest: Callable[[set[int]], int]
) -> set[int]:
    """Measure on the cheapest of the trials whose errors are excessive, until none is, or one stands that was measured.

    Returns the trials that were.
    """
    settled: set[int] = set()
    while (doubtful := excessive()) and doubtful.isdisjoint(settled):
        position = cheapest(doubtful)
        measure(position)
        settled.add(position)
    return settled
