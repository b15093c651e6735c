"""torch.load with repfuse out of reach: the promise that a network which was written needs no repfuse."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from types import ModuleType

PACKAGE = "repfuse"


class Hidden(MetaPathFinder):
    """Finds nothing, and fails where repfuse is asked for; ``wanted`` says that it was."""

    wanted = False

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:  # noqa: ARG002
        """Raise ImportError for repfuse, and leave all else to the finders after this one."""
        if _is_ours(name):
            self.wanted = True
            raise ImportError(f"{name} is out of reach, for the file is to load without it")


@contextmanager
def without_repfuse() -> Iterator[Hidden]:
    """Have every import of repfuse fail within the block. Not for a process in which other threads use it."""
    ours = {name: module for name, module in sys.modules.items() if _is_ours(name)}
    hidden = Hidden()
    for name in ours:
        del sys.modules[name]
    sys.meta_path.insert(0, hidden)
    try:
        yield hidden
    finally:
        sys.meta_path.remove(hidden)
        sys.modules.update(ours)


def _is_ours(name: str) -> bool:
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")
