"""Times plan + rewrite, in one process, against timm's own conversion and against one trace and one forward pass.

`make bench`. Interleaved, medians; the ratio has a bootstrap interval over the rounds.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from support import torchvision_schemas
from support.networks import timm_network
from torch import fx

from repfuse.benching.statistics import ratio_of_medians
from repfuse.planning.planner import plan
from repfuse.rewriting import rewrite

torchvision_schemas.install()
ROUNDS = 15


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(title: str, ours: Callable[[], object], theirs: Callable[[], object], bound: str) -> None:
    ours(), theirs()
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(ROUNDS):
        for which in (0, 1) if number % 2 else (1, 0):
            times[which].append(seconds((ours, theirs)[which]))
    ratio = ratio_of_medians(*times)
    seconds_each = " s against ".join(f"{median(part):.3f}" for part in times)
    print(f"{title}: {seconds_each} s, ratio {ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f}); {bound}")


def main() -> None:
    from timm.utils.model import reparameterize_model

    torch.set_num_threads(2)
    for name in ("repvgg_b1g4", "repvgg_d2se"):
        network, x = timm_network(name), torch.randn(1, 3, 224, 224)
        compare(
            f"{name}, plan + rewrite against timm's reparameterize_model",
            lambda network=network, x=x: rewrite(network, plan(network, (x,))),
            lambda network=network: reparameterize_model(network),
            "wanted: at most 1",
        )
    network, x = timm_network("mobileone_s0"), torch.randn(1, 3, 224, 224)

    def trace_twice_and_run() -> None:
        fx.symbolic_trace(network)
        fx.symbolic_trace(network)
        with torch.no_grad():
            network(x)

    compare(
        "mobileone_s0, plan + rewrite against two plain traces and a forward pass",
        lambda: rewrite(network, plan(network, (x,))),
        trace_twice_and_run,
        "wanted: at most 1",
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of this process {peak:.0f} MiB", file=sys.stderr)


if __name__ == "__main__":
    main()
