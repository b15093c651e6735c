"""Files that do harm when they are trusted: what the harness must see."""

from __future__ import annotations

from pathlib import Path

from .assembling import call, pickled, push, text, torch_archive
from .attack import Attack, fixed


def opening(_folder: Path, canary: Path) -> bytes:
    return torch_archive(pickled(call("builtins:open", text(f"{canary}2"), text("w"))))


CONTROLS = {
    "control: memory": Attack(fixed(torch_archive(pickled(call("builtins:bytearray", push(1 << 29)))))),
    "control: error": Attack(fixed(torch_archive(pickled(call("builtins:exec", text("raise SystemExit")))))),
    "control: file": Attack(
        lambda _, canary: torch_archive(pickled(call("builtins:open", text(f"{canary}2"), text("w"))))
    ),
    "control: program": Attack(fixed(torch_archive(pickled(call("os:system", text("true")))))),
}
