"""The law of cost: what a map costs at its shape, and whether the fused form is predicted to be cheaper.

The prediction is in bytes: work that hides behind nothing is added up, with two exchange rates that are typical of
processors from phones to servers and decide only clear cases. The benchmark says what was really gained.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from repfuse.algebra.geometry import Geometry, Ints
from repfuse.algebra.transposed import TransposedGeometry
from repfuse.plans import Cost, Policy

MACS_PER_BYTE = 4
"""Multiply-accumulates in the time of moving one byte: about 50 G/s against 12 GB/s on one CPU core."""

BYTES_PER_LAUNCH = 196_608
"""Bytes moved in the time of starting one operator: about 16 us at 12 GB/s.

Both measured by ``tests/bench_cost.py`` on 300 pairs. Rank correlation of predicted and measured gain: 0.92 in PyTorch
and 0.84 in ONNX Runtime; time lost by mistakes: 0.4 and 3.8 %. (With 8 and 32,768: 0.89, 0.85; 0.9, 3.9 %. ONNX Runtime
would have less of both, but in PyTorch networks of small depthwise kernels get slower with that.)
"""

WORTH_THE_CLASS = 0.05
"""Which share of the predicted time of a network is to be gained before its outermost module may lose its class: more
than machines differ from one day to the next.
"""

TOLD_APART = 0.05
"""By which share two predicted times have to differ before they say which of two ways is faster."""


def convolution_cost(geometry: Geometry, output: Ints, source: Ints, item: int) -> Cost:
    """Cost of one convolution with bias from shape ``source`` to shape ``output``, ``item`` bytes a number."""
    weights = prod(geometry.weight_shape) + geometry.out_channels
    moved, launches, read = prod(output) + weights, 1, source
    copies = needs_separate_pad(geometry) or geometry.padding_mode != "zeros"  # as PyTorch's own module does
    for amounts in filter(any, geometry.pad_then_crop if copies else ()):
        pairs = zip(reversed(amounts[::2]), reversed(amounts[1::2]), strict=True)
        spatial = (n + sum(pair) for n, pair in zip(read[-geometry.ndim :], pairs, strict=True))
        padded = (*read[: -geometry.ndim], *spatial)
        moved, launches, read = moved + prod(read) + prod(padded), launches + 1, padded
    return Cost(geometry.macs(source, output), item * (moved + prod(read)), launches, weights)


def homogeneous_cost(geometry: Geometry, output: Ints, source: Ints, item: int) -> Cost:
    """Cost of a convolution of ``source`` with a channel of ones behind the others, and of the copy that puts it there.

    That starts in less than half the time of a convolution (4.4 and 9.9 us in PyTorch), so before a transposed one it
    is memory alone. Others take longer for channels that fill no blocks: with the copy, in PyTorch and ONNX Runtime, a
    1x1 from C to M channels and a 3x3 back were 0.7 to 1.1 times and 0.6 to 1.05 times as fast where M = C, 1.9 to 8.7
    and 1.3 to 9.6 times where M = 4 C. (A transposed 2x2 or 4x4 behind it, M = C: 0.99 to 1.9 and 0.77 to 1.4 times.)
    """
    copied = (source[0], geometry.in_channels, *source[2:])
    whole = convolution_cost(geometry, output, copied, item) + Cost(0, item * (prod(source) + prod(copied)))
    if isinstance(geometry, TransposedGeometry):
        return whole
    return replace(whole, macs=int(whole.macs * _UNEVEN), launches=whole.launches + 1)


_UNEVEN = 1.25


def filter_cost(geometry: Geometry, output: Ints, source: Ints, item: int) -> Cost:
    """Cost of a fixed filter: of a pool, of the copy that a pad makes; a crop and a step are views and cost nothing."""
    if prod(geometry.kernel) == 1 and not any(amount > 0 for pair in geometry.padding for amount in pair):
        return Cost()
    return Cost(0, item * (prod(source) + prod(output)), 1)


def needs_separate_pad(geometry: Geometry) -> bool:
    """Whether an operator of its own has to make the padding: it differs before and after, or it crops."""
    return any(before != after or before < 0 for before, after in geometry.padding)


def elementwise_cost(output: Ints, inputs: int, item: int, parameters: int = 0) -> Cost:
    """Cost of an operation that reads ``inputs`` tensors of shape ``output`` and writes one."""
    return Cost(0, item * ((inputs + 1) * prod(output) + parameters), 1, parameters)


def price(cost: Cost, policy: Policy = Policy.COST) -> float:
    """Return the predicted time, in bytes moved; or the number of operators first, where that is the policy."""
    time = cost.macs / MACS_PER_BYTE + cost.bytes + cost.launches * BYTES_PER_LAUNCH
    return cost.launches * _MORE_THAN_ANY_TIME + time if policy is Policy.ALWAYS else time


_MORE_THAN_ANY_TIME = 1e15


def is_better(after: Cost, before: Cost, policy: Policy = Policy.COST) -> bool:
    """Whether it is predicted to be faster; by a cost that is a trade, more of one thing for less of another, so much
    faster that it shows.
    """
    least = 1 - TOLD_APART if is_trade(after, before) and policy is not Policy.ALWAYS else 1
    return price(after, policy) < least * price(before, policy)


def is_trade(after: Cost, before: Cost) -> bool:
    """Whether it is more of one thing: what is no trade cannot be slower."""
    return after.macs > before.macs or after.bytes > before.bytes or after.launches > before.launches
