"""Checkpoints in and out: ``load`` gives a network that runs, ``save`` writes one back in the same layout."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from repfuse.checkpoint import atomic, example, saving
from repfuse.checkpoint.allow import names_refused
from repfuse.checkpoint.around import Around
from repfuse.checkpoint.contents import RECIPE
from repfuse.checkpoint.deploy import mode
from repfuse.checkpoint.hub import fetch, is_hub_name
from repfuse.checkpoint.inert import origins
from repfuse.checkpoint.network import Network, network_of
from repfuse.checkpoint.opening import Opened, digest_of, open_checkpoint
from repfuse.checkpoint.recipe import Recipe
from repfuse.checkpoint.recognise import damaged
from repfuse.checkpoint.snapshot import is_snapshot, open_snapshot
from repfuse.checkpoint.source import ModelSource, model_source
from repfuse.errors import RepfuseError
from repfuse.networks import device_of, placed
from repfuse.planning.planner import plan as make_plan
from repfuse.plans import Plan
from repfuse.rewriting import rewrite
from repfuse.verifying.results import Verified
from repfuse.version import __version__

if TYPE_CHECKING:
    from torch.export import ExportedProgram

ONE_FILE = "a fused network is no architecture of timm any more: what is written from this folder is one file"


@dataclass(frozen=True)
class Checkpoint:
    """A network from a file, in eval mode with its weights, and what is known of it.

    ``format`` is ``pt`` (a pickled network), ``state-dict``, ``safetensors``, ``pt2`` or ``torchscript``;
    ``digest`` is that of the file. ``source`` says how the
    network was built and ``plans`` how it was fused since, where the file holds weights alone. ``input_origin`` says
    where the shape of ``example_inputs`` is from: ``given``, ``checkpoint``, ``model source`` or ``guess``. ``notes``
    are what the user must be told. ``around``, ``metadata``, ``allow``, ``trust``, the exported ``program`` in the file
    and the ``files`` that hold shards are for ``save``.
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
    program: ExportedProgram | None = None
    files: tuple[Path, ...] = ()

    def without_metadata(self) -> Checkpoint:
        """The same without what the file holds beside the network; the keys that lead to the network stay."""
        return replace(self, around=self.around.without_metadata(), metadata={})

    @property
    def fused_already(self) -> str:
        """What is known of earlier fusing, in words; empty where nothing is."""
        if self.plans:
            sites = sum(len(plan.sites) for plan in self.plans)
            return f"fused already by repfuse, {sites} {'site' if sites == 1 else 'sites'}"
        if isinstance(mark := vars(self.module).get(RECIPE), str):
            return f"fused already by {mark}"
        return mode(self.module.state_dict())

    @property
    def plan(self) -> Plan | None:
        """The plan that made the network, where the file is a fused state dict."""
        return self.plans[-1] if self.plans else None


@dataclass(frozen=True)
class Saved:
    """A file that was written: its path, digest and format, and what the user must be told of it.

    ``verified`` says what was run of the file itself, where its format can be run.
    """

    path: Path
    digest: str
    format: str
    notes: tuple[str, ...] = ()
    verified: Verified | None = None


def load(
    path: str | Path,
    *,
    model: str | None = None,
    model_args: Mapping[str, Any] | Iterable[str] | None = None,
    input: str | None = None,
    weights: str = "auto",
    allow: Collection[str] = (),
    trust: bool = False,
    device: str = "cpu",
) -> Checkpoint:
    """Return the checkpoint at ``path``, whose format is recognised by its content.

    ``path`` may also be a snapshot folder of the Hugging Face hub for timm, or ``hf-hub:USER/NAME``, which is fetched.
    ``model`` names how to build the network of a state dict (``timm:NAME``, ``torchvision:NAME``,
    ``package.module:callable``, ``path/to/file.py:callable``), ``model_args`` its arguments. ``input`` is an example's
    shape (``1x3x224x224``). ``weights`` picks one of several networks in a file: ``ema`` (averaged), ``model``
    (trained), a dotted key, or ``auto``: the averaged one where there is one. No code of the file runs: it may name
    networks of torch, torchvision, timm and the packages in ``allow``; ``trust`` lets it run anything.
    Raises RepfuseError with what is wrong and what to do.
    """
    given = list(model_args.items() if isinstance(model_args, Mapping) else model_args or ())
    if given and model is None:
        raise RepfuseError("There are model arguments, but no model.", "", "Say which: --model timm:NAME, ...")
    shapes = example.parse_shapes(input) if input is not None else None
    source = model_source(model, model_args) if model is not None else None
    try:
        opened, found = _opened(path, weights, shapes, trust=trust, built=source is not None)
        network = network_of(opened, source, allow, partial(rewrite, weights=False), trust=trust)
    except RecursionError as error:
        raise damaged(Path(path), "its objects or modules hold each other without end") from error
    module = _on(network.module, device)
    inputs, origin, said = _inputs(shapes, opened, network, module)
    return Checkpoint(
        module=module,
        example_inputs=inputs,
        format=opened.format if network.source is None or opened.format != "pt" else "state-dict",
        path=opened.path,
        digest=opened.digest,
        source=network.source,
        input_origin=origin,
        notes=(*found, *opened.contents.notes, *network.notes, *said),
        plans=network.plans,
        around=replace(opened.contents.around, naming=network.naming),
        metadata={name: text for name, text in opened.metadata.items() if name != RECIPE},
        allow=tuple(allow),
        trust=trust,
        program=opened.program,
        files=opened.files,
    )


def save(
    checkpoint: Checkpoint,
    module: nn.Module,
    out: str | Path,
    *,
    plan: Plan | None = None,
    format: str | None = None,
    force: bool = False,
    keep_metadata: bool = True,
) -> Saved:
    """Write ``module``, which was made from ``checkpoint``, to ``out``: as a whole or not at all.

    The format is ``format`` (``pt``, ``pt2``, ``safetensors``, ``state-dict``, ``onnx``), else what the suffix of
    ``out`` says, else the checkpoint's. ``plan`` is the plan that made ``module``; without it, it is made again. It is
    written along with a state dict, so that ``load`` can build the network again. What else the checkpoint holds goes
    along as far as it stays true, unless ``keep_metadata`` is false; the notes name what is kept and what is not. The
    file is read back and compared before it counts; .pt2 and ONNX files are run, too. Raises RepfuseError where ``out``
    is the input, exists (without ``force``) or cannot be written.
    """
    out = Path(out)
    for source in (checkpoint.path, *checkpoint.files):
        atomic.check_target(out, source, force=force)
    form = saving.format_for(out, format, checkpoint.format)
    dropped = [] if keep_metadata else _texts_lost(checkpoint, "as --drop-metadata asks")
    checkpoint = checkpoint if keep_metadata else checkpoint.without_metadata()
    with atomic.replacing(out) as temporary:
        notes, verified = _write(checkpoint, module, plan, form, temporary)
        digest = digest_of(temporary)
    return Saved(out, digest, form, (*notes, *dropped), verified)


def _opened(
    path: str | Path, weights: str, shapes: Shapes | None, *, trust: bool, built: bool
) -> tuple[Opened, tuple[str, ...]]:
    """Return what is at ``path``, and what to say of where it was found."""
    if not is_hub_name(path) and not is_snapshot(Path(path)):
        return open_checkpoint(Path(path), weights, trust=trust, shapes=shapes), ()
    folder, revision = fetch(str(path)) if is_hub_name(path) else (Path(path), "")
    opened = open_snapshot(folder, weights, trust=trust, built=built)
    said = (f"{path} is revision {revision} of the hub, kept in {folder}",) if revision else ()
    return opened, (*said, ONE_FILE)


def _on(module: nn.Module, device: str) -> nn.Module:
    try:
        return module.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise RepfuseError(f"The network cannot be moved to {device!r}.", first, "Use cpu, or cuda:0, ...") from error


Shapes = tuple[example.Shape, ...]
UNASKED = 1 << 26  # numbers that an input may have without being asked for


def _inputs(
    given: Shapes | None, opened: Opened, network: Network, module: nn.Module
) -> tuple[tuple[torch.Tensor, ...], str, tuple[str, ...]]:
    """Return the example inputs, where they are from, and what to say of that."""
    if given is None and opened.program is not None:
        from repfuse.checkpoint.exported.network import flat_inputs

        inputs = placed(flat_inputs(opened.program), device_of(module), {})
        return inputs, "checkpoint", ()
    shapes, origin, said = _shapes(given, opened, network)
    return example.make_inputs(shapes, module), origin, said


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
    if opened.recipe is not None and opened.recipe.input:
        return example.parse_shapes(opened.recipe.input), "checkpoint", ()
    if known := example.known_shape(network.module, network.source.arguments if network.source else {}):
        return (known,), "model source" if network.source else "checkpoint", ()
    guess = example.guessed_shape(network.module)
    return (guess,), "guess", (f"the input {guess} is a guess; --input says what it really is",)


def _write(
    checkpoint: Checkpoint, module: nn.Module, plan: Plan | None, form: str, path: Path
) -> tuple[list[str], Verified | None]:
    """Write the file at ``path``, and return what the user must be told of it, and what was run of it."""
    if form not in ("pt2", "onnx"):
        return _write_weights(checkpoint, module, plan, form, path), None
    from repfuse.checkpoint.exported import writing  # torch.export takes a second to import

    source = writing.Source(checkpoint.module, module, checkpoint.example_inputs, checkpoint.program)
    alone = [f"{form} holds the network alone: the rest of the training checkpoint is left out"]
    kept = alone if checkpoint.around.keys else []
    if form == "onnx":
        return kept, writing.write_onnx(source, path)
    verified, notes = writing.write_pt2(source, path)
    return kept + notes, verified


def _write_weights(checkpoint: Checkpoint, module: nn.Module, plan: Plan | None, form: str, path: Path) -> list[str]:
    layout = checkpoint.around
    if form == "pt":
        unguarded = ["the file does not check its inputs as the .pt2 did"] if checkpoint.program else []
        with _marked(module, fused=module is not checkpoint.module):
            written = saving.write_torch(module, layout, path, trust=checkpoint.trust)
        return layout.said() + _texts_lost(checkpoint) + unguarded + _trust_note(written, checkpoint)
    recipe = _recipe(checkpoint, module, plan)
    unbuilt = [] if recipe else ["the file does not say how its network is built: load_state_dict takes it"]
    state = saving.state_of(module, layout, recipe)
    if form == "state-dict":
        saving.write_torch(state, layout, path, trust=False)
        return layout.said() + _texts_lost(checkpoint) + unbuilt
    saving.write_safetensors(state, {**checkpoint.metadata, **({RECIPE: recipe} if recipe else {})}, path)
    rest = [*layout.kept(), *layout.left_out]
    alone = [f"safetensors holds weights alone: left out of the training checkpoint: {', '.join(rest)}"] if rest else []
    return alone + unbuilt


@contextmanager
def _marked(module: nn.Module, *, fused: bool) -> Iterator[None]:
    """While it is written, a fused module says in a text who fused it, as a state dict does in its recipe."""
    if not fused or RECIPE in vars(module):
        yield
        return
    vars(module)[RECIPE] = f"repfuse {__version__}"
    try:
        yield
    finally:
        del vars(module)[RECIPE]


def _texts_lost(checkpoint: Checkpoint, why: str = "only safetensors holds it") -> list[str]:
    lost = [name for name in checkpoint.metadata if name != "format"]
    return [f"left out of the metadata: {', '.join(lost)} ({why})"] if lost else []


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
