"""The two checkpoints that `verify`, `bench` and `check` compare: loaded, compared, and timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from repfuse.benching.results import Benchmark
from repfuse.checking.results import Verification
from repfuse.checkpoint.spec import Said, Shape, render
from repfuse.cli.options import Code, OneNetwork
from repfuse.cli.output import check_sources, notes
from repfuse.plan_file import said_beside
from repfuse.plans import Plan

if TYPE_CHECKING:
    from repfuse.loading import Checkpoint


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


Side = tuple[Path, dict[str, Any]]
"""A file, and how it is loaded."""


def sides(paths: tuple[Path, Path], networks: tuple[OneNetwork, OneNetwork], code: Code) -> tuple[Side, Side]:
    """Return what the options say of both. Raises RepfuseError where one makes no sense, or a file is no checkpoint."""
    check_sources(paths)
    original, fused = ((path, network.loading(code)) for path, network in zip(paths, networks, strict=True))
    return original, fused


def load_pair(original: Side, second: Side) -> Pair:
    """Load both. What neither an option nor ORIGINAL says of itself, the report beside FUSED may, or FUSED itself."""
    from repfuse.checkpoint.build import shapes_of
    from repfuse.loading import load

    (path, loading), (fused_path, fused_loading) = original, second
    fused = load(fused_path, **fused_loading, said=said_beside(fused_path))
    known = fused.input_origin == "checkpoint" and fused.plans
    shapes = render(shapes_of(fused.example_inputs, fused.module)) if known else None
    said = said_beside(fused_path, path) or Said(fused_path.name, fused.source, shapes)
    return Pair(load(path, **loading, said=said), fused)


def compare_pair(loaded: Pair, plan: Plan | None, **settings: Any) -> Verification:
    """Hold both against each other, in as many threads as they are worth. ``settings`` are those of repfuse.verify."""
    from repfuse.checking.runs import enough_threads
    from repfuse.checking.verification import verify
    from repfuse.networks import using_threads

    original, fused = loaded
    module, example, notes = fused.module, original.example_inputs, list[str]()
    if plan is not None and plan.sites and original.format == fused.format == "onnx":
        from repfuse.checkpoint.onnx_graph.writing import with_numbers_of  # onnx takes a second to import
        from repfuse.rewriting import rewrite

        module = rewrite(original.module, plan, weights=False)
        if not with_numbers_of(fused.path, original.path, module):
            module, plan = fused.module, None
            notes.append(f"{fused.path} is another graph than its plan makes: it is compared as a whole.")
    with using_threads(enough_threads(original.module, example)):
        result = verify(original.module, module, example, plan=plan, **settings)
    return replace(result, notes=(*result.notes, *notes))


def time_pair(
    loaded: Pair, runtimes: Sequence[str] = (), inputs: Sequence[Sequence[Shape]] = (), **settings: Any
) -> Benchmark:
    """Time both as they are deployed: an ONNX file as that file, in ONNX Runtime unless ``runtimes`` say otherwise.

    On all ``inputs``, or the original's example where there are none. ``settings`` are those of ``repfuse.bench``.
    """
    from repfuse.benching.benchmark import bench
    from repfuse.checkpoint.build import make_inputs
    from repfuse.saving import of_file

    original, fused = loaded
    usual = "onnxruntime" if "onnx" in (original.format, fused.format) else "eager"
    with of_file(original, original.module) as before, of_file(fused, fused.module) as after:
        example, *more = [make_inputs(shapes, original.module) for shapes in inputs] or [original.example_inputs]
        return bench(before, after, example, more_inputs=more, runtimes=runtimes or (usual,), **settings)
