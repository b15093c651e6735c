"""Where a network gained: each place of a plan by itself, before and after, at the size that the example gives it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from math import inf
from statistics import median

import torch
from torch import nn

from repfuse.benching.clock import FEWEST_ROUNDS, Clock, device_clock, time_rounds
from repfuse.benching.results import SiteTiming
from repfuse.benching.statistics import ratio_of_medians
from repfuse.checking.places import Place, places
from repfuse.checking.proof import at_the_example
from repfuse.networks import device_of
from repfuse.planning.cost import price
from repfuse.plans import Plan, Site


@torch.inference_mode()
def time_sites(
    original: nn.Module,
    fused: nn.Module,
    plan: Plan,
    *,
    seconds: float = 10.0,
    below: float = inf,
    progress: Callable[[float], None] = lambda _fraction: None,
    clock: Clock = time.perf_counter,
) -> tuple[SiteTiming, ...]:
    """Time each place of ``plan``, by which ``fused`` was made of ``original``: its operations and what they became.

    Only those that are predicted to get less than ``below`` times as fast. All take ``seconds``, about, and each
    FEWEST_ROUNDS at least. The inputs are random, in the dtypes that the network has there. Raises RepfuseError where
    the plan is of other networks.
    """
    found = [place for place in places(original, plan) if _predicted(place, plan) < below]
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


def _predicted(place: Place, plan: Plan) -> float:
    """Return how many times as fast the law of cost expects the place to get."""
    before, after = (sum(price(getattr(site, side)) for site in _sites(place, plan)) for side in ("before", "after"))
    return before / after if after else inf


def _sites(place: Place, plan: Plan) -> list[Site]:
    """Return the sites of a plan that are written there: several where what they compute is added up."""
    return [site for site in plan.sites if site.output == _output(place)]


def _output(place: Place) -> str:
    return place.planner.recording.names[place.region.root]


def _timing(place: Place, plan: Plan, before: tuple[float, ...], after: tuple[float, ...]) -> SiteTiming:
    predicted = _predicted(place, plan)
    return SiteTiming(
        path=place.path,
        output=_output(place),
        kernel=" + ".join(site.kernel for site in _sites(place, plan)),
        predicted=predicted if predicted < inf else None,
        before=median(before),
        after=median(after),
        speedup=ratio_of_medians(before, after),
    )
