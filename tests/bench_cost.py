"""Times what the law of cost predicts: some hundred blocks of any shape as they are and merged whatever that costs.

`python tests/bench_cost.py [--pairs N] [--seed N]`. One thread, interleaved rounds, in PyTorch and in ONNX Runtime. For
the two exchange rates of ``planning/cost.py``, and for others around them: the rank correlation of the predicted gain
and the measured one, the time lost by taking the prediction's word, and how often it is wrong by more than 5 %.
"""

from __future__ import annotations

import argparse
import io
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from repfuse.fusing import fuse
from repfuse.planning import cost
from repfuse.plans import Cost, Policy

SECONDS = 0.25
MACS_PER_BYTE, BYTES_PER_LAUNCH = (2, 3, 4, 6, 8), (2**15, 2**16, 2**17, 2**18)
Call = Callable[[], object]


class Total(nn.Module):
    """An activated sum."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(sum(branch(x) for branch in self.branches))


class Parts(nn.Module):
    """Some eighths of the channels, each with its own kernel, joined with the rest and normalised."""

    def __init__(self, parts: Sequence[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.parts, self.norm = nn.ModuleList(parts), norm

    def forward(self, x: Tensor) -> Tensor:
        part = x.shape[1] // 8
        rest, *others = torch.split(x, [x.shape[1] - len(self.parts) * part, *[part] * len(self.parts)], 1)
        return torch.relu(self.norm(torch.cat([rest, *map(lambda m, y: m(y), self.parts, others)], 1)))


def drawn(rng: random.Random) -> tuple[nn.Module, Tensor]:
    """A block and its input: dense, grouped and depthwise kernels, of one axis and of two."""
    axes, c, batch = rng.choice((1, 2, 2, 2)), rng.choice((16, 32, 64, 96, 128, 256)), rng.choice((1, 1, 4))
    sides = [rng.choice((7, 14, 28, 56) if axes == 2 else (64, 256, 1024))] * axes
    norm = (nn.BatchNorm1d, nn.BatchNorm2d)[axes - 1]

    def conv(kernel: int, inputs: int = c, outputs: int = c, groups: int = 1, *, pads: bool = True) -> nn.Module:
        kind = (nn.Conv1d, nn.Conv2d)[axes - 1]
        return kind(inputs, outputs, kernel, padding=kernel // 2 * pads, groups=groups, bias=kernel > 1)

    def wise(kernel: int, channels: int = c, *, pads: bool = True) -> nn.Module:
        return conv(kernel, channels, channels, channels, pads=pads)

    k, width = rng.choice((3, 5, 7)), rng.choice((c // 4, c // 2, c, 2 * c))
    blocks: list[Callable[[], nn.Module]] = [
        lambda: nn.Sequential(conv(rng.choice((1, 3)), groups=rng.choice((1, 4, c))), norm(c)),
        lambda: Total(conv(3), conv(1), nn.Identity()),
        lambda: Total(conv(3, groups=4), conv(1)),
        lambda: Total(wise(1), wise(3), wise(k)),
        lambda: Total(wise(k), conv(1)),
        lambda: nn.Sequential(wise(3), conv(1, outputs=width)),
        lambda: nn.Sequential(wise(3, pads=False), wise(3, pads=False)),
        lambda: nn.Sequential(conv(1, outputs=width), conv(1, inputs=width)),
        lambda: nn.Sequential(conv(1, outputs=width), conv(1, inputs=width, outputs=2 * c)),
        lambda: nn.Sequential(conv(1, outputs=width), conv(3, inputs=width)),
        lambda: Parts(
            [wise(kernel, c // 8) for kernel in rng.sample((3, 5, 7, 9, 11), rng.choice((1, 2, 3)))], norm(c)
        ),
    ]
    if rng.random() < 1 / (1 + len(blocks)):
        rows = Total(nn.Linear(c, c), nn.Sequential(nn.Linear(c, 8), nn.Linear(8, c)))
        return rows, torch.randn(batch, sides[0], c)
    return rng.choice(blocks)(), torch.randn(batch, c, *sides)


def clocked(calls: Sequence[Call]) -> list[float]:
    """Seconds of each call, in a quiet round."""
    for call in [*calls, *calls]:
        call()
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times[0]) < 7:
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [sorted(taken)[len(taken) // 10] for taken in times]


def in_onnxruntime(module: nn.Module, x: Tensor) -> Call:
    import onnxruntime

    options, file = onnxruntime.SessionOptions(), io.BytesIO()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    torch.onnx.export(module, (x,), file, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


@dataclass(frozen=True)
class Pair:
    """What a block costs as it is and merged, and the seconds of both by runtime."""

    before: Cost
    after: Cost
    seconds: dict[str, list[float]]


def pairs(count: int, seed: int) -> Iterator[Pair]:
    rng = random.Random(seed)
    for _ in range(count):
        block, x = drawn(rng)
        result = fuse(block.eval(), [x], Policy.ALWAYS)
        sites = result.plan.sites
        both = (block, result.module)
        with torch.inference_mode():
            seconds = {
                "PyTorch": clocked([partial(m, x) for m in both]),
                "ONNX Runtime": clocked([in_onnxruntime(m, x) for m in both]),
            }
        if sites:
            yield Pair(sum((s.before for s in sites), Cost()), sum((s.after for s in sites), Cost()), seconds)


def judged(found: Sequence[Pair], where: str, macs_per_byte: float, bytes_per_launch: float) -> str:
    """How well these rates predict: rank correlation, time lost beside the better of both, clear mistakes."""

    def price(c: Cost) -> float:
        return c.macs / macs_per_byte + c.bytes + c.launches * bytes_per_launch

    said = [math.log(price(pair.before) / price(pair.after)) for pair in found]
    seen = [math.log(pair.seconds[where][0] / pair.seconds[where][1]) for pair in found]
    ranks = torch.tensor([said, seen]).argsort().argsort().double()
    lost = sum(abs(b) for a, b in zip(said, seen, strict=True) if (a > 0) != (b > 0)) / len(found)
    wrong = sum((a > 0) != (b > 0) for a, b in zip(said, seen, strict=True) if abs(b) > math.log(1.05))
    return f"{where}: rank {float(torch.corrcoef(ranks)[0, 1]):.3f}, lost {100 * lost:.1f} %, wrong {wrong}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = list(pairs(options.pairs, options.seed))
    now = (cost.MACS_PER_BYTE, cost.BYTES_PER_LAUNCH)
    for rates in (now, *product(MACS_PER_BYTE, BYTES_PER_LAUNCH)):
        print(rates, *(judged(found, where, *rates) for where in ("PyTorch", "ONNX Runtime")), sep="  ")


if __name__ == "__main__":
    main()
