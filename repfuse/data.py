"""Real inputs for `repfuse verify --data`: tensors in a file, or a folder of images. Reading runs no code from a file.

``read_data`` finds them before any network is loaded; ``prepare`` makes what a network takes of them, batch by batch.

Of a folder of images: which files count, which folder each is in, and which class that stands for. It finds what
torchvision's ImageFolder finds, also without folders of classes, and says what ImageFolder passes over: other files and
folders that cannot be read. Folders named by numbers are the classes of these numbers; others count from 0 in the order
of their names as text, as ImageFolder counts, where there are as many folders as classes.

Images are prepared as timm and torchvision prepare those of their networks, or by Pillow alone. Configurations may be
strangers' data: every number is checked, none is believed. So may images: decoding is bounded.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import torch
from safetensors.torch import load_file

from repfuse.checking.agreement import CHUNK, Samples, class_count
from repfuse.checking.runs import takes
from repfuse.checkpoint import torch_pickle
from repfuse.checkpoint.build import library
from repfuse.checkpoint.formats import CONFIG, recognise
from repfuse.checkpoint.opening import WEIGHT_FILES, configuration
from repfuse.errors import RepfuseError, failing_as
from repfuse.networks import dense
from repfuse.wording import dtype_name, first_line, listed

if TYPE_CHECKING:
    from PIL.Image import Image

    from repfuse.loading import Checkpoint

INPUTS = ("inputs", "images", "x")
LABELS = ("labels", "targets", "y")
LAYOUT = (
    f"Save a dict with a tensor under {', '.join(map(repr, INPUTS))} and, if known, one class number per sample "
    f"under {', '.join(map(repr, LABELS))}."
)


SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # those of ImageFolder


class Arrays(NamedTuple):
    """``inputs`` [samples, ...] for the network's first argument; ``labels`` [samples] integer classes, if any."""

    inputs: torch.Tensor
    labels: torch.Tensor | None


class Folder(NamedTuple):
    """The images below ``path``, sorted. ``classes`` are all folders of the first level, sorted by name as text.

    ``notes`` say what else was found there.
    """

    path: Path
    images: tuple[Path, ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def class_of(self, image: Path) -> str | None:
        """Return the folder of the first level that the image is in; None where it is in none."""
        parts = image.relative_to(self.path).parts
        return parts[0] if len(parts) > 1 else None


def pillow() -> Any:
    """Return the package PIL. Raises RepfuseError where Pillow is not installed."""
    library("PIL.ImageOps", "images")
    return library("PIL", "images")


def read_data(path: Path) -> Arrays | Folder:
    """Return what is at ``path``: the tensors of a file, or the names of a folder's images.

    Raises RepfuseError where it is neither, is damaged, or holds no inputs or labels that do not match them.
    """
    if path.is_dir():
        return read_folder(path)
    if not path.is_file():
        raise RepfuseError(f"There is no data at {path}.", hint="Check the path given with --data.")
    tensors = _tensors(path)
    inputs, labels = _find(tensors, INPUTS), _find(tensors, LABELS)
    if inputs is None:
        held = ", ".join(map(str, tensors)) or "nothing"
        raise RepfuseError(f"{path} holds no inputs.", f"It holds {held}.", LAYOUT)
    if not inputs.dim() or not len(inputs):
        raise RepfuseError(f"The inputs in {path} hold no samples.", f"Their shape is {list(inputs.shape)}.", LAYOUT)
    if labels is not None and labels.shape != inputs.shape[:1]:
        shapes = f"There are {len(inputs)} inputs, and the labels have shape {list(labels.shape)}."
        raise RepfuseError(f"The labels in {path} do not match the inputs.", shapes, LAYOUT)
    return Arrays(dense(inputs), labels if labels is None or labels.is_floating_point() else labels.to(torch.int64))


def _read_npz(path: Path) -> dict[str, torch.Tensor]:
    torch_pickle.check_unpacked(path, torch_pickle.room_for(path.stat().st_size))
    with np.load(path, allow_pickle=False) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files if name in INPUTS + LABELS}


READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": load_file,
    ".npz": _read_npz,
    **dict.fromkeys((".pt", ".pth"), lambda path: torch_pickle.read(path, recognise(path))),
}


def _tensors(path: Path) -> Mapping[str, Any]:
    if path.suffix not in READERS:
        raise RepfuseError(
            f"Data in {path.suffix or 'a file without a suffix'} cannot be read.",
            f"The readable kinds are {', '.join(READERS)} and folders of images.",
            LAYOUT,
        )
    try:
        found = READERS[path.suffix](path)
    except RepfuseError as error:  # of the reader of checkpoints
        raise RepfuseError(f"The data in {path} cannot be read.", f"{error.what} {error.why}", error.hint) from error
    except Exception as error:  # a damaged file can make its reader fail in any way
        raise RepfuseError(f"The data in {path} cannot be read.", first_line(error), LAYOUT) from error
    found = {INPUTS[0]: found} if isinstance(found, torch.Tensor) else found
    if not isinstance(found, Mapping):
        raise RepfuseError(f"{path} holds a {type(found).__name__}, no dict of tensors.", "", LAYOUT)
    return found


def _find(tensors: Mapping[str, Any], names: tuple[str, ...]) -> torch.Tensor | None:
    return next((tensors[name] for name in names if isinstance(tensors.get(name), torch.Tensor)), None)


def read_folder(path: Path) -> Folder:
    """Return the images in ``path`` and in the folders below it. Hidden files and folders do not count.

    Raises RepfuseError where there are none, a folder cannot be read, or Pillow is missing.
    """
    pillow()
    walked = list(_walk(path))
    files = sorted(file for _, files in walked for file in files)
    images = tuple(file for file in files if file.suffix.lower() in SUFFIXES)
    others = Counter(file.suffix or file.name for file in files if file.suffix.lower() not in SUFFIXES)
    if not images:
        held = f"It holds files with {listed(others)}." if others else "It holds no files."
        hint = f"Give a folder with {', '.join(SUFFIXES)} files, or a .safetensors, .npz or .pt file."
        raise RepfuseError(f"There are no images in {path}.", held, hint)
    left = (f"left out {others.total()} files that are no images by their suffix: {listed(others)}",) if others else ()
    return Folder(path, images, tuple(sorted(walked[0][0])), left)


def _walk(root: Path) -> Iterator[tuple[list[str], list[Path]]]:
    """Yield the folders and files in ``root`` and below, also through links, but never into a folder from within."""
    for name, folders, files in os.walk(root, onerror=_unreadable, followlinks=True):
        folder = Path(name)
        around = {parent.resolve() for parent in (folder / "file").absolute().parents}
        inside = [inner for inner in folders if (folder / inner).resolve() not in around]
        folders[:] = [inner for inner in inside if not inner.startswith(".")]
        found = [folder / file for file in files if not file.startswith(".")]
        yield list(folders), [file for file in found if file.is_file() or not file.exists()]  # a pipe would wait


def _unreadable(error: OSError) -> NoReturn:
    why = error.strerror or str(error)
    raise RepfuseError(f"The folder {error.filename} cannot be read.", why, "Check its permissions.") from error


def numbering(folders: Sequence[str], classes: int | None) -> tuple[dict[str, int] | None, str]:
    """Return the class of each folder, or None, and what to say of it. ``folders`` are sorted as text."""
    if classes is None:
        return None, "no labels: the network's first output is no table of classes"
    if not folders:
        return None, "no labels: the images are in no folders named by their classes"
    in_order = {folder: index for index, folder in enumerate(folders)}
    numbers = {folder: int(folder) for folder in folders if folder.isascii() and folder.isdecimal()}
    values = list(numbers.values())
    if len(numbers) == len(folders) and len(set(values)) == len(values) and max(values) < classes:
        other = len(values) == classes and numbers != in_order
        doubt = "; torchvision's ImageFolder would count them otherwise, in the order of their names as text"
        return numbers, "labels: the numbers that the folders are named by" + (doubt if other else "")
    if len(numbers) == len(folders) and values != sorted(set(values)):
        return None, f"no labels: the numbers that the folders are named by are not the classes, 0 to {classes - 1}"
    if len(folders) == classes:
        return in_order, f"labels: the {classes} folders in the order of their names"
    count = "1 folder" if len(folders) == 1 else f"{len(folders)} folders"
    return None, f"no labels: {count} for a network of {classes} classes"


# What was found, as a network takes it.

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


# How an image becomes a network's input.

Numbers = tuple[float, ...]
Size = tuple[int, int]  # height and width
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")  # Pillow hands others to programs: EPS to Ghostscript
MODES = {1: "L", 3: "RGB"}
DEEP = ("I", "F")  # modes of more than 8 bits begin so: conversion to 8 bits cuts them off
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")  # of timm's, all but a random one
COVERING = "to cover"
FITTING = {"border": "to fit within", "squash": "to"}  # timm's other crop modes
PER_CHANNEL = 16  # numbers at most
ENLARGED = 4.0  # the largest ratio, either way, of the resized image to the crop: more is a mistake or an attack


class Preparing(NamedTuple):
    """``transform`` makes ``[C, H, W]`` of an image; ``geometry`` says how it is resized and cut for that."""

    transform: Callable[[Image], torch.Tensor]
    geometry: str


@dataclass(frozen=True)
class Preset:
    """``origin`` says who prepares images so: ``mean`` and ``std`` are per channel or one for all, for pixels in 0..1.

    ``preparing`` makes what prepares them, from the size of the input and a mean and a deviation for each channel.
    """

    origin: str
    mean: Numbers
    std: Numbers
    preparing: Callable[[Size, Numbers, Numbers], Preparing]


def read_image(path: Path, channels: int, preparing: Preparing) -> torch.Tensor:
    """Return the image at ``path``, prepared.

    As timm and torchvision do, it leaves out transparency and takes no notice of a rotation that the file asks for.
    Raises RepfuseError, which names the file, where it is damaged, none of FORMATS, or far too large.
    """
    hint = "Mend it or move it away: repfuse leaves out no image silently."
    with failing_as(f"The image {path} cannot be read.", hint):  # a damaged file can make its decoder fail in any way
        return preparing.transform(_decoded(path, MODES[channels]))


def _decoded(path: Path, mode: str) -> Image:
    pil = pillow().Image
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", pil.DecompressionBombWarning)
        with pil.open(path, formats=FORMATS) as image:
            if image.mode.startswith(DEEP):
                raise ValueError(f"it has more than 8 bits per pixel (mode {image.mode}): give tensors instead")
            return image.convert(mode)  # type: ignore[no-any-return]


def normalised(pixels: torch.Tensor, mean: Numbers, std: Numbers, dtype: torch.dtype) -> torch.Tensor:
    """Return (pixels / 255 - mean) / std for uint8 ``[..., C, H, W]``; computed in float32, or ``dtype`` if wider."""
    wide = torch.promote_types(dtype, torch.float32)
    means, stds = (torch.tensor(values, dtype=wide).reshape(-1, 1, 1) for values in (mean, std))
    return pixels.to(wide).div_(255).sub_(means).div_(stds).to(dtype)


def by_pillow(size: Size, mean: Numbers, std: Numbers) -> Preparing:
    """Return what prepares images where nothing more is known: they cover the input, and are cut at the centre."""
    pil = pillow()

    def transform(image: Image) -> torch.Tensor:
        fitted = pil.ImageOps.fit(image, size[::-1], pil.Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(fitted)).reshape(*size, len(mean)).permute(2, 0, 1)
        return normalised(pixels, mean, std, torch.float32)

    return Preparing(transform, _geometry(COVERING, size, "bilinear", size))


def of_timm(config: Any, origin: str) -> Preset | None:
    """Return how timm prepares images for ``config``, a ``pretrained_cfg``; None where it gives no sound numbers."""
    if not isinstance(config, dict):
        return None
    mean, std, crop = config.get("mean", ()), config.get("std", ()), config.get("crop_pct")
    lists = all(isinstance(each, list | tuple) and all(map(_number, each)) for each in (mean, std))
    if not lists or not 0 < len(mean) == len(std) <= PER_CHANNEL or min(std) <= 0:
        return None
    if crop is not None and not (_number(crop) and 1 / ENLARGED <= crop <= ENLARGED):
        return None
    if config.get("interpolation") not in (None, *INTERPOLATIONS):
        return None
    return Preset(origin, tuple(mean), tuple(std), partial(_by_timm, config))


def _by_timm(config: dict[str, Any], size: Size, mean: Numbers, std: Numbers) -> Preparing:
    try:
        data = library("timm").data
    except RepfuseError as error:
        plain = by_pillow(size, mean, std)
        return plain._replace(geometry=f"{plain.geometry} and not as timm would ({error.what.rstrip('.')})")
    told = {"input_size": (len(mean), *size), "mean": mean, "std": std}
    resolved = data.resolve_data_config(told, pretrained_cfg=config)
    scaled = (math.floor(size[0] / resolved["crop_pct"]), math.floor(size[1] / resolved["crop_pct"]))
    fitting = FITTING.get(str(resolved["crop_mode"]), COVERING)
    said = _geometry(fitting, scaled, resolved["interpolation"], size)
    return Preparing(data.create_transform(**resolved), said)


def of_torchvision(name: str) -> Preset | None:
    """Return how images are prepared for the usual weights of the network ``name``; None where they are only scaled."""
    try:
        weights = library("torchvision").models.get_model_weights(name).DEFAULT
    except (ValueError, AttributeError):  # a network without any
        return None
    usual = weights.transforms()
    if not all(isinstance(getattr(usual, name, None), list) for name in ("mean", "std", "resize_size")):
        return None
    return Preset(f"torchvision's {weights}", tuple(usual.mean), tuple(usual.std), partial(_by_torchvision, weights))


def _by_torchvision(weights: Any, size: Size, mean: Numbers, std: Numbers) -> Preparing:
    """For an input of another size, what is resized keeps its ratio to what is cropped, if anything is."""
    usual, edge = weights.transforms(), max(size)
    crops = hasattr(usual, "crop_size")
    resized = edge * usual.resize_size[0] // usual.crop_size[0] if crops else edge
    told = {"mean": mean, "std": std, "resize_size": resized} | ({"crop_size": edge} if crops else {})
    transforms = library("torchvision").transforms
    whole = transforms.Compose([weights.transforms(**told), transforms.CenterCrop(size)])
    return Preparing(whole, _geometry(COVERING, (resized, resized), usual.interpolation.value, size))


def _geometry(fitting: str, scaled: Size, interpolation: str, size: Size) -> str:
    return f"resized {fitting} {scaled[0]}x{scaled[1]} ({interpolation}), {size[0]}x{size[1]} at the centre"


def known(checkpoint: Checkpoint) -> Preset | None:
    """Return how images are prepared for the network of ``checkpoint``; None where nothing that it has says it.

    A snapshot of the Hugging Face hub says it in its configuration; a network of timm carries what it was published
    with; for one of torchvision it is that of its usual weights. What makes no sense is no answer.
    """
    found, source = None, checkpoint.source
    if checkpoint.path.name in WEIGHT_FILES:
        with suppress(RepfuseError):
            config = configuration(checkpoint.path.with_name(CONFIG))
            found = of_timm(config.get("pretrained_cfg", config), CONFIG)
    published = vars(checkpoint.module).get("pretrained_cfg")
    found = found or of_timm(published, "timm's configuration of the network")
    usual = source.parts[1] if source is not None and source.kind == "torchvision" else ""
    return found or (of_torchvision(usual) if usual else None)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e6
