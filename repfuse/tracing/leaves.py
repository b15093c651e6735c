"""Which modules a trace records as one call, instead of looking into their forward."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

WEIGHT_HOOKS = (WeightNorm, SpectralNorm)
"""PyTorch's own hooks that compute a weight before each call: tracing through them shows what they compute."""


def is_stock(module: nn.Module) -> bool:
    """Whether calling the module runs PyTorch's own forward, so that its class says what it computes."""
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) or "forward" in vars(module):
        return False
    forward = type(module).forward
    return (getattr(forward, "__module__", None) or "").startswith("torch.nn.modules")


def is_leaf(module: nn.Module) -> bool:
    """Whether one call node says all about the module: it is stock, and its weights are what it holds.

    A module with hooks of others stays one call, which runs them, and so does one that rounds: nothing merges with it.
    """
    computes = bool(weight_hooks(module)) or parametrize.is_parametrized(module) or _convolves_its_own_way(module)
    return rounds_like_quantised(module) or (is_stock(module) and (has_foreign_hooks(module) or not computes))


def _convolves_its_own_way(module: nn.Module) -> bool:
    """Whether a convolution keeps the forward of its class, but not the arithmetic that this calls."""
    own = getattr(type(module), "_conv_forward", None)
    return own is not None and own.__module__ != nn.Conv2d.__module__


def weight_hooks(module: nn.Module) -> list[Any]:
    """Return the hooks of PyTorch that compute a weight of the module before each call."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WEIGHT_HOOKS)]


def has_foreign_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs forward hooks other than ``WEIGHT_HOOKS``."""
    return bool(module._forward_hooks) or len(module._forward_pre_hooks) > len(weight_hooks(module))


def rounds_like_quantised(module: nn.Module) -> bool:
    """Whether the module rounds, or is a layer that rounds its weight; told by names, without importing torch.ao."""
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(module).__mro__}
    return "torch.ao.quantization.fake_quantize.FakeQuantizeBase" in kinds or hasattr(module, "weight_fake_quant")
