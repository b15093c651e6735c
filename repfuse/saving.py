"""network -> checkpoint file: laid out as its input was, or in another format, and read back before it counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from repfuse.checking.results import Verified
from repfuse.checkpoint import atomic, example
from repfuse.checkpoint.allow import Need, names_refused
from repfuse.checkpoint.around import Around
from repfuse.checkpoint.contents import RECIPE
from repfuse.checkpoint.formats import format_for
from repfuse.checkpoint.inert import origins
from repfuse.checkpoint.opening import digest_of
from repfuse.checkpoint.recipe import Recipe
from repfuse.checkpoint.writing import state_of, write_safetensors, write_torch
from repfuse.errors import EXIT_FAILED_CHECK, RepfuseError
from repfuse.loading import Checkpoint
from repfuse.planning.planner import plan as make_plan
from repfuse.plans import Plan
from repfuse.readback.checking import Check, Written, bare_job, check_read, network_job, weights_job
from repfuse.readback.process import place
from repfuse.version import __version__


@dataclass(frozen=True)
class Saved:
    """A file that was written: its path, digest and format, and what the user must be told of it.

    ``verified`` says how the file was read again and run before it took its place, None where that was left out.
    """

    path: Path
    digest: str
    format: str
    notes: tuple[str, ...] = ()
    verified: Verified | None = None


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
    does where no other process could read the file: its classes are of a notebook, say.

    Raises RepfuseError where ``out`` is the input, exists (without ``force``) or cannot be written, and where the file
    is not what was to be written: then there is none.
    """
    out = Path(out)
    for source in (checkpoint.path, *checkpoint.files):
        atomic.check_target(out, source, force=force)
    form = format_for(out, format, checkpoint.format)
    dropped = [] if keep_metadata else _texts_lost(checkpoint, "as --drop-metadata asks")
    checkpoint = checkpoint if keep_metadata else checkpoint.without_metadata()
    with atomic.replacing(out) as temporary:
        try:
            notes, verified = _checked(partial(_write, checkpoint, module, plan, form, temporary), verify=verify)
        except RepfuseError as error:
            if form != "onnx" or error.exit_code != EXIT_FAILED_CHECK:
                raise
            notes, verified = _checked(partial(_write_program, checkpoint, module, form, temporary, sizes=False))
        digest = digest_of(temporary)
    return Saved(out, digest, form, (*notes, *dropped), verified)


def _checked(write: Callable[[], tuple[list[str], Check]], *, verify: bool = True) -> tuple[list[str], Verified | None]:
    """Write a file; return what the user must be told of it, and what a process found that has read it again."""
    with place() if verify else nullcontext() as reader:
        notes, check = write()
        return notes, check(reader) if reader else None


def _write(
    checkpoint: Checkpoint, module: nn.Module, plan: Plan | None, form: str, path: Path
) -> tuple[list[str], Check]:
    """Write the file at ``path``, and return what the user must be told of it, and what reads it again."""
    if form == "pt":
        return _write_network(checkpoint, module, path)
    if form not in ("pt2", "onnx"):
        return _write_weights(checkpoint, module, plan, form, path)
    return _write_program(checkpoint, module, form, path)


def _write_program(
    checkpoint: Checkpoint, module: nn.Module, form: str, path: Path, *, sizes: bool = True
) -> tuple[list[str], Check]:
    """As ``_write``; without ``sizes`` the file takes those of the example alone."""
    from repfuse.checkpoint.exported import writing  # torch.export takes a second to import
    from repfuse.readback.programs import WrittenProgram, check_program, program_job

    networks, example = (checkpoint.module, module), checkpoint.example_inputs
    write = partial(writing.write_onnx, sizes=sizes) if form == "onnx" else writing.write_pt2
    program, notes = write(writing.Source(*networks, example, checkpoint.program), path)
    alone = [f"{form} holds the network alone: the rest of the training checkpoint is left out"]
    written = WrittenProgram(networks, example, program)
    check = partial(check_program, written, program_job(written, path, onnx=form == "onnx"))
    return (alone if checkpoint.around.keys else []) + notes, check


def _write_network(checkpoint: Checkpoint, module: nn.Module, path: Path) -> tuple[list[str], Check]:
    around = checkpoint.around
    unguarded = ["the file does not check its inputs as the .pt2 did"] if checkpoint.program else []
    with _marked(module, fused=module is not checkpoint.module):
        written = write_torch(module, around, path, trust=checkpoint.trust)
    refused = [] if checkpoint.trust else names_refused(origins(written), checkpoint.allow)
    job = network_job(checkpoint, path, trust=checkpoint.trust or bool(refused))
    notes = around.said() + _texts_lost(checkpoint) + unguarded + _trust_note(refused)
    return notes, partial(check_read, _written(checkpoint, module), job)


def _write_weights(
    checkpoint: Checkpoint, module: nn.Module, plan: Plan | None, form: str, path: Path
) -> tuple[list[str], Check]:
    around, recipe = checkpoint.around, _recipe(checkpoint, module, plan)
    state = state_of(module, around, recipe)
    if form == "state-dict":
        write_torch(state, around, path, trust=False)
        notes = around.said() + _texts_lost(checkpoint)
    else:
        write_safetensors(state, {**checkpoint.metadata, **({RECIPE: recipe} if recipe else {})}, path)
        notes, around = _rest_lost(around), Around()
    written = replace(_written(checkpoint, module), around=around)
    if recipe:
        return notes, partial(check_read, written, weights_job(checkpoint, path, around.keys))
    notes.append("the file does not say how its network is built: load_state_dict takes it")
    return notes, partial(check_read, replace(written, state=state), bare_job(path, around.keys))


def _written(checkpoint: Checkpoint, module: nn.Module) -> Written:
    return Written(checkpoint.module, module, checkpoint.example_inputs, checkpoint.around)


def _rest_lost(around: Around) -> list[str]:
    rest = [*around.kept(), *around.left_out]
    return [f"safetensors holds weights alone: left out of the training checkpoint: {', '.join(rest)}"] if rest else []


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


def _trust_note(refused: Sequence[Need]) -> list[str]:
    """Say so where the new file asks for more than its input did."""
    if not refused:
        return []
    names = ", ".join(str(need.name) for need in refused)
    return [f"this file needs --trust where its input did not, because of {names}; .safetensors would not"]
