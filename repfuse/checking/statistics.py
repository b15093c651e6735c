"""The statistics of data for the norms that stay behind merged convolutions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from repfuse.checking.agreement import Data, chunks
from repfuse.checking.inputs import Trial
from repfuse.checking.places import ExactWeights, places
from repfuse.checking.runs import as_stored, copied, run_copy
from repfuse.errors import RepfuseError
from repfuse.networks import why_refused
from repfuse.plans import Plan


def set_statistics(original: nn.Module, plan: Plan, fused: nn.Module, data: Data) -> None:
    """Give the norms that ``plan`` leaves in ``fused`` the mean and variance of what they are given on ``data``.

    What they multiply and add is computed anew, so that the network stays what it is. Raises RepfuseError where it
    does not run on the data.
    """
    found = list(places(original, plan))
    norms = {path: norm for place in found for path, norm in place.norms(fused).items()}
    for path, (mean, var) in _measured(fused, list(norms), data).items():
        for stored, wanted in ((norms[path].running_mean, mean), (norms[path].running_var, var)):
            assert stored is not None
            stored.copy_(wanted)
    exact = ExactWeights(fused, found)
    with torch.no_grad():
        for weight in (weight for place in found for weight in exact.at(place)):
            weight.stored.copy_(weight.exact())


def _measured(network: nn.Module, paths: list[str], data: Data) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return mean and unbiased variance, in float64, of each channel that the norms at ``paths`` are given."""
    sums: dict[str, torch.Tensor] = {}
    counts = dict.fromkeys(paths, 0)

    def watching(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def watch(_norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].double().transpose(0, 1).flatten(1)
            sums[path] = torch.stack([x.sum(1), x.square().sum(1)]) + sums.get(path, 0)
            counts[path] += x.shape[1]

        return watch

    with copied(network, as_stored) as copy:
        for path in paths:
            copy.get_submodule(path).register_forward_pre_hook(watching(path))
        for inputs in chunks(data):
            if error := run_copy(copy, [Trial("the data", inputs)], {})[0].error:
                why = why_refused(network, inputs, error)[0]
                raise RepfuseError("The network cannot run on the data.", why, "Give data of its shape and dtype.")
    found = {}
    for path, (total, squares) in sums.items():
        mean, count = total / counts[path], counts[path]
        found[path] = mean, (squares / count - mean.square()).clamp(min=0) * count / max(1, count - 1)
    return found
