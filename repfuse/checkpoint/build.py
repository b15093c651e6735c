"""Building the network that a ModelSource names, with fresh weights. Nothing is ever downloaded."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from repfuse.errors import RepfuseError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import ModuleType

    from repfuse.checkpoint.source import ModelSource

WEIGHTS = ("pretrained", "checkpoint_path", "weights", "weights_backbone")  # arguments that would fetch weights


def build(source: ModelSource) -> nn.Module:
    """Return the network with fresh weights; the state of the random generator is left as it was.

    Raises RepfuseError where the name is unknown, or where building it fails.
    """
    make = _BUILDERS[source.kind](source)
    try:
        with torch.random.fork_rng(devices=[]):
            network = make(**source.arguments)
    except Exception as error:  # code that is not ours, with arguments of the user
        raise RepfuseError(
            f"{source} could not be built.",
            f"{type(error).__name__}: {error}",
            "Check its arguments (--model-arg name=value).",
        ) from error
    if not isinstance(network, nn.Module):
        raise RepfuseError(
            f"{source} gave a {type(network).__name__}, not a network.",
            "",
            "Name a function or class that gives one torch.nn.Module.",
        )
    return network


def timm_defaults(name: str) -> Any:
    """Return timm's own configuration of the architecture ``name``. Raises RepfuseError where it has none."""
    return _timm(name).models.get_pretrained_cfg(name.partition(".")[0]) or library("timm").models.PretrainedCfg()


def _timm(name: str) -> Any:
    timm = library("timm")
    if not timm.is_model(name.partition(".")[0]):
        raise _unknown("timm", name, timm.list_models())
    return timm


def _from_timm(source: ModelSource) -> Callable[..., Any]:
    name = source.parts[1]
    timm = _timm(name)
    _refuse_weights(source)
    return lambda **arguments: timm.create_model(name, **(arguments | {"pretrained": False}))


def _from_torchvision(source: ModelSource) -> Callable[..., Any]:
    models = library("torchvision").models
    name = source.parts[1]
    if name not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    _refuse_weights(source)
    builder = models.get_model_builder(name)
    fixed = {key: None for key in ("weights", "weights_backbone") if key in inspect.signature(builder).parameters}
    return lambda **arguments: builder(**(arguments | fixed))


def _from_import(source: ModelSource) -> Callable[..., Any]:
    where, name = source.parts
    try:
        module = importlib.import_module(where)
    except Exception as error:  # a package may fail to import in any way
        hint = "Install the package, or name the file itself: path/to/file.py:callable."
        raise RepfuseError(f"{where} cannot be imported.", f"{type(error).__name__}: {error}", hint) from error
    return _callable(module, name, source)


def _from_file(source: ModelSource) -> Callable[..., Any]:
    where, name = source.parts
    path = Path(where).resolve()
    if not path.is_file():
        raise RepfuseError(f"{where} does not exist.", "", "Give the path of the Python file that builds the network.")
    return _callable(_run(path), name, source)


_BUILDERS = {"timm": _from_timm, "torchvision": _from_torchvision, "import": _from_import, "file": _from_file}


def _run(path: Path) -> ModuleType:
    """Import ``path`` under its own name, as Python would from its folder, so that its neighbours import too."""
    known = sys.modules.get(path.stem)
    taken = known is not None and getattr(known, "__file__", None) != str(path)
    spec = importlib.util.spec_from_file_location(f"repfuse_model_{path.stem}" if taken else path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code
        del sys.modules[spec.name]
        raise RepfuseError(f"{path} does not run.", f"{type(error).__name__}: {error}", "Mend it first.") from error
    return module


def _callable(module: ModuleType, name: str, source: ModelSource) -> Callable[..., Any]:
    found = getattr(module, name, None)
    if callable(found):
        return found  # type: ignore[no-any-return]
    if found is not None:
        raise RepfuseError(f"{source.spec} is not callable.", "", "Name a class, or a function that gives the network.")
    own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    raise _unknown(source.parts[0], name, own)


def library(name: str) -> Any:
    """Return the module ``name``. Raises RepfuseError where it is not installed or does not import."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if importlib.util.find_spec(name) is None:
            raise RepfuseError(f"{name} is not installed.", "", f"Install it: pip install {name}.") from error
        raise _broken(name, error) from error
    except Exception as error:  # torchvision built for another torch raises RuntimeError
        raise _broken(name, error) from error


def _broken(name: str, error: Exception) -> RepfuseError:
    return RepfuseError(
        f"{name} is installed but does not import.",
        f"{type(error).__name__}: {error}",
        f"Install versions of torch, torchvision and {name} that belong together.",
    )


def _refuse_weights(source: ModelSource) -> None:
    for name in WEIGHTS:
        if source.arguments.get(name):
            raise RepfuseError(
                f"The model argument {name} is not allowed.",
                "The weights come from the checkpoint; repfuse downloads nothing.",
                f"Leave out {name}.",
            )


def _unknown(where: str, name: str, known: Iterable[str]) -> RepfuseError:
    close = difflib.get_close_matches(name, list(known), n=4, cutoff=0.5)
    hint = f"Did you mean {', '.join(close)}?" if close else "Check the name."
    return RepfuseError(f"{where} has no {name!r}.", "", hint)
