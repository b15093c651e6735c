"""Which classes a file may name without being trusted, and what to say of the others.

The rule: only classes, never functions; only nn.Module subclasses and enumerations; only from the packages below and
those that the user allows; and each must really be defined there. Nothing outside these packages is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import fx, nn

from repfuse.checkpoint.inert import GlobalName
from repfuse.errors import RepfuseError
from repfuse.wording import listed

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

KNOWN = (
    "torch.nn.modules",
    "torch.nn.parallel.data_parallel",
    "torchvision.models",
    "torchvision.ops",
    "timm.models",
    "timm.layers",
    "repfuse.samples",
)
NEVER = (torch.jit.ScriptModule, fx.GraphModule)  # they rebuild themselves from source text in the file
PARTIAL = GlobalName("functools", "partial")  # held to a rule of its own where it is built
NOT_DATA = "not a class of networks that can be restored from data alone"


class Need(NamedTuple):
    """A name that the file may not use: why, and which packages to allow (None where only trust helps)."""

    name: GlobalName
    why: str
    allow: str | None = None


class NotAllowedError(Exception):
    """Carries the Need of one name."""

    def __init__(self, need: Need) -> None:
        super().__init__(str(need.name))
        self.need = need


def resolve(name: GlobalName, allow: Collection[str]) -> type:
    """Return the class that ``name`` names. Raises NotAllowedError where the rule forbids it."""
    if not _inside(name.module, (*KNOWN, *allow)):
        raise NotAllowedError(_outside(name))
    try:
        found = vars(importlib.import_module(name.module)).get(name.name)
    except Exception as error:  # a package may fail to import in any way
        detail = f"{name.module} does not import: {type(error).__name__}: {error}"
        raise NotAllowedError(Need(name, detail)) from error
    if found is None:
        raise NotAllowedError(Need(name, f"{name.module} has no {name.name} in the version installed here"))
    if not _is_plain_class(found, allow):
        raise NotAllowedError(Need(name, NOT_DATA))
    return found  # type: ignore[no-any-return]


def check_all(path: Path, names: Iterable[GlobalName], allow: Collection[str]) -> dict[GlobalName, type]:
    """Return the class of each name. Raises one RepfuseError that lists every name that is not allowed."""
    names = set(names) - {PARTIAL}
    if needs := names_refused(names, allow):
        raise refusal(path, needs)
    return {name: resolve(name, allow) for name in names}


def names_refused(names: Iterable[GlobalName], allow: Collection[str]) -> list[Need]:
    """Return what is not allowed among ``names``."""
    needs = []
    for name in sorted(set(names) - {PARTIAL}):
        try:
            resolve(name, allow)
        except NotAllowedError as refused:
            needs.append(refused.need)
    return needs


def refusal(path: Path, needs: list[Need]) -> RepfuseError:
    """Return the error that lists what the file needs, and says which option would let it in."""
    by_reason: dict[str, list[str]] = {}
    for need in needs:
        by_reason.setdefault(need.why, []).append(str(need.name))
    packages = {need.allow for need in needs}
    if None in packages:
        hint = "If you trust whoever made the file, --trust loads it all the same."
    else:
        options = " ".join(f"--allow {package}" for package in sorted(filter(None, packages)))
        hint = f"If you trust the package, install it where it is missing, and use {options}."
    return RepfuseError(
        f"{path} needs more than repfuse lets a file do.",
        "It names " + "; ".join(f"{listed(names)} ({why})" for why, names in by_reason.items()) + ".",
        hint,
    )


def _inside(module: str, packages: Iterable[str]) -> bool:
    if "__main__" in module.split("."):
        return False
    return any(module == package or module.startswith(package + ".") for package in packages)


def _is_plain_class(found: object, allow: Collection[str]) -> bool:
    return (
        isinstance(found, type)
        and issubclass(found, (nn.Module, Enum))
        and not issubclass(found, NEVER)
        and _inside(found.__module__, (*KNOWN, *allow))
    )


def _outside(name: GlobalName) -> Need:
    if name.package in ("__main__", "__mp_main__"):
        return Need(name, "of the notebook or script that saved it")
    if name.module.startswith("torch.fx."):
        return Need(name, "source text of a network that torch.fx wrote, which is code")
    if name.package == "torch" or name.package in sys.stdlib_module_names:
        return Need(name, NOT_DATA)
    if not _is_installed(name.package):
        return Need(name, f"of the package {name.package}, which is not installed", name.package)
    return Need(name, f"of the package {name.package}", name.package)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # no name that a package can have
        return False
