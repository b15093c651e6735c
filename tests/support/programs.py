"""Random affine networks: a module that runs a random program, which symbolic tracing sees as an ordinary forward.

A program is a list of steps; a step reads earlier values, counted backwards, and makes the next one.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

C = 4


@dataclass(frozen=True)
class Step:
    """``kind`` of operation on the values ``reads`` steps back, with a ``number`` that chooses among its variants."""

    kind: str
    reads: tuple[int, int, int] = (0, 0, 0)
    number: int = 0
    inner: tuple[Step, ...] = ()


def _conv(number: int) -> nn.Module:
    kernel, dilation, groups = (1, 2, 3, 3)[number % 4], (1, 2)[number // 4 % 2], (1, 2, 4)[number // 8 % 3]
    return nn.Conv2d(C, C, kernel, 1, "same", dilation, groups, bias=number % 5 > 0)


def _strided(number: int) -> nn.Module:
    kernel = (1, 3, 5)[number % 3]
    return nn.Conv2d(C, C, kernel, 2, kernel // 2, bias=number % 2 > 0)


class FunctionalNorm(nn.BatchNorm2d):
    """A normalisation that is traced through."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)


class FunctionalConv(nn.Conv2d):
    """A convolution that is traced through."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


MODULES = {
    "conv": _conv,
    "functional conv": lambda n: FunctionalConv(C, C, (1, 3)[n % 2], padding="same", groups=(1, 2)[n // 2 % 2]),
    "strided": _strided,
    "norm": lambda _number: nn.BatchNorm2d(C),
    "functional norm": lambda _number: FunctionalNorm(C),
    "relu": lambda n: nn.ReLU(inplace=n % 3 == 0),
    "nothing": lambda n: (nn.Identity(), nn.Dropout(), nn.Dropout2d(inplace=True))[n % 3],
}

SUMS = {
    "add": (
        lambda a, b: a + b,
        torch.add,
        lambda a, b: a.add(b, alpha=2),
        lambda a, b: torch.sub(a, b, alpha=0.5),
        lambda a, b: a - b,
        lambda a, b: a.add_(b),
        lambda a, b: a.__iadd__(b),
        lambda a, b: torch.add(a, b, alpha=-1),
    ),
    "number": (
        lambda a, _: a * 2,
        lambda a, _: 0.5 * a,
        lambda a, _: -a,
        lambda a, _: a / 4,
        lambda a, _: a + 0,
        lambda a, _: a.clone(),
        lambda a, _: a.contiguous(),
        lambda a, _: a.mul_(2),
        lambda a, _: a.detach(),
        lambda a, _: a.relu_(),
        lambda a, _: a.mul(1),
    ),
}


class Branched(nn.Module):
    """Some of the modules above on one value, and their sum, nested to the left or to the right."""

    def __init__(self, steps: tuple[Step, ...], to_the_right: bool) -> None:
        super().__init__()
        self.to_the_right = to_the_right
        self.parts = nn.ModuleList(MODULES[step.kind](step.number) for step in steps)

    def forward(self, x: Tensor) -> Tensor:
        values = [part(x) for part in self.parts]
        return functools.reduce(operator.add, values[::-1] if self.to_the_right else values)


class Program(nn.Module):
    """Runs its steps and returns the last value, or with ``both`` an earlier one too."""

    def __init__(self, steps: tuple[Step, ...], both: bool = False) -> None:
        super().__init__()
        self.steps, self.both = steps, both
        self.parts = nn.ModuleDict()
        for place, step in enumerate(steps):
            if step.kind in MODULES:
                self.parts[str(place)] = MODULES[step.kind](step.number)
            elif step.kind == "block":
                self.parts[str(place)] = Program(step.inner)
            elif step.kind == "branches":
                self.parts[str(place)] = Branched(step.inner, step.number % 2 == 0)

    def forward(self, x: Tensor) -> Any:
        values: list[Tensor] = [x]
        halved: list[int] = [0]
        for place, step in enumerate(self.steps):
            a, b, c = (max(len(values) - 1 - back, 0) for back in step.reads)
            if step.kind == "sum":
                chosen = [i for i in (a, b, c) if halved[i] == halved[a]]
                values.append(sum([values[i] for i in chosen]))
            elif step.kind in SUMS:
                b = b if halved[b] == halved[a] else a
                functions = SUMS[step.kind]
                values.append(functions[step.number % len(functions)](values[a], values[b]))
            else:
                again = step.kind == "again" and self.parts
                name = list(self.parts)[step.number % len(self.parts)] if again else str(place)
                values.append(self.parts[name](values[a]) if name in self.parts else values[a])
                halved.append(halved[a] + self._halves(name))
                continue
            halved.append(halved[a])
        return (values[-1], values[self.steps[0].number % len(values)]) if self.both else values[-1]

    def _halves(self, name: str) -> bool:
        return name in self.parts and isinstance(self.parts[name], nn.Conv2d) and self.parts[name].stride != (1, 1)


_NUMBERS = st.integers(0, 47)
_BACK = st.sampled_from([0, 0, 0, 1, 1, 2, 3, 5])
_READS = st.tuples(_BACK, _BACK, _BACK)
_AFFINE = ["conv", "conv", "conv", "functional conv", "norm", "functional norm", "nothing"]
_INNER = [*_AFFINE, "add", "add", "number", "relu", "sum"]
_KINDS = [*_INNER, "strided", "again"]


def _steps(kinds: list[str], least: int, most: int) -> st.SearchStrategy[tuple[Step, ...]]:
    steps = st.builds(Step, st.sampled_from(kinds), _READS, _NUMBERS)
    return st.lists(steps, min_size=least, max_size=most).map(tuple)


def _compound(kind: str, inner: st.SearchStrategy[tuple[Step, ...]]) -> st.SearchStrategy[Step]:
    return st.builds(Step, st.just(kind), _READS, _NUMBERS, inner)


PROGRAMS = st.lists(
    st.one_of(
        st.builds(Step, st.sampled_from(_KINDS), _READS, _NUMBERS),
        _compound("branches", _steps(_AFFINE, 2, 4)),
        _compound("block", _steps(_INNER, 1, 6)),
    ),
    min_size=1,
    max_size=12,
).map(tuple)
"""Steps of a program."""
