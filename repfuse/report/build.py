"""The parts of a conversion -> its report."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from repfuse.checkpoint.source import as_texts
from repfuse.report.schema import Environment, Input, Output
from repfuse.version import __version__
from repfuse.wording import dtype_name

if TYPE_CHECKING:
    from repfuse.loading import Checkpoint
    from repfuse.saving import Saved


def environment() -> Environment:
    """Return the versions of this process."""
    import torch

    system = f"{platform.system()} {platform.machine()}"
    return Environment(__version__, torch.__version__, platform.python_version(), system)


def input_of(checkpoint: Checkpoint) -> Input:
    """Return what the report says of a loaded checkpoint."""
    examples = checkpoint.example_inputs
    return Input(
        path=str(checkpoint.path),
        digest=checkpoint.digest,
        format=checkpoint.format,
        model=checkpoint.source.spec if checkpoint.source else None,
        shapes=tuple(tuple(example.shape) for example in examples),
        dtypes=tuple(dtype_name(example.dtype) for example in examples),
        input_origin=checkpoint.input_origin,
        model_args=_arguments(checkpoint),
    )


def _arguments(checkpoint: Checkpoint) -> tuple[str, ...] | None:
    texts = as_texts(checkpoint.source) if checkpoint.source else []
    return None if texts is None else tuple(texts)


def output_of(saved: Saved) -> Output:
    """Return what the report says of a checkpoint that was written."""
    return Output(str(saved.path), saved.digest, saved.format, saved.verified, saved.use)
