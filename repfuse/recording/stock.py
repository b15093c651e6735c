"""Whose code runs when a module is called: PyTorch's, and what people hung on it."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import jit, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

WEIGHT_HOOKS = (WeightNorm, SpectralNorm)
"""PyTorch's own hooks that compute a weight before each call: a recording shows what they compute."""

CALLED = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_STORED = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")

_EXPORTS = ("torch.export.", "torch._export.")
"""Who hangs hooks on an exported program that check its inputs; a copy of it has none, and its guards stay."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, jit.ScriptModule)


OF_TORCH = "torch.nn.modules"
_OF_FORWARD = frozenset({"forward", "__call__", "_conv_forward", "_check_input_dim", "_output_padding"})
"""What a forward of PyTorch's own consists of, each of which a subclass may have replaced."""


def is_stock(module: nn.Module) -> bool:
    """Whether calling the module runs PyTorch's own forward, so that its class says what it computes."""
    kind: Any = type(module)
    return vars(module).keys().isdisjoint(_OF_FORWARD) and _is_stock_class(kind)


@cache
def _is_stock_class(kind: Any) -> bool:
    if issubclass(kind, _CONTAINERS):
        return False
    own = (getattr(kind, name) for name in _OF_FORWARD if hasattr(kind, name))
    return all((getattr(each, "__module__", None) or "").startswith(OF_TORCH) for each in own)


def hooks_of(module: nn.Module) -> list[Any]:
    """Return the hooks that people put on a module: on its calls, on its gradients, on how it is saved and loaded.

    Those by which PyTorch computes a weight, and saves what it is computed from, are not among them.
    """
    if not any(map(vars(module).get, (*CALLED, *_STORED))):
        return []
    called = [hook for table in CALLED for hook in getattr(module, table).values()]
    stored = [hook for table in _STORED for hook in getattr(module, table).values()]
    foreign = [hook for hook in stored if not _origin(hook).startswith("torch.nn.utils.")]
    known = (hook for hook in called if not isinstance(hook, WEIGHT_HOOKS))
    return [hook for hook in known if not _origin(hook).startswith(_EXPORTS)] + foreign


def _origin(hook: Any) -> str:
    """Return the name of the Python module that a hook, perhaps wrapped by PyTorch, was written in."""
    return getattr(getattr(hook, "hook", hook), "__module__", None) or ""
