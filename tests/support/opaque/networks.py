"""Random networks of these forwards, nested in each other and between traced blocks, with shared modules."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import torch
from blocks import RepVGG, conv, conv_norm, norm
from torch import Tensor, nn

from support.opaque.forwards import FORWARDS, Held


class Opaque(nn.Module):
    """A module whose forward is one of ``FORWARDS``."""

    def __init__(self, kind: str, rng: random.Random, block: Any) -> None:
        super().__init__()
        self.kind = kind
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

    def forward(self, x: Tensor) -> Any:
        return FORWARDS[self.kind](self, x)


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


def network(seed: int, kinds: list[str] | None = None) -> nn.Module:
    """Return a random network; of ``kinds`` of forwards, where given."""
    rng = random.Random(seed)
    shared: list[nn.Module] = []
    depth = 0

    def block() -> nn.Module:
        nonlocal depth
        if shared and rng.random() < 0.08:
            return rng.choice(shared)
        makers = [lambda: conv_norm(3), RepVGG, lambda: nn.Sequential(conv_norm(1), nn.ReLU(), RepVGG()), lambda: conv(1), Keyed0]
        if depth < 1 and rng.random() < 0.06:
            depth += 1
            made: nn.Module = Opaque(rng.choice(kinds or list(FORWARDS)), rng, block)
            depth -= 1
        else:
            made = rng.choice(makers)()
        shared.append(made)
        return made

    layers: list[nn.Module] = []
    for _ in range(rng.randint(1, 2)):
        if rng.random() < 0.5:
            layers.append(block())
        layers.append(Opaque(rng.choice(kinds or list(FORWARDS)), rng, block))
        if rng.random() < 0.5:
            layers += [block()]
    return nn.Sequential(*layers) if len(layers) > 1 or rng.random() < 0.5 else layers[0]


class Keyed0(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p, self.q, self.n = conv(3), conv(1), norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.p(x) + self.q(x)) + x
