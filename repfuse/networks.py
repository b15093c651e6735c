"""Facts about a network that need no run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


def join(path: str, name: str) -> str:
    """Return the path of a descendant; the root has no name of its own."""
    return f"{path}.{name}".strip(".")


def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters, buffers and plain tensor attributes of the module itself, without its children."""
    members = {**vars(module), **module._buffers, **module._parameters}
    return {name: value for name, value in members.items() if isinstance(value, torch.Tensor)}


def named_tensors(network: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each parameter, buffer and plain tensor attribute of the modules by its dotted name.

    What has several names comes once, under its first; without ``remove_duplicate`` under each.
    """
    seen: set[int] = set()
    for path, module in network.named_modules(remove_duplicate=remove_duplicate):
        for name, value in own_tensors(module).items():
            if not (remove_duplicate and id(value) in seen):
                seen.add(id(value))
                yield f"{path}.{name}" if path else name, value


def main_dtype(network: nn.Module) -> torch.dtype | None:
    """Return the floating dtype in which most of the network's numbers are stored; None where it has none."""
    counts: dict[torch.dtype, int] = {}
    for _, tensor in named_tensors(network):
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=None)


def between(original: nn.Module, fused: nn.Module) -> dict[torch.dtype, torch.dtype]:
    """Return the cast that makes inputs of the original's dtype inputs of the fused network's."""
    own, other = main_dtype(original), main_dtype(fused)
    return {own: other} if own and other else {}


def device_of(network: nn.Module) -> torch.device:
    """Return where the network's first tensor lies; the CPU where it has none."""
    return next((tensor.device for _, tensor in named_tensors(network)), torch.device("cpu"))


def placed(inputs: tuple[Any, ...], device: torch.device, cast: Mapping[torch.dtype, torch.dtype]) -> tuple[Any, ...]:
    """Return copies of the tensors among the inputs, on ``device`` and in the dtypes that ``cast`` names."""
    return tuple(
        x.to(device=device, dtype=cast.get(x.dtype), copy=True) if isinstance(x, torch.Tensor) else x for x in inputs
    )


_PLAIN = (bool, int, float, str, bytes, type(None))


def is_plain(value: Any) -> bool:
    """Whether a value is numbers and text, in tuples and lists."""
    if type(value) in (tuple, list):
        return all(map(is_plain, value))
    return type(value) in _PLAIN
