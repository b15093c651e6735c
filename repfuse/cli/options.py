"""The options that several commands share, in groups: each has its help texts once, and what they mean together.

torch is not imported: what makes no sense is said at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from functools import partial, wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from repfuse.checkpoint.spec import model_source, parse_shapes
from repfuse.errors import RepfuseError
from repfuse.plan_file import PlanFile
from repfuse.plans import Policy

if TYPE_CHECKING:
    from repfuse.data import Prepared
    from repfuse.planning.replaying import Choice


def option(*names: str, default: Any = None, **settings: Any) -> Any:
    """Return an option of a command or of a group, which stands there as its default does; see ``spread``.

    Without ``names`` it has that of the argument or field: --keep-affine of keep_affine.
    """
    return field(default=default, metadata={"names": names, "settings": settings})


building = partial(option, rich_help_panel="How the network is built")
trusting = partial(option, rich_help_panel="What the file may do")
output = partial(option, rich_help_panel="Output")
checking = partial(option, rich_help_panel="Checking")
tolerance = partial(option, rich_help_panel="Tolerances in place of what rounding explains")
real_data = partial(option, rich_help_panel="Real data")
choosing = partial(option, rich_help_panel="What is merged")


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command as Typer takes it, which knows no groups: in the place of each stand the options in it."""
    hints: dict[str, Any] = get_type_hints(command, include_extras=True)
    parameters = list[Parameter]()
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}

    def add(name: str, kind: Any, found: Field[Any]) -> None:
        names = found.metadata["names"] or (f"--{name.replace('_', '-')}",)
        annotation = Annotated[kind, typer.Option(*names, **found.metadata["settings"])]
        parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=found.default, annotation=annotation))

    for name, parameter in signature(command).parameters.items():
        if name in groups:
            kinds = get_type_hints(groups[name])
            for each in fields(groups[name]):
                add(each.name, kinds[each.name], each)
        elif isinstance(parameter.default, Field):
            add(name, hints[name], parameter.default)
        else:
            parameters.append(parameter.replace(annotation=hints[name]))

    @wraps(command)
    def called(**given: Any) -> None:
        made = {
            name: group(**{each.name: given.pop(each.name) for each in fields(group)}) for name, group in groups.items()
        }
        command(**given, **made)

    called.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


# Files, and how their networks are built.

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
INPUT = (
    "The example input, as 1x3x224x224 or 1x3x224x224:float16. Without it: what the checkpoint or the model source "
    "knows, else a guess that is said."
)
WEIGHTS = partial(
    building,
    default="auto",
    metavar="WHICH",
    help="Which weights of a training checkpoint: ema (averaged), model (trained), or a dotted key such as "
    "state_dict.teacher. auto takes the averaged ones where there are some, and says so.",
)
FUSED_WEIGHTS = building("--fused-weights", default="auto", metavar="WHICH", help="As --weights, for FUSED.")


@dataclass(frozen=True)
class Code:
    """What of the code may run that a file names."""

    allow: list[str] | None = trusting(
        metavar="CODE",
        help="Also build classes of this code from the file, and run it for that: an installed package, a module "
        "that is found where you stand or beside the checkpoint, or path/to/script.py; repeat it.",
    )
    trust: bool = trusting(
        default=False, help="Let the file run any code it contains while it is loaded. Only for files you made."
    )


@dataclass(frozen=True)
class Source:
    """What builds the network of a file."""

    model: str | None = building(
        metavar="SPEC",
        help="How to build the network of a state dict: timm:NAME, torchvision:NAME, package.module:callable or "
        "path/to/file.py:callable.",
    )
    model_arg: list[str] | None = building(metavar="KEY=VALUE", help="An argument for --model; repeat it.")


@dataclass(frozen=True)
class OneNetwork(Source):
    """How the network of a file is built, with which weights, and what it takes."""

    weights: str = WEIGHTS()
    example: str | None = building("--input", metavar="SHAPE", help=INPUT)

    def loading(self, code: Code) -> dict[str, Any]:
        """Return what this says as repfuse.load takes it. Raises RepfuseError where an option makes no sense."""
        if self.model is not None:
            model_source(self.model, self.model_arg)
        elif self.model_arg:
            raise RepfuseError("There are model arguments, but no model.", "", "Say which: --model timm:NAME, ...")
        if self.example is not None:
            parse_shapes(self.example)
        network = {"model": self.model, "model_args": self.model_arg, "weights": self.weights, "input": self.example}
        return {**network, "allow": code.allow or (), "trust": code.trust}


@dataclass(frozen=True)
class TwoNetworks(Source):
    """How the networks of two files are built that are compared."""

    fused_model: str | None = building(
        metavar="SPEC",
        help="How to build the network of FUSED, where that differs and the file does not say it itself.",
    )
    fused_model_arg: list[str] | None = building(metavar="KEY=VALUE", help="An argument for --fused-model.")
    weights: str = WEIGHTS()

    def both(self, example: str | None, fused_weights: str = "auto") -> tuple[OneNetwork, OneNetwork]:
        """Return that of each; FUSED is built as the original where it has no source of its own.

        Raises RepfuseError where there are arguments for nothing.
        """
        original = OneNetwork(self.model, self.model_arg, self.weights, example)
        if self.fused_model:
            return original, OneNetwork(self.fused_model, self.fused_model_arg, fused_weights, example)
        if self.fused_model_arg:
            what = "There are arguments of --fused-model-arg, but no --fused-model."
            raise RepfuseError(what, "", "Say which network they are for: --fused-model timm:NAME, ...")
        return original, replace(original, weights=fused_weights)


# What is printed.

JSON = output("--json", default=False, help="Print the result as JSON on standard output.")
QUIET = output("--quiet", "-q", default=False, help="Print nothing but errors (and JSON).")
VERBOSE = output("--verbose", "-v", default=False, help="Print the details too: each site, each check.")


@dataclass(frozen=True)
class Thoroughness:
    """How much is tried to find a mistake."""

    quick: bool = checking(
        default=False,
        help="Only the example and a few inputs of about an eighth of its size, and no timing: for a first look.",
    )
    thorough: bool = checking(
        default=False,
        help="More random inputs, every kind of input at three sizes, larger batches and 32 sizes in a row (each "
        "phase of a stride): several times as long.",
    )

    @property
    def name(self) -> str:
        """The effort by name. Raises typer.BadParameter where both are asked for."""
        if self.quick and self.thorough:
            raise typer.BadParameter("give --quick or --thorough, not both.")
        return "quick" if self.quick else "thorough" if self.thorough else "default"


@dataclass(frozen=True)
class RealInputs:
    """Real inputs, and what they are prepared by. Raises RepfuseError where there are none to prepare, or no file."""

    data: Path | None = real_data(
        metavar="PATH",
        help="Real inputs: a folder of images (in folders per class where the classes are known), or "
        ".safetensors, .npz or .pt with `inputs` and, if known, `labels`.",
    )
    mean: str | None = real_data(
        metavar="NUMBERS",
        help="The mean of each channel that is subtracted from images (pixels in 0..1), as 0.485,0.456,0.406. "
        "Without it: what the checkpoint or the model source knows.",
    )
    std: str | None = real_data(
        metavar="NUMBERS",
        help="The standard deviation of each channel that images are divided by, as 0.229,0.224,0.225.",
    )
    limit: int | None = real_data(metavar="N", min=1, help="Take only N of the samples, evenly spaced.")

    def __post_init__(self) -> None:
        if self.data is None and (self.mean, self.std, self.limit) != (None, None, None):
            raise RepfuseError("--mean, --std and --limit are about real data.", "There is none.", "Give --data too.")
        if self.data is not None and not self.data.exists():
            raise RepfuseError(f"There is no data at {self.data}.", "", f"Check the path; you are in {Path.cwd()}.")

    def read(self) -> Callable[[Any], Prepared] | None:
        """Find the data, and return what prepares it for the network of a checkpoint; None where there is none.

        Raises RepfuseError where it cannot be read, or a number cannot be meant. torch is imported.
        """
        from repfuse.data import Wishes, parse_numbers, prepare, read_data

        if self.data is None:
            return None
        wishes = Wishes(parse_numbers(self.mean), parse_numbers(self.std), self.limit)
        return partial(prepare, read_data(self.data), wishes=wishes)


# What is merged.

POLICY = choosing(
    "--policy",
    help="What to merge of all that can be merged exactly: what is predicted to be faster (cost, the default), "
    "whatever leaves fewer operators (always), or as cost but no layers in a row (never-compose).",
    show_default=False,
)


@dataclass(frozen=True)
class Merging:
    """Which of the sites are merged, and what stays."""

    include: list[str] | None = choosing(
        metavar="GLOB",
        help="Merge only the sites whose path, or a module around them, matches: 'stages.1', '*.mlp.*'; repeat "
        "it. * stands for dots too.",
    )
    exclude: list[str] | None = choosing(
        metavar="GLOB", help="Leave these sites alone, in the same way; repeat it. It goes before --include."
    )
    keep_class: bool | None = choosing(
        "--keep-class/--drop-class",
        help="Leave the outermost module what it is, with its class and methods, or merge also what stands in its "
        "own forward, for which it becomes a GraphModule. Without it: as more than 5 % of the time is predicted "
        "to be gained, or not.",
        show_default=False,
    )
    keep_affine: bool = choosing(
        default=False,
        help="Leave a BatchNorm behind each convolution that is merged, which has the scale of each channel and "
        "the shift: for training with simulated quantisation (`repfuse explain int8`). A convolution with its own "
        "norm stays as it is.",
    )

    def choice(self, policy: Policy | None, file: PlanFile | None = None) -> Choice:
        """Return what is to be merged. Raises RepfuseError where options contradict each other. torch is imported."""
        from repfuse.planning.replaying import Choice

        globs = tuple(self.include or ()), tuple(self.exclude or ())
        return Choice(policy, file.plan if file else None, *globs, self.keep_class, self.keep_affine)
