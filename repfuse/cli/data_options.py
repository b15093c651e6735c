"""The options of real data, and what they say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from repfuse.data import Wishes

DATA = "Real data"

DataPath = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="PATH",
        help="Real inputs: a folder of images (in folders per class where the classes are known), or .safetensors, "
        ".npz or .pt with `inputs` and, if known, `labels`.",
        rich_help_panel=DATA,
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        "--mean",
        metavar="NUMBERS",
        help="The mean of each channel that is subtracted from images (pixels in 0..1), as 0.485,0.456,0.406. Without "
        "it: what the checkpoint or the model source knows.",
        rich_help_panel=DATA,
    ),
]
Std = Annotated[
    str | None,
    typer.Option(
        "--std",
        metavar="NUMBERS",
        help="The standard deviation of each channel that images are divided by, as 0.229,0.224,0.225.",
        rich_help_panel=DATA,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", help="Take only N of the samples, evenly spaced.", rich_help_panel=DATA),
]


def wishes_of(data: Path | None, mean: str | None, std: str | None, limit: int | None) -> Wishes:
    """Return what the options ask for. Raises RepfuseError where they make no sense, or there is no data."""
    from repfuse.data import Wishes
    from repfuse.data.wishes import parse_numbers
    from repfuse.errors import RepfuseError

    if data is None and (mean, std, limit) != (None, None, None):
        raise RepfuseError("--mean, --std and --limit are about real data.", "There is none.", "Give --data too.")
    return Wishes(parse_numbers(mean), parse_numbers(std), limit)
