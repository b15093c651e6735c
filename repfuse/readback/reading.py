"""The work of the process that reads a file again: load it, say what is in it, run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repfuse.checking.runs import Outcome, call
from repfuse.checkpoint import safetensors_file, torch_pickle
from repfuse.checkpoint.contents import RECIPE, Around
from repfuse.checkpoint.formats import Container, recognise
from repfuse.checkpoint.user_code import running
from repfuse.errors import RepfuseError
from repfuse.loading import load
from repfuse.networks import device_of, placed, set_eval, using_threads
from repfuse.readback.messages import Answer, FileKind, Fingerprint, Inputs, Job, digest_of, digests, fingerprint_of

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

    found = None
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
