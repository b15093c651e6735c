"""The arguments of one call: as they are, by parameter, and as plain data from which others like them are made."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

_PLAIN = (bool, int, float, str, type(None))


class NotDescribable(ValueError):
    """A value is neither a tensor nor plain data."""


@dataclass(frozen=True)
class Arguments:
    """What one call of a module is given."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def distinct(self) -> Arguments:
        """Return the arguments with a copy of each tensor that is there a second time: it might be another one."""
        seen: set[int] = set()

        def copied(x: Tensor) -> Tensor:
            again = id(x) in seen
            seen.add(id(x))
            return x.clone() if again else x

        return self.changed(copied)

    def copied(self) -> Arguments:
        """Return copies of the arguments, a tensor that is there twice once."""
        memo: dict[int, Tensor] = {}
        return self.changed(lambda x: memo.setdefault(id(x), x.clone()))

    def changed(self, change: Callable[[Tensor], Tensor]) -> Arguments:
        """Return the arguments with others in the place of the tensors."""
        return Arguments(*tree_map_only(Tensor, change, (self.args, dict(self.kwargs))))

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, and in them."""
        return [x for x in tree_leaves((self.args, dict(self.kwargs))) if isinstance(x, Tensor)]

    @property
    def numbers(self) -> int:
        """How many numbers the tensors hold."""
        return sum(x.numel() for x in self.tensors)

    def names(self, module: nn.Module) -> list[str]:
        """Return what ``module.forward`` calls its positional arguments. Raises TypeError where they do not fit."""
        names: list[str] = []
        for parameter in inspect.signature(module.forward).parameters.values():
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                names += [f"{parameter.name}_{number}" for number in range(len(self.args) - len(names))]
            elif parameter.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
                names.append(parameter.name)
        if len(names) < len(self.args):
            raise TypeError(f"forward takes {len(names)} arguments, and was given {len(self.args)}")
        return names[: len(self.args)]


def description(value: Any) -> Any:
    """Return what ``describe`` returns, and None where it raises NotDescribable."""
    try:
        return describe(value)
    except NotDescribable:
        return None


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


def recreate(description: Any, like: Tensor, fill: Callable[[Tensor], object] = Tensor.zero_) -> Any:
    """Return a value that ``describe`` described: tensors on the device of ``like``, floats in its dtype, and these as
    ``fill`` fills them; the others are zeros.

    Raises KeyError, TypeError, AttributeError or ValueError where the description is none.
    """
    match description:
        case {"shape": shape, "dtype": dtype}:
            kind = getattr(torch, dtype)
            made = torch.zeros(shape, dtype=like.dtype if kind.is_floating_point else kind, device=like.device)
            if kind.is_floating_point:
                fill(made)
            return made
        case {"list": items}:
            return [recreate(item, like, fill) for item in items]
        case {"tuple": items}:
            return tuple(recreate(item, like, fill) for item in items)
        case {"dict": items}:
            return {key: recreate(item, like, fill) for key, item in items.items()}
        case {"float": name}:
            return float(name)
        case {"value": value}:
            return value
    raise ValueError(f"{description!r} describes no argument")
