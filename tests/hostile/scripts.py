"""TorchScript archives, which run as they load: refused before that, whatever they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .archives import bomb
from .assembling import Member, pickled, system, touching, write_archive
from .attack import Attack


class Writes(nn.Module):
    """Writes its file as soon as it is loaded."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path, self.training = state
        torch.save(torch.ones(1), self.path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def script(folder: Path, canary: Path) -> bytes:
    torch.jit.save(torch.jit.script(Writes(str(canary))), folder / "in.pt")
    return (folder / "in.pt").read_bytes()


def pickles() -> list[Member]:
    return [Member("archive/constants.pkl", pickled(b")")), Member("archive/data.pkl", pickled(b"}"))]


def calling(_folder: Path, canary: Path) -> bytes:
    """Pickles that call, where a reader of torch.save's files might look for them."""
    evil = pickled(system(touching(canary)))
    return write_archive(Member(member.name, evil) for member in pickles())


SHAPE: dict[str, Any] = {"options": {"input": "1x3x8x8"}}
SCRIPTS = {
    "that writes as it loads": Attack(script, executes=True, **SHAPE),
    "that writes as it loads, with no shape": Attack(script),
    "that is pickles": Attack(calling, **SHAPE),
    "bomb: the constants": bomb("constants.pkl", of=pickles),
    "bomb: the pickle": bomb("data.pkl", of=pickles),
    "that is nothing else": Attack(lambda _folder, _canary: write_archive(pickles()[:1])),
}
