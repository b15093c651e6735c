"""Where a network gained: each place of a plan by itself, before and after, at the size that the example gives it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from repfuse.benching.clock import FEWEST_ROUNDS, Clock, device_clock, time_rounds
from repfuse.benching.results import SiteTiming
from repfuse.benching.statistics import ratio_of_medians
from repfuse.checking.places import Place, places
from repfuse.checking.proof import at_the_example
from repfuse.networks import device_of
from repfuse.planning.cost import price
from repfuse.plans import Plan


@torch.inference_mode()
def time_sites(
    original: nn.Module,
    fused: nn.Module,
    plan: Plan,
    *,
    seconds: float = 10.0,
    progress: Callable[[float], None] = lambda _fraction: None,
    clock: Clock = time.perf_counter,
) -> tuple[SiteTiming, ...]:
    """Time each place of ``plan``, by which ``fused`` was made of ``original``: its operations and what they became.

    All of them take ``seconds``, about, and each FEWEST_ROUNDS at least. The inputs are random, in the dtypes that the
    network has there. Raises RepfuseError where the plan is of other networks.
    """
    found = list(places(original, plan))
    clock = device_clock(clock, device_of(original))
    timed = []
    for number, place in enumerate(found):
        inputs = _inputs(place)
        calls = [partial(module, *inputs) for module in (place.before, place.after(fused))]
        rounds = time_rounds(
            calls, clock, rounds=10 * FEWEST_ROUNDS, seconds=seconds / len(found), progress=lambda _fraction: None
        )
        timed.append(_timing(place, plan, *rounds.times))
        progress((number + 1) / len(found))
    return tuple(timed)


def _inputs(place: Place) -> tuple[torch.Tensor, ...]:
    recording = place.planner.recording
    device = device_of(place.module)
    pairs = zip(place.sources, at_the_example(place).inputs, strict=True)
    return tuple(x.to(device=device, dtype=recording.dtype_of[source]) for source, x in pairs)


def _timing(place: Place, plan: Plan, before: tuple[float, ...], after: tuple[float, ...]) -> SiteTiming:
    output = place.planner.recording.names[place.region.root]
    sites = [site for site in plan.sites if site.output == output]
    ratio = ratio_of_medians(before, after)
    costs = [sum(price(getattr(site, side)) for site in sites) for side in ("before", "after")]
    return SiteTiming(
        path=place.path,
        kernel=" + ".join(site.kernel for site in sites),
        predicted=costs[0] / costs[1] if costs[1] else None,
        before=sorted(before)[len(before) // 2],
        after=sorted(after)[len(after) // 2],
        speedup=ratio,
    )
