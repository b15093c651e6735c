"""A folder of images, by name: which files count, which folder each is in, and which class that stands for.

It finds what torchvision's ImageFolder finds, also without folders of classes, and says what ImageFolder passes over:
other files and folders that cannot be read. Folders named by numbers are the classes of these numbers; others count
from 0 in the order of their names as text, as ImageFolder counts, where there are as many folders as classes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from repfuse.data.images import pillow
from repfuse.errors import RepfuseError
from repfuse.wording import listed

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # those of ImageFolder


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
        folders[:] = [inner for inner in _visible(folders) if (folder / inner).resolve() not in around]
        found = [folder / file for file in _visible(files)]
        yield list(folders), [file for file in found if file.is_file() or not file.exists()]  # a pipe would wait


def _visible(names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith(".")]


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
