"""Building a network that weights are loaded into: from a ModelSource, also one that a file names; and its inputs.

Nothing is ever downloaded.

A fused state dict carries a recipe so that its network can be built again. It is JSON text: in a safetensors file under
the metadata key ``repfuse``, in a torch file as the attribute ``repfuse`` of the state dict, where torch.load keeps it
and load_state_dict(strict=True) does not see it.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from repfuse import __version__
from repfuse.checkpoint import user_code
from repfuse.checkpoint.allow import GlobalName, NotAllowedError, resolve
from repfuse.checkpoint.files import parse_json
from repfuse.checkpoint.spec import FORM, ModelSource, Shape, as_texts, model_source
from repfuse.checkpoint.user_code import Named, script
from repfuse.errors import RepfuseError, failing_as
from repfuse.networks import USUAL_SIZE, first_layer
from repfuse.plans import Plan
from repfuse.wording import dtype_name, first_line

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


def read_recipe(text: Any, path: Path) -> Recipe | None:
    """Return the recipe that ``text`` holds; None where there is no text. Raises RepfuseError where it is another."""
    if text is None:
        return None
    what, hint = f"{path} has a damaged recipe for its network.", "Convert the original checkpoint again."
    kinds = (ValueError, KeyError, TypeError, RecursionError)
    with failing_as(what, hint, of=kinds, why=lambda error: f"{type(error).__name__}: {error}"):
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


def is_buildable(source: ModelSource, named: Named) -> bool:
    """Whether a file may name what builds its network without being trusted.

    The model libraries build by name alone; of the packages that may give classes, a class of networks will do.
    """
    if source.kind != "import":
        return source.kind in LIBRARIES
    try:
        found = resolve(GlobalName(*source.parts), named)
    except NotAllowedError:
        return False
    return isinstance(found, type) and issubclass(found, nn.Module)


LIBRARIES = ("timm", "torchvision")  # which build by name alone
FETCHING = ("pretrained", "checkpoint_path", "weights", "weights_backbone")  # arguments that would fetch weights


class _Unfilled(TorchFunctionMode):
    """While it is on, no random numbers are drawn for parameters: the file's take their place, and to draw them takes
    longer than to read those. Nor are they scaled or clipped, which is all that a truncated normal distribution is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._unfilled: dict[int, nn.Parameter] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, x = getattr(func, "__name__", ""), args[0] if args else kwargs.get("tensor")
        if isinstance(x, nn.Parameter):
            if name in _DRAWING:
                self._unfilled[id(x)] = x
            if name in _DRAWING or (name in _SCALING and id(x) in self._unfilled):
                return x
        return func(*args, **kwargs)


_DRAWING = frozenset({"normal_", "uniform_", "kaiming_uniform_"})
_SCALING = frozenset({"erfinv_", "mul_", "div_", "add_", "clamp_"})


def build(source: ModelSource, file: Path | None = None) -> nn.Module:
    """Return the network with weights that mean nothing; the state of the random generator is left as it was.

    A module of the user's is looked for where he stands, and beside the checkpoint ``file``.

    Raises RepfuseError where the name is unknown, or where building it fails.
    """
    make = _BUILDERS[source.kind](source, file)
    of_library = source.kind in LIBRARIES
    for name in FETCHING if of_library else ():
        if source.arguments.get(name):
            raise RepfuseError(
                f"The model argument {name} is not allowed.",
                "The weights come from the checkpoint; repfuse downloads nothing.",
                f"Leave out {name}.",
            )
    try:
        with torch.random.fork_rng(devices=[]), _Unfilled() if of_library else nullcontext():
            network = make(**source.arguments)
    except Exception as error:  # code that is not ours, with arguments of the user
        hint = user_code.missing(error) or "Check its arguments (--model-arg name=value)."
        raise RepfuseError(f"{source} could not be built.", f"{type(error).__name__}: {error}", hint) from error
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


def _from_timm(source: ModelSource, _file: Path | None) -> Callable[..., Any]:
    name = source.parts[1]
    timm = _timm(name)
    return lambda **arguments: timm.create_model(name, **(arguments | {"pretrained": False}))


def _from_torchvision(source: ModelSource, _file: Path | None) -> Callable[..., Any]:
    models = library("torchvision").models
    name = source.parts[1]
    if name not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    builder = models.get_model_builder(name)
    fixed = {key: None for key in ("weights", "weights_backbone") if key in inspect.signature(builder).parameters}
    return lambda **arguments: builder(**(arguments | fixed))


def _from_import(source: ModelSource, file: Path | None) -> Callable[..., Any]:
    where = source.parts[0]
    named = user_code.Named((where,), file=file)
    if not named.finds(where):
        raise RepfuseError(
            f"{where} cannot be imported.",
            f"Python finds no such module: it is not installed, and not in {Path.cwd()}.",
            "Install the package, go to the folder that it is in, or name the file: --model path/to/file.py:callable.",
        )
    with user_code.explained(where):
        return _member(named.load(where), source)


def _from_file(source: ModelSource, _file: Path | None) -> Callable[..., Any]:
    where, name = source.parts
    path = Path(where).resolve()
    if not path.is_file():
        raise RepfuseError(f"{where} does not exist.", "", "Give the path of the Python file that builds the network.")
    with user_code.explained(path):
        if script(path).works:  # to run all of it would train again
            found = user_code.Named(paths=(path,)).of_script(name)
            return _callable(found, script(path).names, source)
        return _member(user_code.load_file(path), source)


_BUILDERS = {"timm": _from_timm, "torchvision": _from_torchvision, "import": _from_import, "file": _from_file}


def _member(module: ModuleType, source: ModelSource) -> Callable[..., Any]:
    own = [key for key, value in vars(module).items() if callable(value)]
    return _callable(getattr(module, source.parts[1], None), own, source)


def _callable(found: Any, names: Iterable[str], source: ModelSource) -> Callable[..., Any]:
    where, name = source.parts
    if callable(found):
        return found  # type: ignore[no-any-return]
    if found is not None:
        raise RepfuseError(f"{source.spec} is not callable.", "", "Name a class, or a function that gives the network.")
    raise _unknown(where, name, (each for each in names if not each.startswith("_")))


def library(name: str, extra: str = "") -> Any:
    """Return the module ``name``, of one of our extras. Raises RepfuseError where it is missing or does not import."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # torchvision built for another torch raises RuntimeError
        if isinstance(error, ImportError) and (extra or importlib.util.find_spec(name) is None):
            install = f"'repfuse[{extra}]'" if extra else name
            raise RepfuseError(
                f"{name.partition('.')[0]} is not installed.", str(error), f"Install it: pip install {install}."
            ) from error
        raise RepfuseError(
            f"{name} is installed but does not import.",
            f"{type(error).__name__}: {error}",
            f"Install versions of torch, torchvision and {name} that belong together.",
        ) from error


def _unknown(where: str, name: str, known: Iterable[str]) -> RepfuseError:
    close = difflib.get_close_matches(name, list(known), n=4, cutoff=0.5)
    hint = f"Did you mean {', '.join(close)}?" if close else "Check the name."
    return RepfuseError(f"{where} has no {name!r}.", "", hint)


# Example inputs: tensors of given shapes, what a network knows of its own, and the guess where nothing is known.

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def make_inputs(shapes: Sequence[Shape], network: nn.Module) -> tuple[Tensor, ...]:
    """Return one tensor of repeatable random values for each shape, where ``network`` lives and in its dtype."""
    like = _like(network)
    generator = torch.Generator().manual_seed(0)

    def made(shape: Shape) -> Tensor:
        kinds = (RuntimeError, MemoryError, OverflowError)
        with failing_as(f"An input of {shape} cannot be made.", FORM, of=kinds, why=first_line):
            dtype = getattr(torch, shape.dtype) if shape.dtype else like.dtype
            return random_tensor(shape.sizes, dtype, generator).to(like.device)

    return tuple(map(made, shapes))


def shapes_of(inputs: Iterable[Tensor], network: nn.Module) -> tuple[Shape, ...]:
    """Return the shapes that ``make_inputs`` would turn into tensors like ``inputs``."""
    usual = _like(network).dtype
    return tuple(Shape(tuple(x.shape), None if x.dtype == usual else dtype_name(x.dtype)) for x in inputs)


def _like(network: nn.Module) -> Tensor:
    return next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))


def random_tensor(sizes: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return standard normal numbers; of a dtype that holds none, zeros and ones."""
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(sizes, generator=generator).to(dtype)
    return torch.randint(0, 2, sizes, generator=generator).to(dtype)


def known_shape(network: nn.Module, arguments: Mapping[str, Any]) -> Shape | None:
    """Return the input that ``network`` itself records, or None; ``arguments`` are those that it was built with.

    timm's networks have a configuration with an input size; repfuse's samples have an ``input_shape``.
    """
    if type(network).__module__ == "repfuse.samples":
        return _shape_of(network.input_shape)
    configuration: Any = getattr(network, "pretrained_cfg", None)
    size = configuration.get("input_size") if isinstance(configuration, dict) else None
    known = _shape_of(size) if type(network).__module__.startswith("timm.") else None
    if known is None or len(known.sizes) != 3:
        return None
    # The configuration does not follow ``in_chans``, the first convolution does; some stems move pixels into channels
    # first, and read a multiple of what is configured.
    usual, *pixels = known.sizes
    first = next((layer.in_channels for layer in network.modules() if isinstance(layer, CONVOLUTIONS)), usual)
    return _shape_of((1, arguments.get("in_chans") or (first if first % usual else usual), *pixels))


def _shape_of(sizes: Any) -> Shape | None:
    """Return the shape, or None where the file that holds the network made something else of it."""
    fits = isinstance(sizes, (tuple, list)) and all(isinstance(size, int) and size > 0 for size in sizes)
    return Shape(tuple(sizes)) if fits and sizes else None


def guessed_shape(network: nn.Module) -> Shape:
    """Guess an input from the first convolution or linear layer. Raises RepfuseError where there is neither."""
    if first := first_layer(network):
        _, channels, axes = first
        return Shape((1, channels, *[USUAL_SIZE[axes]] * axes))
    raise RepfuseError(
        "The input of this network is not known, and cannot be guessed.",
        "It has no convolution and no linear layer.",
        "Give it: --input 1x3x224x224",
    )
