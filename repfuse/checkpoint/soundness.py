"""What is read must be in proportion to its file, so that working with it ends and fits the memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from repfuse.checkpoint.inert import Record, module_state, walk

FREE_BYTES = 1 << 28
BYTES_OF_BYTE = 8  # what a byte of the file may stand for: repeated numbers take the room of one
MODULES = 100_000  # ways from the root to a module: a module held twice by one that is held twice is four modules
CALLS = 150_000  # some seconds; networks have thousands of tensors, and each is filled in a few calls
DEPTH = 200  # modules in modules: Python itself runs no deeper network
SPARSE = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def room_for(file_size: int) -> int:
    """Return the bytes of memory that a file of this size may ask for."""
    return max(FREE_BYTES, BYTES_OF_BYTE * file_size)


def sound(root: Any, file_size: int) -> Any:
    """Return ``root``, read from a file of ``file_size`` bytes.

    Raises ValueError where its tensors are larger than such a file can mean, where a sparse one points outside
    itself, or where its modules hold each other without end.
    """
    room = room_for(file_size)
    ways: dict[int, tuple[int, int]] = {}
    for value in walk(root):
        if isinstance(value, Tensor):
            room -= _bytes_of(value)
            if room < 0:
                raise ValueError("its tensors are larger than a file of this size can mean")
            _check_layout(value)
        elif isinstance(value, Record):
            _ways(value, ways)
    return root


def _bytes_of(tensor: Tensor) -> int:
    held = tensor.untyped_storage().nbytes() if tensor.layout is torch.strided else 0
    return max(tensor.numel() * tensor.element_size(), held)


def _check_layout(tensor: Tensor) -> None:
    """Build a sparse tensor again with its indices checked: torch reads them unchecked from a file."""
    if tensor.is_nested:
        raise ValueError("it holds a nested tensor")
    plain = tensor.detach()
    if plain.layout is torch.sparse_coo:
        torch.sparse_coo_tensor(plain._indices(), plain._values(), plain.shape, check_invariants=True)
    elif plain.layout in SPARSE:
        by_row = plain.layout in (torch.sparse_csr, torch.sparse_bsr)
        indices = (plain.crow_indices(), plain.col_indices()) if by_row else (plain.ccol_indices(), plain.row_indices())
        torch.sparse_compressed_tensor(
            *indices, plain.values(), plain.shape, layout=plain.layout, check_invariants=True
        )


def _ways(record: Record, found: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return (number of modules in the tree below ``record``, its depth), each module counted as often as it is held.

    nn.Module walks its children along every way, so that their number is what counts. A cycle ends in RecursionError.
    """
    if id(record) not in found:
        held = (module_state(record) or {"_modules": {}})["_modules"].values()
        below = [_ways(child, found) for child in held if isinstance(child, Record)]
        count, depth = 1 + sum(count for count, _ in below), 1 + max((depth for _, depth in below), default=0)
        if count > MODULES or depth > DEPTH:
            raise ValueError("its modules hold each other without end")
        found[id(record)] = count, depth
    return found[id(record)]


class Bounded(TorchFunctionMode):
    """Within it, no more than ``room`` bytes of new tensors are made, in no more than CALLS; else MemoryError.

    torch gives the memory of an empty tensor its pages only when they are written to, which does not come to pass.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.left = room, CALLS

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.left -= 1
        if self.left < 0:
            raise MemoryError("building it does not end")
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and not any(isinstance(value, Tensor) for value in args):
            self.room -= made.numel() * made.element_size()
            if self.room < 0:
                raise MemoryError("it is far larger than the file that names it")
        return made
