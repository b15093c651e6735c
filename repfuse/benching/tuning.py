"""Which of two forms is faster here: places where the law of cost is in doubt, as one layer and in parts."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from repfuse.benching.clock import Clock
from repfuse.benching.sites import time_places
from repfuse.checking.places import places
from repfuse.planning.cost import is_trade, price
from repfuse.planning.replaying import Choice, again
from repfuse.plans import Measured, Plan
from repfuse.rewriting import rewrite

DOUBTFUL = 1.5
"""What the law of cost merges is timed where it is predicted to get less than so many times as fast, and what it
leaves in parts where that is not to get so many times as slow.
"""


@dataclass(frozen=True)
class Tuned:
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
