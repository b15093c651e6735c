"""Real inputs for `repfuse verify --data`: tensors in a file, or a folder of images. Reading runs no code from a file.

``read_data`` finds them before any network is loaded; ``prepare`` makes what a network takes of them, batch by batch.
"""

from repfuse.data.arrays import Arrays
from repfuse.data.folder import Folder
from repfuse.data.prepare import prepare
from repfuse.data.reading import read_data
from repfuse.data.wishes import Wishes

__all__ = ["Arrays", "Folder", "Wishes", "prepare", "read_data"]
