"""Reading and writing safetensors files: tensors by name, and text beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from repfuse.checkpoint.json_file import parse_json
from repfuse.checkpoint.recognise import damaged
from repfuse.errors import RepfuseError
from repfuse.wording import described, first_line

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors, on the CPU and in the order of the file, and the text metadata.

    The tensors are copies: none of them goes on reading the file, which may be overwritten later.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            _check_names(path)
            names = list(file.keys())
            return {name: file.get_tensor(name).clone() for name in names}, dict(file.metadata() or {})
    except Exception as error:  # a damaged file can make its reader fail in any way
        raise damaged(path, first_line(error)) from error


def _check_names(path: Path) -> None:
    """Raise ValueError where the header has a name twice: which of the two counts, each reader decides for itself."""
    with path.open("rb") as file:
        parse_json(file.read(int.from_bytes(file.read(8), "little")))


def write(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Write ``tensors`` and text ``metadata``. Values and dtypes are kept; strides are not, the format has none.

    A tensor that shares its memory with others is written in full under each name, so that every reader finds
    every name. Raises RepfuseError where the format cannot hold them, OSError where the disk fails.
    """
    try:
        save_file(_apart(tensors), path, {"format": "pt"} | dict(metadata))
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise RepfuseError(
            "These weights cannot be written as safetensors.",
            described(error),
            "Choose a .pt file as the output.",
        ) from error
    except SafetensorError as error:  # what the library makes of an OSError
        raise OSError(first_line(error)) from error


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    apart: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        memory = own.untyped_storage().data_ptr()
        apart[name] = own.clone() if memory in seen else own
        seen.add(memory)
    return apart
