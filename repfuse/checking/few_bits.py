"""Both networks with their weights rounded to few bits: what that does to their outputs, and where it costs most.

Weights alone are rounded, as ``repfuse.quantization`` says, and run in float64: what a quantiser does to activations
comes on top. It is measured of each network against itself, so it says nothing about whether they are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from repfuse.checking.agreement import Data, agreement
from repfuse.checking.inputs import Trial
from repfuse.checking.results import FewBits, RoundedLayer, RoundedWeights
from repfuse.checking.runs import Change, Outcome, as_stored, by_key, copied, in_float64, run_float64
from repfuse.errors import RepfuseError
from repfuse.networks import join, named_modules, own_tensors
from repfuse.quantization import rounded, signal_to_noise
from repfuse.recording.stock import is_stock

LEAST, MOST = 2, 16
PER: tuple[Literal["tensor"], Literal["channel"]] = ("tensor", "channel")


def check_bits(bits: int | None) -> None:
    """Raise RepfuseError for other than LEAST to MOST bits."""
    if bits is not None and not LEAST <= bits <= MOST:
        raise RepfuseError(f"Weights cannot be rounded to {bits} bits here.", "", f"Give {LEAST} to {MOST}.")


def few_bits(  # noqa: PLR0917 - what `verify` was given
    original: nn.Module,
    fused: nn.Module,
    trial: Trial,
    bits: int,
    data: Data | None = None,
    labels: torch.Tensor | None = None,
) -> FewBits | None:
    """Round the weights of both networks per tensor and per channel, and run them on ``trial``.

    Each layer of the fused network is rounded by itself too, and both run, as they are stored, on the ``data``. None
    where a network does not run on the trial.
    """
    networks = original, fused
    exact = [run_float64(network, [trial])[0] for network in networks]
    if any(outcome.error for outcome in exact):
        return None
    axes = [dict(weights(network)) for network in networks]
    ways = []
    for per in PER:
        before, after = (_rounding(bits, known if per == "channel" else dict.fromkeys(known)) for known in axes)
        levels = _level(original, exact[0], before, trial), _level(fused, exact[1], after, trial)
        real = None
        if data is not None:
            with copied(original, before) as one, copied(fused, after) as other:
                real = agreement(one, other, data, labels)
        accuracies = (real.accuracy_original, real.accuracy_fused) if real else (None, None)
        ways.append(RoundedWeights(per, *levels, *accuracies))
    layers = [
        RoundedLayer(name.rpartition(".")[0] or name, _level(fused, exact[1], _rounding(bits, {name: None}), trial))
        for name in axes[1]
    ]
    counts = (len(axes[0]), len(axes[1]))
    return FewBits(bits, trial.label, counts, tuple(ways), tuple(sorted(layers, key=lambda each: each.level)))


def weights(network: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the name of each weight of a convolution or linear layer, and the axis of its output channels.

    In a module that is none of PyTorch's, as those of exported programs, they are parameters of two axes and more.
    """
    for path, module in named_modules(network):
        layer = isinstance(module, _ConvNd | nn.Linear)
        bare = type(module) is nn.Module or not is_stock(module)  # as those of an exported program
        for name, tensor in own_tensors(module).items():
            matrix = isinstance(tensor, nn.Parameter) and tensor.dim() > 1 and tensor.is_floating_point()
            named = name == "weight" and (layer or bare)
            if matrix and (named or (bare and tensor.numel() > len(tensor) > 1)):
                yield join(path, name), 1 if isinstance(module, _ConvTransposeNd) else 0


def _rounding(bits: int, axes: Mapping[str, int | None]) -> Change:
    """Return a change that rounds the tensors named in ``axes``: along their axis, or as a whole."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in axes:
            return as_stored(name, tensor)
        return rounded(tensor.double(), bits, axes[name]).to(tensor.dtype)

    return change


def _level(network: nn.Module, exact: Outcome, change: Change, trial: Trial) -> float:
    """Return the signal-to-noise of the output that suffers most."""
    (found,) = run_float64(network, [trial], lambda name, tensor: in_float64(name, change(name, tensor)))
    before, after = by_key([exact]), by_key([found])
    alike = [key for key, x in before.items() if key in after and after[key].shape == x.shape and x.is_floating_point()]
    return min((signal_to_noise(before[key], after[key]) for key in alike), default=-float("inf"))
