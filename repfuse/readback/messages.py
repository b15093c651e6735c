"""What goes to the process that reads a file again, and what comes back."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.serialization import safe_globals

from repfuse.checking.runs import Outcome
from repfuse.checkpoint.contents import RECIPE
from repfuse.networks import is_plain, named_tensors, stored_tensors
from repfuse.wording import listed

# A network in short: a digest of each tensor, and the class and the settings of each module.
#
# Two networks with one fingerprint hold the same numbers, bit by bit, in modules that are set the same.


CLASS = "its class"
MODE = "training"  # which loading turns off
MACHINERY = ("meta", "shape_env")  # of a GraphModule, which its file does not keep
Settings = dict[str, str]


@dataclass(frozen=True)
class Fingerprint:
    """``tensors`` are digests by name, ``modules`` the settings of each module by its path, as text."""

    tensors: dict[str, str] = field(default_factory=dict)
    modules: dict[str, Settings] = field(default_factory=dict)

    def differs(self, other: Fingerprint, *, modules: bool = True) -> str:
        """Say in what ``other`` differs, or return "": without ``modules`` the tensors alone count."""
        if self.tensors.keys() != other.tensors.keys():
            return f"which tensors there are: {listed(sorted(self.tensors.keys() ^ other.tensors.keys()))}"
        if wrong := [name for name, digest in self.tensors.items() if other.tensors[name] != digest]:
            return f"the tensors {listed(wrong)}"
        if modules and self.modules.keys() != other.modules.keys():
            return f"which modules there are: {listed(sorted(self.modules.keys() ^ other.modules.keys()))}"
        for path, settings in self.modules.items() if modules else ():
            for name in sorted(settings.keys() | other.modules[path].keys()):
                one, two = settings.get(name, "nothing"), other.modules[path].get(name, "nothing")
                if one != two and name != MODE:
                    return f"{path or 'the network'}, {name}: {one[:200]} was written, {two[:200]} was read"
        return ""


def fingerprint_of(network: nn.Module, *, module: bool) -> Fingerprint:
    """Return the fingerprint of ``network``, as far as its file holds it.

    A pickled ``module`` holds everything; a file of weights holds what a state dict does, and of the modules their
    classes and what torch's own layers are set to have to be built again. The graph of a GraphModule is left out: it is
    traced again when it is loaded, under other names. That it is the same is for a run to show.
    """
    found = named_tensors(network, remove_duplicate=False) if module else stored_tensors(network)
    parts = network.named_modules(remove_duplicate=False)
    return Fingerprint(digests(dict(found)), {path: _settings(part, every=module) for path, part in parts})


def _settings(module: nn.Module, *, every: bool) -> Settings:
    traced = isinstance(module, fx.GraphModule)
    settings = {CLASS: "GraphModule" if traced else f"{type(module).__module__}.{type(module).__qualname__}"}
    if not every and not type(module).__module__.startswith("torch.nn."):
        return settings
    for name, value in vars(module).items():
        machinery = traced and (name.startswith("_") or name in MACHINERY)
        if name != RECIPE and not machinery and is_plain(value):
            settings[name] = repr(value)
    return settings


def digests(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Return a digest of each tensor, its dtype and its shape."""
    return {name: digest_of(tensor) for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def digest_of(value: Any) -> str:
    """Return a digest of a tensor, or of plain data with tensors in it."""
    digest = hashlib.sha256()
    for piece in _pieces(value):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(value: Any) -> Iterable[Any]:
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        if not value.is_meta:
            yield bits_of(value.int_repr() if value.is_quantized else value).numpy().data
    elif isinstance(value, dict):
        yield f"dict of {len(value)}".encode()
        for item in value.items():
            yield from _pieces(item)
    elif isinstance(value, (list, tuple)):
        yield f"{type(value).__name__} of {len(value)}".encode()
        for item in value:
            yield from _pieces(item)
    elif isinstance(value, (set, frozenset)):
        yield repr(sorted(map(repr, value))).encode()
    else:
        yield f"{type(value).__name__} {value!r}".encode()


def bits_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor in the order of its elements, on the CPU."""
    flat = tensor.detach().cpu().to_dense().contiguous().flatten()
    return flat.view(torch.uint8) if flat.numel() else flat


FileKind = Literal["network", "weights", "pt2", "onnx"]
Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Job:
    """Read the file at ``path`` and run it on ``inputs`` with as many ``threads``.

    ``kind`` says how it is read: as a ``network`` by repfuse.load with the arguments ``loading``, as bare ``weights``
    whose network nobody knows, or in the runtime of its format. ``keys`` lead to the network in the file, ``outputs``
    are the names of what an ONNX file gives. ``module`` says whether the file holds the modules themselves, ``needs``
    names the Python modules that reading it imports, and in ``folders`` lies code that the user named.
    """

    kind: FileKind
    path: str
    threads: int
    loading: dict[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    module: bool = False
    outputs: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    inputs: tuple[Inputs, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What was found in the file, in which ``runtime``, and what it gave on each input.

    ``network`` is the fingerprint of what was loaded, ``rest`` are digests of what stands around it, ``contract`` the
    shapes that an exported program takes. ``refused`` are the parts of the error where the file could not be read.
    """

    runtime: str = ""
    network: Fingerprint | None = None
    rest: dict[str, str] = field(default_factory=dict)
    contract: str = ""
    refused: tuple[str, ...] = ()
    outcomes: tuple[Outcome, ...] = ()


def packed(message: Job | Answer) -> bytes:
    """Return a message as it is sent."""
    buffer = io.BytesIO()
    torch.save(message, buffer)
    return buffer.getvalue()


def unpacked(data: bytes) -> Any:
    """Return the message that was sent. Raises any exception where ``data`` is none; no code of it runs."""
    with safe_globals([Job, Answer, Fingerprint, Outcome]):
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
