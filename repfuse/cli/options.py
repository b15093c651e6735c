"""The options that several commands share, each with its help text once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repfuse.checkpoint.spec import model_source, parse_shapes
from repfuse.errors import RepfuseError
from repfuse.plans import Policy

if TYPE_CHECKING:
    from repfuse.plan_file import PlanFile
    from repfuse.planning.choosing import Choice
    from repfuse.report.schema import Chosen


network = partial(typer.Option, rich_help_panel="How the network is built")
trust = partial(typer.Option, rich_help_panel="What the file may do")
output = partial(typer.Option, rich_help_panel="Output")
checking = partial(typer.Option, rich_help_panel="Checking")

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
    network(
        "--model",
        metavar="SPEC",
        help="How to build the network of a state dict: timm:NAME, torchvision:NAME, package.module:callable or "
        "path/to/file.py:callable.",
    ),
]
ModelArg = Annotated[
    list[str] | None,
    network("--model-arg", metavar="KEY=VALUE", help="An argument for --model; repeat it."),
]
INPUT = (
    "The example input, as 1x3x224x224 or 1x3x224x224:float16. Without it: what the checkpoint or the model source "
    "knows, else a guess that is said."
)
Input = Annotated[str | None, network("--input", metavar="SHAPE", help=INPUT)]
Weights = Annotated[
    str,
    network(
        "--weights",
        metavar="WHICH",
        help="Which weights of a training checkpoint: ema (averaged), model (trained), or a dotted key such as "
        "state_dict.teacher. auto takes the averaged ones where there are some, and says so.",
    ),
]
Allow = Annotated[
    list[str] | None,
    trust(
        "--allow",
        metavar="CODE",
        help="Also build classes of this code from the file, and run it for that: an installed package, a module that "
        "is found where you stand or beside the checkpoint, or path/to/script.py; repeat it.",
    ),
]
Trust = Annotated[
    bool,
    trust("--trust", help="Let the file run any code it contains while it is loaded. Only for files you made."),
]
Json = Annotated[bool, output("--json", help="Print the result as JSON on standard output.")]
Quiet = Annotated[bool, output("--quiet", "-q", help="Print nothing but errors (and JSON).")]
Verbose = Annotated[
    bool,
    output("--verbose", "-v", help="Print the details too: each site, each check."),
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
    checking(
        "--quick", help="Only the example and small inputs, at about a quarter of its size: seconds, for a first look."
    ),
]
Thorough = Annotated[
    bool,
    checking(
        "--thorough",
        help="More random inputs, every kind of input at three sizes, larger batches and 32 sizes in a row (each phase "
        "of a stride): several times as long.",
    ),
]


def effort_of(*, quick: bool, thorough: bool) -> str:
    """Return the effort by name. Raises typer.BadParameter where both are asked for."""
    if quick and thorough:
        raise typer.BadParameter("give --quick or --thorough, not both.")
    return "quick" if quick else "thorough" if thorough else "default"


# The tolerances of `verify`. torch is not imported.


tolerance = partial(typer.Option, rich_help_panel="Tolerances in place of what rounding explains")

Rtol = Annotated[
    float | None,
    tolerance(
        "--rtol",
        metavar="NUMBER",
        help="Call the networks the same where |a - b| <= atol + rtol |a| for every element, in float64 and as stored, "
        "a being the original's. Without --atol, that is 0.",
    ),
]
Atol = Annotated[
    float | None,
    tolerance("--atol", metavar="NUMBER", help="As --rtol. Without --rtol, that is 0."),
]


# The options of real data, and what they say.


data = partial(typer.Option, rich_help_panel="Real data")

DataPath = Annotated[
    Path | None,
    data(
        "--data",
        metavar="PATH",
        help="Real inputs: a folder of images (in folders per class where the classes are known), or .safetensors, "
        ".npz or .pt with `inputs` and, if known, `labels`.",
    ),
]
Mean = Annotated[
    str | None,
    data(
        "--mean",
        metavar="NUMBERS",
        help="The mean of each channel that is subtracted from images (pixels in 0..1), as 0.485,0.456,0.406. Without "
        "it: what the checkpoint or the model source knows.",
    ),
]
Std = Annotated[
    str | None,
    data(
        "--std",
        metavar="NUMBERS",
        help="The standard deviation of each channel that images are divided by, as 0.229,0.224,0.225.",
    ),
]
Limit = Annotated[
    int | None,
    data("--limit", metavar="N", min=1, help="Take only N of the samples, evenly spaced."),
]


def check_real(data: Path | None, mean: str | None, std: str | None, limit: int | None) -> None:
    """Raise RepfuseError where there is no data, or nothing that it could be prepared for. torch is not imported."""
    if data is None and (mean, std, limit) != (None, None, None):
        raise RepfuseError("--mean, --std and --limit are about real data.", "There is none.", "Give --data too.")
    if data is not None and not data.exists():
        raise RepfuseError(f"There is no data at {data}.", "", f"Check the path; you are in {Path.cwd()}.")


# What is merged: the options that say which sites, and what they mean together.


choice = partial(typer.Option, rich_help_panel="What is merged")

Merging = Annotated[
    Policy | None,
    choice(
        "--policy",
        help="What to merge of all that can be merged exactly: what is predicted to be faster (cost, the default), "
        "whatever leaves fewer operators (always), or as cost but no layers in a row (never-compose).",
        show_default=False,
    ),
]
PlanIn = Annotated[
    Path | None,
    choice(
        "--plan",
        metavar="FILE",
        help="Merge exactly the sites of this plan, which `repfuse inspect --plan` wrote, and you may have dropped "
        "sites from.",
    ),
]
Include = Annotated[
    list[str] | None,
    choice(
        "--include",
        metavar="GLOB",
        help="Merge only the sites whose path, or a module around them, matches: 'stages.1', '*.mlp.*'; repeat it. "
        "* stands for dots too.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    choice(
        "--exclude",
        metavar="GLOB",
        help="Leave these sites alone, in the same way; repeat it. It goes before --include.",
    ),
]
KeepClass = Annotated[
    bool | None,
    choice(
        "--keep-class/--drop-class",
        help="Leave the outermost module what it is, with its class and methods, or merge also what stands in its own "
        "forward, for which it becomes a GraphModule. Without it: as more than 5 % of the time is predicted to be "
        "gained, or not.",
        show_default=False,
    ),
]


KeepAffine = Annotated[
    bool,
    choice(
        "--keep-affine",
        help="Leave a BatchNorm behind each convolution that is merged, which has the scale of each channel and the "
        "shift: for training with simulated quantisation (`repfuse explain int8`). A convolution with its own norm "
        "stays as it is.",
    ),
]


@dataclass(frozen=True)
class Wanted:
    """What the user wants merged, and the file that the plan is from, where there is one."""

    choice: Choice
    file: PlanFile | None

    @property
    def chosen(self) -> Chosen | None:
        """What the report says of it, None where nothing was chosen."""
        from repfuse.checkpoint.files import digest_of
        from repfuse.report.schema import Chosen

        globs = tuple(self.choice.include), tuple(self.choice.exclude)
        if self.file:
            return Chosen(str(self.file.path), *globs, digest_of(self.file.path))
        return Chosen(None, *globs) if any(globs) else None


def wanted(
    policy: Policy | None,
    plan: Path | None,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    keep_class: bool | None,
    *,
    keep_affine: bool = False,
) -> Wanted:
    """Read what the options say. Raises RepfuseError where the file is no plan, or where they contradict each other."""
    from repfuse.plan_file import read_plan_file

    file = read_plan_file(plan) if plan else None
    from repfuse.planning.choosing import Choice  # it imports torch: a file that cannot be read is said before

    given = file.plan if file else None
    choice = Choice(policy, given, tuple(include or ()), tuple(exclude or ()), keep_class, keep_affine)
    return Wanted(choice, file)
