"""Which modules a trace records as one call, instead of looking into their forward."""

from __future__ import annotations

from typing import Any

from torch import jit, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

WEIGHT_HOOKS = (WeightNorm, SpectralNorm)
"""PyTorch's own hooks that compute a weight before each call: tracing through them shows what they compute."""

_CALLED = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_STORED = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, jit.ScriptModule)


def is_stock(module: nn.Module) -> bool:
    """Whether calling the module runs PyTorch's own forward, so that its class says what it computes."""
    if isinstance(module, _CONTAINERS) or "forward" in vars(module):
        return False
    forward = type(module).forward
    return (getattr(forward, "__module__", None) or "").startswith("torch.nn.modules")


def is_leaf(module: nn.Module) -> bool:
    """Whether one call node says all about the module: it is stock, and its weights are what it holds.

    A module with hooks of others stays one call, which runs them, and so does one that rounds: nothing merges with it.
    """
    computes = bool(weight_hooks(module)) or parametrize.is_parametrized(module) or _convolves_its_own_way(module)
    if isinstance(module, jit.ScriptModule):
        return True
    return rounds_like_quantised(module) or (is_stock(module) and (bool(hooks_of(module)) or not computes))


def _convolves_its_own_way(module: nn.Module) -> bool:
    """Whether a convolution keeps the forward of its class, but not the arithmetic that this calls."""
    own = getattr(type(module), "_conv_forward", None)
    return own is not None and own.__module__ != nn.Conv2d.__module__


def weight_hooks(module: nn.Module) -> list[Any]:
    """Return the hooks of PyTorch that compute a weight of the module before each call."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WEIGHT_HOOKS)]


def hooks_of(module: nn.Module) -> list[Any]:
    """Return the hooks that people put on a module: on its calls, on its gradients, on how it is saved and loaded.

    Those by which PyTorch computes a weight, and saves what it is computed from, are not among them.
    """
    called = [hook for table in _CALLED for hook in getattr(module, table).values()]
    stored = [hook for table in _STORED for hook in getattr(module, table).values()]
    foreign = [hook for hook in stored if not _origin(hook).startswith("torch.nn.utils.")]
    return [hook for hook in called if not isinstance(hook, WEIGHT_HOOKS)] + foreign


def _origin(hook: Any) -> str:
    """Return the name of the Python module that a hook, perhaps wrapped by PyTorch, was written in."""
    return getattr(getattr(hook, "hook", hook), "__module__", None) or ""


def rounds_like_quantised(module: nn.Module) -> bool:
    """Whether the module rounds, or is a layer that rounds its weight; told by names, without importing torch.ao."""
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(module).__mro__}
    return "torch.ao.quantization.fake_quantize.FakeQuantizeBase" in kinds or hasattr(module, "weight_fake_quant")
