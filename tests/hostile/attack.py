"""What an attack is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import repfuse

Make = Callable[[Path, Path], bytes]


@dataclass(frozen=True)
class Attack:
    """``make(folder, canary)`` gives the bytes of a file; they may name other files, which it puts into ``folder``.

    ``executes`` says that the canary is touched where the file is trusted, which the control shows. ``by`` loads the
    file, or what else is at ``loads`` in the folder, with ``options``. ``may_load`` says that the file holds a network,
    and that it may load without the attack.
    """

    make: Make
    executes: bool = False
    may_load: bool = False
    name: str = "in.pt"
    options: dict[str, Any] = field(default_factory=dict)
    loads: str = ""
    by: Callable[..., Any] = repfuse.load


def fixed(data: bytes) -> Make:
    """Give ``data`` whatever the canary is."""
    return lambda _folder, _canary: data
