"""The gate: why a block is believed to be the kernel that was read off it. Each reason is a number and its bound.

Finitely many probes prove nothing of a forward that looks at values: ``if x.abs().max() > 1e9: ...`` is seen only by
an input that is that large. So the inputs are dense and sparse, constant and random, of both signs, and of magnitudes
from 1e-6 to 1e12; a block that does something else for other inputs than these is not found out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from repfuse.probing.agreement import disagreement
from repfuse.probing.axes import core
from repfuse.probing.box import Box, Refused
from repfuse.probing.kernel import Kernel
from repfuse.probing.probes import Probes, everywhere, grid, impulses, numbers

FACTORS = (-3.0, 2.0**-20, 2.0**20, 2.0**40)
FAR = {1: 257, 2: 65, 3: 33}
"""A size beyond the one at which the reach was seen, by number of axes."""

UNIT = 2.0**-53
COARSE = 1e-6
LAYERS = 64
"""A block of several layers rounds at each of them."""


@dataclass(frozen=True)
class Check:
    """One reason: what was measured, relative, and what rounding explains."""

    name: str
    measured: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether rounding explains it; what is not a number is not explained."""
        return self.measured <= self.allowed


@dataclass(frozen=True)
class Evidence:
    """Every reason, and at which sizes and on how many inputs."""

    checks: tuple[Check, ...]
    sizes: tuple[tuple[int, ...], ...]
    calls: int


def gather(box: Box, kernel: Kernel) -> Evidence:
    """Return the evidence that ``box`` is ``kernel``. Raises Refused with the first reason that does not hold."""
    allowed = 8 * UNIT * (kernel.terms + LAYERS)
    sizes = tuple(_sizes(box, kernel))
    if not sizes:
        raise Refused("it takes no other sizes")
    checks = []
    for name, measured, exact in _measured(box, kernel, sizes):
        check = Check(name, measured, 0.0 if exact else allowed)
        if not check.passed:
            raise Refused(f"{_FAILED[name]} ({name}: {measured:.1e}, where rounding explains {check.allowed:.1e})")
        checks.append(check)
    return Evidence(tuple(checks), sizes, box.calls)


def check_linear(box: Box, size: tuple[int, ...]) -> None:
    """Raise Refused where one look shows that the block is not linear, before more is asked of it."""
    if not _superposed(box, torch.Generator().manual_seed(4), size) <= COARSE:
        raise Refused(_FAILED["superposition"])


_FAILED = {
    "determinism": "the same input gives different answers",
    "samples": "a sample's answer depends on the others in its batch",
    "superposition": "the answer to a sum is not the sum of the answers",
    "homogeneity": "a multiple of the input does not give that multiple of the answer",
    "positions": "an impulse elsewhere is answered differently",
    "border": "at the border it does not read zeros beyond it",
    "inputs": "its answers to whole inputs are not those of its kernel",
}


def _measured(box: Box, kernel: Kernel, sizes: tuple[tuple[int, ...], ...]) -> Iterator[tuple[str, float, bool]]:
    generator = torch.Generator().manual_seed(2)
    for size in sizes[:3]:
        x = _dense(generator, box, size)
        yield "determinism", _difference(box(x), box(x)), True
        yield "samples", _difference(box(x), torch.cat([box(one) for one in torch.split(x.flip(0), 1)]).flip(0)), False
        yield "superposition", _superposed(box, generator, size), False
        yield "homogeneity", _scaled(box, x), False
    for size in sizes:
        yield "inputs", _whole(box, kernel, generator, size), False
    for size in sizes[:4]:
        inner, outer = _positions(size)
        yield "positions", _impulses(box, kernel, generator, size, inner), False
        yield "border", _impulses(box, kernel, generator, size, outer), False


def _sizes(box: Box, kernel: Kernel) -> Iterator[tuple[int, ...]]:
    """Yield sizes that the block takes: those that show all taps, not square, the smallest, and a large one."""
    least = [core(axis) or 1 for axis in kernel.axes]
    ways = [[0, 0], [1, 0], [2, 3], [3, 5]]
    wanted = [tuple(n + way[axis % 2] for axis, n in enumerate(least)) for way in ways]
    wanted += [(n,) * box.ndim for n in (1, 2, 3)] + [(FAR.get(box.ndim, 1),) * box.ndim]
    for size in dict.fromkeys(wanted):
        if kernel.output_size(size) is not None and box.runs(size):
            yield size


def _dense(generator: torch.Generator, box: Box, size: tuple[int, ...]) -> Tensor:
    """Return random samples, one of them constant, one nearly empty, one large."""
    x = torch.randn((5, box.channels, *size), generator=generator, dtype=torch.float64)
    x[1] = 1
    x[2] *= torch.rand(x[2].shape, generator=generator) < 0.1
    x[3] *= 1e6
    return x


def _difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, sample by sample, relative to the sample's largest number."""
    if one.shape != other.shape:
        return math.inf
    size = one.abs().flatten(1).amax(1)
    off = (one - other).abs().flatten(1).amax(1)
    return float(torch.where(off == 0, 0.0, off / size).nan_to_num(math.inf, math.inf).max())


def _superposed(box: Box, generator: torch.Generator, size: tuple[int, ...]) -> float:
    """Return by how much ``f(x + y) - f(x) - f(y) + f(0)`` is not zero, relative to the largest of these."""
    x, y = _dense(generator, box, size), _dense(generator, box, size)
    y = torch.cat([y, -x, 1e-6 * x.flip(0)])
    x = x.repeat(3, *[1] * (x.dim() - 1))
    answers = [box(x + y), box(x), box(y), box(box.zeros(size)).expand(len(x), *[-1] * (x.dim() - 1))]
    off = (answers[0] - answers[1] - answers[2] + answers[3]).abs().flatten(1).amax(1)
    largest = torch.stack([answer.abs().flatten(1).amax(1) for answer in answers]).amax(0)
    return float(torch.where(off == 0, 0.0, off / largest).nan_to_num(math.inf, math.inf).max())


def _scaled(box: Box, x: Tensor) -> float:
    """Return by how much ``f(t x) - f(0)`` differs from ``t (f(x) - f(0))``, for factors of both signs."""
    zero = box(box.zeros(tuple(x.shape[2:])))
    found = []
    for factor in FACTORS:
        scaled, plain = box(factor * x), box(x)
        off = ((scaled - zero) - factor * (plain - zero)).abs().flatten(1).amax(1)
        size = torch.stack([scaled.abs(), (factor * plain).abs(), zero.abs().expand_as(plain)]).amax(0)
        found.append(torch.where(off == 0, 0.0, off / size.flatten(1).amax(1)))
    return float(torch.stack(found).nan_to_num(math.inf, math.inf).max())


def _whole(box: Box, kernel: Kernel, generator: torch.Generator, size: tuple[int, ...]) -> float:
    probes = everywhere(generator, box.channels, size, 2)
    return max(disagreement(box, [kernel], probes.times(factor)) for factor in (1.0, 2.0**20, -(2.0**-10)))


def _positions(size: tuple[int, ...]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return places within, and places of which an axis is at its border; of many, some."""
    near = [sorted({0, 1, n // 3, n // 2, n - 2, n - 1} & set(range(n))) for n in size]
    places = grid(near)
    outer = [place for place in places if any(p in (0, n - 1) for p, n in zip(place, size, strict=True))]
    inner = [place for place in places if place not in set(outer)]
    return inner[:: 1 + len(inner) // 64], outer[:: 1 + len(outer) // 64]


def _impulses(
    box: Box, kernel: Kernel, generator: torch.Generator, size: tuple[int, ...], places: list[tuple[int, ...]]
) -> float:
    if not places:
        return 0.0
    probes: Probes = impulses(numbers(generator, 1, box.channels), size, places)
    return disagreement(box, [kernel], probes)
