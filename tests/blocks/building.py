"""What the blocks are built of, and the rows that say what becomes of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from support.agreement import image
from torch import Tensor, nn
from torch.nn import functional as F

from repfuse.plans import Policy

C = 4
"""Channels of every block."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def conv(kernel: Any = 3, **settings: Any) -> Any:
    """A convolution of C channels that keeps the size unless told otherwise; of images, unless ``axes`` is given."""
    if "padding" not in settings:
        settings["padding"] = kernel // 2 * settings.get("dilation", 1) if isinstance(kernel, int) else "same"
    kind = CONVOLUTIONS[settings.pop("axes", 2) - 1]
    return kind(settings.pop("inputs", C), settings.pop("outputs", C), kernel, **settings)


def norm(channels: int = C, axes: int = 2) -> Any:
    """A normalisation."""
    return NORMS[axes - 1](channels)


def conv_norm(kernel: Any = 3, **settings: Any) -> nn.Sequential:
    """A convolution without bias and its normalisation."""
    return nn.Sequential(
        conv(kernel, bias=False, **settings), norm(settings.get("outputs", C), settings.get("axes", 2))
    )


def values(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of seeded noise."""
    return image(*shape, seed=seed, dtype=torch.float32)


def scale(*shape: int) -> nn.Parameter:
    """A parameter; its values are randomised with the rest of the block."""
    return nn.Parameter(torch.empty(shape))


class Spelled(nn.Module):
    """A module whose forward is given: ``Spelled(lambda m, x: m.a(x) + m.b(x), a=conv(3), b=conv(1))``."""

    def __init__(self, forward: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.spelling = forward
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor) -> Any:
        return self.spelling(self, x)


class SpelledOfTwo(Spelled):
    """The same with two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.spelling(self, x, y)


class Branches(nn.Module):
    """The sum of what it is given, in a ModuleList, with an activation after."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(sum(branch(x) for branch in self.branches))


def total(*branches: nn.Module) -> Spelled:
    """The sum of what it is given, with nothing after."""
    return Spelled(lambda m, x: sum(branch(x) for branch in m.branches), branches=nn.ModuleList(branches))


def pair(forward: Callable[..., Any], axes: int = 2) -> Spelled:
    """A block with a 3x3 ``a`` and a 1x1 ``b``."""
    return Spelled(forward, a=conv(3, axes=axes), b=conv(1, axes=axes))


def triple(forward: Callable[..., Any], axes: int = 2) -> Spelled:
    """The same with a normalisation ``n``."""
    return Spelled(forward, a=conv(3, axes=axes), b=conv(1, axes=axes), n=norm(axes=axes))


def pair_of_two(forward: Callable[..., Any]) -> Spelled:
    """A block with a 3x3 ``a`` and a 1x1 ``b``, of two inputs."""
    return SpelledOfTwo(forward, a=conv(3), b=conv(1))


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a block is called with: ``inputs`` maps of ``channels`` channels and ``axes`` spatial axes.

    ``least`` is the smallest side that it takes, ``side`` that of the example; unless ``square``, every other side is
    one more. Where it takes ``multiple``s alone, it is the next one. A linear layer takes its channels ``last``.
    """

    inputs: int = 1
    axes: int = 2
    channels: int = C
    least: int = 1
    side: int = 0
    square: bool = False
    multiple: int = 1
    last: bool = False

    def __post_init__(self) -> None:
        if not self.side:  # a volume of fewer numbers would be tried a thousand longer, too, which takes a second
            object.__setattr__(self, "side", 8 if self.axes == 3 else 6)

    @property
    def channel_axis(self) -> int:
        """Where the channels are."""
        return self.axes + 1 if self.last else 1

    def at(self, side: int, seed: int = 0, batch: int = 2) -> list[Tensor]:
        """Inputs of sides of about ``side``, seeded."""
        sides = [side + (axis % 2 and not self.square) for axis in range(self.axes)]
        sides = [-(-n // self.multiple) * self.multiple for n in sides]
        shape = (batch, *sides, self.channels) if self.last else (batch, self.channels, *sides)
        return [image(*shape, seed=seed + number) for number in range(self.inputs)]


@dataclass(frozen=True)
class Case(Inputs):
    """A block and what is left of it: how many convolutions, linear layers and normalisations run, how it was done.

    In the spellings ``less_in`` it is left as it is, or merged in part.
    """

    name: str
    make: Callable[[], nn.Module]
    form: str = "chain"
    convolutions: int = 1
    norms: int = 0
    sites: int = 1
    linears: int = 0
    policy: Policy = Policy.COST
    less_in: tuple[str, ...] = ()


NOT_IN_ATEN = ("exported", "decomposed")
"""Spellings for ``less_in``."""

BORDER, EVERYWHERE, ELSEWHERE, NOT_MERGED = "border", "everywhere", "elsewhere", "not merged"
"""Where a merge would be wrong: see Twin."""


@dataclass(frozen=True)
class Twin(Inputs):
    """A block of the table with one thing changed, which must be refused with ``code``.

    ``convolutions``, ``linears`` and ``norms`` are what still runs. ``wrong`` says where the one convolution that
    agrees with the block in the middle of a large map would differ from it: at the ``border`` only; ``everywhere``,
    since the block is no affine map; ``elsewhere``, at inputs of side ``other`` only (or the block fails there). Or
    it is ``not merged`` for another reason: one convolution would be no better, or some other reader needs the parts.
    """

    name: str
    code: str
    make: Callable[[], nn.Module]
    convolutions: int = 2
    norms: int = 0
    linears: int = 0
    wrong: str = BORDER
    other: int = 9
    policy: Policy = Policy.COST
