"""network -> checkpoint file: laid out as its input was, or in another format, and read back before it counts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, fx, nn

from repfuse import __version__
from repfuse.checking.results import Verified
from repfuse.checkpoint import onnx_file, safetensors_file, torch_pickle
from repfuse.checkpoint.allow import MAINS, NotAllowedError, names_refused
from repfuse.checkpoint.build import Recipe, is_buildable, shapes_of
from repfuse.checkpoint.contents import RECIPE, Around
from repfuse.checkpoint.files import check_target, digest_of, replacing
from repfuse.checkpoint.formats import Container, format_for
from repfuse.checkpoint.records import origins
from repfuse.checkpoint.spec import as_texts, render
from repfuse.checkpoint.user_code import Named, script
from repfuse.errors import EXIT_FAILED_CHECK, RepfuseError
from repfuse.loading import Checkpoint
from repfuse.networks import half_the_threads
from repfuse.planning.planner import plan as make_plan
from repfuse.plans import Plan
from repfuse.readback import checking
from repfuse.readback.checking import Check
from repfuse.readback.process import Reader
from repfuse.wording import dtype_name

ONE_SIZE = "the file takes the size of the example alone: at others, ONNX would not compute what the network does"
LIBRARIES = ("torch", "torchvision", "timm")
WIDTH = 76  # what a terminal of 80 columns shows of the lines that use a file
Lines = tuple[str, ...]
Use = Callable[[Path], Lines]
Read = tuple[list[str], Use, Verified]
"""What the user must be told of a file, what gives the lines that use it, and what was found in it."""


@dataclass(frozen=True)
class Saved:
    """A file that was written: its path, digest and format, and what the user must be told of it.

    ``use`` are the lines of Python that use it. ``verified`` says how the file was read again and run before it took
    its place, None where that was left out.
    """

    path: Path
    digest: str
    format: str
    notes: tuple[str, ...] = ()
    verified: Verified | None = None
    use: tuple[str, ...] = ()


Begun = tuple[Callable[[], None], Callable[[], Saved]]
"""A file that is being written: what waits for it to be read again, and what says what was found and has it kept."""


def save(
    checkpoint: Checkpoint,
    module: nn.Module,
    out: str | Path,
    *,
    plan: Plan | None = None,
    format: str | None = None,
    force: bool = False,
    keep_metadata: bool = True,
    verify: bool = True,
    reader: Reader | None = None,
) -> Saved:
    """Write ``module``, which was made from ``checkpoint``, to ``out``: as a whole or not at all.

    The format is ``format`` (``pt``, ``pt2``, ``safetensors``, ``state-dict``, ``onnx``), else what the suffix of
    ``out`` says, else the checkpoint's. ``plan`` is the plan that made ``module``; without it, it is made again. It is
    written along with a state dict, so that ``load`` can build the network again. What else the checkpoint holds goes
    along as far as it stays true, unless ``keep_metadata`` is false; the notes name what is kept and what is not.

    The file counts once a fresh Python process has read it again and found in it, bit by bit, what was written, and
    once its outputs are those of ``module`` (for .pt2 and ONNX: those of the checkpoint's network, as near as
    arithmetic explains). ``verify=False`` leaves the fresh process and the runs out: the file is read back only. The
    environment variable REPFUSE_SAME_PROCESS=1 has this process do all that, which ``Saved.verified`` then says, as it
    does where no other process could read the file: its classes are of a notebook, say. ``reader`` is what reads it,
    where that was started before.

    Raises RepfuseError where ``out`` is the input, exists (without ``force``) or cannot be written, and where the file
    is not what was to be written: then there is none.
    """
    options: dict[str, Any] = {"format": format, "force": force, "keep_metadata": keep_metadata, "verify": verify}
    with writing(checkpoint, module, out, plan, reader=reader, **options) as (_, saved):
        return saved()


@contextmanager
def writing(
    checkpoint: Checkpoint,
    module: nn.Module,
    out: str | Path,
    plan: Plan | None,
    *,
    format: str | None = None,
    force: bool = False,
    keep_metadata: bool = True,
    verify: bool = True,
    quick: bool = False,
    reader: Reader | None = None,
) -> Iterator[Begun]:
    """As ``save``: write the file, and have it read while the block goes on, which is given two functions.

    Where that is to be ``quick``, a file of a network or of weights is run on one input. The first waits for what reads
    the file. The second says what was found; then the file takes its place when the block ends without an error. What
    is exported, and a graph of ONNX, are written when that is asked: a failed check is to spare it.
    """
    out = Path(out)
    for source in (checkpoint.path, *checkpoint.files):
        check_target(out, source, force=force)
    form = format_for(out, format, checkpoint.format, keep_affine=plan is not None and plan.keep_affine)
    if form == checkpoint.format == "onnx":
        yield _nothing, partial(_save_graph, checkpoint, module, out, force=force, verify=verify, reader=reader)
        return
    dropped = [] if keep_metadata else _texts_lost(checkpoint, "as --drop-metadata asks")
    checkpoint = checkpoint if keep_metadata else checkpoint.without_metadata()
    found: list[Saved] = []
    with suppress(_NotWanted), ExitStack() as stack, replacing(out) as temporary, ExitStack() as shared:
        reader = reader or stack.enter_context(Reader(fresh=verify))  # a process gets ready while the file is written
        wait, digest = _nothing, cache(partial(digest_of, temporary))
        if form in ("pt2", "onnx"):
            read: Callable[[], Read] = partial(
                _program_written, checkpoint, module, form, temporary, reader=reader, verify=verify
            )
        else:
            shared.enter_context(half_the_threads())
            network = _write_network(checkpoint, module, temporary) if form == "pt" else None
            notes, use, check = network or _write_weights(checkpoint, module, plan, form, temporary)
            answer = cache(check(reader, runs=verify, quick=quick))
            read = lambda: (notes, use, answer())  # noqa: E731

            def wait() -> None:
                digest()  # while the other process works
                answer()
                shared.close()

        def saved() -> Saved:
            wait()
            notes, use, verified = read()
            made = (*notes, *dropped), verified if verify else None, use(out)
            found.append(Saved(out, digest(), form, *made))
            return found[0]

        yield wait, saved
        if not found:
            raise _NotWanted


def _nothing() -> None:
    pass


class _NotWanted(Exception):
    """Nobody asked whether a file was right: it goes."""


@contextmanager
def of_file(checkpoint: Checkpoint, module: nn.Module) -> Iterator[nn.Module]:
    """Give ``module``, which was made from ``checkpoint``; of a graph of ONNX with the file that a runtime is given."""
    if checkpoint.format != "onnx":
        yield module
        return
    from repfuse.checkpoint.onnx_graph.writing import edited, write  # onnx takes a second to import

    with TemporaryDirectory() as folder:
        path = checkpoint.path
        if module is not checkpoint.module:
            path = Path(folder) / "model.onnx"
            write(edited(checkpoint.path, module), path, checkpoint.files)
        yield onnx_file.OfFile(module, path)


def _save_graph(
    checkpoint: Checkpoint, module: nn.Module, out: Path, *, force: bool, verify: bool, reader: Reader | None
) -> Saved:
    """As ``save``, for a graph of ONNX: what is not rewritten stays as it is in the file.

    Large weights may be in a file of their own, beside it and named after it.
    """
    from repfuse.checkpoint.onnx_graph.reading import shapes_said  # onnx takes a second to import
    from repfuse.checkpoint.onnx_graph.writing import check_valid, edited, write

    weights = out.with_name(f"{out.name}.data")
    with ExitStack() as stack, replacing(out) as temporary:
        reader = reader or stack.enter_context(Reader(fresh=verify))
        folder = Path(stack.enter_context(TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", suffix=".part")))
        model = edited(checkpoint.path, module)
        files = write(model, folder / out.name, checkpoint.files)
        check_valid(folder / out.name, checkpoint.path)
        for source in (checkpoint.path, *checkpoint.files) if files else ():
            check_target(weights, source, force=force)
        job = checking.program_job(checkpoint, folder / out.name, "onnx", module=True)
        verified = checking.check_graph(checkpoint, module, model, job, reader, runs=verify)
        digest = digest_of(folder / out.name, *files)
        for file in files:
            file.replace(stack.enter_context(replacing(weights)))
        (folder / out.name).replace(temporary)
    notes = [f"its weights are in {weights.name}: the two belong together"] if files else []
    inputs = shapes_said(model)
    use = _use_of_onnx(inputs, [f"x{number or ''}" for number in range(len(inputs))], out)
    return Saved(out, digest, "onnx", tuple(notes), verified if verify else None, use)


def _program_written(
    checkpoint: Checkpoint, module: nn.Module, form: str, path: Path, *, reader: Reader, verify: bool
) -> Read:
    """Write a file of a program at ``path`` and have it read: of the example's size, where ONNX takes no other."""
    try:
        notes, use, check = _write_program(checkpoint, module, form, path)
        return notes, use, check(reader, runs=verify)
    except RepfuseError as error:
        if form != "onnx" or error.exit_code != EXIT_FAILED_CHECK:
            raise
    notes, use, check = _write_program(checkpoint, module, form, path, sizes=False)
    with Reader(fresh=verify) as another:
        return notes, use, check(another, runs=verify)


def _write_program(
    checkpoint: Checkpoint, module: nn.Module, form: str, path: Path, *, sizes: bool = True
) -> tuple[list[str], Use, Callable[..., Verified]]:
    """Write a file of a program at ``path``; without ``sizes`` it takes those of the example alone.

    Return what the user must be told of it, what gives the lines that use it, and what has it read. ONNX's exporter
    writes some operators for the size that it sees, and says so nowhere.
    """
    from repfuse.checkpoint import exported, pt2_file  # torch.export takes a second to import

    before, example, notes = checkpoint.program, checkpoint.example_inputs, []
    if before is None or not sizes:
        program = exported.program_of(module, example, sizes=sizes)
    else:
        program = before if module is checkpoint.module else exported.program_like(before, module)
    if form == "onnx":
        onnx_file.write(program, path)
        notes = [] if sizes else [ONE_SIZE]
    else:
        pt2_file.write(program, path)
        try:
            pt2_file.check(path, path.read_bytes())
        except RepfuseError as error:
            notes = [f"this file needs --trust: {error.why}"]
        if before is not None and before.dialect != program.dialect:
            dialects = f"{program.dialect} dialect, where the input was {before.dialect}"
            notes.append(f"the program is in torch.export's {dialects}")
    job = checking.program_job(checkpoint, path, "onnx" if form == "onnx" else "pt2")
    alone = [f"{form} holds the network alone: the rest of the training checkpoint is left out"]
    check = partial(checking.check_program, checkpoint, module, program, job)
    return (alone if checkpoint.around.keys else []) + notes, partial(_use_of_program, program, example, form), check


def _write_network(checkpoint: Checkpoint, module: nn.Module, path: Path) -> tuple[list[str], Use, Check]:
    around = checkpoint.around
    unguarded = ["the file does not check its inputs as the .pt2 did"] if checkpoint.program else []
    marked = module is not checkpoint.module and RECIPE not in vars(module)
    try:  # a fused module says in a text who fused it, as a state dict does in its recipe
        vars(module).update({RECIPE: f"repfuse {__version__}"} if marked else {})
        torch_pickle.write(around.put(module), path)
    finally:
        if marked:
            del vars(module)[RECIPE]
    refused: list[NotAllowedError] = []
    if not checkpoint.trust:
        found = around.take(torch_pickle.read(path, Container.TORCH_ZIP, mapped=True))
        refused = names_refused(origins(found), checkpoint.code)
    job = checking.network_job(checkpoint, path, trust=checkpoint.trust or bool(refused))
    notes = around.said() + _texts_lost(checkpoint) + unguarded
    if refused:
        names = ", ".join(str(need.name) for need in refused)
        notes.append(f"this file needs --trust where its input did not, because of {names}; .safetensors would not")
    check = partial(checking.check_read, replace(checkpoint, metadata={}), module, job)
    return notes, partial(_use_of_network, module, around.keys), check


def _write_weights(
    checkpoint: Checkpoint, module: nn.Module, plan: Plan | None, form: str, path: Path
) -> tuple[list[str], Use, Check]:
    around, recipe = checkpoint.around, _recipe(checkpoint, module, plan)
    state: dict[str, Any] = around.naming.of_file(module.state_dict())
    state.update({name: value.detach().cpu() for name, value in state.items() if isinstance(value, Tensor)})
    metadata: dict[str, str] = {}
    if form == "state-dict":
        vars(state)[RECIPE] = recipe.to_text()
        torch_pickle.write(around.put(state), path)
        notes = around.said() + _texts_lost(checkpoint)
    else:
        metadata = {"format": "pt", **checkpoint.metadata}
        safetensors_file.write(state, {**metadata, RECIPE: recipe.to_text()}, path)
        rest = [*around.kept(), *around.left_out]
        lost = f"safetensors holds weights alone: left out of the training checkpoint: {', '.join(rest)}"
        notes, around = [lost] if rest else [], Around(naming=around.naming)
    check = partial(checking.check_read, replace(checkpoint, around=around, metadata=metadata), module)
    use = partial(_use_of_weights, recipe)
    if recipe.source:
        return notes, use, partial(check, checking.weights_job(checkpoint, path, around.keys))
    notes.append("the file does not say how its network is built: that is to be said where it is loaded")
    return notes, use, partial(check, checking.job_of("weights", path, keys=around.keys), state=state)


def _texts_lost(checkpoint: Checkpoint, why: str = "only safetensors holds it") -> list[str]:
    lost = [name for name in checkpoint.metadata if name != "format"]
    return [f"left out of the metadata: {', '.join(lost)} ({why})"] if lost else []


def _recipe(checkpoint: Checkpoint, module: nn.Module, plan: Plan | None) -> Recipe:
    if plan is None and module is not checkpoint.module:
        plan = make_plan(checkpoint.module, checkpoint.example_inputs)
    known = shapes_of(checkpoint.example_inputs, checkpoint.module)
    plans = (*checkpoint.plans, plan) if plan and plan.sites else checkpoint.plans
    source = checkpoint.source if checkpoint.source and as_texts(checkpoint.source) is not None else None
    return Recipe(source, render(known), plans, _made_of(checkpoint))


# The exact lines of Python that use a file which was written.


def _use_of_network(network: nn.Module, keys: Iterable[str], out: Path) -> Lines:
    """Return how a pickled network is loaded, and what Python must find for that."""
    classes = {type(part) for part in network.modules()}
    packages = sorted({cls.__module__.partition(".")[0] for cls in classes} - {*LIBRARIES, *MAINS})
    own = sorted(cls.__name__ for cls in classes if cls.__module__ in MAINS)
    where = [f"# where Python finds {', '.join(packages)}"] if packages else []
    where += [f"# in the script that defines {', '.join(own)}"] if own else []
    taken = "".join(f"[{key!r}]" for key in keys)
    return (*where, "import torch", f"model = torch.load({_text(out)}, weights_only=False){taken}")


def _use_of_weights(recipe: Recipe, out: Path) -> Lines:
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


def _use_of_program(program: torch.export.ExportedProgram, example: Iterable[Tensor], form: str, out: Path) -> Lines:
    """Return how an exported program is loaded, or the ONNX file that was made of it."""
    if form == "pt2":
        return ("import torch", f"model = torch.export.load({_text(out)}).module()")
    names = program.graph_signature.user_inputs
    shapes = [f"{'x'.join(map(str, x.shape))} {dtype_name(x.dtype)}" for x in example]
    return _use_of_onnx(dict(zip(names, shapes, strict=True)), names, out)


def _use_of_onnx(inputs: Mapping[str, str], arrays: Iterable[str], out: Path) -> Lines:
    """Return how an ONNX file is run that takes ``inputs``, with their shapes: they are NumPy ``arrays``."""
    such = [f"{name} of {shape}" for name, shape in inputs.items()]
    given = [f'"{name}": {array}' for name, array in zip(inputs, arrays, strict=True)]
    return (
        "import onnxruntime",
        f"session = onnxruntime.InferenceSession({_text(out)})",
        f"# NumPy arrays, such as {', '.join(such)}",
        *_call("outputs = session.run(None, {", given, "})"),
    )


def _made_of(checkpoint: Checkpoint) -> str:
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
