"""How many pieces a tensor is taken into, as far as the call says: so that a loop over them can be followed."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_CHUNK = ("chunk", torch.chunk, "tensor_split", torch.tensor_split)
_SPLIT = ("split", torch.split, "split_with_sizes", torch.split_with_sizes)
_CHANNELS = 1


def pieces(node: fx.Node) -> int | None:
    """Return the number of pieces that a call asks for along the channels; None where it is another call.

    ``chunk(n)`` returns fewer where n does not divide the channels well: whoever relies on n has to run it once. The
    number of channels does not change with the input, so once is enough.
    """
    asked = _argument(node, 1, "chunks", "sections", "indices_or_sections", "split_size_or_sections", "split_size")
    if _argument(node, 2, "dim") != _CHANNELS:
        return None
    if node.target in _CHUNK and isinstance(asked, int):
        return asked
    listed = node.target in _SPLIT and isinstance(asked, list | tuple) and all(isinstance(size, int) for size in asked)
    return len(asked) if listed else None


def _argument(node: fx.Node, place: int, *names: str) -> Any:
    given = [node.kwargs[name] for name in names if name in node.kwargs]
    return node.args[place] if len(node.args) > place else next(iter(given), None)
