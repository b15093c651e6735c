"""From a file, a folder or a name of the hub to what it holds: one way in for every format.

A snapshot folder of the Hugging Face hub for timm says in config.json how its network is built. That is data of
strangers: it chooses one of timm's networks by name, and arguments within bounds; nothing in it is run, fetched or
opened. `hf-hub:USER/NAME` is such a folder, which the hub's own library fetches where the user says so; it keeps what
it fetches, and works offline from that (HF_HUB_OFFLINE=1).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from repfuse.checkpoint import safetensors_file, torch_pickle
from repfuse.checkpoint.build import FETCHING, Recipe, library, read_recipe, timm_defaults
from repfuse.checkpoint.contents import RECIPE, Contents, find
from repfuse.checkpoint.files import digest_of, read_json
from repfuse.checkpoint.formats import CONFIG, Container, is_hub_name, is_snapshot, reading, recognise
from repfuse.checkpoint.safetensors_file import weight_map
from repfuse.checkpoint.spec import ModelSource, Shape
from repfuse.checkpoint.user_code import Named
from repfuse.errors import RepfuseError, quietly
from repfuse.wording import described, first_line


@dataclass(frozen=True)
class Opened:
    """A file, read: ``format`` as repfuse names it, its digest, its network and recipe, and its text metadata.

    ``program`` is the exported program, where the file is one; ``files`` are those that were read besides. ``inputs``
    are the shapes that the file says its network takes; where it leaves sizes ``open``, other than the batch, they
    are a guess.
    """

    path: Path
    format: str
    digest: str
    contents: Contents
    recipe: Recipe | None
    metadata: dict[str, str] = field(default_factory=dict)
    program: torch.export.ExportedProgram | None = None
    files: tuple[Path, ...] = ()
    inputs: tuple[Shape, ...] = ()
    open: bool = False


def open_checkpoint(
    path: str | Path, weights: str, *, trust: Named | None, shapes: Sequence[Shape] | None, built: bool
) -> Opened:
    """Read what is at ``path``, and find the network in it that ``weights`` asks for (see contents.find).

    Without ``trust``, none of the file's code runs and modules stay records; with it, it says what the user named
    besides. ``shapes`` are those of the inputs, where they are known: TorchScript is read by running it. ``built``: it
    is known what builds the network. Raises RepfuseError where there is none, or none that may be read so.
    """
    if not is_hub_name(path) and not is_snapshot(Path(path)):
        return _open_file(Path(path), weights, trust, shapes)
    folder, revision = fetch(str(path)) if is_hub_name(path) else (Path(path), "")
    recipe = None if built else recipe_of(folder / CONFIG)
    file = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        why = f"It has none of {', '.join(WEIGHT_FILES)}."
        raise RepfuseError(f"{folder} has a {CONFIG} and no weights.", why, "Give the file itself.")
    opened = _open_file(file, weights, trust, None)
    said = (f"{path} is revision {revision} of the hub, kept in {folder}",) if revision else ()
    contents = replace(opened.contents, notes=(*said, ONE_FILE, *opened.contents.notes))
    return replace(opened, recipe=opened.recipe or recipe, contents=contents)


def _open_file(path: Path, weights: str, trust: Named | None, shapes: Sequence[Shape] | None) -> Opened:
    container = recognise(path)
    if container is Container.SHARDED:
        tensors, files = safetensors_file.read_shards(path)
        contents = find(OrderedDict(tensors), path, weights)
        return Opened(path, "safetensors", digest_of(*files), contents, None, files=files)
    if container is Container.ONNX:
        return _open_graph(path)
    digest = digest_of(path)
    if container is Container.SAFETENSORS:
        tensors, metadata = safetensors_file.read(path)
        contents, text = find(OrderedDict(tensors), path, weights), metadata.get(RECIPE)
        return Opened(path, "safetensors", digest, contents, read_recipe(text, path), metadata)
    if container in (Container.EXPORTED, Container.TORCHSCRIPT):
        from repfuse.checkpoint import exported, pt2_file  # torch.export takes a second to import

        if container is Container.EXPORTED:
            form, program = "pt2", pt2_file.read(path, trust=bool(trust))
        else:
            form, program = "torchscript", exported.read_torchscript(path, shapes, trust=bool(trust))
        return Opened(path, form, digest, Contents(module=exported.opened(program, path)), None, program=program)
    tree: Any = torch_pickle.read_trusted(path, container, trust) if trust else torch_pickle.read(path, container)
    contents = find(tree, path, weights)
    form = "state-dict" if contents.module is None else "pt"
    return Opened(path, form, digest, contents, read_recipe(contents.recipe, path))


def _open_graph(path: Path) -> Opened:
    from repfuse.checkpoint import onnx_file

    onnx_file.check_installed()
    from repfuse.checkpoint.onnx_graph.network import network_of  # onnx takes a second to import
    from repfuse.checkpoint.onnx_graph.reading import example_of, files_of, notes_on, read

    with reading(path, described), quietly():
        model = read(path)
        files, (inputs, is_open) = files_of(model, path), example_of(model)
        contents = Contents(module=network_of(model, path), notes=notes_on(model))
    return Opened(path, "onnx", digest_of(path, *files), contents, None, files=files, inputs=inputs, open=is_open)


ONE_FILE = "a fused network is no architecture of timm any more: what is written from this folder is one file"
INDEX = "model.safetensors.index.json"
WEIGHT_FILES = ("model.safetensors", INDEX, "pytorch_model.bin")  # the safe format first
LARGEST_FILE = 4 << 20  # bytes
ARCHITECTURE = re.compile(r"\w{1,100}(\.\w{1,100})?")
LARGEST = 1_000_000  # a number of classes, channels or pixels beyond this is a mistake or an attack
ARGUMENT = 100_000  # other numbers count blocks and channels
DEEPEST = 4  # lists in the arguments
RESERVED = {*FETCHING, "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only", "model_name"}
HUB_NAME = re.compile(r"hf-hub:(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")


def recipe_of(path: Path) -> Recipe:
    """Return how the network of the configuration at ``path`` is built. Raises RepfuseError where that is not said."""
    config = configuration(path)
    name = config.get("architecture")
    if not isinstance(name, str) or not ARCHITECTURE.fullmatch(name):
        kind = config.get("model_type") or config.get("architectures") or "nothing"
        raise RepfuseError(
            f"{path} does not name a network of timm.",
            f"It has no 'architecture'; of the model it says {str(kind)[:100]!r}.",
            "Say how to build the network: --model package.module:callable.",
        )
    known = timm_defaults(name)
    arguments, sizes = _arguments(path, config, known)
    return Recipe(ModelSource(f"timm:{name}", arguments), "x".join(map(str, sizes)), ())


def _arguments(path: Path, config: dict[str, Any], known: Any) -> tuple[dict[str, Any], list[int]]:
    """Return what timm itself would take from the configuration: what differs from its defaults, then model_args; and
    the sizes of an input, none where it does not say them.
    """
    arguments, pretrained = dict[str, Any](), config.get("pretrained_cfg", config)
    _require(isinstance(pretrained, dict), path, "pretrained_cfg", pretrained)
    classes = config.get("num_classes", pretrained.get("num_classes"))
    if classes is not None:
        arguments["num_classes"] = _number(path, "num_classes", classes, least=0)
    if pretrained.get("global_pool") is not None:  # of timm before 1.0
        arguments["global_pool"] = _plain(path, "global_pool", pretrained["global_pool"])
    size = pretrained.get("input_size")
    if size is not None:
        channels, *pixels = _sizes(path, "input_size", size, 3)
        arguments |= {"in_chans": channels} if channels != known.input_size[0] else {}
        if pretrained.get("fixed_input_size") is True and pixels != list(known.input_size[1:]):
            arguments["img_size"] = pixels
    given = config.get("model_args", {})
    _require(isinstance(given, dict), path, "model_args", given)
    for key, value in given.items():
        _require(key.isidentifier() and key not in RESERVED, path, "model_args", key)
        arguments[key] = _plain(path, key, value)
    if size is None:
        return arguments, []
    image = arguments.get("img_size", pixels)
    image = [image, image] if isinstance(image, int) else image
    channels = _number(path, "in_chans", arguments.get("in_chans", channels))
    return arguments, [1, channels, *_sizes(path, "img_size", image, 2)]


def configuration(path: Path) -> dict[str, Any]:
    """Return what a config.json says. Raises RepfuseError where it is none."""
    try:
        config = read_json(path, LARGEST_FILE)
        if isinstance(config, dict):
            return config
        why = "it is no JSON object"
    except (OSError, ValueError) as error:
        why = first_line(error)
    hint = "Fetch the folder again, or give the weights file itself, with --model."
    raise RepfuseError(f"{path} is no configuration.", f"{why}.", hint)


def _number(path: Path, name: str, value: Any, least: int = 1) -> int:
    _require(type(value) is int and least <= value <= LARGEST, path, name, value)
    return int(value)


def _sizes(path: Path, name: str, value: Any, count: int) -> list[int]:
    _require(isinstance(value, list) and len(value) == count, path, name, value)
    return [_number(path, name, size) for size in value]


def _plain(path: Path, name: str, value: Any, depth: int = 0) -> Any:
    """Return ``value`` where it is a number within bounds, a short text, or a short list of these."""
    if isinstance(value, list) and len(value) <= 100 and depth < DEEPEST:
        return [_plain(path, name, item, depth + 1) for item in value]
    if value is None or isinstance(value, bool) or (isinstance(value, str) and len(value) <= 100):
        return value
    _require(isinstance(value, (int, float)) and abs(value) <= ARGUMENT, path, name, value)
    return value


def _require(holds: bool, path: Path, name: str, value: Any) -> None:
    if not holds:
        hint = "If you trust it, give the weights file itself, with --model and --model-arg."
        raise RepfuseError(f"{path} has an odd {name}.", f"It is {str(value)[:100]!r}.", hint)


def fetch(name: str) -> tuple[Path, str]:
    """Return the folder that holds the snapshot ``name``, and its revision: from the cache, else fetched.

    Raises RepfuseError where the name is none, the library is missing, or nothing can be had.
    """
    match = HUB_NAME.fullmatch(name)
    if match is None:
        raise RepfuseError(
            f"{name!r} is no name of the hub.", "", "Write hf-hub:USER/NAME or hf-hub:USER/NAME@REVISION."
        )
    hub, revision = library("huggingface_hub", "hub"), match["revision"]
    library("huggingface_hub.errors", "hub")
    absent = hub.errors.EntryNotFoundError
    lacking = f"has no {CONFIG}"

    def get(file: str) -> Path:
        return Path(hub.hf_hub_download(match["repo"], file, revision=revision))

    try:
        folder = get(CONFIG).parent
        revision = folder.name  # all files of one revision
        lacking = f"has none of {', '.join(WEIGHT_FILES)}"
        for weights in WEIGHT_FILES[:-1]:
            with suppress(absent):
                found = get(weights)
                break
        else:
            found = get(WEIGHT_FILES[-1])
        for shard in sorted(set(weight_map(found).values())) if found.name == INDEX else ():
            lacking = f"lacks {shard}, which its index names"
            get(shard)
    except RepfuseError:
        raise
    except Exception as error:  # a network fails in many ways
        offline = isinstance(error, hub.errors.LocalEntryNotFoundError)
        why = "The hub cannot be reached, or offline mode is on, and the file is not in the cache."
        raise RepfuseError(
            f"{name} {lacking if isinstance(error, absent) else 'cannot be fetched'}.",
            why if offline else described(error),
            "Check the name and the network (for private models: `hf auth login`), or download the model's folder "
            "elsewhere and give that folder.",
        ) from error
    return folder, folder.name
