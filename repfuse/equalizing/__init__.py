"""Cross-layer equalisation: exact scales between layers, with which the network survives rounding to few bits better.

``laws`` says which scales there may be, ``solving`` which are best, and why; here what rounding does is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn

from repfuse.checking.agreement import Data, chunks
from repfuse.checking.inputs import Trial, is_floating, noise
from repfuse.checking.results import Equalization, Rescaled, SignalGain
from repfuse.checking.runs import WIDE, Change, Widening, as_stored, by_key, copied, in_float64, leaves, run_copy
from repfuse.equalizing.laws import Freedom, Reading
from repfuse.equalizing.solving import TINY, ObjectiveTerm, ScaledWeight, predicted, solve
from repfuse.networks import as_before, as_inputs, device_of, named_tensors, placed, using_threads
from repfuse.planning.edits import left_range
from repfuse.quantization import BITS, in_decibels, rounded
from repfuse.recording.arguments import Arguments
from repfuse.recording.copies import changed_copy
from repfuse.recording.recording import record
from repfuse.wording import described

TRIES = 64
SPREAD = (0.1, 0.5)
"""How far one try is from the best before it, as logarithms to the base 2: any numbers, and powers of two."""
PASSES = 16
AT_ONCE = 8
"""Samples in one pass, at most."""
MOST = 1 << 20
"""Elements in all of them, about."""
MEASURED = 4
"""Passes of which the noise is measured."""


@dataclass(frozen=True)
class Equalized:
    """An equalised module, and what was done; ``exact`` gives its tensors in float64, before they were rounded."""

    module: nn.Module
    equalization: Equalization
    exact: Change


def equalize(
    module: nn.Module,
    example_inputs: Sequence[Any] | Tensor,
    data: Data | None = None,
    *,
    powers_of_two: bool = False,
    exact: Change = in_float64,
) -> Equalized:
    """Return a copy of ``module`` that computes the same with weights that survive rounding to few bits better.

    The values between its layers are others. ``data`` are inputs to solve the scales on; without them each weight
    counts alike, and what is gained is measured on noise like the example is. With ``powers_of_two``, the result
    computes the same bits. ``exact`` gives the tensors of the module in float64, where that is known better than by
    those that it holds. What does not get better stays as it is.
    """
    example = as_inputs(example_inputs)
    with using_threads(1):
        free = Reading(record(module, Arguments(example))).run()
    weights = [part for part in free.parts if isinstance(part, ScaledWeight)]
    trials = trials_of(example, data)
    done = Equalization((), free.count, powers_of_two, "data" if data is not None else "noise", (), free.refusals)
    if not weights:
        return Equalized(module, done, exact)
    terms, why = objective_terms(module, weights, trials, real=data is not None)
    done = replace(done, notes=(why,) if why else ())
    with copied(module, as_stored) as copy:
        search = _Search(module, copy, free, exact, trials[:MEASURED], powers_of_two)
        scale = search.best(terms, solve(terms, free.count))
        if scale is None:
            return Equalized(module, done, exact)
        both = torch.zeros_like(scale), scale
        gains = tuple(SignalGain(bits, *(in_decibels(search.noise(each, bits)) for each in both)) for bits in BITS)
    made, numbers = search.tensors(scale), scale.exp2()
    factors = ((part.name, part.factors(numbers, made[part.name].shape)) for part in free.parts)
    tensors = tuple(Rescaled(name, float(each.min()), float(each.max())) for name, each in factors)
    rescaled = changed_copy(module, lambda name, x: made[name] if name in made else as_stored(name, x.detach()))
    return Equalized(rescaled, replace(done, tensors=tensors, gains=gains), search.exactly(scale))


class _Search:
    """Looks for the scales with which rounding to the fewest bits does least to the outputs.

    It is measured by a ``copy`` of the module, which is changed.
    """

    def __init__(  # noqa: PLR0917 - what ``equalize`` was given, and what it found
        self,
        module: nn.Module,
        copy: nn.Module,
        free: Freedom,
        exact: Change,
        trials: Sequence[Trial],
        powers_of_two: bool,
    ) -> None:
        self.parts = {part.name: part for part in free.parts}
        self.weights = [part for part in free.parts if isinstance(part, ScaledWeight)]
        self.stored = {name: x.detach() for name, x in named_tensors(module) if name in self.parts}
        self.exact, self.powers_of_two = exact, powers_of_two
        self.copy, self.trials, self.held = copy, trials, dict(named_tensors(copy))
        self.wanted = by_key(run_copy(copy, trials, {}))
        self._made: dict[str, tuple[Tensor, Tensor]] = {}
        self._now: dict[str, tuple[Tensor | None, int]] = {}

    def exactly(self, scale: Tensor) -> Change:
        """Return what gives the tensors in float64, multiplied as these scales say."""
        numbers = scale.exp2()

        def change(name: str, tensor: Tensor) -> Tensor:
            part = self.parts.get(name)
            if part is None:
                return self.exact(name, tensor)
            wide = self.exact(name, self.stored[name])  # and not what was rescaled already
            return wide * part.factors(numbers, wide.shape).to(wide.device)

        return change

    def tensors(self, scale: Tensor) -> dict[str, Tensor]:
        """Return the tensors with these scales, rounded once to their dtypes."""
        change = self.exactly(scale)
        for name, part in self.parts.items():
            own = torch.cat([scale[part.times].flatten(), scale[part.over].flatten()])
            if name not in self._made or not torch.equal(self._made[name][0], own):  # a try changes few of them
                x = self.stored[name]
                self._made[name] = own, torch.empty_like(x).copy_(change(name, x))
        return {name: made for name, (_, made) in self._made.items()}

    def best(self, terms: Sequence[ObjectiveTerm], start: Tensor) -> Tensor | None:
        """Return log2 of the best scales, those at ``start`` or near them; None where none are better than 1.

        Those solved for are taken where they are better with the most bits. They are so on average: of those near them,
        numbers happen to round better and worse. Each try moves the scales of one layer.
        """
        ones, solved = torch.zeros_like(start), self._rounded(start)
        average, most = predicted(terms, ones), BITS[0]
        before, limit = (self.noise(each, most) for each in (ones, solved))
        found = solved if predicted(terms, solved) <= average and limit < before else None
        least, limit = self.share(ones if found is None else found), min(before, limit)
        generator = torch.Generator().manual_seed(0)
        for _ in range(TRIES):
            layer = self.weights[int(torch.randint(len(self.weights), (), generator=generator))]
            scale = (start if found is None else found).clone()
            scale[layer.over] += SPREAD[self.powers_of_two] * torch.randn(layer.over.shape, generator=generator)
            scale[0] = 0
            scale = self._rounded(scale)
            tried = self.share(scale) if predicted(terms, scale) <= average else math.inf
            if tried < least and self.noise(scale, most) <= limit:
                least, found = tried, scale
        return found

    def _rounded(self, scale: Tensor) -> Tensor:
        return scale.round() if self.powers_of_two else scale

    def share(self, scale: Tensor) -> float:
        """Return what share of the outputs is noise with these scales, for all numbers of bits together."""
        return sum(1 - 1 / (1 + self.noise(scale, bits)) for bits in BITS)

    def noise(self, scale: Tensor, bits: int) -> float:
        """Return the energy of the noise relative to that of the outputs, with these scales and so many bits.

        It is infinite where a number leaves the range of its dtype.
        """
        tensors = self.tensors(scale)
        if any(left_range([made], [self.stored[name]]) for name, made in tensors.items()):
            return math.inf
        for name, tensor in tensors.items():
            now, known = self._now.get(name, (None, 0))
            if now is not tensor or known != bits:
                with torch.no_grad():
                    self.held[name].copy_(
                        rounded(tensor, bits) if isinstance(self.parts[name], ScaledWeight) else tensor
                    )
                self._now[name] = tensor, bits
        found = by_key(run_copy(self.copy, self.trials, {}))
        pairs = [(x.double(), found[key].double()) for key, x in self.wanted.items() if key in found]
        size = sum(float(x.square().sum()) for x, _ in pairs)
        off = sum(float((x - y).square().sum()) for x, y in pairs)
        return off / size if size and math.isfinite(off) else math.inf


# What rounding does to a network's outputs to first order.


def trials_of(example: Sequence[Any], data: Data | None) -> list[Trial]:
    """Return the inputs that scales are solved on, as many as are not too much work: parts of the data, else noise like
    the example.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(x: Any) -> Any:
        return noise(tuple(x.shape), (), generator).to(x.device, x.dtype) if is_floating(x) else x

    if data is not None:
        parts = (zip(*(torch.split(each, AT_ONCE) for each in x), strict=True) for x in chunks(data))
        trials = (Trial("data", tuple(batch)) for batches in parts for batch in batches)
    else:
        trials = (Trial("noise", tuple(map(drawn, example))) for _ in count())
    found, work = list[Trial](), 0
    for trial in islice(trials, PASSES):
        found, work = [*found, trial], work + trial.work
        if work >= MOST:
            break
    return found


def objective_terms(
    network: nn.Module, weights: Sequence[ScaledWeight], trials: Sequence[Trial], *, real: bool
) -> tuple[list[ObjectiveTerm], str]:
    """Return what rounding each weight does to the outputs, by its gradients on ``real`` inputs.

    On noise they would say little of the inputs that are to come: there each weight counts alike, by its size. So it
    does where no gradient gets to some; then why comes second.
    """
    why, names = "", [each.name for each in weights]
    stored = {name: x.detach().double() for name, x in named_tensors(network) if name in names}
    slopes = {name: torch.ones_like(x) / x.square().sum().clamp_min(TINY) for name, x in stored.items()}
    if real:
        try:
            slopes = _slopes(network, names, trials)
        except Exception as error:  # whatever a forward, or its way back, may raise
            why = f"it is equalised as if each weight counted alike, for want of gradients: {described(error)}"
    both = [[each.by_channel(x[each.name].cpu()) for x in (stored, slopes)] for each in weights]
    pairs = zip(weights, both, strict=True)
    return [ObjectiveTerm(each.times, each.over, x.abs().amax(3), slope.sum(3)) for each, (x, slope) in pairs], why


def _slopes(network: nn.Module, names: Sequence[str], trials: Sequence[Trial]) -> dict[str, Tensor]:
    """Return the squares of the outputs' slopes by these tensors, added up over the trials."""
    generator = torch.Generator().manual_seed(0)
    with as_before(network), copied(network, in_float64) as copy:
        tensors = dict(named_tensors(copy))
        held = [tensors[name].requires_grad_() for name in names]
        slopes = {name: torch.zeros_like(tensors[name], requires_grad=False) for name in names}
        for trial in trials:
            with torch.enable_grad(), Widening(copy):
                outputs = leaves(copy(*placed(trial.inputs, device_of(copy), WIDE)))
                totals = [_projected(x, generator) for x in outputs.values() if x.requires_grad]
            if not totals:
                raise RuntimeError("its outputs have none")
            for name, slope in zip(names, torch.autograd.grad(totals, held), strict=True):
                slopes[name] += slope.square()
        return slopes


def _projected(output: Tensor, generator: torch.Generator) -> Tensor:
    """Return the output's sum with random signs, relative to its size: the square of a slope of it is on average the
    sum of the squares of the slopes of all of its numbers.
    """
    signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
    return (output * signs).sum() / output.detach().square().mean().sqrt().clamp_min(TINY)
