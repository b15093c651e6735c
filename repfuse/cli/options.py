"""The options that several commands share, each with its help text once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

NETWORK = "How the network is built"
TRUST = "What the file may do"
OUTPUT = "Output"
CHECKING = "Checking"

Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="IN",
        show_default=False,
        help="A checkpoint: a pickled module, a state dict, safetensors (also in shards, by their index or folder), a "
        "training checkpoint, .pt2, with --trust TorchScript, a snapshot folder of the Hugging Face hub, or "
        "hf-hub:USER/NAME for one that is fetched.",
    ),
]
Original = Annotated[
    Path, typer.Argument(metavar="ORIGINAL", show_default=False, help="The checkpoint that is known to be right.")
]
Fused = Annotated[Path, typer.Argument(metavar="FUSED", show_default=False, help="The checkpoint to compare with it.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="SPEC",
        help="How to build the network of a state dict: timm:NAME, torchvision:NAME, package.module:callable or "
        "path/to/file.py:callable.",
        rich_help_panel=NETWORK,
    ),
]
ModelArg = Annotated[
    list[str] | None,
    typer.Option(
        "--model-arg", metavar="KEY=VALUE", help="An argument for --model; repeat it.", rich_help_panel=NETWORK
    ),
]
Input = Annotated[
    str | None,
    typer.Option(
        "--input",
        metavar="SHAPE",
        help="The example input, as 1x3x224x224 or 1x3x224x224:float16. Without it: what the checkpoint or the model "
        "source knows, else a guess that is said.",
        rich_help_panel=NETWORK,
    ),
]
Weights = Annotated[
    str,
    typer.Option(
        "--weights",
        metavar="WHICH",
        help="Which weights of a training checkpoint: ema (averaged), model (trained), or a dotted key such as "
        "state_dict.teacher. auto takes the averaged ones where there are some, and says so.",
        rich_help_panel=NETWORK,
    ),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        metavar="PACKAGE",
        help="Also build classes of this installed package from the file; repeat it.",
        rich_help_panel=TRUST,
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Let the file run any code it contains while it is loaded. Only for files you made.",
        rich_help_panel=TRUST,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on standard output.", rich_help_panel=OUTPUT)
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print nothing but errors (and JSON).", rich_help_panel=OUTPUT)
]


def for_load(
    model: str | None,
    model_arg: Sequence[str] | None,
    weights: str,
    example: str | None,
    allow: Sequence[str] | None,
    *,
    trust: bool,
) -> dict[str, Any]:
    """Return what these options say as repfuse.load takes it."""
    network = {"model": model, "model_args": model_arg, "weights": weights, "input": example}
    return {**network, "allow": allow or (), "trust": trust}
