"""Found data + the network that it is for -> samples as that network takes them, made batch by batch, and labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from repfuse.checking.agreement import CHUNK, Samples, class_count
from repfuse.checking.runs import takes
from repfuse.data.finding import Arrays, Folder, numbering
from repfuse.data.images import MODES, Numbers, Preset, by_pillow, known, normalised, read_image
from repfuse.errors import RepfuseError
from repfuse.wording import dtype_name

if TYPE_CHECKING:
    from repfuse.loading import Checkpoint

FORM = "Write numbers with commas between them, one per channel or one for all: --mean 0.485,0.456,0.406"
UNKNOWN = "the network does not say how images become its inputs"
Prepared = tuple[Samples, torch.Tensor | None]


@dataclass(frozen=True)
class Wishes:
    """``mean`` and ``std`` per channel (or one for all), for pixels in 0..1; at most ``limit`` samples.

    Raises RepfuseError where a number cannot be meant.
    """

    mean: Numbers | None = None
    std: Numbers | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.mean and max(self.mean) > 1:
            what, why = f"A mean of {max(self.mean):g} is beyond the pixels.", "They are scaled to 0..1 first."
            raise RepfuseError(what, why, "Divide the mean and the standard deviation by 255.")
        if self.std and min(self.std) <= 0:
            raise RepfuseError("A standard deviation must be above 0.", "", FORM.replace("mean", "std"))
        if self.limit is not None and self.limit < 1:
            raise RepfuseError("The limit of samples must be at least 1.", "", "Leave --limit out to take all.")


def parse_numbers(text: str | None) -> Numbers | None:
    """Return the numbers in ``0.485,0.456,0.406``. Raises RepfuseError where it is another text."""
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise RepfuseError(f"{text!r} is no list of numbers.", "", FORM) from error
    if not all(map(math.isfinite, numbers)):
        raise RepfuseError(f"{text!r} holds a number that is not finite.", "", FORM)
    return numbers


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
    shape = example.shape[1:]
    if example.dim() != 4 or shape[0] not in MODES or not example.is_floating_point():
        what = f"Images are no input for this network: it takes {'x'.join(map(str, example.shape))} of {example.dtype}."
        raise RepfuseError(what, "Images give Nx1xHxW or Nx3xHxW.", "Give tensors in a .safetensors, .npz or .pt file.")
    channels, found = shape[0], known(checkpoint)
    mean, std, said = _normalisation(found, channels, wishes)
    preparing = (found.preparing if found else by_pillow)((shape[1], shape[2]), mean, std)
    labels, about = _labels(folder, checkpoint)
    chosen, limited = _chosen(len(folder.images), wishes.limit)

    def make(positions: range) -> torch.Tensor:
        paths = [folder.images[index] for index in chosen[positions.start : positions.stop]]
        return torch.stack([read_image(path, channels, preparing) for path in paths]).to(example.dtype)

    notes = (*folder.notes, f"images {preparing.geometry}, {said}", about, *limited)
    names = [str(folder.images[index].relative_to(folder.path)) for index in chosen]
    samples = Samples(len(chosen), math.prod(shape), make, notes, _at_once(checkpoint), names)
    return samples, labels[chosen] if labels is not None else None


def _of_arrays(found: Arrays, checkpoint: Checkpoint, wishes: Wishes) -> Prepared:
    example, inputs = checkpoint.example_inputs[0], found.inputs
    chosen, limited = _chosen(len(inputs), wishes.limit)
    convert, said = _conversion(inputs, example, checkpoint, wishes)

    def make(positions: range) -> torch.Tensor:
        return convert(torch.stack([inputs[index] for index in chosen[positions.start : positions.stop]]))

    labels = found.labels.cpu()[chosen] if found.labels is not None else None
    names = list(map(str, chosen))
    return Samples(len(chosen), inputs[0].numel(), make, (*said, *limited), _at_once(checkpoint), names), labels


def _conversion(
    inputs: torch.Tensor, example: torch.Tensor, checkpoint: Checkpoint, wishes: Wishes
) -> tuple[Callable[[torch.Tensor], torch.Tensor], list[str]]:
    """Return what makes inputs of a part of the tensor, and what to say of it."""
    if inputs.dtype == torch.uint8 and example.is_floating_point() and example.dim() == 4:
        permute, lies = laid_out(tuple(inputs.shape), example.shape[1])
        mean, std, said = _normalisation(known(checkpoint), example.shape[1], wishes)
        notes = [f"the data is uint8, {lies}: {said}"]
        return (lambda part: normalised(permute(part), mean, std, example.dtype)), notes
    if wishes.mean or wishes.std:
        what = f"--mean and --std are for images and uint8, and the data is {dtype_name(inputs.dtype)}."
        raise RepfuseError(what, "It is taken as the network's input as it is.", "Leave them out.")
    if inputs.dtype == example.dtype or not (inputs.is_floating_point() and example.is_floating_point()):
        return (lambda part: part), []
    names = f"the data is {dtype_name(inputs.dtype)} and the network takes {dtype_name(example.dtype)}: it was cast"
    return (lambda part: part.to(example.dtype)), [names]


def laid_out(shape: tuple[int, ...], channels: int) -> tuple[Callable[[torch.Tensor], torch.Tensor], str]:
    """Return what makes ``[N, C, H, W]`` of a batch of uint8 images, and in words how they lie.

    Where both readings are possible, the channels come first. Raises RepfuseError where neither is.
    """
    if len(shape) == 4 and shape[1] == channels:
        return (lambda x: x), "samples x channels x height x width"
    if len(shape) == 4 and shape[3] == channels:
        return (lambda x: x.permute(0, 3, 1, 2)), "samples x height x width x channels"
    if len(shape) == 3 and channels == 1:
        return (lambda x: x.unsqueeze(1)), "samples x height x width"
    sizes = "x".join(map(str, shape))
    what = f"The data is {sizes} of uint8, and the network takes images of {channels} channels."
    hint = f"Give Nx{channels}xHxW or NxHxWx{channels}."
    raise RepfuseError(what, "None of its axes can be the channels.", hint)


def _normalisation(found: Preset | None, channels: int, wishes: Wishes) -> tuple[Numbers, Numbers, str]:
    """Return a mean and a standard deviation for each channel, and what to say of these and of who gave them.

    Raises RepfuseError where the user gives numbers for other channels, or only half of what is needed.
    """
    if found and len(found.mean) in (1, channels):
        mean, std, said = found.mean, found.std, f"as {found.origin} says"
    elif (wishes.mean is None) != (wishes.std is None):
        raise RepfuseError("--mean and --std are needed together.", "The network itself says neither.", FORM)
    else:
        why = f"{found.origin} is for {len(found.mean)} channels" if found else UNKNOWN
        mean, std, said = (0.0,), (1.0,), f"{why}; --mean and --std do"
    if given := [name for name, numbers in (("--mean", wishes.mean), ("--std", wishes.std)) if numbers]:
        said = f"{' and '.join(given)} as given"
    mean, std = _each(wishes.mean or mean, channels), _each(wishes.std or std, channels)
    if any(mean) or set(std) != {1.0}:
        means, stds = (", ".join(f"{value:g}" for value in values) for values in (mean, std))
        return mean, std, f"pixels in 0..1, mean {means}, std {stds} ({said})"
    return mean, std, f"pixels in 0..1 ({said})"


def _each(numbers: Numbers, channels: int) -> Numbers:
    if len(numbers) not in (1, channels):
        raise RepfuseError(f"--mean and --std do not have one number for each of the {channels} channels.", "", FORM)
    return numbers if len(numbers) == channels else numbers * channels


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
