"""The options that several commands share, each with its help text once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repfuse.checkpoint.shapes import parse_shapes
from repfuse.checkpoint.source import model_source
from repfuse.errors import RepfuseError

if TYPE_CHECKING:
    from repfuse.data import Wishes


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
        "training checkpoint, .pt2, ONNX, with --trust TorchScript, a snapshot folder of the Hugging Face hub, or "
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
        metavar="CODE",
        help="Also build classes of this code from the file, and run it for that: an installed package, a module that "
        "is found where you stand or beside the checkpoint, or path/to/script.py; repeat it.",
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
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Print the details too: each site, each check.", rich_help_panel=OUTPUT),
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
    """Return what these options say as repfuse.load takes it. Raises RepfuseError where one of them makes no sense."""
    if model is not None:
        model_source(model, model_arg)
    elif model_arg:
        raise RepfuseError("There are model arguments, but no model.", "", "Say which: --model timm:NAME, ...")
    if example is not None:
        parse_shapes(example)
    network = {"model": model, "model_args": model_arg, "weights": weights, "input": example}
    return {**network, "allow": allow or (), "trust": trust}


# How much is tried: the options of `verify` and `convert`. torch is not imported.


Quick = Annotated[
    bool,
    typer.Option(
        "--quick",
        help="Only the example and small inputs, at about a quarter of its size: seconds, for a first look.",
        rich_help_panel=CHECKING,
    ),
]
Thorough = Annotated[
    bool,
    typer.Option(
        "--thorough",
        help="More random inputs, every kind of input at three sizes, larger batches and 32 sizes in a row (each phase "
        "of a stride): several times as long.",
        rich_help_panel=CHECKING,
    ),
]


def effort_of(*, quick: bool, thorough: bool) -> str:
    """Return the effort by name. Raises typer.BadParameter where both are asked for."""
    if quick and thorough:
        raise typer.BadParameter("give --quick or --thorough, not both.")
    return "quick" if quick else "thorough" if thorough else "default"


# The tolerances of `verify`. torch is not imported.


TOLERANCES = "Tolerances in place of what rounding explains"

Rtol = Annotated[
    float | None,
    typer.Option(
        "--rtol",
        metavar="NUMBER",
        help="Call the networks the same where |a - b| <= atol + rtol |a| for every element, in float64 and as stored, "
        "a being the original's. Without --atol, that is 0.",
        rich_help_panel=TOLERANCES,
    ),
]
Atol = Annotated[
    float | None,
    typer.Option("--atol", metavar="NUMBER", help="As --rtol. Without --rtol, that is 0.", rich_help_panel=TOLERANCES),
]


# The options of real data, and what they say.


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
    typer.Option(
        "--limit", metavar="N", min=1, help="Take only N of the samples, evenly spaced.", rich_help_panel=DATA
    ),
]


def check_real(data: Path | None, mean: str | None, std: str | None, limit: int | None) -> None:
    """Raise RepfuseError where there is no data, or nothing that it could be prepared for. torch is not imported."""
    if data is None and (mean, std, limit) != (None, None, None):
        raise RepfuseError("--mean, --std and --limit are about real data.", "There is none.", "Give --data too.")
    if data is not None and not data.exists():
        raise RepfuseError(f"There is no data at {data}.", "", f"Check the path; you are in {Path.cwd()}.")


def wishes_of(mean: str | None, std: str | None, limit: int | None) -> Wishes:
    """Return what the options ask for. Raises RepfuseError where they make no sense."""
    from repfuse.data import Wishes, parse_numbers

    return Wishes(parse_numbers(mean), parse_numbers(std), limit)
