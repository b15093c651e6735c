"""Lets `import torchvision` (and so `import timm`) work where torchvision was built for another torch.

A torchvision built for CUDA cannot load its operators beside a CPU torch, and its Python part then fails to
import because two operators have no schema. Declaring the schemas is enough: no test calls the operators.
This is for the test environment alone; the package never does it.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_alive: list[object] = []  # a Library takes its schemas along when it is collected


class _BeforeTorchvision(MetaPathFinder):
    """Runs once, just before torchvision is first imported, and finds nothing: torch stays unimported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            _declare_what_is_missing()


def install() -> None:
    """Declare the missing schemas as soon as torchvision is imported. A second call changes nothing."""
    if not any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())


def _declare_what_is_missing() -> None:
    import torch

    spec = importlib.util.find_spec("torchvision")
    if _alive or spec is None or spec.origin is None:
        return
    try:
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for schema in SCHEMAS:
            library.define(schema)
        _alive.append(library)
