"""The exact lines of Python that use a file which was written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, fx, nn

from repfuse.checkpoint.allow import MAINS
from repfuse.checkpoint.build import Recipe, is_buildable
from repfuse.checkpoint.script import script
from repfuse.checkpoint.user_code import Named
from repfuse.wording import dtype_name

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from repfuse.loading import Checkpoint

LIBRARIES = ("torch", "torchvision", "timm")
WIDTH = 76  # what a terminal of 80 columns shows of it
Lines = tuple[str, ...]


def of_network(network: nn.Module, keys: Iterable[str], out: Path) -> Lines:
    """Return how a pickled network is loaded, and what Python must find for that."""
    classes = {type(part) for part in network.modules()}
    packages = sorted({cls.__module__.partition(".")[0] for cls in classes} - {*LIBRARIES, *MAINS})
    own = sorted(cls.__name__ for cls in classes if cls.__module__ in MAINS)
    where = [f"# where Python finds {', '.join(packages)}"] if packages else []
    where += [f"# in the script that defines {', '.join(own)}"] if own else []
    taken = "".join(f"[{key!r}]" for key in keys)
    return (*where, "import torch", f"model = torch.load({_text(out)}, weights_only=False){taken}")


def of_weights(recipe: Recipe, out: Path) -> Lines:
    """Return how the network of a file of weights is built again, and filled."""
    said, about = [_text(out)], list[str]()
    if recipe.source is not None:
        if not is_buildable(recipe.source, Named()):
            said.append(f'model="{recipe.source.spec}"')
            said += [f"model_args={recipe.source.arguments!r}"] if recipe.source.arguments else []
    elif recipe.made_of:
        said.append(f'model="{recipe.made_of}"')
        about.append("# with the arguments that it was built with, where there were any: model_args={...}")
    else:
        said.append('model="path/to/net.py:build"')
        about.append("# build() returns the network that was converted")
    return ("import repfuse", *about, *_call("model = repfuse.load(", said, ").module"))


def of_pt2(out: Path) -> Lines:
    """Return how an exported program is loaded."""
    return ("import torch", f"model = torch.export.load({_text(out)}).module()")


def of_onnx(program: ExportedProgram, example: Iterable[Tensor], out: Path) -> Lines:
    """Return how an ONNX file is run; its inputs are NumPy arrays."""
    names = program.graph_signature.user_inputs
    shapes = [f"{'x'.join(map(str, x.shape))} {dtype_name(x.dtype)}" for x in example]
    arrays = [f"{name} of {shape}" for name, shape in zip(names, shapes, strict=True)]
    return (
        "import onnxruntime",
        f"session = onnxruntime.InferenceSession({_text(out)})",
        f"# NumPy arrays, such as {', '.join(arrays)}",
        *_call("outputs = session.run(None, {", [f'"{name}": {name}' for name in names], "})"),
    )


def of_graph(inputs: Mapping[str, str], out: Path) -> Lines:
    """Return how an ONNX file is run that takes these inputs, with their shapes."""
    arrays = [f"{name} of {shape}" for name, shape in inputs.items()]
    given = [f'"{name}": x{number or ""}' for number, name in enumerate(inputs)]
    return (
        "import onnxruntime",
        f"session = onnxruntime.InferenceSession({_text(out)})",
        f"# NumPy arrays, such as {', '.join(arrays)}",
        *_call("outputs = session.run(None, {", given, "})"),
    )


def made_of(checkpoint: Checkpoint) -> str:
    """Return the spec of the class that the network of a pickle had; empty where it has none that could be built."""
    cls = type(checkpoint.module)
    if checkpoint.source or checkpoint.fused_already or issubclass(cls, fx.GraphModule) or "<" in cls.__qualname__:
        return ""
    if cls.__module__ not in MAINS:
        return "" if cls.__module__.startswith("torch.") else f"{cls.__module__}:{cls.__qualname__}"
    scripts = (path for path in checkpoint.code.paths if path.is_file() and cls.__name__ in script(path).names)
    return next((f"{os.path.relpath(path)}:{cls.__name__}" for path in scripts), "")


def _call(start: str, arguments: list[str], end: str) -> list[str]:
    """Return the call on one line, or where that is long on a line for each argument."""
    line = f"{start}{', '.join(arguments)}{end}"
    return [line] if len(line) <= WIDTH else [start, *(f"    {each}," for each in arguments), end]


def _text(out: Path) -> str:
    return '"' + str(out).replace("\\", "\\\\").replace('"', '\\"') + '"'
