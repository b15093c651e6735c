"""Real inputs for `repfuse verify --data`: tensors in a file, or a folder of images. Reading runs no code from a file.

``read_data`` finds them before any network is loaded; ``prepare`` makes what a network takes of them, batch by batch.
"""

from __future__ import annotations

from repfuse.data.finding import Arrays, Folder, read_data
from repfuse.data.prepare import Prepared, Wishes, parse_numbers, prepare

__all__ = ["Arrays", "Folder", "Prepared", "Wishes", "parse_numbers", "prepare", "read_data"]
