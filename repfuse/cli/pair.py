"""The two checkpoints that `verify` and `bench` compare, and the options that say how to load them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from repfuse.cli.options import for_load, network
from repfuse.cli.output import check_sources, notes
from repfuse.errors import RepfuseError

if TYPE_CHECKING:
    from repfuse.benching.results import Benchmark
    from repfuse.checkpoint.spec import Said, Shape
    from repfuse.loading import Checkpoint

FusedModel = Annotated[
    str | None,
    network(
        "--fused-model",
        metavar="SPEC",
        help="How to build the network of FUSED, where that differs and the file does not say it itself.",
    ),
]
FusedModelArg = Annotated[
    list[str] | None,
    network("--fused-model-arg", metavar="KEY=VALUE", help="An argument for --fused-model."),
]
FusedWeights = Annotated[
    str,
    network("--fused-weights", metavar="WHICH", help="As --weights, for FUSED."),
]


class Pair(NamedTuple):
    """Both checkpoints, loaded."""

    original: Checkpoint
    fused: Checkpoint

    @property
    def files(self) -> dict[str, Any]:
        """Which files a result is of, for its document."""
        return {"files": {"original": self.original.digest, "fused": self.fused.digest}}

    def notes(self, *, quiet: bool) -> None:
        """Print what the user must be told of both on standard error."""
        for checkpoint in self:
            notes(checkpoint.path, checkpoint.notes, quiet=quiet)


Source = tuple[str | None, Sequence[str] | None, str]
"""How one side's network is built, by a spec and its arguments, and which weights of the file it has."""
Side = tuple[Path, dict[str, Any]]
"""A file, and how it is loaded."""


def sides(
    paths: tuple[Path, Path],
    source: Source,
    fused_source: Source,
    *,
    example: str | None,
    allow: Sequence[str] | None,
    trust: bool,
) -> tuple[Side, Side]:
    """Return what the options say of both; FUSED is built by ``source`` where it has no source of its own.

    Raises RepfuseError where an option makes no sense, or a file is no checkpoint. torch is not imported.
    """
    model, arguments, weights = fused_source
    if arguments and not model:
        what = "There are arguments of --fused-model-arg, but no --fused-model."
        raise RepfuseError(what, "", "Say which network they are for: --fused-model timm:NAME, ...")
    check_sources(paths)
    fused_source = fused_source if model else (*source[:2], weights)
    loading = (for_load(*each, example, allow, trust=trust) for each in (source, fused_source))
    original, fused = zip(paths, loading, strict=True)
    return original, fused


def load_pair(original: Side, fused: Side) -> Pair:
    """Load both. What neither an option nor ORIGINAL says of itself, the report beside FUSED may, or FUSED itself."""
    from repfuse.loading import load
    from repfuse.plan_file import said_beside

    (path, loading), (fused_path, fused_loading) = original, fused
    second = load(fused_path, **fused_loading, said=said_beside(fused_path))
    return Pair(load(path, **loading, said=said_beside(fused_path, path) or _said_by(second)), second)


def time_pair(
    loaded: Pair, runtimes: Sequence[str] = (), inputs: Sequence[Sequence[Shape]] = (), **settings: Any
) -> Benchmark:
    """Time both as they are deployed: an ONNX file as that file, in ONNX Runtime unless ``runtimes`` say otherwise.

    On all ``inputs``, or the original's example where there are none. ``settings`` are those of ``repfuse.bench``.
    """
    from repfuse.benching.benchmark import bench
    from repfuse.checkpoint.example import make_inputs
    from repfuse.saving import of_file

    original, fused = loaded
    usual = "onnxruntime" if "onnx" in (original.format, fused.format) else "eager"
    with of_file(original, original.module) as before, of_file(fused, fused.module) as after:
        example, *more = [make_inputs(shapes, original.module) for shapes in inputs] or [original.example_inputs]
        return bench(before, after, example, more_inputs=more, runtimes=runtimes or (usual,), **settings)


def _said_by(fused: Checkpoint) -> Said:
    """Return what FUSED says of its original: the network, and the input where it holds one."""
    from repfuse.checkpoint.example import shapes_of
    from repfuse.checkpoint.spec import Said, render

    known = fused.input_origin == "checkpoint" and fused.plans
    shapes = render(shapes_of(fused.example_inputs, fused.module)) if known else None
    return Said(fused.path.name, fused.source, shapes)
