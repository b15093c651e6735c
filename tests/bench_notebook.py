"""The notebook that this project began with, timed as it was there and as it should be: `make bench`.

Its block is ``conv3(x) + conv1(x) + x`` with ``padding="same"``; it was fused into one convolution, each was called
once, cold, the original first, and 10.7 times as fast was claimed. Here are that number, the warm and interleaved one,
and the same with the padding written as integers, for maps from 2x28x28 to 512x7x7.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repfuse import fuse
from repfuse.benching.benchmark import bench

SHAPES = ((2, 28, 28), (16, 56, 56), (64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7))
ROW = "{:>12} {:>10} {:>10} {:>22} {:>22}"


class Notebook(nn.Module):
    """A 3x3, a 1x1 and the input, added up."""

    def __init__(self, channels: int, *, same: bool) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(channels, channels, 3, padding="same" if same else 1)
        self.conv1 = nn.Conv2d(channels, channels, 1, padding="same" if same else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(x) + self.conv1(x) + x


@torch.no_grad()
def main() -> None:
    print(f"One cold call each, and warm, interleaved, 95 % interval; {torch.get_num_threads()} threads")
    print(ROW.format("input", "padding", "cold", "warm", "again in integers"))
    for shape in SHAPES:
        for same in (True, False):
            print(ROW.format("x".join(map(str, shape)), "same" if same else "integers", *row(shape, same=same)))


def row(shape: tuple[int, int, int], *, same: bool) -> tuple[str, str, str]:
    """Return the speed-ups of the block: cold, warm, and warm over the same block with its padding as integers."""
    x = torch.randn(1, *shape)
    block = Notebook(shape[0], same=same).eval()
    integers = Notebook(shape[0], same=False).eval()
    integers.load_state_dict(block.state_dict())
    fused = fuse(block, (x,)).module
    found, other = bench(block, fused, (x,), cold=True, seconds=3), bench(integers, fused, (x,), seconds=3)
    warm, plain = ((each.measurements[0]) for each in (found, other))
    assert found.cold is not None
    cold = f"{found.cold.original / found.cold.fused:.1f}x"
    return cold, *(f"{each.speedup:.2f}x ({each.low:.2f} to {each.high:.2f})" for each in (warm, plain))


if __name__ == "__main__":
    main()
