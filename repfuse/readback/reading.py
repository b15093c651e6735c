"""What goes to the process that reads a file again, what it does with it, and what comes back."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.serialization import safe_globals

from repfuse.checking.runs import Outcome, call
from repfuse.checkpoint import safetensors_file, torch_pickle
from repfuse.checkpoint.contents import RECIPE, Around
from repfuse.checkpoint.formats import Container, recognise
from repfuse.checkpoint.user_code import running
from repfuse.errors import RepfuseError
from repfuse.loading import load
from repfuse.networks import device_of, is_plain, named_tensors, placed, set_eval, stored_tensors, using_threads
from repfuse.wording import listed

# A network in short: a digest of each tensor, and the class and the settings of each module.
#
# Two networks with one fingerprint hold the same numbers, bit by bit, in modules that are set the same.


CLASS = "its class"
MODE = "training"  # which loading turns off
MACHINERY = ("meta", "shape_env")  # of a GraphModule, which its file does not keep


@dataclass(frozen=True)
class Fingerprint:
    """``tensors`` are digests by name, ``modules`` the settings of each module by its path, as text."""

    tensors: dict[str, str] = field(default_factory=dict)
    modules: dict[str, dict[str, str]] = field(default_factory=dict)

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


def _settings(module: nn.Module, *, every: bool) -> dict[str, str]:
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
            stored = value.int_repr() if value.is_quantized else value
            flat = stored.detach().cpu().to_dense().contiguous().flatten()  # bytes in the order of the elements
            yield (flat.view(torch.uint8) if flat.numel() else flat).numpy().data
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


FileKind = Literal["network", "weights", "pt2", "onnx"]
Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Job:
    """Read the file at ``path`` and run it on ``inputs`` with as many ``threads``.

    ``kind`` says how it is read: as a ``network`` by repfuse.load with the arguments ``loading``, as bare ``weights``
    whose network nobody knows, or in the runtime of its format. ``keys`` lead to the weights in the file, ``outputs``
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
    network: Fingerprint = Fingerprint()
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


# The work: load the file, say what is in it, run it.


TORCH = f"PyTorch {torch.__version__}"
ANY = "1"  # an example that is not used: the inputs come with the job


def answer(job: Job) -> Answer:
    """Do the job. What cannot be read becomes part of the answer."""
    with ExitStack() as stack:
        stack.enter_context(using_threads(job.threads))  # another number of them may add in another order
        for folder in job.folders:  # of code that the user named, which Python would find in his program
            stack.enter_context(running(Path(folder)))
        try:
            return _READERS[job.kind](job)
        except RepfuseError as error:
            return Answer(refused=(error.what, error.why, error.hint))


def _network(job: Job) -> Answer:
    checkpoint = load(job.path, **job.loading, input=ANY)
    network = checkpoint.module
    found = fingerprint_of(network, module=job.module)  # before a run, in which some networks change
    rest = rest_of(checkpoint.around, checkpoint.metadata)
    return Answer(TORCH, found, rest, outcomes=_run(network, job.inputs))


def rest_of(around: Around, metadata: Mapping[str, str]) -> dict[str, str]:
    """Return digests of what stands around a network in its file, by the depth and the key."""
    levels = enumerate(zip(around.keys, around.others, strict=True))
    beside = {
        f"{depth}.{key}": digest_of(value)
        for depth, (taken, others) in levels
        for key, value in others.items()
        if key != taken
    }
    more = {**around.naming.extras, **metadata}
    return beside | {f"beside the weights.{name}": digest_of(value) for name, value in more.items()}


def _weights(job: Job) -> Answer:
    path = Path(job.path)
    state: Any
    texts: dict[str, str] = {}
    if (container := recognise(path)) is Container.SAFETENSORS:
        state, texts = safetensors_file.read(path)
        texts.pop(RECIPE, None)
    else:
        state = torch_pickle.read(path, container)
    return Answer(TORCH, Fingerprint(digests(Around(job.keys).take(state))), rest=rest_of(Around(), texts))


def _program(job: Job) -> Answer:
    from repfuse.checkpoint import exported, pt2_file  # torch.export takes a second to import

    program = pt2_file.read(Path(job.path), trust=True)  # repfuse wrote it just now
    network = exported.opened(program, Path(job.path))
    found = Fingerprint(digests(program.state_dict))
    contract = exported.contract_of(program).describe()
    return Answer(f"torch.export, {TORCH}", found, contract=contract, outcomes=_run(network, job.inputs))


def _onnx(job: Job) -> Answer:
    from repfuse.checkpoint import onnx_file

    found = Fingerprint()
    if job.module:
        from repfuse.checkpoint.onnx_graph.reading import held, read

        found = Fingerprint(digests(held(read(Path(job.path)))))
    run = onnx_file.runner(Path(job.path), job.outputs) if job.inputs or not job.module else None
    return Answer(onnx_file.runtime_name(), found, outcomes=tuple(run(inputs) for inputs in job.inputs) if run else ())


_READERS: dict[FileKind, Callable[[Job], Answer]] = {
    "network": _network,
    "weights": _weights,
    "pt2": _program,
    "onnx": _onnx,
}


def _run(network: nn.Module, inputs: Sequence[Inputs]) -> tuple[Outcome, ...]:
    set_eval(network)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    device = device_of(network)
    return tuple(call(network, placed(given, device, {})) for given in inputs)
