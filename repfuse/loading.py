"""checkpoint file -> network that runs, with an example of its inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from repfuse.checkpoint.around import Around
from repfuse.checkpoint.contents import RECIPE
from repfuse.checkpoint.deploy import mode
from repfuse.checkpoint.example import guessed_shape, known_shape, make_inputs, shapes_of
from repfuse.checkpoint.network import Network, built
from repfuse.checkpoint.opening import Opened, open_checkpoint
from repfuse.checkpoint.recipe import check_buildable
from repfuse.checkpoint.recognise import damaged, is_hub_name, is_snapshot
from repfuse.checkpoint.shapes import Shape, parse_shapes, render
from repfuse.checkpoint.snapshot import fetch, open_snapshot
from repfuse.checkpoint.source import ModelSource, Said, model_source
from repfuse.checkpoint.user_code import Named, named
from repfuse.errors import RepfuseError
from repfuse.networks import device_of, placed
from repfuse.plans import Plan
from repfuse.rewriting import rewrite
from repfuse.wording import first_line

if TYPE_CHECKING:
    from torch.export import ExportedProgram

ONE_FILE = "a fused network is no architecture of timm any more: what is written from this folder is one file"
Shapes = tuple[Shape, ...]
UNASKED = 1 << 26  # numbers that an input may have without being asked for


@dataclass(frozen=True)
class Checkpoint:
    """A network from a file, in eval mode with its weights, and what is known of it.

    ``format`` is ``pt`` (a pickled network), ``state-dict``, ``safetensors``, ``pt2``, ``torchscript`` or ``onnx``;
    ``digest`` is that of the file. ``source`` says how the network was built and ``plans`` how it was fused since,
    where the file holds weights alone. ``input_origin`` says where the shape of ``example_inputs`` is from: ``given``,
    ``checkpoint``, ``model source`` or ``guess``. ``notes`` are what the user must be told. ``around``, ``metadata``,
    ``allow``, ``trust``, the exported ``program`` in the file and the ``files`` that hold its weights are for ``save``.
    """

    module: nn.Module
    example_inputs: tuple[Tensor, ...]
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

    @property
    def code(self) -> Named:
        """What of the code that the file names may run."""
        return named(self.allow, self.path)

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
    said: Said | None = None,
) -> Checkpoint:
    """Return the checkpoint at ``path``, whose format is recognised by its content.

    ``path`` may also be a snapshot folder of the Hugging Face hub for timm, or ``hf-hub:USER/NAME``, which is fetched.
    ``model`` names how to build the network of a state dict (``timm:NAME``, ``torchvision:NAME``,
    ``package.module:callable``, ``path/to/file.py:callable``), ``model_args`` its arguments. ``input`` is an example's
    shape (``1x3x224x224``). ``weights`` picks one of several networks in a file: ``ema`` (averaged), ``model``
    (trained), a dotted key, or ``auto``: the averaged one where there is one. No code of the file runs: it may name
    networks of torch, torchvision, timm and of the code in ``allow``: packages, modules that are found where the
    process runs or beside the file, and paths of Python files, also of the script that saved it; ``trust`` lets it run
    anything. ``said`` is what a report or a plan says of the file, for what is neither given nor in the file.
    Raises RepfuseError with what is wrong and what to do.
    """
    given = list(model_args.items() if isinstance(model_args, Mapping) else model_args or ())
    if given and model is None:
        raise RepfuseError("There are model arguments, but no model.", "", "Say which: --model timm:NAME, ...")
    shapes = parse_shapes(input) if input is not None else None
    source = model_source(model, model_args) if model is not None else None
    code = named(allow, Path(path))
    other = parse_shapes(said.input) if said is not None and said.input else None
    try:
        opened, found = _opened(path, weights, shapes or other, trust=code if trust else None, built=source is not None)
        weights_alone = opened.contents.state is not None and opened.recipe is None
        if source is None and said is not None and said.source is not None and weights_alone:
            source = said.source
            if not trust:
                check_buildable(source, said.by, code)
            found = (*found, f"the network is {source}, as {said.by} says")
        network = built(opened, source, code, partial(rewrite, weights=False), trust=trust)
    except RecursionError as error:
        raise damaged(Path(path), "its objects or modules hold each other without end") from error
    try:
        module = network.module.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        what = f"The network cannot be moved to {device!r}."
        raise RepfuseError(what, first_line(error), "Use cpu, or cuda:0, ...") from error
    inputs, origin, told = _inputs_of(opened, network, shapes, said, module)
    return Checkpoint(
        module=module,
        example_inputs=inputs,
        format=opened.format if network.source is None or opened.format != "pt" else "state-dict",
        path=opened.path,
        digest=opened.digest,
        source=network.source,
        input_origin=origin,
        notes=(*found, *opened.contents.notes, *network.notes, *told),
        plans=network.plans,
        around=replace(opened.contents.around, naming=network.naming),
        metadata={name: text for name, text in opened.metadata.items() if name != RECIPE},
        allow=tuple(allow),
        trust=trust,
        program=opened.program,
        files=opened.files,
    )


def _opened(
    path: str | Path, weights: str, shapes: Shapes | None, *, trust: Named | None, built: bool
) -> tuple[Opened, tuple[str, ...]]:
    """Return what is at ``path``, and what to say of where it was found."""
    if not is_hub_name(path) and not is_snapshot(Path(path)):
        return open_checkpoint(Path(path), weights, trust=trust, shapes=shapes), ()
    folder, revision = fetch(str(path)) if is_hub_name(path) else (Path(path), "")
    opened = open_snapshot(folder, weights, trust=trust, built=built)
    said = (f"{path} is revision {revision} of the hub, kept in {folder}",) if revision else ()
    return opened, (*said, ONE_FILE)


def _inputs_of(
    opened: Opened, network: Network, given: Shapes | None, said: Said | None, module: nn.Module
) -> tuple[tuple[Tensor, ...], str, tuple[str, ...]]:
    """Return inputs for ``module``, the network where it runs now, where they are from, and what to say of that.

    Raises RepfuseError where nobody asked for their size, and it is out of all proportion.
    """
    if given is None and opened.program is not None:
        from repfuse.checkpoint.exported.program import flat_inputs  # torch.export takes a second to import

        inputs = placed(flat_inputs(opened.program), device_of(module), {})
        if said is None or not said.asked or said.input in (None, render(shapes_of(inputs, module))):
            return inputs, "checkpoint", ()
    shapes, origin, told = _shapes(given, said, opened, network)
    if len(shapes) == len(opened.inputs):
        pairs = zip(shapes, opened.inputs, strict=True)
        shapes = tuple(replace(shape, dtype=shape.dtype or held.dtype) for shape, held in pairs)
    return make_inputs(shapes, module), origin, told


def _shapes(
    given: Shapes | None, said: Said | None, opened: Opened, network: Network
) -> tuple[Shapes, str, tuple[str, ...]]:
    if given is not None:
        return given, "given", ()
    if opened.recipe is not None and opened.recipe.input:
        known, origin = parse_shapes(opened.recipe.input), "checkpoint"
    elif opened.inputs:  # floating ones are of the dtype that the file says, as they are for any other network
        plain = (replace(each, dtype=None) if "float" in str(each.dtype) else each for each in opened.inputs)
        known, origin = tuple(plain), "checkpoint"
    else:
        shape = known_shape(network.module, network.source.arguments if network.source else {})
        known, origin = (shape,) if shape else (), "model source" if network.source else "checkpoint"
    told: tuple[str, ...] = ()
    if said is not None and said.input and (said.asked or not known) and said.input != render(known):
        known, origin = parse_shapes(said.input), "given"
        told = (f"the input {said.input} is that of {said.by}",)
    elif not known:
        known, origin = (guessed_shape(network.module),), "guess"
        told = (_guess(known),)
    elif opened.open:
        origin, told = "guess", (_guess(known),)
    if sum(prod(shape.sizes) for shape in known) > UNASKED:
        what = f"The input of {opened.path} would be {render(known)}, which is very large."
        raise RepfuseError(what, f"That shape is from the {origin}.", "If it is right, say so with --input.")
    return known, origin, told


def _guess(known: Shapes) -> str:
    return f"the input {render(known)} is a guess; --input says what it really is"
