"""Times plan + rewrite against timm's own conversion, or against a forward pass where timm has nothing to convert.

`make bench`, or `python tests/bench_rewrite.py [--rounds N] [NAME ...]`. One thread, one process, interleaved rounds,
medians of CPU time, which others on the machine disturb less than the time of the clock; a ratio has a bootstrap
interval over the rounds. How the time grows with the depth, and how much memory a plan takes, are measured as well.
What is wanted stands beside what was measured; no number makes this fail.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from statistics import median

import torch
from support import torchvision_schemas
from support.networks import timm_network
from torch import Tensor, nn

from repfuse.benching.timing import ratio_of_medians
from repfuse.fusing import settled
from repfuse.memory import M_MMAP_THRESHOLD, glibc
from repfuse.networks import named_tensors
from repfuse.planning.planner import plan
from repfuse.rewriting import rewrite

ROUNDS = 15
COMPARISONS = 3  # rounds: in float64 each takes longer than all that it is measured beside
AGAINST_TIMM = {
    **dict.fromkeys(("repvgg_a0", "mobileone_s0", "vgg11_bn"), 2.5),
    **dict.fromkeys(("fastvit_t8", "repvit_m1", "resnet50", "repghostnet_050"), 4.0),
    **dict.fromkeys(("repvgg_b1g4", "repvgg_d2se"), 1.2),
}
AGAINST_FORWARD = dict.fromkeys(("efficientvit_b0", "mobilevit_xxs"), 10.0)
LENGTHS, LINEAR = (2000, 100), 1.5
LARGE = "vgg16_bn"
MIB = 2**20
M_TRIM_THRESHOLD = -1  # of malloc.h
ROW = "{:<16} {:>10} {:>13} {:>9} {:>7} {:>16} {:>6} {:>13}"
Work = Callable[[], object]
Times = tuple[list[float], list[float]]
"""Seconds of CPU time of two kinds of work, round by round."""


class ThreeBranches(nn.Module):
    """A block of RepVGG's, with statistics that make every branch count."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm3, self.norm1, self.norm0 = (nn.BatchNorm2d(channels) for _ in range(3))
        for norm in (self.norm3, self.norm1, self.norm0):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm3(self.conv3(x)) + self.norm1(self.conv1(x)) + self.norm0(x))


def main() -> None:
    rounds, names = arguments()
    torchvision_schemas.install()
    torch.set_num_threads(1)
    keep_freed_memory()
    if "memory" in names:  # first: a process starts with the peak of the one that starts it
        memory()
    networks = [name for name in names if name in AGAINST_TIMM | AGAINST_FORWARD]
    if networks:
        print(ROW.format("network", "ours, s", "against", "theirs, s", "ratio", "95 %", "wanted", "comparison, s"))
    for name in networks:
        measure(name, rounds)
    if "linearity" in names:
        linearity(rounds)


def keep_freed_memory() -> None:
    """Let glibc give nothing back to the system.

    By itself it does or does not, as it happens: that depends on what lies above what is freed. To fetch the memory
    of a network again takes as long as timm's whole copy of resnet50, whose ratio was 5.1 in one run so, and 2.1 in
    the next.
    """
    for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        glibc("mallopt", option, 2**31 - 1)


def arguments() -> tuple[int, list[str]]:
    """Return the number of rounds and what to measure, by default all there is."""
    known = [*AGAINST_TIMM, *AGAINST_FORWARD, "linearity", "memory"]
    parser = argparse.ArgumentParser(description="Time plan + rewrite.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"two at least, {ROUNDS} unless told")
    given = parser.parse_args()
    unknown = set(given.names) - set(known)
    if unknown:
        parser.error(f"no such name: {', '.join(sorted(unknown))}")
    if given.rounds < 2:
        parser.error("two rounds at least")
    return given.rounds, given.names or known


def measure(name: str, rounds: int) -> None:
    """Print the row of a network, at the size of input that it was made for."""
    from timm.utils.model import reparameterize_model

    network = timm_network(name)
    x = torch.randn(1, *network.pretrained_cfg["input_size"])
    against, work = "timm", lambda: reparameterize_model(network)
    if name in AGAINST_FORWARD:
        against, work = "forward pass", torch.no_grad()(lambda: network(x))
    times = interleaved(lambda: rewrite(network, plan(network, (x,))), work, rounds)
    made = plan(network, (x,))
    checked = interleaved(lambda: settled(network, made), lambda: rewrite(network, made), min(rounds, COMPARISONS))
    ratio, ours, theirs = ratio_of_medians(*times), *map(median, times)
    interval, comparison = f"{ratio.low:.2f} to {ratio.high:.2f}", median(checked[0]) - median(checked[1])
    bound = (AGAINST_TIMM | AGAINST_FORWARD)[name]
    numbers = (f"{ours:.3f}", against, f"{theirs:.3f}", f"{ratio.value:.2f}", interval, bound, f"{comparison:.3f}")
    print(ROW.format(name, *numbers), flush=True)


def linearity(rounds: int) -> None:
    """Print how much more a block takes in a deep network than in a shallow one."""
    networks, x = [chain(length) for length in LENGTHS], torch.randn(1, 8, 16, 16)
    deep, shallow = (lambda network=network: rewrite(network, plan(network, (x,))) for network in networks)
    times = interleaved(deep, shallow, rounds)
    each = [[seconds / length for seconds in part] for part, length in zip(times, LENGTHS, strict=True)]
    ratio = ratio_of_medians(*each)
    per_block = ", ".join(f"{1000 * median(part):.2f} ms of {n:,}" for part, n in zip(each, LENGTHS, strict=True))
    print(f"a block: {per_block}; ratio {ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f}), wanted {LINEAR}")


def chain(length: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(ThreeBranches() for _ in range(length))).eval()


def interleaved(ours: Work, theirs: Work, rounds: int) -> Times:
    """Time both in every round, in alternating order, so that what slows the machine down slows both."""
    ours(), theirs()
    times: Times = ([], [])
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            times[which].append(seconds((ours, theirs)[which]))
    return times


def seconds(work: Work) -> float:
    """Time one run, without the garbage of the one before it: graphs refer to themselves and stay until collected."""
    gc.collect()
    start = time.process_time()
    made = work()
    taken = time.process_time() - start
    del made  # to free it is not part of the work
    return taken


def memory(name: str = LARGE) -> None:
    """Print what planning adds to the memory of a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        size, before, after = process.submit(peaks, name).result()
    parts = f"{size / MIB:.0f} MiB; peak {before / MIB:.0f} MiB before plan, {after / MIB:.0f} MiB after"
    print(f"{name}, {parts}: {(after - before) / size:.2f} networks")


def peaks(name: str) -> tuple[int, int, int]:
    """Return the bytes of a network and the peak of this process before and after planning it.

    The network keeps the statistics that it is made with: to run it for others would raise the peak before.
    """
    torchvision_schemas.install()
    import timm

    torch.set_num_threads(1)
    plan(chain(1), (torch.randn(1, 8, 16, 16),))  # imports what is imported late
    network = timm.create_model(name, pretrained=False).eval()
    size = sum(tensor.numel() * tensor.element_size() for _, tensor in named_tensors(network))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    plan(network, (torch.randn(1, *network.pretrained_cfg["input_size"]),))
    return size, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
