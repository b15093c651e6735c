"""A folder of images, by name: which files count, and which folder of the first level each is in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from repfuse.data.pixels import pillow
from repfuse.errors import RepfuseError
from repfuse.wording import listed

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # those of ImageFolder


@dataclass(frozen=True)
class Folder:
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
    try:
        files = sorted(_files(path))
        classes = sorted(entry.name for entry in _visible(path) if entry.is_dir())
    except OSError as error:
        why = error.strerror or str(error)
        raise RepfuseError(f"The folder {error.filename} cannot be read.", why, "Check its permissions.") from error
    images = tuple(file for file in files if file.suffix.lower() in SUFFIXES)
    others = Counter(file.suffix or file.name for file in files if file.suffix.lower() not in SUFFIXES)
    if not images:
        held = f"It holds files with {listed(others)}." if others else "It holds no files."
        hint = f"Give a folder with {', '.join(SUFFIXES)} files, or a .safetensors, .npz or .pt file."
        raise RepfuseError(f"There are no images in {path}.", held, hint)
    left = [f"left out {sum(others.values())} files that are no images by their suffix: {listed(others)}"]
    return Folder(path, images, tuple(classes), tuple(left if others else ()))


def _files(root: Path) -> Iterator[Path]:
    """Yield the files below ``root``, also through links, but never a folder within itself; broken links, too."""
    waiting: list[tuple[Path, frozenset[Path]]] = [(root, frozenset())]
    while waiting:
        folder, above = waiting.pop()
        if (real := folder.resolve()) in above:
            continue
        for entry in _visible(folder):
            if entry.is_dir():
                waiting.append((entry, above | {real}))
            elif entry.is_file() or not entry.exists():  # reading a pipe would wait for ever
                yield entry


def _visible(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
