"""A snapshot folder of the Hugging Face hub for timm: config.json says how the network is built.

The file is data of strangers. It chooses one of timm's networks by name, and arguments within bounds; nothing in it is
run, fetched or opened. `hf-hub:USER/NAME` is such a folder, which the hub's own library fetches where the user says so;
it keeps what it fetches, and works offline from that (HF_HUB_OFFLINE=1).
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from repfuse.checkpoint.build import FETCHING, library, timm_defaults
from repfuse.checkpoint.json_file import read_json
from repfuse.checkpoint.opening import Opened, open_checkpoint
from repfuse.checkpoint.recipe import Recipe
from repfuse.checkpoint.recognise import CONFIG
from repfuse.checkpoint.safetensors_file import weight_map
from repfuse.checkpoint.source import ModelSource
from repfuse.checkpoint.user_code import Named
from repfuse.errors import RepfuseError
from repfuse.wording import described, first_line

INDEX = "model.safetensors.index.json"
WEIGHT_FILES = ("model.safetensors", INDEX, "pytorch_model.bin")  # the safe format first
LARGEST_FILE = 4 << 20  # bytes
ARCHITECTURE = re.compile(r"\w{1,100}(\.\w{1,100})?")
LARGEST = 1_000_000  # a number of classes, channels or pixels beyond this is a mistake or an attack
ARGUMENT = 100_000  # other numbers count blocks and channels
DEEPEST = 4  # lists in the arguments
RESERVED = {*FETCHING, "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only", "model_name"}
HUB_NAME = re.compile(r"hf-hub:(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")


def open_snapshot(folder: Path, weights: str = "auto", *, trust: Named | None = None, built: bool = False) -> Opened:
    """Read the weights in ``folder``, with the recipe that its configuration gives; ``built``: by --model instead.

    Raises RepfuseError where the configuration is none of timm's, or where there are no weights.
    """
    recipe = None if built else recipe_of(folder / CONFIG)
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            opened = open_checkpoint(folder / name, weights, trust=trust)
            return opened if built or opened.recipe else replace(opened, recipe=recipe)
    raise RepfuseError(
        f"{folder} has a {CONFIG} and no weights.",
        f"It has none of {', '.join(WEIGHT_FILES)}.",
        "Give the file itself.",
    )


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
    pretrained = config.get("pretrained_cfg", config)
    if not isinstance(pretrained, dict):
        raise _odd(path, "pretrained_cfg", pretrained)
    arguments = _arguments(path, config, pretrained, known)
    size = _input_size(path, pretrained, arguments)
    return Recipe(ModelSource(f"timm:{name}", arguments), "x".join(map(str, (1, *size))) if size else "", ())


def _arguments(path: Path, config: dict[str, Any], pretrained: dict[str, Any], known: Any) -> dict[str, Any]:
    """Return what timm itself would take from the configuration: what differs from its defaults, then model_args."""
    arguments: dict[str, Any] = {}
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
    if not isinstance(given, dict):
        raise _odd(path, "model_args", given)
    for key, value in given.items():
        if not key.isidentifier() or key in RESERVED:
            raise _odd(path, "model_args", key)
        arguments[key] = _plain(path, key, value)
    return arguments


def _input_size(path: Path, pretrained: dict[str, Any], arguments: dict[str, Any]) -> tuple[int, ...] | None:
    if pretrained.get("input_size") is None:
        return None
    channels, *pixels = _sizes(path, "input_size", pretrained["input_size"], 3)
    image = arguments.get("img_size", pixels)
    pixels = [image, image] if isinstance(image, int) else _sizes(path, "img_size", image, 2)
    return (_number(path, "in_chans", arguments.get("in_chans", channels)), *pixels)


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
    if type(value) is not int or not least <= value <= LARGEST:
        raise _odd(path, name, value)
    return value


def _sizes(path: Path, name: str, value: Any, count: int) -> list[int]:
    if not isinstance(value, list) or len(value) != count:
        raise _odd(path, name, value)
    return [_number(path, name, size) for size in value]


def _plain(path: Path, name: str, value: Any, depth: int = 0) -> Any:
    """Return ``value`` where it is a number within bounds, a short text, or a short list of these."""
    if isinstance(value, list) and len(value) <= 100 and depth < DEEPEST:
        return [_plain(path, name, item, depth + 1) for item in value]
    if value is None or isinstance(value, bool) or (isinstance(value, str) and len(value) <= 100):
        return value
    if isinstance(value, (int, float)) and abs(value) <= ARGUMENT:
        return value
    raise _odd(path, name, value)


def _odd(path: Path, name: str, value: Any) -> RepfuseError:
    return RepfuseError(
        f"{path} has an odd {name}.",
        f"It is {str(value)[:100]!r}.",
        "If you trust it, give the weights file itself, with --model and --model-arg.",
    )


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
