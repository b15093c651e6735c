"""What a checkpoint knows of how its images were prepared, from the most to the least specific source."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repfuse.checkpoint.json_file import read_json
from repfuse.checkpoint.snapshot import CONFIG, LARGEST_FILE, WEIGHTS
from repfuse.data.configurations import of_processor, of_timm, of_torchvision
from repfuse.data.preset import Preset
from repfuse.data.wishes import FORM, Wishes
from repfuse.errors import RepfuseError

if TYPE_CHECKING:
    from repfuse.loading import Checkpoint

UNKNOWN = "the network does not say how images become its inputs"
PROCESSOR = "preprocessor_config.json"


def preset_for(checkpoint: Checkpoint, channels: int, wishes: Wishes) -> tuple[Preset, str]:
    """Return how images are prepared, with a number for each channel, and who says so.

    Raises RepfuseError where the user gives numbers for other channels, or only half of what is needed.
    """
    found = known(checkpoint)
    told = found.per_channel(channels) if found else None
    base = told or (found or Preset("nothing")).unnormalised(channels)
    if wishes.normalises:
        return _as_wished(base, wishes, channels, told is not None)
    if told:
        return told, f"as {told.origin} says"
    unknown = f"{found.origin} is for {len(found.mean)} channels" if found else UNKNOWN
    return base, f"{unknown}; --mean and --std do"


def _as_wished(base: Preset, wishes: Wishes, channels: int, told: bool) -> tuple[Preset, str]:
    if not told and not (wishes.mean and wishes.std):
        raise RepfuseError("--mean and --std are needed together.", "The network itself says neither.", FORM)
    preset = base.with_numbers(wishes.mean, wishes.std).per_channel(channels)
    if preset is None:
        what = f"--mean and --std do not have one number for each of the {channels} channels."
        raise RepfuseError(what, "", FORM)
    given = [name for name, numbers in (("--mean", wishes.mean), ("--std", wishes.std)) if numbers]
    return preset, f"{' and '.join(given)} as given"


def known(checkpoint: Checkpoint) -> Preset | None:
    """Return how images are prepared for the network of ``checkpoint``; None where nothing that it has says it.

    A snapshot of the Hugging Face hub says it in its configuration; a network of timm carries what it was published
    with; for one of torchvision it is that of its usual weights. What makes no sense is no answer.
    """
    return next((preset for preset in _candidates(checkpoint) if preset), None)


def _candidates(checkpoint: Checkpoint) -> Iterator[Preset | None]:
    if checkpoint.path.name in WEIGHTS:
        config = _json(checkpoint.path.with_name(CONFIG))
        yield of_timm(config.get("pretrained_cfg", config), CONFIG)
        yield of_processor(_json(checkpoint.path.with_name(PROCESSOR)), PROCESSOR)
    yield of_timm(vars(checkpoint.module).get("pretrained_cfg"), "timm's configuration of the network")
    if checkpoint.source is not None and checkpoint.source.kind == "torchvision":
        yield _of_weights(checkpoint.source.parts[1])


def _json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path, LARGEST_FILE)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _of_weights(name: str) -> Preset | None:
    """Return what torchvision's usual weights of a network are evaluated with. Nothing is fetched."""
    models = importlib.import_module("torchvision.models")
    try:
        weights = models.get_model_weights(name).DEFAULT
    except (ValueError, AttributeError):  # a network without any
        return None
    return of_torchvision(weights.transforms(), f"torchvision's {weights}")
