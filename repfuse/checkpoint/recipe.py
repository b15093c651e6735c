"""The recipe: what a fused state dict carries so that its network can be built again.

It is JSON text: in a safetensors file under the metadata key ``repfuse``, in a torch file as the attribute ``repfuse``
of the state dict, where torch.load keeps it and load_state_dict(strict=True) does not see it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from repfuse.checkpoint.allow import NotAllowedError, resolve
from repfuse.checkpoint.inert import GlobalName
from repfuse.checkpoint.json_file import parse_json
from repfuse.checkpoint.source import ModelSource, as_texts, model_source
from repfuse.errors import RepfuseError
from repfuse.plans import Plan
from repfuse.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from repfuse.checkpoint.user_code import Named

SCHEMA = 1


@dataclass(frozen=True)
class Recipe:
    """Build ``source``, apply each of ``plans`` in turn, load the weights; ``input`` is an example's shape.

    Where no source is known that the file could name, its user says how the network is built; ``made_of`` is the spec
    of the class that it had.
    """

    source: ModelSource | None
    input: str
    plans: tuple[Plan, ...]
    made_of: str = ""

    def to_text(self) -> str:
        """Return the recipe as JSON."""
        data = {
            "repfuse": __version__,
            "schema": SCHEMA,
            "model": self.source.spec if self.source else None,
            "model_args": as_texts(self.source) if self.source else [],
            "made_of": self.made_of,
            "input": self.input,
            "plans": [replace(plan, refusals=()).to_dict() for plan in self.plans],
        }
        return json.dumps(data, separators=(",", ":"))


def read_recipe(text: Any, path: Path) -> Recipe:
    """Return the recipe that ``text`` holds. Raises RepfuseError where it is not one of this schema."""
    try:
        data = parse_json(text)
        if data["schema"] != SCHEMA:
            raise RepfuseError(
                f"{path} was fused by repfuse {data['repfuse']}, whose recipe this version does not read.",
                f"It has schema {data['schema']}, not {SCHEMA}.",
                "Install that version of repfuse, or convert the original checkpoint again.",
            )
        arguments = [str(argument) for argument in data["model_args"]]
        source = None if data["model"] is None else model_source(str(data["model"]), arguments)
        plans = tuple(Plan.from_dict(plan) for plan in data["plans"])
        return Recipe(source, str(data["input"]), plans, str(data.get("made_of", "")))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RepfuseError(
            f"{path} has a damaged recipe for its network.",
            f"{type(error).__name__}: {error}",
            "Convert the original checkpoint again.",
        ) from error


def check_buildable(source: ModelSource, path: Path | str, named: Named) -> None:
    """Raise RepfuseError where building ``source`` would run code merely because a file, at ``path``, names it.

    The model libraries build by name alone; of the packages that may give classes, a class of networks will do.
    """
    where, name = source.parts
    if source.kind in ("timm", "torchvision"):
        return
    try:
        if source.kind == "import" and issubclass(resolve(GlobalName(where, name), named), nn.Module):
            return
    except NotAllowedError:
        pass
    raise RepfuseError(
        f"{path} says that {source} builds its network, which means running that code.",
        "repfuse runs no code because a file names it.",
        f"If that is the right code, say so: {source.options}",
    )


def is_buildable(source: ModelSource, path: Path | str, named: Named) -> bool:
    """Whether a file may name what builds its network without being trusted."""
    try:
        check_buildable(source, path, named)
    except RepfuseError:
        return False
    return True
