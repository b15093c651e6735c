"""Small networks, and correct and incorrect fusions of them made by hand: no repfuse code is involved."""

from __future__ import annotations

import copy

import torch
from torch import nn

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def network(depth: int = 3, width: int = 8, classes: int = 10, seed: int = 0, dtype=torch.float32) -> nn.Module:
    """``depth`` times convolution, normalisation with random statistics, ReLU; then a head unless ``classes`` is 0."""
    torch.default_generator.manual_seed(seed)
    body: list[nn.Module] = []
    for layer in range(depth):
        body += [nn.Conv2d(width if layer else 3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)] if classes else []
    model = nn.Sequential(nn.Sequential(*body), *head)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor, low in (
                (norm.weight, 0.5),
                (norm.running_var, 0.5),
                (norm.bias, -0.5),
                (norm.running_mean, -0.5),
            ):
                tensor.data = torch.rand(width) + low
    return model.to(dtype).eval()


@torch.no_grad()
def folded(model: nn.Module, *, wide: bool = True, eps: float | None = None) -> nn.Module:
    """The same network with each normalisation folded: in float64 and rounded once, or in its own dtype."""
    result = copy.deepcopy(model)
    body = result[0]
    for i in range(0, len(body), 3):
        conv, norm = body[i], body[i + 1]
        dtype = conv.weight.dtype
        weight, gamma, beta, mean, var = (
            tensor.to(torch.float64 if wide else dtype)
            for tensor in (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        )
        scale = gamma / torch.sqrt(var + (norm.eps if eps is None else eps))
        conv.weight = nn.Parameter((weight * scale[:, None, None, None]).to(dtype))
        conv.bias = nn.Parameter((beta - mean * scale).to(dtype))
        body[i + 1] = nn.Identity()
    return result


def example(dtype=torch.float32, size: int = 9) -> tuple[torch.Tensor]:
    """A seeded image."""
    return (torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(dtype),)
