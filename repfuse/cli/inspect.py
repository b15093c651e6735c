"""`repfuse inspect`."""

from __future__ import annotations

from repfuse.cli.options import Allow, Checkpoint, Input, Json, Merging, Model, ModelArg, Quiet, Trust, Weights
from repfuse.cli.output import progress, show, show_json
from repfuse.planning.cost import Policy


def inspect(
    source: Checkpoint,
    *,
    model: Model = None,
    model_arg: ModelArg = None,
    weights: Weights = "auto",
    example: Input = None,
    policy: Merging = Policy.COST,
    allow: Allow = None,
    trust: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List what can be fused in a checkpoint, and what not and why. Nothing is written.

    \b
    Examples:
      repfuse inspect model.pt
      repfuse inspect weights.safetensors --model torchvision:resnet18
    """
    from repfuse.cli.conversion import Job, run
    from repfuse.report.convert_view import convert_view

    network = {"model": model, "model_args": model_arg, "weights": weights, "input": example}
    loading = {**network, "allow": allow or (), "trust": trust}
    with progress(quiet=quiet) as update:
        report = run(Job(source, None, loading, policy, None, force=False), update)
    if as_json:
        show_json("inspection", report.to_dict())
    elif not quiet:
        show(convert_view(report))
