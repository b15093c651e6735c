"""Timing calls in rounds. The clock is a parameter, so that the tests need not wait for one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from repfuse.errors import RepfuseError
from repfuse.networks import same_randomness, set_eval
from repfuse.recording.copies import restored

Clock = Callable[[], float]
Call = Callable[[], Any]

SHORTEST = 5e-3  # seconds: one timing lasts at least this long, thousands of times the resolution of the clock
MOST_CALLS = 10_000
WARM_UP = 2
MOST_WARM_UP = 30
STABLE = 0.05  # a network is warm whose last calls, by their median, are as fast as its fastest, by this much
FEWEST_ROUNDS = 8  # with fewer, fewer than 95 % of the intervals hold the ratio


@dataclass(frozen=True)
class Rounds:
    """Seconds per call of each network, by round; ``calls`` the calls in a row of which each is the mean."""

    times: tuple[tuple[float, ...], ...]
    calls: tuple[int, ...]


def time_rounds(
    calls: Sequence[Call], clock: Clock, *, rounds: int, seconds: float, progress: Callable[[float], None]
) -> Rounds:
    """Time all calls, warm and interleaved: each round times each of them once.

    The order is drawn anew for every other round, and turned around in the next one: so a drift of the machine's speed,
    and what a call leaves behind in its caches, fall on all alike. Stops after ``rounds`` rounds, or after the first
    even number of rounds that fills ``seconds``, warm-up included, and no sooner than FEWEST_ROUNDS.
    """
    end, draw = clock() + seconds, random.Random(0)
    counts = [_calibrate(call, clock, end) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    order = [*range(len(calls))]
    for number in range(rounds):
        if number >= FEWEST_ROUNDS and number % 2 == 0 and clock() >= end:
            break
        if number % 2 == 0:
            draw.shuffle(order)
        for which in order if number % 2 == 0 else reversed(order):
            times[which].append(time_calls(calls[which], counts[which], clock))
        progress((number + 1) / rounds)
    return Rounds(tuple(map(tuple, times)), tuple(counts))


def time_calls(call: Call, calls: int, clock: Clock) -> float:
    """Return the mean seconds of ``calls`` calls in a row."""
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) / calls


def _calibrate(call: Call, clock: Clock, end: float) -> int:
    """Warm up until calls get no faster, and return how many in a row last SHORTEST, judged by the fastest of them."""
    once = [time_calls(call, 1, clock) for _ in range(WARM_UP)]
    while median(once[-WARM_UP:]) > (1 + STABLE) * min(once) and len(once) < MOST_WARM_UP and clock() < end:
        once.append(time_calls(call, 1, clock))
    fastest = min(once)
    return min(MOST_CALLS, math.ceil(SHORTEST / fastest)) if fastest > 0 else MOST_CALLS


# The conditions of a measurement: eval mode, threads, batch sizes, and a clock that waits for the device.


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Put the networks in eval mode, and leave them afterwards as they were: their modes, what they cached, what they
    counted in buffers, and the random numbers.
    """
    counted = [(buffer, buffer.clone()) for network in networks for buffer in network.buffers()]
    with ExitStack() as stack:
        stack.callback(_write_back, counted)
        for network in networks:
            stack.enter_context(same_randomness(network))
            stack.enter_context(restored(network))
            set_eval(network)
        yield


@torch.no_grad()
def _write_back(values: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for tensor, before in values:
        tensor.copy_(before)


def batch_of(inputs: tuple[Any, ...]) -> int | None:
    """Return the length of the first axis of the first tensor that has one."""
    return next((len(x) for x in tree_leaves(inputs) if isinstance(x, torch.Tensor) and x.dim()), None)


def batched(inputs: tuple[Any, ...], size: int) -> tuple[Any, ...]:
    """Return inputs of ``size`` samples: those given, repeated or cut off.

    Tensors whose first axis is as long as the batch follow; others stay.
    """
    batch = batch_of(inputs)
    return tuple(tree_map(lambda x: _repeat(x, batch, size), inputs)) if batch else inputs


def at_least(least: int, name: str, values: Sequence[int]) -> tuple[int, ...]:
    """Return the values, each once. Raises RepfuseError where there is none or one is less than ``least``."""
    if not values or min(values) < least:
        given = ", ".join(map(str, values)) or "empty"
        raise RepfuseError(f"{name} cannot be {given}.", "", f"Give at least {least}.")
    return tuple(dict.fromkeys(values))


def device_clock(clock: Clock, device: torch.device) -> Clock:
    """Return the clock, or on CUDA one that adds up the times between events on the device.

    A reading waits until the device has done what it was given before, and for what ``clock`` waits for. It stops the
    clock: until the host hears that the device is done, and comes to its next call, no time passes.
    """
    if device.type != "cuda":
        return clock
    last, seconds = _recorded(device), 0.0

    def read() -> float:
        nonlocal last, seconds
        clock()
        now = _recorded(device)
        torch.cuda.synchronize(device)
        seconds += float(last.elapsed_time(now)) / 1e3  # of single precision: exact enough from one reading to the next
        last = _recorded(device)
        return seconds

    return read


def _recorded(device: torch.device) -> torch.cuda.Event:
    """Return an event that happens when the device has done what it was given before."""
    with torch.cuda.device(device):
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
    return event


def _repeat(x: Any, old: int, size: int) -> Any:
    if not isinstance(x, torch.Tensor) or not x.dim() or len(x) != old:
        return x
    return x[torch.arange(size, device=x.device) % old]
