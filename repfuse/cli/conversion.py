"""The steps of `repfuse convert` and `repfuse inspect` between the options and what is shown."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repfuse import cli
from repfuse.benching.benchmark import bench
from repfuse.benching.tuning import tune
from repfuse.checking.runs import enough_threads
from repfuse.checkpoint.atomic import replacing, together
from repfuse.checkpoint.formats import format_for
from repfuse.checkpoint.source import as_texts
from repfuse.converting import convert
from repfuse.data import Arrays, Folder, Wishes, prepare
from repfuse.health import examine
from repfuse.loading import Checkpoint, load
from repfuse.networks import using_threads
from repfuse.plan_file import said_beside
from repfuse.planning.choosing import Choice, choose
from repfuse.plans import Plan
from repfuse.quantization import kernels
from repfuse.report.schema import Environment, Input, Output, Report, Status, envelope, report_path, to_json
from repfuse.saving import of_file, save
from repfuse.version import __version__
from repfuse.wording import dtype_name

if TYPE_CHECKING:
    from torch import nn

    from repfuse.cli.options import Wanted
    from repfuse.progress import Progress
    from repfuse.readback.process import Reader

TIMING_SECONDS = 1.0
NEUTRAL = "the norms that stay have statistics that change nothing: give --data before you train this network on"
SCALED = "the values between the layers are scaled now: features that are taken from within the network are others"


@dataclass(frozen=True)
class DataWanted:
    """Real inputs that were found, and what is wished of them."""

    found: Arrays | Folder
    wishes: Wishes


@dataclass(frozen=True)
class Request:
    """What to convert and where to; ``loading`` is for repfuse.load. ``out`` is None in a dry run.

    ``keep_metadata`` says whether the rest of a training checkpoint is written too, ``effort`` how much is tried to
    find a mistake. ``tune`` asks for the doubtful sites to be timed, and those left alone that are slower;
    ``equalize`` for scales between the layers. ``data`` are the inputs that these are solved on, and those of which the
    norms that stay have the statistics.
    """

    source: Path
    out: Path | None
    loading: dict[str, Any]
    wanted: Wanted
    format: str | None
    force: bool
    keep_metadata: bool = True
    effort: str = "default"
    tune: bool = False
    equalize: bool = False
    powers_of_two: bool = False
    data: DataWanted | None = None


def run(request: Request, progress: Progress, reader: Reader | None = None) -> Report:
    """Do all of it, and return the report, which is also written beside the result; ``reader`` reads that again."""
    progress("reading", 0.0)
    checkpoint = _loaded(request)
    if reader:
        reader.prepare(checkpoint.module)
    if request.out is None:
        progress("looking for what can be fused", 0.3)
        return _planned(checkpoint, request)
    keeps = request.wanted.choice.keeps_affine  # what cannot be written is said before the work is done
    format_for(request.out, request.format, checkpoint.format, keep_affine=keeps)
    with using_threads(enough_threads(checkpoint.module, checkpoint.example_inputs)):
        report, module = _proven(checkpoint, request, progress)
        if report.status == "failed" or (report.status == "nothing-to-fuse" and not request.force):
            return report
        progress("timing", 0.7)
        with of_file(checkpoint, checkpoint.module) as before, of_file(checkpoint, module) as after:
            runtime = "onnxruntime" if checkpoint.format == "onnx" else "eager"
            timing = bench(before, after, checkpoint.example_inputs, runtimes=(runtime,), seconds=TIMING_SECONDS)
        progress("writing, and reading it again", 0.9)
        return _saved(replace(report, timing=timing), checkpoint, module, request, reader)


def _saved(
    report: Report, checkpoint: Checkpoint, module: nn.Module, request: Request, reader: Reader | None
) -> Report:
    """Write the result and its report: both or neither."""
    out = request.out
    assert out is not None
    options: dict[str, Any] = {"format": request.format, "force": request.force, "keep_metadata": request.keep_metadata}
    with together():
        saved = save(checkpoint, module, out, plan=report.plan, reader=reader, **options)
        output = Output(str(saved.path), saved.digest, saved.format, saved.verified, saved.use)
        notes = (*report.notes, *saved.notes)
        report = replace(report, output=output, notes=notes, seconds=time.perf_counter() - cli.STARTED)
        with replacing(report_path(out)) as temporary:
            temporary.write_text(to_json(envelope("conversion", report.to_dict())), encoding="utf-8")
    return report


def _loaded(request: Request) -> Checkpoint:
    """Load the checkpoint, with the input and the model that were given for the plan; notes say what that is of."""
    file = request.wanted.file
    checkpoint = load(request.source, **request.loading, said=file.said if file else said_beside(request.source))
    notes = []
    made_for = file.origin.input if file else None
    if made_for and made_for.digest != checkpoint.digest:
        notes.append(f"the plan was made for another file, {made_for.path}: its sites are merged with these weights")
    return replace(checkpoint, notes=(*checkpoint.notes, *notes))


def _planned(checkpoint: Checkpoint, request: Request) -> Report:
    found = choose(checkpoint.module, checkpoint.example_inputs, request.wanted.choice)
    status: Status = "planned" if found.sites else "nothing-to-fuse"
    report = _report(status, checkpoint, found, request.wanted)
    unsaid = ("--equalize makes no difference here: what it does is found out where a file is written",)
    notes = (*report.notes, *_effort_notes(request.effort, checked=False), *(unsaid if request.equalize else ()))
    return replace(report, notes=notes)


def _proven(checkpoint: Checkpoint, request: Request, progress: Progress) -> tuple[Report, nn.Module]:
    original, choice, tuned = checkpoint.module, request.wanted.choice, tuple[str, ...]()
    if request.tune:
        progress("timing the doubtful places", 0.1)
        found = tune(original, choose(original, checkpoint.example_inputs, choice), choice)
        tuned = found.said or ("no place is doubtful: none was timed",)
        choice = Choice(plan=found.plan)
    samples = prepare(request.data.found, checkpoint, request.data.wishes)[0] if request.data else None
    conversion = convert(
        checkpoint,
        progress=lambda stage, fraction: progress(stage, 0.1 + 0.6 * fraction),
        data=samples,
        effort=request.effort,
        equalizing=request.equalize,
        powers_of_two=request.powers_of_two,
        **vars(choice),
    )
    done: Status = "converted" if conversion.plan.sites or conversion.plan.equalized else "nothing-to-fuse"
    status: Status = done if conversion.passed else "failed"
    report = _report(status, checkpoint, conversion.plan, request.wanted)
    notes = (
        *report.notes,
        *tuned,
        *(samples.notes if samples else ()),
        *((NEUTRAL,) if conversion.plan.keep_affine and conversion.plan.sites and not samples else ()),
        *((SCALED,) if conversion.plan.equalized else ()),
        *(conversion.equalization.notes if conversion.equalization else ()),
        *(class_notes(checkpoint.module, conversion.module) if checkpoint.format != "onnx" else ()),
        *_effort_notes(request.effort, checked=conversion.drift is not None),
    )
    report = replace(report, proof=conversion.proof, drift=conversion.drift, notes=notes)
    report = replace(report, equalization=conversion.equalization)
    return report, conversion.module


def _effort_notes(effort: str, *, checked: bool) -> tuple[str, ...]:
    if not checked:
        why = "--{} makes no difference here: a check is only done of what is fused and written"
        return () if effort == "default" else (why.format(effort),)
    return ("proven on few and small inputs: leave --quick out before you rely on it",) if effort == "quick" else ()


def class_notes(original: nn.Module, fused: nn.Module) -> tuple[str, ...]:
    """Say so where the network itself got a new body: its data is kept, the methods of its class are not."""
    before, after = type(original), type(fused)
    if isinstance(fused, before):
        return ()
    kind = "torch.fx.GraphModule" if hasattr(fused, "graph") else f"{after.__module__}.{after.__name__}"
    return (f"the outermost forward was rewritten: the network is a {kind} now, without the methods of its class",)


def _report(status: Status, checkpoint: Checkpoint, found: Plan, wanted: Wanted) -> Report:
    earlier = (
        [f"{'' if found.sites or found.equalized else 'nothing to do: '}{said}"]
        if (said := checkpoint.fused_already)
        else []
    )
    return Report(
        status,
        environment(),
        input_of(checkpoint),
        found,
        time.perf_counter() - cli.STARTED,
        notes=(*checkpoint.notes, *earlier),
        health=examine(checkpoint.module),
        chosen=wanted.chosen,
        command=shlex.join(["repfuse", *sys.argv[1:]]),
        quantization=kernels(checkpoint.module, found),
    )


def environment() -> Environment:
    """Return the versions of this process."""
    import torch

    system = f"{platform.system()} {platform.machine()}"
    return Environment(__version__, torch.__version__, platform.python_version(), system)


def input_of(checkpoint: Checkpoint) -> Input:
    """Return what the report says of a loaded checkpoint."""
    examples, source = checkpoint.example_inputs, checkpoint.source
    texts = as_texts(source) if source else []
    return Input(
        path=str(checkpoint.path),
        digest=checkpoint.digest,
        format=checkpoint.format,
        model=source.spec if source else None,
        shapes=tuple(tuple(example.shape) for example in examples),
        dtypes=tuple(dtype_name(example.dtype) for example in examples),
        input_origin=checkpoint.input_origin,
        model_args=None if texts is None else tuple(texts),
    )
