"""What the tables know besides a node itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx, nn

from repfuse.tracing.constants import Constants


@dataclass(frozen=True)
class Scope:
    """``root`` is the model of the graph, perhaps without data; ``shape_of`` the shapes of the values before a node."""

    root: nn.Module
    constants: Constants
    shape_of: Mapping[fx.Node, tuple[int, ...]]
