"""What goes to the process that reads a file again, and what comes back: a line of JSON, then tensors."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from repfuse.rereading.fingerprint import Fingerprint
from repfuse.verifying.copies import Outcome

Kind = Literal["network", "weights", "pt2", "onnx"]
Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Job:
    """Read the file at ``path`` and run it on ``inputs`` with as many ``threads``.

    ``kind`` says how it is read: as a ``network`` by repfuse.load with the arguments ``loading``, as bare ``weights``
    whose network nobody knows, or in the runtime of its format. ``keys`` lead to the network in the file, ``alone``
    asks for torch.load without repfuse as well, ``outputs`` are the names of what an ONNX file gives. ``module`` says
    whether the file holds the modules themselves, ``needs`` names the Python modules that reading it imports.
    """

    kind: Kind
    path: str
    threads: int
    loading: dict[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    alone: bool = False
    module: bool = False
    outputs: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    inputs: tuple[Inputs, ...] = ()

    def to_bytes(self) -> bytes:
        """Return the job as it is sent."""
        return _packed({**vars(self), "inputs": None}, list(self.inputs))

    @classmethod
    def from_bytes(cls, data: bytes) -> Job:
        """Return the job that was sent."""
        said, inputs = _unpacked(data)
        tuples = {name: tuple(said[name]) for name in ("keys", "outputs", "needs")}
        return cls(**said | tuples | {"inputs": tuple(inputs)})


@dataclass(frozen=True)
class Answer:
    """What was found in the file, in which ``runtime``, and what it gave on each input.

    ``network`` is the fingerprint of what was loaded; ``alone`` that of what torch.load gave without repfuse, where
    that was asked for. ``wanted`` says that loading it alone asked for repfuse. ``rest`` are digests of what stands
    around the network, ``contract`` the shapes that an exported program takes. ``refused`` are the parts of the error
    where the file could not be read.
    """

    runtime: str = ""
    network: Fingerprint | None = None
    alone: Fingerprint | None = None
    wanted: bool = False
    rest: dict[str, str] = field(default_factory=dict)
    contract: str = ""
    refused: tuple[str, ...] = ()
    outcomes: tuple[Outcome, ...] = ()

    def to_bytes(self) -> bytes:
        """Return the answer as it is sent."""
        prints = {name: held and vars(held) for name, held in (("network", self.network), ("alone", self.alone))}
        errors = {"outcomes": None, "errors": [outcome.error for outcome in self.outcomes]}
        return _packed(vars(self) | prints | errors, [outcome.outputs for outcome in self.outcomes])

    @classmethod
    def from_bytes(cls, data: bytes) -> Answer:
        """Return the answer that was sent. Raises any exception where ``data`` is none."""
        said, outputs = _unpacked(data)
        errors = said.pop("errors")
        prints = {name: Fingerprint(**said[name]) if said[name] else None for name in ("network", "alone")}
        outcomes = tuple(Outcome(dict(held), str(error)) for held, error in zip(outputs, errors, strict=True))
        return cls(**said | prints | {"refused": tuple(said["refused"]), "outcomes": outcomes})


def _packed(said: dict[str, Any], tensors: Any) -> bytes:
    buffer = io.BytesIO()
    buffer.write(json.dumps(said).encode() + b"\n")
    held = io.BytesIO()
    torch.save(tensors, held)
    return buffer.getvalue() + held.getvalue()


def _unpacked(data: bytes) -> tuple[dict[str, Any], Any]:
    said, _, held = data.partition(b"\n")
    return json.loads(said), torch.load(io.BytesIO(held), map_location="cpu", weights_only=True)
