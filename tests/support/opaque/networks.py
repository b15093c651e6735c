"""Random networks of these forwards, nested in each other and between traced blocks, with shared modules."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from blocks import RepVGG, conv, conv_norm, norm
from support.agreement import randomised
from support.opaque.forwards import FORWARDS, Held
from torch import Tensor, nn


class Opaque(nn.Module):
    """A module whose forward is one of ``FORWARDS``."""

    def __init__(self, kind: str, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.kind = kind
        self.__class__ = KINDS[kind]
        self.a, self.b, self.c = block(), block(), block()
        self.register_buffer("count", torch.zeros(()))
        self.scaler, self.keyed, self.held = Scaling(block()), Keyed(block()), Holding(block())
        self.dicts, self.tensors, self.spaced, self.starred = Dicts(block()), Dicts(block()), Spaced(block()), Starred()
        self.again, self.same, self.viewing, self.pair, self.two = Again(), Same(), Viewing(), Pair(), Two()
        self.by_key = nn.ModuleDict({"plus": block(), "minus": block()})
        self.row = nn.Sequential(conv_norm(3), norm(), RepVGG())
        if kind == "scripted":
            self.scripted = torch.jit.trace(randomly(conv_norm(3)), torch.zeros(1, 4, 5, 5, dtype=torch.float64))
        if kind == "parallel":
            self.parallel = nn.DataParallel(block())
        self.hidden, self.alias = [randomly(conv_norm(3))], [self.a, self.b]


KINDS = {kind: type(kind, (Opaque,), {"forward": forward}) for kind, forward in FORWARDS.items()}
"""Classes of their own: how their forwards are written is looked at."""


def randomly(module: nn.Module) -> nn.Module:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    return module.double().eval()


class Scaling(nn.Module):
    """Overwrites what it is given."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        x.mul_(0.5)
        return y


class Keyed(nn.Module):
    """A sum, with options."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.p, self.q, self.block = conv(3), conv(1), block

    def features(self, x: Tensor) -> Tensor:
        return self.p(x)

    def forward(self, x: Tensor, scale: float = 1.0, shift: Tensor | None = None) -> Tensor:
        y = torch.relu(self.p(x) + self.q(x)) * scale
        return y if shift is None else y + self.block(shift)


class Holding(Keyed):
    def forward(self, given: Held) -> Held:  # type: ignore[override]
        return Held(super().forward(given.x) * given.scale)


class Spaced(Keyed):
    def forward(self, given: Any) -> Any:  # type: ignore[override]
        return SimpleNamespace(x=super().forward(given.x))


class Dicts(Keyed):
    def forward(self, given: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        return {"y": super().forward(given["x"]) * given.get("scale", 1.0), **given}


class Starred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = conv(3), conv(1)

    def forward(self, *xs: Tensor, **more: Tensor) -> Tensor:
        return sum(torch.relu(self.p(x) + self.q(x)) for x in (*xs, *more.values()))


class Again(nn.Module):
    """Calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = conv(3), conv(1)

    def forward(self, x: Tensor, depth: int) -> Tensor:
        y = torch.relu(self.p(x) + self.q(x)) / 16
        return y if depth == 0 else self(y, depth - 1)


class Same(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = conv(3), conv(1)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Viewing(Same):
    def forward(self, x: Tensor) -> Tensor:
        return (self.p(x) + self.q(x)).flatten(2).view(x.shape)


class Pair(Same):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.p(x) + self.q(x)
        return y, y


class Two(Same):
    """A sum over two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(self.p(x) + self.q(y))


class Normed(Same):
    """(conv3 + conv1) with a normalisation, and the input."""

    def __init__(self) -> None:
        super().__init__()
        self.n = norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.p(x) + self.q(x)) + x


PLAIN = (
    RepVGG,
    Normed,
    lambda: conv_norm(3),
    lambda: conv(1),
    lambda: nn.Sequential(conv_norm(1), nn.ReLU(), RepVGG()),
)


class _Maker:
    """Makes blocks: plain ones, now and then an opaque one within an opaque one, or one that is there already."""

    def __init__(self, rng: random.Random, kinds: Sequence[str]) -> None:
        self.rng, self.kinds = rng, kinds
        self.made: list[nn.Module] = []
        self.depth = 0

    def opaque(self) -> nn.Module:
        self.depth += 1
        made = Opaque(self.rng.choice(self.kinds), self)
        self.depth -= 1
        return made

    def __call__(self) -> nn.Module:
        if self.made and self.rng.random() < 0.08:
            return self.rng.choice(self.made)
        inner = self.depth < 2 and self.rng.random() < 0.06
        self.made.append(self.opaque() if inner else self.rng.choice(PLAIN)())
        return self.made[-1]


def network(seed: int, kinds: Sequence[str] = tuple(FORWARDS)) -> nn.Module:
    """Return a random network of these kinds of forwards. Its outputs stay small."""
    rng = random.Random(seed)
    make = _Maker(rng, kinds)
    layers = []
    for _ in range(rng.randint(1, 2)):
        around = rng.choice([(), (0,), (1,), (0, 1)])
        layers += [make() if 0 in around else None, make.opaque(), make() if 1 in around else None]
    model = randomised(nn.Sequential(*filter(None, layers)), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.4)
    return model
