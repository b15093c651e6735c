"""Which classes a file may name without being trusted, and what to say of the others.

The rule: only nn.Module subclasses and enumerations; only from the packages below and the code that the user named;
and each must really be defined there. Nothing else is imported. Of functions only torch's own activations are let in,
as what a network holds (``self.act = F.relu``): the file calls none.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from repfuse.checkpoint.user_code import MAIN, PIP, Named, explained, installed_only, is_found, is_found_in
from repfuse.errors import RepfuseError
from repfuse.wording import described, listed


class GlobalName(NamedTuple):
    """A class or function as a pickle names it."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def package(self) -> str:
        """The top-level package: ``timm`` of ``timm.models.byobnet``."""
        return self.module.partition(".")[0]


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
PARTIAL = GlobalName("functools", "partial")
GETATTR = GlobalName("builtins", "getattr")
FUNCTIONS = GlobalName("torch._C", "_VariableFunctionsClass")
"""As a pickle spells ``torch.tanh``: that attribute of that class."""
OF_THEIR_OWN = frozenset({PARTIAL, GETATTR, FUNCTIONS})
"""Names that are held to a rule of their own where something is built of them."""
ACTIVATIONS = frozenset(
    {
        "relu", "relu_", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish",
        "hardsigmoid", "hardtanh", "sigmoid", "sigmoid_", "tanh", "tanh_", "softplus", "softsign", "softmax",
        "log_softmax", "logsigmoid", "tanhshrink",
    }
)  # fmt: skip
"""The functions of torch that a file may name: each computes a tensor from one, and does nothing else."""
NOT_DATA = "not a class of networks that can be restored from data alone"
OF_SCRIPT = "of the notebook or script that saved it"
MAINS = (MAIN, "__mp_main__")


class NotAllowedError(Exception):
    """A name that the file may not use: why, what to allow, and what pip would install; neither where trust helps."""

    def __init__(self, name: GlobalName, why: str, allow: str = "", install: str = "") -> None:
        super().__init__(str(name))
        self.name, self.why, self.allow, self.install = name, why, allow, install


def resolve(name: GlobalName, named: Named) -> Any:
    """Return the class, or activation, that ``name`` names. Raises NotAllowedError where the rule forbids it.

    Raises RepfuseError where code that the user named does not run.
    """
    if name.module in ("torch.nn.functional", "torch._C._nn") and name.name in ACTIVATIONS:
        return getattr(nn.functional, name.name)
    found = _of_script(name, named) if name.module in MAINS else _of_module(name, named)
    plain = isinstance(found, type) and issubclass(found, (nn.Module, Enum)) and not issubclass(found, NEVER)
    own = found.__module__ if plain else ""
    ours = _is_inside(own, KNOWN) or (own == MAIN and name.module in MAINS)
    if not plain or not (ours or named.covers(own, found.__name__)):
        raise NotAllowedError(name, NOT_DATA)
    return found


def names_refused(names: Iterable[GlobalName], named: Named) -> list[NotAllowedError]:
    """Return what is not allowed among ``names``."""
    needs = []
    for name in sorted(set(names) - OF_THEIR_OWN):
        try:
            resolve(name, named)
        except NotAllowedError as refused:
            needs.append(refused)
    return needs


def refusal(path: Path, needs: list[NotAllowedError]) -> RepfuseError:
    """Return the error that lists what the file needs, and says what would let it in."""
    by_reason: dict[str, list[str]] = {}
    for need in needs:
        by_reason.setdefault(need.why, []).append(str(need.name))
    return RepfuseError(
        f"{path} needs more than repfuse lets a file do.",
        "It names " + "; ".join(f"{listed(names)} ({why})" for why, names in by_reason.items()) + ".",
        advice(needs),
    )


def advice(needs: list[NotAllowedError]) -> str:
    """Return what lets all of it in; nothing where there is nothing to let in."""
    trust = "" if all(need.allow or need.install for need in needs) else "--trust"
    options = " ".join(filter(None, [trust, *sorted({f"--allow {need.allow}" for need in needs if need.allow})]))
    install = " ".join(sorted({need.install for need in needs if need.install}))
    first = f"Install what is missing: pip install {install}." if install else ""
    whom = "whoever made the file" if trust else "that code"
    then = f"If you trust {whom}, add {options}." if options else ""
    return " ".join(filter(None, [first, then]))


def _of_module(name: GlobalName, named: Named) -> Any:
    by_user = named.covers(*name)
    if not (by_user or _is_inside(name.module, KNOWN)) or MAIN in name.module.split("."):
        raise _outside(name, named)
    with nullcontext() if by_user else installed_only():
        found = named.finds(name.module) if by_user else is_found(name.package)
    if not found:
        raise _not_found(name, named)
    if by_user:
        with explained(name.module):
            module = named.load(name.module)
    else:
        try:
            with installed_only():
                module = importlib.import_module(name.module)
        except Exception as error:  # a package may fail to import in any way
            detail = f"{name.module} does not import: {described(error)}"
            raise NotAllowedError(name, detail) from error
    if (member := vars(module).get(name.name)) is None:
        raise NotAllowedError(name, f"{name.module} has no {name.name} in the version installed here")
    return member


def _of_script(name: GlobalName, named: Named) -> Any:
    with explained(listed(named.paths)):
        found = named.of_script(name.name)
    if found is None:
        raise NotAllowedError(name, OF_SCRIPT, _script_with(name.name, named))
    return found


def _is_inside(module: str, packages: Iterable[str]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def _outside(name: GlobalName, named: Named) -> NotAllowedError:
    if name.module.startswith("torch.fx."):
        return NotAllowedError(name, "source text of a network that torch.fx wrote, which is code")
    if name.package == "torch" or name.package in sys.stdlib_module_names:
        return NotAllowedError(name, NOT_DATA)
    if named.finds(name.module):
        return NotAllowedError(name, f"of the package {name.package}", name.package)
    return _not_found(name, named)


def _not_found(name: GlobalName, named: Named) -> NotAllowedError:
    """Say how to get at what nobody finds: with pip, or by the path of the user's own file or folder."""
    package = name.package
    if package in PIP:
        known = any(package == each.partition(".")[0] for each in KNOWN)
        why = f"of the package {package}, which is not installed"
        return NotAllowedError(name, why, "" if known else package, PIP[package])
    if named.finds(package):
        why = f"{package} has no module {name.module} in the version found here"
        return NotAllowedError(name, why, f"path/to/{package}")
    places = " or ".join(map(str, named.places))
    why = f"{package} is not installed, and not in {places}"
    suffix = "" if "." in name.module else ".py"
    below = (inner for place in named.places for inner in sorted(place.glob("*/")))
    folder = next((os.path.relpath(inner) for inner in below if is_found_in(name.module, inner)), "path/to")
    return NotAllowedError(name, why, f"{folder}/{package}{suffix}")


def _script_with(name: str, named: Named) -> str:
    """Return the path of the script that defines the class ``name``, where only one can be meant.

    The scripts where the user stands and beside the file are read, and not run. Of several, it is the one in which the
    name of the file stands.
    """
    pattern = re.compile(rf"^class {re.escape(name)}\b".encode(), re.MULTILINE)
    found = (sorted([*place.glob("*.py"), *place.glob("*/*.py")]) for place in named.places)
    paths = [path for each in found for path in each if path.is_file() and os.access(path, os.R_OK)]
    known = {path: text for path in paths if pattern.search(text := path.read_bytes())}
    saving = [path for path, text in known.items() if named.file and named.file.name.encode() in text]
    scripts = saving or list(known)
    return os.path.relpath(scripts[0]) if len(scripts) == 1 else "path/to/the_script.py"
