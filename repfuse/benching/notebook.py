"""The experiment that this project began with, as it was done there and as it should be.

A notebook fused ``conv3(x) + conv1(x) + x`` with ``padding="same"``, called the block and the one convolution once
each, cold, the block first, and claimed a factor of 10.7.
"""

from __future__ import annotations

import copy
import time
from functools import partial

import torch

from repfuse.benching.clock import Clock, time_calls, time_rounds
from repfuse.benching.results import Experiment
from repfuse.benching.statistics import ratio_of_medians
from repfuse.fusing import fuse
from repfuse.samples import NotebookBlock
from repfuse.wording import Progress

SHAPES = ((2, 28, 28), (16, 56, 56), (64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7))


@torch.inference_mode()
def experiments(
    *,
    rounds: int = 40,
    seconds: float = 3.0,
    progress: Progress = lambda _stage, _fraction: None,
    clock: Clock = time.perf_counter,
) -> tuple[Experiment, ...]:
    """Do it at each of SHAPES, which takes ``seconds`` or ``rounds`` rounds."""
    found = []
    for number, shape in enumerate(SHAPES):
        progress("the notebook's experiment", number / len(SHAPES))
        x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        block = NotebookBlock(shape[0]).eval()
        first = time_calls(partial(block, x), 1, clock)
        fused = fuse(block, (x,)).module
        second = time_calls(partial(fused, x), 1, clock)
        integers = copy.deepcopy(block)
        integers.conv3.padding, integers.conv1.padding = (1, 1), (0, 0)
        calls = [partial(network, x) for network in (block, integers, fused)]
        times = time_rounds(calls, clock, rounds=rounds, seconds=seconds, progress=lambda _fraction: None).times
        warm, again = (ratio_of_medians(each, times[2]) for each in times[:2])
        found.append(Experiment((1, *shape), first / second, warm, again))
    return tuple(found)
