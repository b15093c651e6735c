"""checkpoint file -> network that runs, with an example of its inputs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repfuse.checkpoint.build import build, guessed_shape, is_buildable, known_shape, make_inputs, shapes_of
from repfuse.checkpoint.contents import RECIPE, Around, no_network
from repfuse.checkpoint.formats import damaged
from repfuse.checkpoint.opening import Opened, open_checkpoint
from repfuse.checkpoint.records import module_state, revive, state_of_record
from repfuse.checkpoint.spec import FORMS, ModelSource, Said, Shape, model_source, parse_shapes, render
from repfuse.checkpoint.user_code import Named, named
from repfuse.checkpoint.weights import Naming, check_deploy_mode, deploy_mode, fit, load_weights, match_dtype
from repfuse.errors import RepfuseError, failing_as
from repfuse.networks import device_of, in_training, placed, set_eval
from repfuse.plans import Plan
from repfuse.rewriting import rewrite
from repfuse.wording import first_line, listed

Shapes = tuple[Shape, ...]
UNASKED = 1 << 26  # numbers that an input may have without being asked for
NESTED = 200  # modules in modules: Python itself runs no deeper network


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
    program: torch.export.ExportedProgram | None = None
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
        return deploy_mode(self.module.state_dict())

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
    if model_args and model is None:
        raise RepfuseError("There are model arguments, but no model.", "", "Say which: --model timm:NAME, ...")
    shapes = parse_shapes(input) if input is not None else None
    source = model_source(model, model_args) if model is not None else None
    code = named(allow, Path(path))
    said = said or Said("nobody")
    other = parse_shapes(said.input) if said.input else None
    try:
        opened = open_checkpoint(
            path, weights, trust=code if trust else None, shapes=shapes or other, built=source is not None
        )
        network = _built(opened, source, said, code, trust=trust)
    except RecursionError as error:
        raise damaged(Path(path), "its objects or modules hold each other without end") from error
    what, kinds = f"The network cannot be moved to {device!r}.", (RuntimeError, AssertionError, NotImplementedError)
    with failing_as(what, "Use cpu, or cuda:0, ...", of=kinds, why=first_line):
        module = network.module.to(device)
    inputs, origin, told = _inputs_of(opened, network, shapes, said, module)
    return Checkpoint(
        module=module,
        example_inputs=inputs,
        format=opened.format if network.source is None or opened.format != "pt" else "state-dict",
        path=opened.path,
        digest=opened.digest,
        source=network.source,
        input_origin=origin,
        notes=(*opened.contents.notes, *network.notes, *told),
        plans=network.plans,
        around=replace(opened.contents.around, naming=network.naming),
        metadata={name: text for name, text in opened.metadata.items() if name != RECIPE},
        allow=tuple(allow),
        trust=trust,
        program=opened.program,
        files=opened.files,
    )


def _inputs_of(
    opened: Opened, network: _Network, given: Shapes | None, said: Said, module: nn.Module
) -> tuple[tuple[Tensor, ...], str, tuple[str, ...]]:
    """Return inputs for ``module``, the network where it runs now, where they are from, and what to say of that."""
    if given is None and opened.program is not None:
        from repfuse.checkpoint.exported import flat_inputs  # torch.export takes a second to import

        inputs = placed(flat_inputs(opened.program), device_of(module), {})
        if not said.asked or said.input in (None, render(shapes_of(inputs, module))):
            return inputs, "checkpoint", ()
    shapes, origin, told = _shapes(given, said, opened, network)
    if len(shapes) == len(opened.inputs):
        pairs = zip(shapes, opened.inputs, strict=True)
        shapes = tuple(replace(shape, dtype=shape.dtype or held.dtype) for shape, held in pairs)
    return make_inputs(shapes, module), origin, told


def _shapes(given: Shapes | None, said: Said, opened: Opened, network: _Network) -> tuple[Shapes, str, tuple[str, ...]]:
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
    if said.input and (said.asked or not known) and said.input != render(known):
        known, origin = parse_shapes(said.input), "given"
        told = (f"the input {said.input} is that of {said.by}",)
    elif not known or opened.open:
        known, origin = known or (guessed_shape(network.module),), "guess"
        told = (f"the input {render(known)} is a guess; --input says what it really is",)
    if sum(prod(shape.sizes) for shape in known) > UNASKED:
        what = f"The input of {opened.path} would be {render(known)}, which is very large."
        raise RepfuseError(what, f"That shape is from the {origin}.", "If it is right, say so with --input.")
    return known, origin, told


class _Network(NamedTuple):
    """A network in eval mode with its weights, how it was built, if it was, and how the file names its weights."""

    module: nn.Module
    source: ModelSource | None
    plans: tuple[Plan, ...]
    notes: tuple[str, ...]
    naming: Naming


def _built(opened: Opened, source: ModelSource | None, said: Said, code: Named, *, trust: bool) -> _Network:
    """Return the network of the file: its classes restored, or built by its source and filled."""
    state, recipe = opened.contents.state, opened.recipe
    if state is None:
        return _restored(opened, source, code)
    notes: tuple[str, ...] = ()
    if source is None:
        source, by = (recipe.source, str(opened.path)) if recipe else (said.source, said.by)
        if source is None:
            raise RepfuseError(
                f"{opened.path} holds weights, and not the network that they belong to.",
                f"It is a state dict with {len(state)} entries: {', '.join(list(state)[:4])}, ...",
                f"Say how to build the network: --model {(recipe.made_of if recipe else '') or FORMS}.",
            )
        if not (trust or is_buildable(source, code)):
            raise RepfuseError(
                f"{by} says that {source} builds its network, which means running that code.",
                "repfuse runs no code because a file names it.",
                f"If that is the right code, say so: {source.options}",
            )
        notes = () if recipe else (f"the network is {source}, as {by} says",)
    network = _filled(opened, state, source, recipe.plans if recipe else ())
    return network._replace(notes=(*notes, *network.notes))


def _restored(opened: Opened, source: ModelSource | None, code: Named) -> _Network:
    held = opened.contents.module
    try:
        module = revive(held, opened.path, code)
    except RepfuseError as refused:
        if source is None:
            if module_state(held) is not None:
                refused.hint += " Or give --model: then only the weights are taken from the file."
            raise
        note = f"only the weights are taken from the file, the network is {source}: {refused.why}"
        network = _filled(opened, state_of_record(held), source)
        return network._replace(notes=(note, *network.notes))
    if not isinstance(module, nn.Module):
        raise no_network(opened.path, f"It holds one object of type {type(module).__name__}.")
    if any(name.count(".") > NESTED for name, _ in module.named_modules()):
        raise damaged(opened.path, "its modules hold each other without end")
    notes = [f"the file holds its network itself: {source.spec} is not used"] if source else []
    before = in_training(module)
    set_eval(module)
    still = in_training(module)
    if turned := [name or "the network" for name in before if name not in still]:
        was = f"{listed(turned)} {'was' if len(turned) == 1 else 'were'}"
        notes.append(f"{was} in training mode: all of the network is used in eval mode")
    if still:
        names = listed([name or "the network" for name in still])
        notes.append(f"in training mode, and staying in it after eval(): {names}")
    return _Network(module, None, (), tuple(notes), Naming())


def _filled(
    opened: Opened, state: OrderedDict[str, Tensor], source: ModelSource, plans: tuple[Plan, ...] = ()
) -> _Network:
    """Build the network, fuse it as it was fused before, and only then load the weights."""
    module = build(source, opened.path)
    set_eval(module)
    match_dtype(module, state)
    for plan in plans:
        module = rewrite(module, plan, weights=False)
    naming = fit(state, module, opened.contents.chosen, f"{opened.path} holds")
    weights = naming.of_network(state)
    check_deploy_mode(weights, module.state_dict(), source, str(opened.path))
    match_dtype(module, weights)
    notes = load_weights(module, weights, opened.path, str(source))
    return _Network(module, source, plans, (*naming.notes(), *notes), naming)
