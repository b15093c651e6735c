"""Putting a state dict into a freshly built network: strictly, in the state dict's own dtypes, ties kept."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from repfuse.errors import RepfuseError
from repfuse.wording import listed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def match_dtype(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give ``network`` the floating dtype of ``state``, where it has only one.

    The weights bring their dtypes themselves; this is for what is not in a state dict (non-persistent buffers).
    """
    tensors = [tensor for tensor in state.values() if isinstance(tensor, Tensor)]
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()}
    if len(dtypes) == 1 and (dtype := dtypes.pop()).is_floating_point:
        network.to(dtype)


def load_weights(network: nn.Module, state: dict[str, Tensor], path: Path, built_by: str) -> tuple[str, ...]:
    """Load ``state`` into ``network``, which takes over its tensors, dtypes and strides; return notes for the user.

    Raises RepfuseError with the missing, unexpected and wrong-shaped names where the two do not fit exactly.
    """
    groups = ties(network)
    notes = _fill_ties(state, groups)
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except (RuntimeError, AttributeError, TypeError, KeyError) as error:
        raise _mismatch(network, state, path, built_by, error) from error
    for names in groups:
        notes += _tie(network, names)
    return notes


def ties(network: nn.Module) -> list[list[str]]:
    """Return the groups of names under which the network holds one and the same parameter or buffer."""
    names: defaultdict[int, list[str]] = defaultdict(list)
    persistent = network.state_dict().keys()
    for found in (network.named_parameters, network.named_buffers):
        for name, tensor in found(remove_duplicate=False):
            if name in persistent:
                names[id(tensor)].append(name)
    return [group for group in names.values() if len(group) > 1]


def _fill_ties(state: dict[str, Tensor], ties: list[list[str]]) -> tuple[str, ...]:
    """Give each name of a tie its tensor: safetensors files often hold a tied tensor under one name only."""
    filled = []
    for names in ties:
        held = next((state[name] for name in names if name in state), None)
        for name in names:
            if held is not None and name not in state:
                state[name] = held
                filled.append(name)
    return (f"the file leaves out {', '.join(filled)}, which the network shares with other names",) if filled else ()


def _tie(network: nn.Module, names: list[str]) -> tuple[str, ...]:
    tensors = [_get(network, name) for name in names]
    if not all(_same(tensors[0], tensor) for tensor in tensors[1:]):
        return (f"{' and '.join(names)} are one tensor in the network, but differ in the file: they are kept apart",)
    for name in names[1:]:
        owner, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(owner), attribute, tensors[0])
    return ()


def _get(network: nn.Module, name: str) -> Any:
    owner, _, attribute = name.rpartition(".")
    return getattr(network.get_submodule(owner), attribute)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _mismatch(
    network: nn.Module, state: Mapping[str, Tensor], path: Path, built_by: str, error: Exception
) -> RepfuseError:
    expected = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    shapes = [
        f"{name} ({_shape(state[name])} in the file, {_shape(value)} in the network)"
        for name, value in expected.items()
        if isinstance(state.get(name), Tensor) and state[name].shape != value.shape
    ]
    parts = [
        _listed("missing from the file", [name for name in expected if name not in state]),
        _listed("unexpected in the file", [name for name in state if name not in expected]),
        _listed("of another shape", shapes),
    ]
    why = "\n".join(part for part in parts if part) or str(error).replace("\n\t", " ")
    return RepfuseError(f"The weights of {path} do not fit {built_by}.", why, _hint(expected, shapes))


def _hint(expected: Mapping[str, Tensor], shapes: list[str]) -> str:
    if shapes and len(shapes) < len(expected) / 2:
        return "The network is close: check its arguments, such as --model-arg num_classes=... or in_chans=..."
    return "Check the name of the network, its arguments (--model-arg), and that the file is not fused already."


def _listed(title: str, names: list[str]) -> str:
    return f"{len(names)} {title}: {listed(names)}" if names else ""


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
