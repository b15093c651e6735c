"""Real inputs and labels from a file of tensors. Reading runs no code from the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

from repfuse.checkpoint import torch_pickle
from repfuse.checkpoint.formats import recognise
from repfuse.errors import RepfuseError
from repfuse.networks import dense
from repfuse.wording import first_line

INPUTS = ("inputs", "images", "x")
LABELS = ("labels", "targets", "y")
LAYOUT = (
    f"Save a dict with a tensor under {', '.join(map(repr, INPUTS))} and, if known, one class number per sample "
    f"under {', '.join(map(repr, LABELS))}."
)


class Arrays(NamedTuple):
    """``inputs`` [samples, ...] for the network's first argument; ``labels`` [samples] integer classes, if any."""

    inputs: torch.Tensor
    labels: torch.Tensor | None


def read_arrays(path: Path) -> Arrays:
    """Read ``path``, a `.safetensors`, `.npz` or `.pt` file with inputs and, if it has them, labels.

    Raises RepfuseError where it is none of these, is damaged, or holds no inputs or labels that do not match them.
    """
    tensors = _tensors(path)
    inputs, labels = _find(tensors, INPUTS), _find(tensors, LABELS)
    if inputs is None:
        held = ", ".join(map(str, tensors)) or "nothing"
        raise RepfuseError(f"{path} holds no inputs.", f"It holds {held}.", LAYOUT)
    if not inputs.dim() or not len(inputs):
        raise RepfuseError(f"The inputs in {path} hold no samples.", f"Their shape is {list(inputs.shape)}.", LAYOUT)
    if labels is not None and labels.shape != inputs.shape[:1]:
        shapes = f"There are {len(inputs)} inputs, and the labels have shape {list(labels.shape)}."
        raise RepfuseError(f"The labels in {path} do not match the inputs.", shapes, LAYOUT)
    return Arrays(dense(inputs), labels if labels is None or labels.is_floating_point() else labels.to(torch.int64))


def _read_torch(path: Path) -> Any:
    return torch_pickle.read(path, recognise(path))


def _read_npz(path: Path) -> dict[str, torch.Tensor]:
    torch_pickle.check_unpacked(path, torch_pickle.room_for(path.stat().st_size))
    with np.load(path, allow_pickle=False) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files if name in INPUTS + LABELS}


READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": load_file,
    ".npz": _read_npz,
    ".pt": _read_torch,
    ".pth": _read_torch,
}


def _tensors(path: Path) -> Mapping[str, Any]:
    if path.suffix not in READERS:
        raise RepfuseError(
            f"Data in {path.suffix or 'a file without a suffix'} cannot be read.",
            f"The readable kinds are {', '.join(READERS)} and folders of images.",
            LAYOUT,
        )
    try:
        found = READERS[path.suffix](path)
    except RepfuseError as error:  # of the reader of checkpoints
        raise RepfuseError(f"The data in {path} cannot be read.", f"{error.what} {error.why}", error.hint) from error
    except Exception as error:  # a damaged file can make its reader fail in any way
        raise RepfuseError(f"The data in {path} cannot be read.", first_line(error), LAYOUT) from error
    if isinstance(found, torch.Tensor):
        return {INPUTS[0]: found}
    if isinstance(found, Mapping):
        return found
    raise RepfuseError(f"{path} holds a {type(found).__name__}, no dict of tensors.", "", LAYOUT)


def _find(tensors: Mapping[str, Any], names: tuple[str, ...]) -> torch.Tensor | None:
    return next((tensors[name] for name in names if isinstance(tensors.get(name), torch.Tensor)), None)
