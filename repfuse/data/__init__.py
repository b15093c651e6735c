"""Real inputs for `repfuse verify --data`: tensors in a file, or a folder of images. Reading runs no code from a file.

``read_data`` finds them before any network is loaded; ``prepare`` makes what a network takes of them, batch by batch.
"""

from __future__ import annotations

from pathlib import Path

from repfuse.data.arrays import Arrays, read_arrays
from repfuse.data.folder import Folder, read_folder
from repfuse.data.prepare import Prepared, Wishes, parse_numbers, prepare
from repfuse.errors import RepfuseError

__all__ = ["Arrays", "Folder", "Prepared", "Wishes", "parse_numbers", "prepare", "read_data"]


def read_data(path: Path) -> Arrays | Folder:
    """Return what is at ``path``: the tensors of a file, or the names of a folder's images.

    Raises RepfuseError where it is neither, is damaged, or holds no inputs or labels that do not match them.
    """
    if path.is_dir():
        return read_folder(path)
    if not path.is_file():
        raise RepfuseError(f"There is no data at {path}.", hint="Check the path given with --data.")
    return read_arrays(path)
