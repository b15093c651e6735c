"""The arguments of one call: as they are, by parameter, and as plain data from which others like them are made."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

_PLAIN = (bool, int, float, str, type(None))


class NotDescribable(ValueError):
    """A value is neither a tensor nor plain data."""


@dataclass(frozen=True)
class Arguments:
    """What one call of a module is given."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def by_parameter(self, module: nn.Module) -> dict[str, Any]:
        """Return the value of each parameter of ``module.forward``, in order: the given ones and the defaults.

        ``*args`` come under ``*args``, as torch.fx calls them. Raises TypeError where the call does not fit.
        """
        bound = inspect.signature(module.forward).bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        star_of = {
            name: star for name, p in bound.signature.parameters.items() for k, star in stars.items() if p.kind is k
        }
        return {star_of.get(name, "") + name: value for name, value in bound.arguments.items()}


def has_tensor(value: Any) -> bool:
    """Whether a value is a tensor or holds one."""
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def is_mixed(value: Any) -> bool:
    """Whether a value holds tensors and other things: what is traced as one cannot tell them apart."""
    leaves = tree_leaves(value)
    return len({isinstance(leaf, Tensor) for leaf in leaves}) > 1


def constants_of(arguments: Arguments) -> tuple[Any, ...]:
    """Return what a trace takes for fixed: the structure of the arguments, and all in it that is no tensor."""
    leaves, structure = tree_flatten((arguments.args, dict(arguments.kwargs)))
    return (structure, *(Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves))


def describe(value: Any) -> Any:
    """Return a value as JSON-ready data, tensors by shape and dtype. Raises NotDescribable for anything else."""
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if type(value) in (list, tuple):
        return {type(value).__name__: [describe(item) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: describe(item) for key, item in value.items()}}
    if type(value) is float and not math.isfinite(value):
        return {"float": str(value)}  # JSON has no such numbers
    if type(value) in _PLAIN:
        return {"value": value}
    raise NotDescribable(type(value).__name__)


def recreate(description: Any, like: Tensor) -> Any:
    """Return a value that ``describe`` described: zeros for tensors, on the device of ``like``, floats in its dtype.

    Raises KeyError, TypeError, AttributeError or ValueError where the description is none.
    """
    match description:
        case {"shape": shape, "dtype": dtype}:
            kind = getattr(torch, dtype)
            return torch.zeros(shape, dtype=like.dtype if kind.is_floating_point else kind, device=like.device)
        case {"list": items}:
            return [recreate(item, like) for item in items]
        case {"tuple": items}:
            return tuple(recreate(item, like) for item in items)
        case {"dict": items}:
            return {key: recreate(item, like) for key, item in items.items()}
        case {"float": name}:
            return float(name)
        case {"value": value}:
            return value
    raise ValueError(f"{description!r} describes no argument")
