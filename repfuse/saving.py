"""network -> checkpoint file: laid out as its input was, or in another format, and read back before it counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from repfuse.checkpoint import atomic, example
from repfuse.checkpoint.allow import names_refused
from repfuse.checkpoint.contents import RECIPE
from repfuse.checkpoint.formats import format_for
from repfuse.checkpoint.inert import origins
from repfuse.checkpoint.opening import digest_of
from repfuse.checkpoint.recipe import Recipe
from repfuse.checkpoint.saving import state_of, write_safetensors, write_torch
from repfuse.loading import Checkpoint
from repfuse.planning.planner import plan as make_plan
from repfuse.plans import Plan
from repfuse.verifying.results import Verified
from repfuse.version import __version__


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
    form = format_for(out, format, checkpoint.format)
    dropped = [] if keep_metadata else _texts_lost(checkpoint, "as --drop-metadata asks")
    checkpoint = checkpoint if keep_metadata else checkpoint.without_metadata()
    with atomic.replacing(out) as temporary:
        notes, verified = _write(checkpoint, module, plan, form, temporary)
        digest = digest_of(temporary)
    return Saved(out, digest, form, (*notes, *dropped), verified)


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
    around = checkpoint.around
    if form == "pt":
        unguarded = ["the file does not check its inputs as the .pt2 did"] if checkpoint.program else []
        with _marked(module, fused=module is not checkpoint.module):
            written = write_torch(module, around, path, trust=checkpoint.trust)
        return around.said() + _texts_lost(checkpoint) + unguarded + _trust_note(written, checkpoint)
    recipe = _recipe(checkpoint, module, plan)
    unbuilt = [] if recipe else ["the file does not say how its network is built: load_state_dict takes it"]
    state = state_of(module, around, recipe)
    if form == "state-dict":
        write_torch(state, around, path, trust=False)
        return around.said() + _texts_lost(checkpoint) + unbuilt
    write_safetensors(state, {**checkpoint.metadata, **({RECIPE: recipe} if recipe else {})}, path)
    rest = [*around.kept(), *around.left_out]
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
    plans = (*checkpoint.plans, plan) if plan and plan.rewrites else checkpoint.plans
    return Recipe(checkpoint.source, example.render(shapes), plans).to_text()


def _trust_note(written: Any, checkpoint: Checkpoint) -> list[str]:
    """Say so where the new file asks for more than its input did."""
    refused = [] if checkpoint.trust else names_refused(origins(written), checkpoint.allow)
    if not refused:
        return []
    names = ", ".join(str(need.name) for need in refused)
    return [f"this file needs --trust where its input did not, because of {names}; .safetensors would not"]
