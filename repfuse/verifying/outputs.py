"""What a network returns, as named tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from repfuse.errors import RepfuseError
from repfuse.networks import dense


def leaves(output: Any, name: str = "out") -> dict[str, torch.Tensor]:
    """Return the tensors of ``output`` by readable names: ``out``, ``out[0]``, ``out.logits``.

    Tuples, lists, mappings, named tuples, dataclasses and nested tensors are walked; numbers become tensors; a complex
    tensor gets a last axis for its real and imaginary parts, a sparse one all its numbers; ``None`` is left out. Raises
    RepfuseError for anything else, which could not be compared.
    """
    if output is None:
        return {}
    if isinstance(output, torch.Tensor) and not output.is_nested:
        return {name: _real(dense(output))}
    if isinstance(output, (bool, int, float, complex)):
        exact = {float: torch.float64, complex: torch.complex128}
        return {name: _real(torch.tensor(output, dtype=exact.get(type(output))))}
    return {key: leaf for part, value in _parts(output, name) for key, leaf in leaves(value, part).items()}


def _parts(output: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(output, torch.Tensor):
        yield from _parts(output.unbind(), name)
    elif isinstance(output, Mapping):
        yield from ((_member(name, key), value) for key, value in output.items())
    elif is_dataclass(output) and not isinstance(output, type):
        yield from ((f"{name}.{field.name}", getattr(output, field.name)) for field in fields(output))
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        yield from ((f"{name}.{key}", value) for key, value in zip(output._fields, output, strict=True))
    elif isinstance(output, (tuple, list)):
        yield from ((f"{name}[{index}]", value) for index, value in enumerate(output))
    else:
        raise RepfuseError(
            f"The network returns a {type(output).__name__} ({name}), which cannot be compared.",
            "Outputs are compared as tensors, numbers, and tuples, lists, mappings and dataclasses of them.",
            "Wrap the network in a module that returns tensors.",
        )


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _member(name: str, key: Any) -> str:
    return f"{name}.{key}" if isinstance(key, str) and key.isidentifier() else f"{name}[{key!r}]"
