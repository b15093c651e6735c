"""Real inputs by name or as tensors, before any network is loaded. Reading runs no code from a file.

Of a folder of images: which files count, which folder each is in, and which class that stands for. It finds what
torchvision's ImageFolder finds, also without folders of classes, and says what ImageFolder passes over: other files and
folders that cannot be read. Folders named by numbers are the classes of these numbers; others count from 0 in the order
of their names as text, as ImageFolder counts, where there are as many folders as classes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from safetensors.torch import load_file

from repfuse.checkpoint import torch_pickle
from repfuse.checkpoint.build import library
from repfuse.checkpoint.formats import recognise
from repfuse.errors import RepfuseError
from repfuse.networks import dense
from repfuse.wording import first_line, listed

INPUTS = ("inputs", "images", "x")
LABELS = ("labels", "targets", "y")
LAYOUT = (
    f"Save a dict with a tensor under {', '.join(map(repr, INPUTS))} and, if known, one class number per sample "
    f"under {', '.join(map(repr, LABELS))}."
)


SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # those of ImageFolder


class Arrays(NamedTuple):
    """``inputs`` [samples, ...] for the network's first argument; ``labels`` [samples] integer classes, if any."""

    inputs: torch.Tensor
    labels: torch.Tensor | None


class Folder(NamedTuple):
    """The images below ``path``, sorted. ``classes`` are all folders of the first level, sorted by name as text.

    ``notes`` say what else was found there.
    """

    path: Path
    images: tuple[Path, ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def class_of(self, image: Path) -> str | None:
        """Return the folder of the first level that the image is in; None where it is in none."""
        parts = image.relative_to(self.path).parts
        return parts[0] if len(parts) > 1 else None


def pillow() -> Any:
    """Return the package PIL. Raises RepfuseError where Pillow is not installed."""
    library("PIL.ImageOps", "images")
    return library("PIL", "images")


def read_data(path: Path) -> Arrays | Folder:
    """Return what is at ``path``: the tensors of a file, or the names of a folder's images.

    Raises RepfuseError where it is neither, is damaged, or holds no inputs or labels that do not match them.
    """
    if path.is_dir():
        return read_folder(path)
    if not path.is_file():
        raise RepfuseError(f"There is no data at {path}.", hint="Check the path given with --data.")
    return _read_arrays(path)


def _read_arrays(path: Path) -> Arrays:
    """Read a `.safetensors`, `.npz` or `.pt` file with inputs and, if it has them, labels."""
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
    found = {INPUTS[0]: found} if isinstance(found, torch.Tensor) else found
    if not isinstance(found, Mapping):
        raise RepfuseError(f"{path} holds a {type(found).__name__}, no dict of tensors.", "", LAYOUT)
    return found


def _find(tensors: Mapping[str, Any], names: tuple[str, ...]) -> torch.Tensor | None:
    return next((tensors[name] for name in names if isinstance(tensors.get(name), torch.Tensor)), None)


def read_folder(path: Path) -> Folder:
    """Return the images in ``path`` and in the folders below it. Hidden files and folders do not count.

    Raises RepfuseError where there are none, a folder cannot be read, or Pillow is missing.
    """
    pillow()
    walked = list(_walk(path))
    files = sorted(file for _, files in walked for file in files)
    images = tuple(file for file in files if file.suffix.lower() in SUFFIXES)
    others = Counter(file.suffix or file.name for file in files if file.suffix.lower() not in SUFFIXES)
    if not images:
        held = f"It holds files with {listed(others)}." if others else "It holds no files."
        hint = f"Give a folder with {', '.join(SUFFIXES)} files, or a .safetensors, .npz or .pt file."
        raise RepfuseError(f"There are no images in {path}.", held, hint)
    left = (f"left out {others.total()} files that are no images by their suffix: {listed(others)}",) if others else ()
    return Folder(path, images, tuple(sorted(walked[0][0])), left)


def _walk(root: Path) -> Iterator[tuple[list[str], list[Path]]]:
    """Yield the folders and files in ``root`` and below, also through links, but never into a folder from within."""
    for name, folders, files in os.walk(root, onerror=_unreadable, followlinks=True):
        folder = Path(name)
        around = {parent.resolve() for parent in (folder / "file").absolute().parents}
        inside = [inner for inner in folders if (folder / inner).resolve() not in around]
        folders[:] = [inner for inner in inside if not inner.startswith(".")]
        found = [folder / file for file in files if not file.startswith(".")]
        yield list(folders), [file for file in found if file.is_file() or not file.exists()]  # a pipe would wait


def _unreadable(error: OSError) -> NoReturn:
    why = error.strerror or str(error)
    raise RepfuseError(f"The folder {error.filename} cannot be read.", why, "Check its permissions.") from error


def numbering(folders: Sequence[str], classes: int | None) -> tuple[dict[str, int] | None, str]:
    """Return the class of each folder, or None, and what to say of it. ``folders`` are sorted as text."""
    if classes is None:
        return None, "no labels: the network's first output is no table of classes"
    if not folders:
        return None, "no labels: the images are in no folders named by their classes"
    in_order = {folder: index for index, folder in enumerate(folders)}
    numbers = {folder: int(folder) for folder in folders if folder.isascii() and folder.isdecimal()}
    values = list(numbers.values())
    if len(numbers) == len(folders) and len(set(values)) == len(values) and max(values) < classes:
        other = len(values) == classes and numbers != in_order
        doubt = "; torchvision's ImageFolder would count them otherwise, in the order of their names as text"
        return numbers, "labels: the numbers that the folders are named by" + (doubt if other else "")
    if len(numbers) == len(folders) and values != sorted(set(values)):
        return None, f"no labels: the numbers that the folders are named by are not the classes, 0 to {classes - 1}"
    if len(folders) == classes:
        return in_order, f"labels: the {classes} folders in the order of their names"
    count = "1 folder" if len(folders) == 1 else f"{len(folders)} folders"
    return None, f"no labels: {count} for a network of {classes} classes"
