"""Found data + the network that it is for -> samples as that network takes them, made batch by batch, and labels."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING

import torch

from repfuse.checking.agreement import CHUNK, Samples, class_count, takes
from repfuse.data.arrays import Arrays
from repfuse.data.folder import Folder
from repfuse.data.known import preset_for
from repfuse.data.labels import numbering
from repfuse.data.pixels import MODES, pixels
from repfuse.data.scaling import laid_out, normalised
from repfuse.data.wishes import Wishes
from repfuse.errors import RepfuseError

if TYPE_CHECKING:
    from repfuse.loading import Checkpoint

Prepared = tuple[Samples, torch.Tensor | None]


def prepare(found: Arrays | Folder, checkpoint: Checkpoint, wishes: Wishes) -> Prepared:
    """Return samples for the network of ``checkpoint``, and a class per sample where classes are known.

    Images are resized and cropped to the height and width of the example, and normalised as the user wishes, else as
    the checkpoint says, else not; so are tensors of uint8. Other tensors are taken as they are, in the example's dtype
    where both are floating. Raises RepfuseError where the data is none for such a network, or a wish has no meaning.
    """
    if isinstance(found, Folder):
        return _of_images(found, checkpoint, wishes)
    return _of_arrays(found, checkpoint, wishes)


def _of_images(folder: Folder, checkpoint: Checkpoint, wishes: Wishes) -> Prepared:
    example = checkpoint.example_inputs[0]
    shape = tuple(example.shape[1:])
    if example.dim() != 4 or shape[0] not in MODES or not example.is_floating_point():
        what = f"Images are no input for this network: it takes {'x'.join(map(str, example.shape))} of {example.dtype}."
        raise RepfuseError(what, "Images give Nx1xHxW or Nx3xHxW.", "Give tensors in a .safetensors, .npz or .pt file.")
    channels, size = shape[0], (shape[1], shape[2])
    preset, said = preset_for(checkpoint, channels, wishes)
    labels, about = _labels(folder, checkpoint)
    chosen, limited = _chosen(len(folder.images), wishes.limit)
    images = [folder.images[index] for index in chosen]

    def make(positions: range) -> torch.Tensor:
        batch = torch.stack([pixels(images[index], channels, size, preset) for index in positions])
        return normalised(batch, preset, example.dtype)

    prepared = f"images {preset.geometry(size)}, {preset.normalisation()} ({said})"
    notes = (*folder.notes, prepared, about, *limited)
    samples = Samples(len(images), prod(shape), make, notes, _at_once(checkpoint))
    return samples, labels[chosen] if labels is not None else None


def _of_arrays(found: Arrays, checkpoint: Checkpoint, wishes: Wishes) -> Prepared:
    example, inputs = checkpoint.example_inputs[0], found.inputs
    chosen, limited = _chosen(len(inputs), wishes.limit)
    convert, said = _conversion(inputs, example, checkpoint, wishes)

    def make(positions: range) -> torch.Tensor:
        return convert(torch.stack([inputs[index] for index in chosen[positions.start : positions.stop]]))

    labels = found.labels.cpu()[chosen] if found.labels is not None else None
    return Samples(len(chosen), inputs[0].numel(), make, (*said, *limited), _at_once(checkpoint)), labels


def _conversion(
    inputs: torch.Tensor, example: torch.Tensor, checkpoint: Checkpoint, wishes: Wishes
) -> tuple[Callable[[torch.Tensor], torch.Tensor], list[str]]:
    """Return what makes inputs of a part of the tensor, and what to say of it."""
    if inputs.dtype == torch.uint8 and example.is_floating_point() and example.dim() == 4:
        permute, said = laid_out(tuple(inputs.shape), example.shape[1])
        preset, origin = preset_for(checkpoint, example.shape[1], wishes)
        notes = [f"the data is uint8, {said}: {preset.normalisation()} ({origin})"]
        return (lambda part: normalised(permute(part), preset, example.dtype)), notes
    if wishes.normalises:
        what = f"--mean and --std are for images and uint8, and the data is {_name(inputs.dtype)}."
        raise RepfuseError(what, "It is taken as the network's input as it is.", "Leave them out.")
    if inputs.dtype == example.dtype or not (inputs.is_floating_point() and example.is_floating_point()):
        return (lambda part: part), []
    names = f"the data is {_name(inputs.dtype)} and the network takes {_name(example.dtype)}: it was cast"
    return (lambda part: part.to(example.dtype)), [names]


def _labels(folder: Folder, checkpoint: Checkpoint) -> tuple[torch.Tensor | None, str]:
    """Return the class of each image, where the folders say it, and what to say of that."""
    within = [folder.class_of(image) for image in folder.images]
    if None in within and folder.classes:
        return None, "no labels: some images are in no folder of the first level"
    classes, said = numbering(folder.classes, class_count(checkpoint.module, checkpoint.example_inputs))
    if classes is None:
        return None, said
    return torch.tensor([classes[name] for name in within if name is not None]), said


def _at_once(checkpoint: Checkpoint) -> int:
    """Return how many samples go into one call: those of the example, where a program is exported for no others."""
    if checkpoint.program is None:
        return CHUNK
    example = checkpoint.example_inputs[0]
    twice = (torch.cat([example, example]), *checkpoint.example_inputs[1:])
    return CHUNK if takes(checkpoint.module, twice) else len(example)


def _chosen(count: int, limit: int | None) -> tuple[list[int], list[str]]:
    """Return the positions of at most ``limit`` samples, evenly spaced, and what to say of that."""
    if limit is None or limit >= count:
        return list(range(count)), []
    return [index * count // limit for index in range(limit)], [f"{limit} of {count} samples, evenly spaced"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
