"""Times every network of the zoo that has sites against its fused form, and against timm's own form where there is one.

`make speed`, or `python -m tests.bench_zoo [--rounds N] [--batch N] [--own-size] [NAME ...]`. One thread, interleaved
rounds, in seconds of the processor, so that other work beside it disturbs little; images of 96 pixels where a network
takes them, unless they are to be of its own size.
Each batch has a plan of its own: what is worth merging depends on it, so the example is to be what will be deployed.
A ratio is how many times as fast the fused form is, with its 95 % interval; the last lines name what got slower.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import time
from functools import partial
from typing import Any

import torch
from support import torchvision_schemas
from torch import nn

from repfuse.benching.results import Ratio
from repfuse.benching.timing import batched, ratio_of_medians, time_rounds
from repfuse.fusing import fuse
from tests.zoo.networks import build, names

SIDE = 96
SECONDS = 6.0
ALIKE = 0.02  # copies of one form differ by as much: where their weights lie in memory
ROW = "{:<44} {:>5} {:>5} {:>10} {:>20} {:>20}"


def main() -> None:
    """Print the table, a row for each network and batch size."""
    torchvision_schemas.install()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="timm:NAME or torchvision:NAME, unless all")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, action="append", help="1 and 32 unless told")
    parser.add_argument("--own-size", action="store_true", help="images of the size that each network is made for")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(ROW.format("network", "sites", "batch", "fused, ms", "original over fused", "timm's over fused"), flush=True)
    slower = []
    for name in options.names or names():
        try:
            slower += measured(name, options.batch or [1, 32], options.rounds, own_size=options.own_size)
        except Exception as error:  # what it says is the row
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr, flush=True)
        gc.collect()
    print(*(slower or ["none is slower"]), sep="\n")


@torch.inference_mode()
def measured(name: str, batches: list[int], rounds: int, *, own_size: bool) -> list[str]:
    """Print the rows of a network; return those in which something is faster than the fused form."""
    network, example = build(name)
    small = example if own_size else (example[0][..., :SIDE, :SIDE],)
    try:
        network(*small)
    except Exception:  # it takes images of one size, or larger ones
        small = example
    others, slower = [network, *timms(network)], list[str]()
    for size in batches:
        inputs = batched(small, size)
        result = fuse(network, inputs)
        if not result.plan.sites:
            continue
        calls = [partial(each, *inputs) for each in (result.module, *others)]
        ours, *theirs = time_rounds(
            calls, time.process_time, rounds=rounds, seconds=SECONDS * len(calls), progress=lambda _fraction: None
        ).times
        ratios = [ratio_of_medians(each, ours) for each in theirs]
        shown = [f"{ratio.value:.3f} ({ratio.low:.2f} to {ratio.high:.2f})" for ratio in ratios]
        fused = f"{1000 * sorted(ours)[len(ours) // 2]:.2f}"
        row = ROW.format(name, len(result.plan.sites), size, fused, *shown, *[""] * (2 - len(shown)))
        print(row, flush=True)
        slower += [row] * any(map(is_slower, ratios))
    return slower


def timms(network: nn.Module) -> list[Any]:
    """Return timm's re-parameterised form of a network, where that is another one."""
    from timm.utils.model import reparameterize_model

    theirs = reparameterize_model(copy.deepcopy(network))
    kinds = [[type(module) for module in each.modules()] for each in (network, theirs)]
    return [theirs] if kinds[0] != kinds[1] else []


def is_slower(ratio: Ratio) -> bool:
    """Whether the other form is certainly faster."""
    return ratio.high < 1 - ALIKE


if __name__ == "__main__":
    main()
