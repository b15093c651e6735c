"""How the tests of the core compare a network with its fused form, without any code of repfuse."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@torch.no_grad()
def randomised(module: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Give every parameter and statistic a random value: fresh statistics hide every mistake. In eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    for norm in module.modules():
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
            norm.running_mean.copy_(torch.randn(norm.running_mean.shape, generator=generator))
            norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=generator) + 0.5)
    return module.to(dtype).eval()


def image(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor of seeded noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@torch.no_grad()
def outputs(module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """The tensors that a module returns, in any nesting; the inputs are not written into."""
    return [leaf for leaf in tree_leaves(module(*(x.clone() for x in inputs))) if isinstance(leaf, Tensor)]


def error(one: nn.Module, other: nn.Module, *inputs: Tensor) -> float:
    """Largest difference of the outputs, relative to the largest number in each; infinite where the shapes differ."""
    pairs = list(zip(outputs(one, *inputs), outputs(other, *inputs), strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-300)) for a, b in pairs)


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.rstrip("_")
        kind = next((kind for kind in ("convolution", "batch_norm") if kind in name), name)
        self.seen[kind] += 1
        return func(*args, **(kwargs or {}))


def operations(module: nn.Module, *inputs: Tensor) -> Counter[str]:
    """How often each kind of operator runs in one call: "convolution", "batch_norm", "add", "addmm", ..."""
    with _Counting() as counting:
        outputs(module, *inputs)
    return counting.seen


class _Peak(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.highest = 0.0
        self.empty = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self.empty |= not leaf.numel()
                self.highest = max(self.highest, float(leaf.detach().abs().max()) if leaf.numel() else 0.0)
        return result


def peak(module: nn.Module, *inputs: Tensor) -> float:
    """The largest number that appears in one call: what rounding errors are relative to, even where outputs cancel.

    0 where a value without any numbers appears: what runs on such a value is up to the operator.
    """
    with _Peak() as recorded:
        outputs(module, *inputs)
    return 0.0 if recorded.empty else recorded.highest
