"""Copies of a module for looking at and for rewriting: its structure, with other tensors in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from repfuse.errors import RepfuseError


def meta_copy(module: nn.Module) -> nn.Module:
    """Copy a module without its data: the same structure with every tensor on the meta device."""
    return copy_with(module, {id(tensor): _meta(tensor) for tensor in _tensors(module)})


def copy_with(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Deep-copy a module with these replacements by identity. Raises RepfuseError where it cannot be copied."""
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise RepfuseError(
            f"{type(module).__name__} cannot be copied.",
            f"{type(error).__name__}: {first_line(error)}",
            "Remove what cannot be deep-copied (old weight_norm, open handles), and save the model again.",
        ) from error


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def first_line(error: BaseException) -> str:
    """Return the beginning of an error's text, for a message of our own."""
    return str(error).strip().split("\n")[0][:200]
