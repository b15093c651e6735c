"""repfuse: rewrites the parallel linear branches of a trained network into single convolutions, and proves it.

    checkpoint = repfuse.load("in.pt")
    result = repfuse.fuse(checkpoint.module, checkpoint.example_inputs)
    repfuse.verify(checkpoint.module, result.module, checkpoint.example_inputs, plan=result.plan)
    repfuse.save(checkpoint, result.module, "out.pt", plan=result.plan)

``plan`` and ``rewrite`` are the two steps of ``fuse``, ``convert`` also proves the result, ``bench`` times it,
``equalize`` prepares it for int8.

The names are imported when they are first used, so that ``import repfuse`` and ``repfuse --help`` do not wait for
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from repfuse.errors import RepfuseError

if TYPE_CHECKING:
    from repfuse.benching.benchmark import bench
    from repfuse.checking.verification import verify
    from repfuse.converting import convert
    from repfuse.equalizing import equalize
    from repfuse.fusing import fuse
    from repfuse.loading import load
    from repfuse.planning.planner import plan
    from repfuse.plans import Plan, Policy
    from repfuse.rewriting import rewrite
    from repfuse.saving import save

__version__ = "0.1.0"

_HOMES = {
    "Plan": "repfuse.plans",
    "Policy": "repfuse.plans",
    "bench": "repfuse.benching.benchmark",
    "convert": "repfuse.converting",
    "equalize": "repfuse.equalizing",
    "fuse": "repfuse.fusing",
    "load": "repfuse.loading",
    "plan": "repfuse.planning.planner",
    "rewrite": "repfuse.rewriting",
    "save": "repfuse.saving",
    "verify": "repfuse.checking.verification",
}

__all__ = [
    "Plan",
    "Policy",
    "RepfuseError",
    "__version__",
    "bench",
    "convert",
    "equalize",
    "fuse",
    "load",
    "plan",
    "rewrite",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'repfuse' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
