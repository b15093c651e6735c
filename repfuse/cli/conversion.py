"""The steps of `repfuse convert` and `repfuse inspect` between the options and what is shown."""

from __future__ import annotations

import gc
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repfuse import __version__, cli
from repfuse.checking.runs import enough_threads
from repfuse.checkpoint.files import digest_of, together
from repfuse.checkpoint.formats import format_for
from repfuse.checkpoint.spec import as_texts
from repfuse.converting import convert
from repfuse.data import Prepared
from repfuse.errors import RepfuseError
from repfuse.health import examine
from repfuse.loading import Checkpoint, load
from repfuse.memory import collecting_later, is_streamed
from repfuse.networks import half_the_threads, tensors_of, using_threads
from repfuse.plan_file import PlanFile, said_beside
from repfuse.planning.replaying import Choice, choose
from repfuse.plans import Plan
from repfuse.quantization import kernels
from repfuse.readback.process import Reader
from repfuse.report.schema import Chosen, Environment, Input, Output, Report, Status, report_path
from repfuse.report.schema import write as write_document
from repfuse.saving import Begun, Saved, of_file, writing
from repfuse.wording import Progress, dtype_name

TIMING_SECONDS = 1.0
NEUTRAL = "the norms that stay have statistics that change nothing: give --data before you train this network on"
SCALED = "the values between the layers are scaled now: features that are taken from within the network are others"
TWO_AXES = (
    "for inputs of two axes: of three, the BatchNorm1d that is merged normalised the second, the layer has the last"
)
UNTIMED = "not timed, since both networks would be in memory at once: repfuse bench does it"
UNSOLVED = "--equalize makes no difference here: what it does is found out where a file is written"


@dataclass(frozen=True)
class Request:
    """What to convert and where to; ``loading`` is for repfuse.load. ``out`` is None in a dry run.

    ``file`` is what the plan of ``choice`` is from. ``keep_metadata`` says whether the rest of a training checkpoint is
    written too, ``effort`` how much is tried to find a mistake. ``tune`` asks for the doubtful sites to be timed, and
    those left alone that are slower; ``equalize`` for scales between the layers. ``prepared`` makes the inputs that
    these are solved on, and those of which the norms that stay have the statistics.
    """

    source: Path
    loading: dict[str, Any]
    choice: Choice
    file: PlanFile | None = None
    out: Path | None = None
    format: str | None = None
    force: bool = False
    keep_metadata: bool = True
    effort: str = "default"
    tune: bool = False
    equalize: bool = False
    powers_of_two: bool = False
    prepared: Callable[[Checkpoint], Prepared] | None = None


def run(request: Request, progress: Progress, reader: Reader | None = None) -> Report:
    """Do all of it, and return the report, which is also written beside the result; ``reader`` reads that again."""
    progress("reading", 0.0)
    with collecting_later():
        checkpoint = _loaded(request)
        gc.freeze()  # what is imported and loaded stays: nobody need look through it for garbage, not even once
    if request.out is None:
        progress("looking for what can be fused", 0.3)
        found = choose(checkpoint.module, checkpoint.example_inputs, request.choice)
        notes = (*_unchecked(request), *((UNSOLVED,) if request.equalize else ()))
        notes += axes_notes(found, checkpoint.example_inputs)
        status: Status = "planned" if found.sites else "nothing-to-fuse"
        return _report(status, checkpoint, found, request, notes, **_of_weights(checkpoint, found))
    # What cannot be written is said before the work is done.
    format_for(request.out, request.format, checkpoint.format, keep_affine=request.choice.keeps_affine)
    threads = enough_threads(checkpoint.module, checkpoint.example_inputs)  # before anybody else is at work
    busy = reader.prepare(checkpoint.module) if reader else False
    with using_threads(threads), together():
        with ExitStack() as stack:

            def write(plan: Plan, fused: nn.Module) -> Begun:
                assert request.out is not None
                progress("writing the file, and reading it again", 0.55)
                how: dict[str, Any] = {"force": request.force, "keep_metadata": request.keep_metadata, "reader": reader}
                how |= {"format": request.format, "quick": request.effort == "quick"}
                return stack.enter_context(writing(checkpoint, fused, request.out, plan, **how))

            report, module, begun = _proven(checkpoint, request, progress, write, busy=busy)
            if report.status == "failed" or (report.status == "nothing-to-fuse" and not request.force):
                return report
            _, saved = begun or write(report.plan, module)
            progress("reading the file again", 0.7)
            report = with_output(report, saved())
            if request.effort != "quick":
                progress("timing", 0.8)
                report = _timed(report, checkpoint, module)
        report = replace(report, seconds=time.perf_counter() - cli.STARTED)
        write_document("conversion", report.to_dict(), report_path(request.out))
        return report


def _timed(report: Report, checkpoint: Checkpoint, module: nn.Module) -> Report:
    """Add how long both networks take, or why that is not known."""
    if is_streamed(module):  # to time both would mean to hold both
        return replace(report, notes=(*report.notes, UNTIMED))
    from repfuse.benching.benchmark import bench  # which --quick does without

    runtime = "onnxruntime" if checkpoint.format == "onnx" else "eager"
    with of_file(checkpoint, checkpoint.module) as before, of_file(checkpoint, module) as after:
        try:
            timing = bench(before, after, checkpoint.example_inputs, runtimes=(runtime,), seconds=TIMING_SECONDS)
        except RepfuseError as error:
            if checkpoint.format != "onnx":
                raise
            return replace(report, notes=(*report.notes, f"not timed: {error.why}"))  # a dtype that it has not
    return replace(report, timing=timing)


def _loaded(request: Request) -> Checkpoint:
    """Load the checkpoint, with the input and the model that were given for the plan; notes say what that is of."""
    file = request.file
    checkpoint = load(request.source, **request.loading, said=file.said if file else said_beside(request.source))
    made_for = file.origin.input if file else None
    if made_for is None or made_for.digest == checkpoint.digest:
        return checkpoint
    note = f"the plan was made for another file, {made_for.path}: its sites are merged with these weights"
    return replace(checkpoint, notes=(*checkpoint.notes, note))


def _proven(
    checkpoint: Checkpoint,
    request: Request,
    progress: Progress,
    write: Callable[[Plan, nn.Module], Begun],
    *,
    busy: bool,
) -> tuple[Report, nn.Module, Begun | None]:
    """Convert, and ``write`` what is proven, as ``repfuse.saving.writing`` does, before its drift is measured.

    Where another process is ``busy``, which imports what it needs to read the file, it has a core up to the proof.
    """
    choice, notes, weights, begun = request.choice, list[str](), dict[str, Any](), list[Begun]()
    sharing = ExitStack()

    def shown(stage: str, fraction: float) -> None:
        if stage in ("proving", "equalising"):
            sharing.close()
        progress(stage, 0.1 + 0.6 * fraction)

    def proven(plan: Plan, fused: nn.Module) -> None:
        begun.append(write(plan, fused))
        weights.update(_of_weights(checkpoint, plan))  # while another process reads the file
        wait, _ = begun[0]
        wait()  # so that the drift has the cores for itself

    if request.tune:
        from repfuse.benching.sites import tune

        progress("timing the doubtful places", 0.1)
        found = tune(checkpoint.module, choose(checkpoint.module, checkpoint.example_inputs, choice), choice)
        notes += found.said or ("no place is doubtful: none was timed",)
        choice = Choice(plan=found.plan)
    samples = request.prepared(checkpoint)[0] if request.prepared else None
    with sharing:
        if busy:
            sharing.enter_context(half_the_threads())
        conversion = convert(
            checkpoint,
            progress=shown,
            data=samples,
            effort=request.effort,
            equalizing=request.equalize,
            powers_of_two=request.powers_of_two,
            proven=proven,
            **vars(choice),
        )
    plan, module = conversion.plan, conversion.module
    done: Status = "converted" if plan.sites or plan.equalized else "nothing-to-fuse"
    notes += samples.notes if samples else ()
    notes += [NEUTRAL] if plan.keep_affine and plan.sites and not samples else []
    notes += [SCALED] if plan.equalized else []
    notes += conversion.equalization.notes if conversion.equalization else ()
    notes += class_notes(checkpoint.module, module) if checkpoint.format != "onnx" else ()
    notes += axes_notes(plan, checkpoint.example_inputs)
    if conversion.drift is None:
        notes += _unchecked(request)
    elif request.effort == "quick":
        notes.append("proven on few and small inputs, and not timed: leave --quick out before you rely on it")
    measured = {name: getattr(conversion, name) for name in ("proof", "drift", "equalization")}
    measured |= weights or _of_weights(checkpoint, plan)
    status = done if conversion.passed else "failed"
    return _report(status, checkpoint, plan, request, notes, **measured), module, next(iter(begun), None)


def _unchecked(request: Request) -> tuple[str, ...]:
    """Say of an effort that was asked for that nothing is checked."""
    why = f"--{request.effort} makes no difference here: a check is only done of what is fused and written"
    return () if request.effort == "default" else (why,)


def class_notes(original: nn.Module, fused: nn.Module) -> tuple[str, ...]:
    """Say so where the network itself got a new body: its data is kept, the methods of its class are not."""
    if isinstance(fused, type(original)):
        return ()
    after = type(fused)
    kind = "torch.fx.GraphModule" if hasattr(fused, "graph") else f"{after.__module__}.{after.__name__}"
    return (f"the outermost forward was rewritten: the network is a {kind} now, without the methods of its class",)


def axes_notes(plan: Plan, example: Sequence[Any]) -> tuple[str, ...]:
    """Say so where a normalisation of rows is merged into a linear layer: of more axes it was another one."""
    ranks = [x.dim() for x in tensors_of(example)]
    linear = (site.nodes for site in plan.sites if site.kernel.startswith("linear"))
    merged = any("batch_norm" in node for nodes in linear for node in nodes)
    return (TWO_AXES,) if merged and max(ranks, default=0) == 2 else ()


def with_output(report: Report, saved: Saved) -> Report:
    """Add the file that was written."""
    output = Output(str(saved.path), saved.digest, saved.format, saved.verified, saved.use)
    return replace(report, output=output, notes=(*report.notes, *saved.notes))


def _of_weights(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """Return what a report says of the weights alone."""
    return {"health": examine(checkpoint.module), "quantization": kernels(checkpoint.module, plan)}


def _report(
    status: Status, checkpoint: Checkpoint, found: Plan, request: Request, notes: Iterable[str], **measured: Any
) -> Report:
    examples, source, said = checkpoint.example_inputs, checkpoint.source, checkpoint.fused_already
    texts = as_texts(source) if source else []
    earlier = [f"{'' if found.sites or found.equalized else 'nothing to do: '}{said}"] if said else []
    file, globs = request.file, (tuple(request.choice.include), tuple(request.choice.exclude))
    return Report(
        status=status,
        environment=Environment(
            __version__, torch.__version__, platform.python_version(), f"{platform.system()} {platform.machine()}"
        ),
        input=Input(
            *(str(checkpoint.path), checkpoint.digest, checkpoint.format),
            model=source.spec if source else None,
            shapes=tuple(tuple(example.shape) for example in examples),
            dtypes=tuple(dtype_name(example.dtype) for example in examples),
            input_origin=checkpoint.input_origin,
            model_args=None if texts is None else tuple(texts),
        ),
        plan=found,
        seconds=time.perf_counter() - cli.STARTED,
        notes=(*checkpoint.notes, *earlier, *notes),
        chosen=Chosen(str(file.path) if file else None, *globs, digest_of(file.path) if file else None)
        if file or any(globs)
        else None,
        command=shlex.join(["repfuse", *sys.argv[1:]]),
        **measured,
    )
