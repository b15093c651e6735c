"""The law of cost: what a map costs at its shape, and whether the fused form is predicted to be cheaper.

The prediction is in bytes: work that hides behind nothing is added up, with two exchange rates that are typical of
processors from phones to servers and decide only clear cases. The benchmark says what was really gained.
"""

from __future__ import annotations

from math import prod

from repfuse.algebra.geometry import Geometry, Ints
from repfuse.plans import Cost

MACS_PER_BYTE = 8
"""Multiply-accumulates in the time of moving one byte: about 100 G/s against 12 GB/s on one CPU core."""

BYTES_PER_LAUNCH = 32_768
"""Bytes moved in the time of starting one operator: about 3 us at 12 GB/s."""


def convolution_cost(geometry: Geometry, output: Ints, source: Ints, item: int) -> Cost:
    """Cost of one convolution with bias from shape ``source`` to shape ``output``, ``item`` bytes a number."""
    weights = prod(geometry.weight_shape) + geometry.out_channels
    macs = prod(output) * prod(geometry.weight_shape[1:])
    separate_pad = needs_separate_pad(geometry)
    padded = 2 * prod(source) if separate_pad else 0
    return Cost(macs, item * (prod(source) + prod(output) + weights + padded), 1 + separate_pad, weights)


def needs_separate_pad(geometry: Geometry) -> bool:
    """Whether the padding is not the same before and after, so that an operator of its own has to make it."""
    return any(before != after for before, after in geometry.padding)


def elementwise_cost(output: Ints, inputs: int, item: int, parameters: int = 0) -> Cost:
    """Cost of an operation that reads ``inputs`` tensors of shape ``output`` and writes one."""
    return Cost(prod(output), item * ((inputs + 1) * prod(output) + parameters), 1, parameters)


def price(cost: Cost) -> float:
    """Return the predicted time, in bytes moved."""
    return cost.macs / MACS_PER_BYTE + cost.bytes + cost.launches * BYTES_PER_LAUNCH


def cheaper(after: Cost, before: Cost) -> bool:
    """Whether the fused form is predicted to take less time."""
    return price(after) < price(before)
