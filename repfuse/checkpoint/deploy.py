"""Deploy mode: a file whose blocks are fused already, and a network that has their branches; or the other way round.

The mismatch says it first. Where a block is fused, one side has plain weights in it and the other has branches, which
are known by their normalisation statistics: so every surplus name of the fused side lies in a module in which the other
side has names that it lacks. The names that authors give to fused layers and to branches then say it for sure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, NamedTuple

from repfuse.errors import RepfuseError
from repfuse.wording import listed

if TYPE_CHECKING:
    from repfuse.checkpoint.source import ModelSource

FUSED = (  # the layer in the place of the branches: RepVGG, MobileOne and timm, DBB, RepLKNet, OREPA, ACNet, ...
    *("rbr_reparam", "reparam_conv", "reparam", "conv_reparam", "dbb_reparam", "lkb_reparam", "orepa_reparam"),
    *("fused_conv", "eval_conv", "rep_conv", "repconv_fused"),
)
BRANCHES = (  # and the branches themselves, as the same authors call them
    *("rbr_dense", "rbr_1x1", "rbr_identity", "rbr_conv", "rbr_skip", "rbr_scale", "conv_kxk", "conv_1x1"),
    *("conv_scale", "dbb_origin", "dbb_1x1", "dbb_avg", "dbb_1x1_kxk", "lkb_origin", "lk_origin", "large_conv"),
    *("small_conv", "square_conv", "ver_conv", "hor_conv", "orepa_origin"),
)
FLAGS = ("deploy", "inference_mode", "reparam")  # the arguments that build a network in deploy mode
BUILD_FUSED = (
    "build the network fused: often --model-arg deploy=True, for timm inference_mode=True, or --model "
    "path/to/file.py:callable with a function that returns timm.utils.reparameterize_model(timm.create_model(...))."
)
STATISTICS = ("running_mean", "running_var")


class Names(NamedTuple):
    """The names of a state dict that say what mode it is in: of fused layers, and of branches."""

    fused: list[str]
    branches: list[str]


def names_in(names: Iterable[str]) -> Names:
    """Return the names of which a part is one that authors give to fused layers, and to branches."""
    names = list(names)
    branches = [name for name in names if not set(name.split(".")).isdisjoint(BRANCHES)]
    fused = [name for name in names if not set(name.split(".")).isdisjoint(FUSED) and name not in branches]
    return Names(fused, branches)


def mode(names: Iterable[str]) -> str:
    """Say in words what the names give away of fused blocks; empty where they give nothing away."""
    found = names_in(names)
    if not found.fused:
        return ""
    if found.branches:
        return f"some of its blocks are fused already ({listed(_owners(found.fused))}), others are not"
    return f"its blocks are fused already: {listed(_owners(found.fused))}"


def check(held: Collection[str], expected: Collection[str], source: ModelSource, about: str) -> None:
    """Raise RepfuseError where the names ``held`` by a file and ``expected`` by its network differ in mode alone."""
    unexpected = [name for name in held if name not in set(expected)]
    missing = [name for name in expected if name not in set(held)]
    known = names_in(held)
    if missing and unexpected and known.fused and known.branches:
        raise RepfuseError(
            f"{about} is fused in part: neither the network of training nor that of deployment fits it.",
            f"Fused are {listed(_owners(known.fused))}\nBranches are in {listed(_owners(known.branches))}",
            f"Convert the checkpoint of training, or give a --model that builds {source.spec} fused in these places.",
        )
    if _is_fused_form(unexpected, missing):
        sure = names_in(unexpected).fused
        raise RepfuseError(
            f"{about} {'is' if sure else 'looks'} fused already (deploy mode), and {source} builds the branches.",
            f"The file has {len(unexpected)} names of fused layers: {listed(unexpected)}\n"
            f"The network has {len(missing)} names of branches instead: {listed(missing)}",
            f"There is nothing left to fuse in it. To load it, {BUILD_FUSED}"
            if sure
            else f"If it is, nothing is left to fuse; to load it, {BUILD_FUSED} If not, check the name of the network.",
        )
    if _is_fused_form(missing, unexpected):
        flag = next((flag for flag in FLAGS if source.arguments.get(flag)), "deploy")
        raise RepfuseError(
            f"{about} has the branches of training, and {source} builds the network fused (deploy mode).",
            f"The file has {len(unexpected)} names of branches: {listed(unexpected)}\n"
            f"The network has {len(missing)} names of fused layers instead: {listed(missing)}",
            f"Build the network as it was trained, without --model-arg {flag}: repfuse fuses the branches itself.",
        )


def _is_fused_form(plain: list[str], branches: list[str]) -> bool:
    """Say whether ``plain`` are weights that stand where ``branches`` stood."""
    if not plain or not any(name.endswith(STATISTICS) for name in branches):
        return False
    blocks = {path for name in branches for path in _ancestors(name)}
    within = (set(_ancestors(name)[-2:]) & blocks for name in plain)  # what owns it, or what that is in
    return all(within) and all(name.endswith((".weight", ".bias")) for name in plain)


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")[:-1]
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _owners(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))
