"""Checkpoints in and out: ``load`` gives a network that runs, ``save`` writes one back in the same layout."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repfuse.checkpoint import atomic, example, saving
from repfuse.checkpoint.allow import names_refused
from repfuse.checkpoint.around import Around
from repfuse.checkpoint.contents import RECIPE
from repfuse.checkpoint.inert import origins
from repfuse.checkpoint.network import Network, network_of
from repfuse.checkpoint.opening import Opened, digest_of, open_checkpoint
from repfuse.checkpoint.recipe import Recipe
from repfuse.checkpoint.recognise import damaged
from repfuse.checkpoint.source import ModelSource, model_source
from repfuse.errors import RepfuseError
from repfuse.planning.planner import plan as make_plan
from repfuse.plans import Plan
from repfuse.rewriting import rewrite


@dataclass(frozen=True)
class Checkpoint:
    """A network from a file, in eval mode with its weights, and what is known of it.

    ``format`` is ``module``, ``state-dict`` or ``safetensors``; ``digest`` is that of the file. ``source`` says how the
    network was built and ``plans`` how it was fused since, where the file holds weights alone. ``input_origin`` says
    where the shape of ``example_inputs`` is from: ``given``, ``checkpoint``, ``model source`` or ``guess``. ``notes``
    are what the user must be told. ``around``, ``metadata``, ``allow`` and ``trust`` are for ``save``.
    """

    module: nn.Module
    example_inputs: tuple[torch.Tensor, ...]
    format: str
    path: Path
    digest: str
    source: ModelSource | None
    input_origin: str
    notes: tuple[str, ...]
    plans: tuple[Plan, ...] = ()
    around: Around = Around()  # noqa: RUF009 - it is frozen
    metadata: Mapping[str, str] = field(default_factory=dict)
    allow: tuple[str, ...] = ()
    trust: bool = False

    @property
    def plan(self) -> Plan | None:
        """The plan that made the network, where the file is a fused state dict."""
        return self.plans[-1] if self.plans else None


@dataclass(frozen=True)
class Saved:
    """A file that was written: its path, digest and format, and what the user must be told of it."""

    path: Path
    digest: str
    format: str
    notes: tuple[str, ...] = ()


def load(
    path: str | Path,
    *,
    model: str | None = None,
    model_args: Mapping[str, Any] | Iterable[str] | None = None,
    input: str | None = None,
    key: str | None = None,
    allow: Collection[str] = (),
    trust: bool = False,
    device: str = "cpu",
) -> Checkpoint:
    """Return the checkpoint at ``path``, whose format is recognised by its content.

    ``model`` names how to build the network of a state dict (``timm:NAME``, ``torchvision:NAME``,
    ``package.module:callable``, ``path/to/file.py:callable``), ``model_args`` its arguments. ``input`` is an example's
    shape (``1x3x224x224``). ``key`` picks one of several networks in a training checkpoint. No code of the file runs:
    it may name networks of torch, torchvision, timm and the packages in ``allow``; ``trust`` lets it run anything.
    Raises RepfuseError with what is wrong and what to do.
    """
    path, given = Path(path), list(model_args.items() if isinstance(model_args, Mapping) else model_args or ())
    if given and model is None:
        raise RepfuseError("There are model arguments, but no model.", "", "Say which: --model timm:NAME, ...")
    shapes = example.parse_shapes(input) if input is not None else None
    source = model_source(model, model_args) if model is not None else None
    try:
        opened = open_checkpoint(path, key, trust=trust)
        network = network_of(opened, source, allow, partial(rewrite, weights=False), trust=trust)
    except RecursionError as error:
        raise damaged(path, "its objects or modules hold each other without end") from error
    module = _on(network.module, device)
    shapes, origin, said = _shapes(shapes, opened, network)
    return Checkpoint(
        module=module,
        example_inputs=example.make_inputs(shapes, module),
        format=opened.format if network.source is None or opened.format != "module" else "state-dict",
        path=path,
        digest=opened.digest,
        source=network.source,
        input_origin=origin,
        notes=(*opened.contents.notes, *network.notes, *said),
        plans=network.plans,
        around=opened.contents.around,
        metadata={name: text for name, text in opened.metadata.items() if name != RECIPE},
        allow=tuple(allow),
        trust=trust,
    )


def save(
    checkpoint: Checkpoint,
    module: nn.Module,
    out: str | Path,
    *,
    plan: Plan | None = None,
    format: str | None = None,
    force: bool = False,
) -> Saved:
    """Write ``module``, which was made from ``checkpoint``, to ``out``: as a whole or not at all.

    The format is ``format`` (``module``, ``state-dict``, ``safetensors``), else what the suffix of ``out`` says, else
    the checkpoint's. ``plan`` is the plan that made ``module``; without it, it is made again. It is written along with
    a state dict, so that ``load`` can build the network again. The file is read back and compared before it counts.
    Raises RepfuseError where ``out`` is the input, exists (without ``force``) or cannot be written.
    """
    out = Path(out)
    atomic.check_target(out, checkpoint.path, force=force)
    form = saving.format_for(out, format, checkpoint.format)
    with atomic.replacing(out) as temporary:
        notes = _write(checkpoint, module, plan, form, temporary)
        digest = digest_of(temporary)
    return Saved(out, digest, form, tuple(notes))


def _on(module: nn.Module, device: str) -> nn.Module:
    try:
        return module.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise RepfuseError(f"The network cannot be moved to {device!r}.", first, "Use cpu, or cuda:0, ...") from error


Shapes = tuple[example.Shape, ...]
UNASKED = 1 << 26  # numbers that an input may have without being asked for


def _shapes(given: Shapes | None, opened: Opened, network: Network) -> tuple[Shapes, str, tuple[str, ...]]:
    """Return the shapes of the example inputs, where they are from, and what to say of that."""
    if given is not None:
        return given, "given", ()
    shapes, origin, said = _shapes_of(opened, network)
    if sum(prod(shape.sizes) for shape in shapes) > UNASKED:
        what = f"The input of {opened.path} would be {example.render(shapes)}, which is very large."
        raise RepfuseError(what, f"That shape is from the {origin}.", "If it is right, say so with --input.")
    return shapes, origin, said


def _shapes_of(opened: Opened, network: Network) -> tuple[Shapes, str, tuple[str, ...]]:
    if opened.recipe is not None:
        return example.parse_shapes(opened.recipe.input), "checkpoint", ()
    if known := example.known_shape(network.module, network.source.arguments if network.source else {}):
        return (known,), "model source" if network.source else "checkpoint", ()
    guess = example.guessed_shape(network.module)
    return (guess,), "guess", (f"the input {guess} is a guess; --input says what it really is",)


def _write(checkpoint: Checkpoint, module: nn.Module, plan: Plan | None, form: str, path: Path) -> list[str]:
    """Write the file at ``path``, and return what the user must be told of it."""
    layout = checkpoint.around
    left_out = [f"left out of the training checkpoint: {', '.join(layout.left_out)}"] if layout.left_out else []
    if form == "module":
        written = saving.write_torch(module, layout, path, trust=checkpoint.trust)
        return left_out + _trust_note(written, checkpoint)
    recipe = _recipe(checkpoint, module, plan)
    unbuilt = [] if recipe else ["the file does not say how its network is built: load_state_dict takes it"]
    state = saving.state_of(module, layout, recipe)
    if form == "state-dict":
        saving.write_torch(state, layout, path, trust=False)
        return left_out + unbuilt
    saving.write_safetensors(state, {**checkpoint.metadata, **({RECIPE: recipe} if recipe else {})}, path)
    alone = ["safetensors holds weights alone: the rest of the training checkpoint is left out"] if layout.keys else []
    return alone + unbuilt


def _recipe(checkpoint: Checkpoint, module: nn.Module, plan: Plan | None) -> str | None:
    if checkpoint.source is None:
        return None
    if plan is None and module is not checkpoint.module:
        plan = make_plan(checkpoint.module, checkpoint.example_inputs)
    shapes = example.shapes_of(checkpoint.example_inputs, checkpoint.module)
    plans = (*checkpoint.plans, plan) if plan and plan.sites else checkpoint.plans
    return Recipe(checkpoint.source, example.render(shapes), plans).to_text()


def _trust_note(written: Any, checkpoint: Checkpoint) -> list[str]:
    """Say so where the new file asks for more than its input did."""
    refused = [] if checkpoint.trust else names_refused(origins(written), checkpoint.allow)
    if not refused:
        return []
    names = ", ".join(str(need.name) for need in refused)
    return [f"this file needs --trust where its input did not, because of {names}; .safetensors would not"]
