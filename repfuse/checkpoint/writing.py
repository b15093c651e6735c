"""From a network to a file: laid out as its input was, and read back before it counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from repfuse.checkpoint import safetensors_file, torch_pickle
from repfuse.checkpoint.contents import RECIPE
from repfuse.checkpoint.inert import tensors_of_record
from repfuse.checkpoint.recognise import Container
from repfuse.errors import EXIT_FAILED_CHECK, RepfuseError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from repfuse.checkpoint.around import Around
    from repfuse.checkpoint.user_code import Named


def state_of(network: nn.Module, around: Around, recipe: str | None) -> dict[str, Any]:
    """Return the state dict as it will be written: on the CPU, named as the input's and with its extras."""
    full: dict[str, Any] = around.naming.of_file(network.state_dict())
    for name, value in full.items():
        full[name] = value.detach().cpu() if isinstance(value, Tensor) else value
    if recipe is not None:
        vars(full)[RECIPE] = recipe
    return full


def write_torch(network: Any, around: Around, path: Path, *, trust: Named | None = None) -> Any:
    """Write ``network`` (a module or state dict) in what was around it, read it back, and return what was read.

    Raises RepfuseError where it cannot be pickled, or where a tensor does not come back bit by bit.
    """
    torch_pickle.write(around.put(network), path)
    zipped = Container.TORCH_ZIP
    back = torch_pickle.read_trusted(path, zipped, trust) if trust else torch_pickle.read(path, zipped)
    check_same(_tensors(network), _tensors(around.take(back)))
    return around.take(back)


def write_safetensors(state: Mapping[str, Any], metadata: Mapping[str, str], path: Path) -> None:
    """Write ``state`` and read it back, with the same promise as ``write_torch``."""
    safetensors_file.write(state, metadata, path)
    back, text = safetensors_file.read(path)
    check_same(state, back)
    if any(text.get(key) != value for key, value in metadata.items()):
        raise not_the_same("its metadata")


def _tensors(network: Any) -> Mapping[str, Any]:
    if isinstance(network, nn.Module):
        parameters = network.named_parameters(remove_duplicate=False)
        return dict([*parameters, *network.named_buffers(remove_duplicate=False)])
    return network if isinstance(network, dict) else tensors_of_record(network)[0]


def check_same(written: Mapping[str, Any], read: Mapping[str, Any]) -> None:
    """Raise RepfuseError where a tensor of ``written`` is not the same, bit by bit, in ``read``."""
    if written.keys() != read.keys():
        raise not_the_same(", ".join(sorted(written.keys() ^ read.keys())))
    for name, tensor in written.items():
        if isinstance(tensor, Tensor) and not same_bits(tensor, read[name]):
            raise not_the_same(name)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether both are of the same dtype and shape and hold the same bits."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(bits_of(one), bits_of(other))


def bits_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor in the order of its elements, on the CPU."""
    flat = tensor.detach().cpu().to_dense().contiguous().flatten()
    return flat.view(torch.uint8) if flat.numel() else flat


def not_the_same(what: str) -> RepfuseError:
    """Return the error for a file that does not read as it was written."""
    return RepfuseError(
        "What was read back is not what was written; nothing was kept.",
        f"It differs in {what}.",
        "Try again, and on another disk. If it stays so, please report it.",
        exit_code=EXIT_FAILED_CHECK,
    )
