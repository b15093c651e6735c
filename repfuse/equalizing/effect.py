"""What rounding does to a network's outputs: to first order, by gradients, and measured, by rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from repfuse.checking.agreement import Data, chunks
from repfuse.checking.inputs import noise
from repfuse.checking.runs import WIDE, Widening, by_key, copied, in_float64, leaves, run_copy
from repfuse.checking.trial import Trial, is_floating
from repfuse.equalizing.scales import Weight
from repfuse.equalizing.solving import TINY, Term, of_activation, of_weight
from repfuse.networks import device_of, named_tensors, placed, same_randomness
from repfuse.quantization import rounded

PASSES = 16
AT_ONCE = 8
"""Samples in one pass, at most."""
MOST = 1 << 20
"""Elements in all of them, about."""
MEASURED = 4
"""Passes of which the noise is measured."""


def trials_of(example: Sequence[Any], data: Data | None) -> list[Trial]:
    """Return the inputs that scales are solved on: parts of the data, else noise like the example."""
    if data is not None:
        batches = (
            tuple(y) for x in chunks(data) for y in zip(*(torch.split(each, AT_ONCE) for each in x), strict=True)
        )
        return _no_more(Trial("data", batch) for batch in islice(batches, PASSES))
    generator = torch.Generator().manual_seed(0)

    def drawn(x: Any) -> Any:
        return noise(tuple(x.shape), (), generator).to(x.device, x.dtype) if is_floating(x) else x

    return _no_more(Trial("noise", tuple(map(drawn, example))) for _ in range(PASSES))


def _no_more(trials: Iterator[Trial]) -> list[Trial]:
    """Return the first of them, as many as are not too much work."""
    found, work = list[Trial](), 0
    for trial in trials:
        found, work = [*found, trial], work + trial.work
        if work >= MOST:
            break
    return found


class _Watching(TorchFunctionMode):
    """While it is on, notes what the functions that are given one of these weights are given first."""

    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()
        self.weights = weights
        self.read: dict[str, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call one function of torch."""
        name = next((self.weights[id(x)] for x in args[1:] if id(x) in self.weights), None)
        if name is not None and isinstance(args[0], Tensor) and args[0].requires_grad:
            self.read[name] = args[0]
        return func(*args, **(kwargs or {}))


def terms_of(network: nn.Module, weights: Sequence[Weight], trials: Sequence[Trial]) -> list[Term]:
    """Return what rounding each weight, and what its layer reads, does to the outputs.

    Where no gradient gets to one of them, each counts alike, by its noise and its size.
    """
    with suppress(Exception), same_randomness(network), copied(network, in_float64) as copy:  # whatever may be raised
        return _by_gradients(copy, weights, trials)
    stored = dict(named_tensors(network))
    even = {each: stored[each.name].detach().double() for each in weights}
    return [of_weight(each, x, torch.ones_like(x) / x.square().sum().clamp_min(TINY)) for each, x in even.items()]


def _by_gradients(copy: nn.Module, weights: Sequence[Weight], trials: Sequence[Trial]) -> list[Term]:
    tensors = dict(named_tensors(copy))
    held = {each.name: tensors[each.name].requires_grad_() for each in weights}
    watching = _Watching({id(x): name for name, x in held.items()})
    slopes = {name: torch.zeros_like(x, requires_grad=False) for name, x in held.items()}
    sizes, effects = dict[str, Tensor](), dict[str, Tensor]()
    generator = torch.Generator().manual_seed(0)
    for trial in trials:
        watching.read.clear()
        with torch.enable_grad(), watching, Widening(copy):
            outputs = leaves(copy(*placed(trial.inputs, device_of(copy), WIDE)))
            total = sum(_projected(x, generator) for x in outputs.values() if x.requires_grad)
        given = [*held.values(), *watching.read.values()]
        found = torch.autograd.grad(total, given)  # type: ignore[arg-type]
        for name, slope in zip(held, found, strict=False):
            slopes[name] += slope.square()
        for (name, x), slope in zip(watching.read.items(), found[len(held) :], strict=True):
            axis = 1 if held[name].dim() > 2 else x.dim() - 1
            largest, effect = (y.transpose(0, axis).flatten(1) for y in (x.detach().abs(), slope.square()))
            sizes[name] = torch.maximum(sizes[name], largest.amax(1)) if name in sizes else largest.amax(1)
            effects[name] = effects.get(name, 0) + effect.sum(1)
    terms = [of_weight(each, held[each.name].detach(), slopes[each.name]) for each in weights]
    return terms + [of_activation(each, sizes[each.name], effects[each.name]) for each in weights if each.name in sizes]


def _projected(output: Tensor, generator: torch.Generator) -> Tensor:
    """Return the output's sum with random signs, relative to its size: the square of a slope of it is on average the
    sum of the squares of the slopes of all of its numbers.
    """
    signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
    return (output * signs).sum() / output.detach().square().mean().sqrt().clamp_min(TINY)


class Rounding:
    """Rounds the weights of a network, a copy of ours, to few bits, tensor by tensor, and measures the noise in its
    outputs.
    """

    def __init__(self, copy: nn.Module, weights: Sequence[Weight], trials: Sequence[Trial]) -> None:
        self.names = {weight.name for weight in weights}
        self.trials = trials[:MEASURED]
        self.copy = copy
        self.held = dict(named_tensors(self.copy))
        self.now: dict[str, tuple[Tensor | None, int]] = {}
        self.wanted = by_key(run_copy(self.copy, self.trials, {}))

    def noise(self, tensors: Mapping[str, Tensor], bits: int) -> float:
        """Return the energy of the noise relative to that of the outputs, with these tensors in the network."""
        for name, tensor in tensors.items():
            now, known = self.now.get(name, (None, 0))
            if now is not tensor or known != bits:
                with torch.no_grad():
                    self.held[name].copy_(rounded(tensor, bits) if name in self.names else tensor)
                self.now[name] = tensor, bits
        found = by_key(run_copy(self.copy, self.trials, {}))
        pairs = [(x.double(), found[key].double()) for key, x in self.wanted.items() if key in found]
        size = sum(float(x.square().sum()) for x, _ in pairs)
        off = sum(float((x - y).square().sum()) for x, y in pairs)
        return off / size if size and math.isfinite(off) else math.inf
