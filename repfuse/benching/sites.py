"""Where a network gained: each place of a plan, before and after, at the size that the example gives it.

An operation by itself takes another time than within the network: what it reads was not just written. So a place is
timed twice. By itself, before and after: that says how many times as fast it got. And in the network, which is timed
with more and more of its places merged, in the same rounds: what each step saves adds up to what the network gains.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import ceil
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from repfuse.benching.results import Gain, SiteTiming
from repfuse.benching.timing import (
    FEWEST_ROUNDS,
    Clock,
    device_clock,
    difference_of_medians,
    evaluating,
    ratio_of_medians,
    time_rounds,
)
from repfuse.checking.places import Place, places
from repfuse.checking.proof import at_the_example
from repfuse.errors import RepfuseError
from repfuse.networks import device_of
from repfuse.planning.cost import is_trade, price
from repfuse.planning.replaying import Choice, again, replay
from repfuse.plans import Measured, Plan
from repfuse.rewriting import rewrite

ROUNDS = 10 * FEWEST_ROUNDS
MOST_STEPS = 10
"""Of so many networks at most, each with more of its places merged, all are in memory, and timed in each round."""

Report = Callable[[float], None]


@torch.inference_mode()
def time_sites(
    original: nn.Module,
    fused: nn.Module,
    plan: Plan,
    example: Sequence[Any],
    *,
    seconds: float = 10.0,
    progress: Report = lambda _fraction: None,
    clock: Clock = time.perf_counter,
) -> tuple[SiteTiming, ...]:
    """Time each place of ``plan``, by which ``fused`` was made of ``original``: by itself, its operations and what they
    became, and what the network gains by it on ``example``.

    Of more than MOST_STEPS places several are merged in one step, which shares its gain out among them. All take
    ``seconds`` twice, about, and each FEWEST_ROUNDS at least. Raises RepfuseError where the plan is of other networks.
    """
    plan = replace(plan, live=replay(original, plan)[0])
    halves = (lambda done: progress(done / 2)), (lambda done: progress((1 + done) / 2))
    pairs = [(place, place.before) for place in places(original, plan)]
    alone = time_places(pairs, fused, plan, seconds=seconds, progress=halves[0], clock=clock)
    networks, steps, waiting = [original], list[list[SiteTiming]](), list[SiteTiming]()
    size = ceil(len(alone) / MOST_STEPS)
    for start in range(0, len(alone), size or 1):
        waiting += alone[start : start + size]
        merged = {site.output for step in (*steps, waiting) for site in step}
        part = replace(plan, sites=tuple(site for site in plan.sites if site.output in merged))
        try:
            networks.append(fused if len(merged) == len(alone) else rewrite(original, part, share=True))
        except RepfuseError:  # one that cannot be merged without the next
            continue
        steps, waiting = [*steps, waiting], []
    calls, clock = [partial(network, *example) for network in networks], device_clock(clock, device_of(original))
    with evaluating(*networks):
        times = time_rounds(calls, clock, rounds=ROUNDS, seconds=seconds, progress=halves[1]).times
    gains = map(difference_of_medians, times, times[1:])
    return tuple(site for step, gain in zip(steps, gains, strict=True) for site in shared_out(gain, step))


def time_places(
    pairs: Sequence[tuple[Place, nn.Module]],
    fused: nn.Module,
    plan: Plan,
    *,
    seconds: float,
    progress: Report = lambda _fraction: None,
    clock: Clock,
) -> tuple[SiteTiming, ...]:
    """Time what each place is in ``fused``, by ``plan``, against another module that computes the same.

    The inputs are random, in the dtypes that the network has there.
    """
    clock = device_clock(clock, device_of(fused))
    timed = []
    for number, (place, other) in enumerate(pairs):
        device, dtype_of = device_of(place.module), place.planner.recording.dtype_of
        given = zip(place.sources, at_the_example(place).inputs, strict=True)
        inputs = [x.to(device=device, dtype=dtype_of[source]) for source, x in given]
        calls = [partial(module, *inputs) for module in (_at_hand(other), place.after(fused))]
        rounds = time_rounds(calls, clock, rounds=ROUNDS, seconds=seconds / len(pairs), progress=lambda _fraction: None)
        timed.append(_timing(place, plan, *rounds.times))
        progress((number + 1) / len(pairs))
    return tuple(timed)


def shared_out(gain: Gain, step: Sequence[SiteTiming]) -> list[SiteTiming]:
    """Return places with what the network gains by each, where all of them are merged in one step.

    To each goes what it gained by itself, and of what that differs from the step's ``gain`` the share that it took of
    the time: together they gain just that.
    """
    alone, took = sum(site.before - site.after for site in step), sum(site.before for site in step)

    def of(site: SiteTiming, whole: float) -> float:
        return site.before - site.after + (whole - alone) * site.before / took

    return [
        replace(site, gain=Gain(*(of(site, whole) for whole in (gain.value, gain.low, gain.high)))) for site in step
    ]


def _at_hand(module: nn.Module) -> nn.Module:
    """Return a module that finds its tensors at once: to go through nested ones takes as long as a small operation."""
    for each in module.modules():
        vars(each).update(each._modules | each._parameters | each._buffers)
    return module


def _timing(place: Place, plan: Plan, before: tuple[float, ...], after: tuple[float, ...]) -> SiteTiming:
    sites = [site for site in plan.sites if site.output == place.output]  # several where what they compute is added up
    costs = [sum(price(getattr(site, side)) for site in sites) for side in ("before", "after")]
    return SiteTiming(
        path=place.path,
        output=place.output,
        kernel=" + ".join(site.kernel for site in sites),
        predicted=costs[0] / costs[1] if costs[1] else None,
        before=median(before),
        after=median(after),
        speedup=ratio_of_medians(before, after),
    )


# Which of two forms is faster here: places where the law of cost is in doubt, as one layer and in parts.

DOUBTFUL = 1.5
"""What the law of cost merges is timed where it is predicted to get less than so many times as fast, and what it
leaves in parts where that is not to get so many times as slow.
"""


class Tuned(NamedTuple):
    """A plan that goes by what was measured, and a line for each place that was."""

    plan: Plan
    said: tuple[str, ...]


@torch.inference_mode()
def tune(
    original: nn.Module,
    plan: Plan,
    choice: Choice,
    *,
    seconds: float = 10.0,
    clock: Clock = time.perf_counter,
) -> Tuned:
    """Time the doubtful places of a network as one layer and in parts, and return the plan of the faster forms.

    ``plan`` is what ``choice`` makes; doubtful are places that it merges, and that it does not, where little difference
    is expected. Where none is measured, it stays.
    """
    left = plan.live.declined.keys()
    merged = {site.output for site in plan.sites} - left
    parts = again(original, plan, choice, [Measured(output, 0.5, 0.5, 0.5) for output in merged])
    costs = {output: both for output, both in parts.live.declined.items() if is_trade(*reversed(both))}
    expected = {output: price(apart) / price(one) for output, (apart, one) in costs.items()}
    doubted = [x for x, by in expected.items() if (by > 1 / DOUBTFUL if x in left else by < DOUBTFUL)]
    whole = again(original, plan, choice, [Measured(output, 2.0, 2.0, 2.0) for output in doubted])
    kept = {site.output for site in whole.sites}
    found = [place for place in places(original, whole) if place.output in kept.intersection(doubted)]
    others, in_parts = list(places(original, parts)), rewrite(original, parts)
    pairs = [(place, place.in_parts(others, in_parts)) for place in found]
    timed = time_places(pairs, rewrite(original, whole), whole, seconds=seconds, clock=clock)
    sure = [site for site in timed if not site.speedup.low <= 1 <= site.speedup.high]
    measured = [Measured(site.output, site.speedup.value, site.speedup.low, site.speedup.high) for site in sure]
    said = []
    for site in timed:
        ratio = site.speedup
        done = "merged" if ratio.low > 1 else "left in parts" if ratio.high < 1 else "no difference"
        said.append(f"{site.path} is {ratio.value:.2f}x as fast merged ({ratio.low:.2f} to {ratio.high:.2f}): {done}")
    return Tuned(again(original, plan, choice, measured) if measured else plan, tuple(said))
