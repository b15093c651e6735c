"""Cross-layer equalisation: exact scales between layers, with which the network survives rounding to few bits better.

``laws`` says which scales there may be, ``solving`` which are best, and why; ``effect`` measures what rounding does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from repfuse.checking.agreement import Data
from repfuse.checking.results import Equalization, Rescaled, SignalGain
from repfuse.checking.runs import Change, as_stored, copied, in_float64
from repfuse.equalizing.effect import Rounding, terms_of, trials_of
from repfuse.equalizing.network import Freedom, freedom
from repfuse.equalizing.scales import Weight
from repfuse.equalizing.solving import Term, predicted, solve
from repfuse.networks import named_tensors, using_threads
from repfuse.planning.edits import left_range
from repfuse.quantization import BITS, in_decibels
from repfuse.recording.arguments import Arguments
from repfuse.recording.copies import changed_copy
from repfuse.recording.recording import record

TRIES = 64
SPREAD = (0.1, 0.5)
"""How far one try is from the best before it, as logarithms to the base 2: any numbers, and powers of two."""


@dataclass(frozen=True)
class Equalized:
    """An equalised module, and what was done; ``exact`` gives its tensors in float64, before they were rounded."""

    module: nn.Module
    equalization: Equalization
    exact: Change


def equalize(
    module: nn.Module,
    example_inputs: Sequence[Any],
    data: Data | None = None,
    *,
    powers_of_two: bool = False,
    exact: Change = in_float64,
) -> Equalized:
    """Return a copy of ``module`` that computes the same with weights that survive rounding to few bits better.

    The values between its layers are others. ``data`` are inputs to solve the scales on; without them, noise like the
    example is. With ``powers_of_two``, the result computes the same bits. ``exact`` gives the tensors of the module in
    float64, where that is known better than by those that it holds. What does not get better stays as it is.
    """
    example = tuple(example_inputs)
    with using_threads(1):
        free = freedom(record(module, Arguments(example)))
    weights = [part for part in free.parts if isinstance(part, Weight)]
    trials = trials_of(example, data)
    done = Equalization((), free.count, powers_of_two, "data" if data is not None else "noise", (), free.refusals)
    if not weights:
        return Equalized(module, done, exact)
    terms = terms_of(module, weights, trials)
    with copied(module, as_stored) as copy:
        search = _Search(module, free, exact, Rounding(copy, weights, trials), powers_of_two)
        scale = search.best(terms, solve(terms, free.count))
        gains = () if scale is None else search.gains(scale)
    if scale is None:
        return Equalized(module, done, exact)
    made, numbers = search.tensors(scale), scale.exp2()
    factors = ((part.name, part.factors(numbers, made[part.name].shape)) for part in free.parts)
    tensors = tuple(Rescaled(name, float(each.min()), float(each.max())) for name, each in factors)
    rescaled = changed_copy(module, lambda name, x: made[name] if name in made else as_stored(name, x.detach()))
    return Equalized(rescaled, replace(done, tensors=tensors, gains=gains), search.exactly(scale))


class _Search:
    """Looks for the scales with which rounding to the fewest bits does least to the outputs."""

    def __init__(
        self, module: nn.Module, free: Freedom, exact: Change, rounding: Rounding, powers_of_two: bool
    ) -> None:
        self.parts = {part.name: part for part in free.parts}
        self.weights = [part for part in free.parts if isinstance(part, Weight)]
        self.stored = {name: x.detach() for name, x in named_tensors(module) if name in self.parts}
        self.exact, self.rounding, self.powers_of_two = exact, rounding, powers_of_two
        self._made: dict[str, tuple[Tensor, Tensor]] = {}

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

    def best(self, terms: Sequence[Term], start: Tensor) -> Tensor | None:
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
        """Return the noise in the outputs with these scales; infinite where a number leaves the range of its dtype."""
        tensors = self.tensors(scale)
        whole = all(not left_range([made], [self.stored[name]]) for name, made in tensors.items())
        return self.rounding.noise(tensors, bits) if whole else math.inf

    def gains(self, scale: Tensor) -> tuple[SignalGain, ...]:
        """Return what these scales gain."""
        both = torch.zeros_like(scale), scale
        return tuple(SignalGain(bits, *(in_decibels(self.noise(each, bits)) for each in both)) for bits in BITS)
