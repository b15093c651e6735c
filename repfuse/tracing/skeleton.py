"""Copies of a module for looking at and for rewriting: its structure, with other tensors in it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from repfuse.errors import RepfuseError
from repfuse.networks import named_tensors

Change = Callable[[str, Tensor], Tensor]


def meta_copy(module: nn.Module) -> nn.Module:
    """Copy a module without its data: the same structure with every tensor on the meta device."""
    return changed_copy(module, lambda _name, tensor: torch.empty_like(tensor, device="meta"))


def changed_copy(module: nn.Module, change: Change) -> nn.Module:
    """Copy a module whose tensors become ``change(name, tensor)``; shared ones stay shared, parameters parameters.

    Plain tensor attributes count too. Raises RepfuseError where the module cannot be copied.
    """
    memo = {id(tensor): _like(tensor, change(name, tensor)) for name, tensor in named_tensors(module)}
    return copy_with(module, memo)


def copy_with(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Deep-copy a module with these replacements by identity. Raises RepfuseError where it cannot be copied."""
    # A tensor with a history, which old weight_norm leaves behind, is no obstacle where the memo has its copy.
    histories = [tensor for _, tensor in named_tensors(module) if not tensor.is_leaf and id(tensor) not in memo]
    try:
        return copy.deepcopy(module, memo | {id(tensor): tensor.detach().clone() for tensor in histories})
    except Exception as error:
        raise RepfuseError(
            f"{type(module).__name__} cannot be copied.",
            f"{type(error).__name__}: {first_line(error)}",
            "Remove what cannot be copied (open files, locks, generators) from its attributes.",
        ) from error


@contextmanager
def restored(root: nn.Module) -> Iterator[None]:
    """Undo, at the end, what is set on the modules in between: proxies, where a forward was traced."""
    tables = [vars(module) for module in root.modules()]
    tables += [table[kind] for table in tables for kind in ("_parameters", "_buffers", "_modules")]
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    value = value.detach()
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def first_line(error: BaseException) -> str:
    """Return the beginning of an error's text, for a message of our own."""
    return str(error).strip().split("\n")[0][:200]
