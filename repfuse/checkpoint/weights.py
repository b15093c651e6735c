"""The weights of a file in a network: which of the file's names are the network's, and whether both are in one mode.

A name of the network becomes the file's by putting a prefix before it, and a wrapper's segments (``_orig_mod.``) behind
the path of each module that was wrapped. Readings are tried from the plainest to the furthest: the names as they are,
without a prefix, and without the wrappers inside them. What no reading fits is an error later, said of the nearest one;
nothing is dropped to make it fit. Then the weights go into the network: strictly, in their own dtypes, ties kept.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from repfuse.checkpoint.spec import ModelSource
from repfuse.errors import RepfuseError
from repfuse.networks import equal, stored_tensors
from repfuse.plans import above
from repfuse.wording import listed

SEGMENTS = ("module", "_orig_mod")  # what DataParallel and AveragedModel, and torch.compile, add to the names


class ChosenWeights(NamedTuple):
    """``way`` are the keys to the network; ``prefix`` is what its names must begin with, and ``kind`` says which of
    several networks in one state dict is meant: ``ema``, ``model``, or ``auto``.
    """

    way: tuple[str, ...] = ()
    prefix: str = ""
    kind: str = "auto"


BARE = ChosenWeights()


@dataclass(frozen=True)
class Naming:
    """``prefix`` stands before each name; ``wrapped`` are paths of modules, and the wrappers' segments behind each.

    Prefix and paths are written without wrappers, and the paths begin with the prefix; the empty one is the whole.
    ``extras`` are the entries of the state dict that belong to none of the network's names, ``copies`` the prefixes of
    other copies of the weights, which are no extras.
    """

    prefix: str = ""
    wrapped: dict[str, str] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    copies: tuple[str, ...] = ()

    def in_file(self, name: str) -> str:
        """Return what the file calls the network's ``name``."""
        return insert(self.prefix + name, self.wrapped)

    def of_network(self, state: Mapping[str, Any]) -> OrderedDict[str, Any]:
        """Return the file's entries by the network's names, with the versions of its modules and without the rest."""
        wrappers = {segment for added in self.wrapped.values() for segment in added.split(".")}
        bare = OrderedDict((without(name, wrappers), held) for name, held in state.items())
        cut = len(self.prefix)
        found = OrderedDict((name[cut:], held) for name, held in bare.items() if name.startswith(self.prefix))
        versions = {_dotted(without(path, wrappers)): held for path, held in getattr(state, "_metadata", {}).items()}
        if versions:
            kept = ((path[cut:-1], held) for path, held in versions.items() if path.startswith(self.prefix))
            vars(found)["_metadata"] = OrderedDict(kept)
        return found

    def of_file(self, state: Mapping[str, Any]) -> OrderedDict[str, Any]:
        """Return the network's ``state`` by the file's names and with the extras: the inverse of ``of_network``."""
        named = OrderedDict((self.in_file(name), held) for name, held in state.items())
        named.update(self.extras)
        if versions := getattr(state, "_metadata", None):
            kept = ((self.in_file(_dotted(path))[:-1], held) for path, held in versions.items())
            vars(named)["_metadata"] = OrderedDict(kept)
        return named

    def notes(self) -> tuple[str, ...]:
        """Return what the user must be told."""
        said, before = [], self.in_file("")
        if before:
            said.append(f"took the prefix {before!r} off the names of the weights")
        inner = [path[len(self.prefix) :] for path in self.wrapped if len(path) >= len(self.prefix)]
        if inner and any(inner):
            said.append(f"took the wrapper of torch.compile or DataParallel out of the names under {listed(inner)}")
        if self.extras:
            said.append(f"kept as it is beside the network, for it is outside {before!r}: {listed(self.extras)}")
        if self.copies:
            said.append(f"left out other copies of the weights: {listed(map(repr, self.copies))}")
        return tuple(said)


def insert(name: str, wrapped: Mapping[str, str]) -> str:
    """Return ``name`` with each wrapper's segments behind its path; the empty path is before everything."""
    segments = name.split(".")
    made, path = wrapped.get("", "") + segments[0], segments[0]
    for segment in segments[1:]:
        made += "." + wrapped.get(path, "") + segment
        path += f".{segment}"
    return made


def without(name: str, wrappers: Collection[str]) -> str:
    """Return ``name`` (of a weight or a module) without the wrappers' segments."""
    if not wrappers:
        return name
    return ".".join(segment for segment in name.split(".") if segment not in wrappers)


def wrapped_in(names: Iterable[str], wrappers: Collection[str]) -> dict[str, str] | None:
    """Return where ``wrappers`` stand in the names, by the path before; None where a module is wrapped in part."""
    names, wrapped = list(names), {}
    for name in names:
        path: list[str] = []
        added = ""
        for segment in name.split("."):
            if segment in wrappers:
                added += f"{segment}."
                wrapped[".".join(path)] = added
            else:
                path.append(segment)
                added = ""
    back = all(insert(without(name, wrappers), wrapped) == name for name in names)
    return wrapped if back else None


def _dotted(path: str) -> str:
    return f"{path}." if path else ""


LEVELS = ((), ("_orig_mod",), SEGMENTS)  # that is no name which people give; `module` may be one
AVERAGED = re.compile(r"(^|[._])(ema|swa|avg|averaged?)([._]|$)")
COUNTER = "n_averaged"  # what AveragedModel adds to the state dict
ANCHORS = 4  # names of the network whose place in the file says what the prefix is
PREFIXES = 64  # more than any file has networks; each is compared name by name


class Expected(NamedTuple):
    """What a network's own state dict holds: names with shapes (None: no tensor), and names that share a tensor."""

    shapes: dict[str, tuple[int, ...] | None]
    ties: list[list[str]]

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Say whether ``state`` has these names with these shapes and no others; of a tie one name will do."""
        missing = self.shapes.keys() - state.keys()
        tied = {name for group in self.ties if state.keys() & group for name in group}
        if state.keys() - self.shapes.keys() or missing - tied:
            return False
        return all(_shape(state[name]) == shape for name, shape in self.shapes.items() if name in state)


def fit(state: Mapping[str, Any], network: nn.Module, chosen: ChosenWeights, about: str) -> Naming:
    """Return how ``state`` names the weights of ``network``; where nothing fits exactly, the nearest reading.

    Raises RepfuseError, which begins with ``about``, where several of its networks fit, and where ``chosen`` asks for
    one of them that is not there.
    """
    expected = Expected({name: _shape(value) for name, value in network.state_dict().items()}, ties(network))
    tried: list[Naming] = []
    for wrappers in LEVELS:
        readings = list(_readings(state, expected, wrappers))
        tried += readings
        fitting = [naming for naming in readings if expected.fits(naming.of_network(state))]
        wanted = [naming for naming in fitting if _is_wanted(naming, state, chosen)]
        if len(wanted) > 1:
            raise RepfuseError(
                f"{about} several networks that fit.",
                f"Their names begin with {' and '.join(repr(naming.in_file('')) for naming in wanted)}.",
                f"Choose one: {_options(wanted, chosen)}.",
            )
        if wanted:
            return _with_rest(wanted[0], state, fitting)
        if fitting:
            raise _not_there(fitting, chosen, about)
    wanted = [naming for naming in tried if _is_wanted(naming, state, chosen)]
    if not wanted:
        raise _not_there([], chosen, about)
    best = max(wanted, key=lambda naming: len(expected.shapes.keys() & naming.of_network(state).keys()))
    return _with_rest(best, state, [])


def _readings(state: Mapping[str, Any], expected: Expected, wrappers: tuple[str, ...]) -> Iterator[Naming]:
    wrapped = wrapped_in(state, wrappers)
    if wrapped is None or bool(wrappers) != bool(wrapped):
        return
    names, every = [without(name, wrappers) for name in state], list(expected.shapes)
    found: Counter[str] = Counter()  # what may stand before the names: nothing, else what does before most anchors
    for anchor in {*every[:ANCHORS], *every[-ANCHORS:]}:
        found.update(name[: -len(anchor)] for name in names if name.endswith(f".{anchor}"))
    for prefix in ["", *sorted(prefix for prefix, _ in found.most_common(PREFIXES))]:
        yield Naming(prefix, wrapped)


def _is_wanted(naming: Naming, state: Mapping[str, Any], chosen: ChosenWeights) -> bool:
    before = naming.in_file("")
    if chosen.kind == "auto":
        return before.startswith(chosen.prefix)
    counters = (name.removesuffix(COUNTER) for name in state if name.endswith(COUNTER))
    averaged = bool(AVERAGED.search(before)) or any(before.startswith(counter) for counter in counters)
    return averaged == (chosen.kind == "ema")


def _with_rest(naming: Naming, state: Mapping[str, Any], fitting: list[Naming]) -> Naming:
    """Return ``naming`` with the entries that are no part of the network, less the other copies of it."""
    copies = tuple(other.in_file("") for other in fitting if other != naming)
    own = {naming.in_file(name) for name in naming.of_network(state)}
    rest = {name: held for name, held in state.items() if name not in own and not name.startswith(copies)}
    return replace(naming, extras=rest, copies=copies)


def _not_there(fitting: list[Naming], chosen: ChosenWeights, about: str) -> RepfuseError:
    asked = f"names that begin with {chosen.prefix!r}" if chosen.kind == "auto" else f"--weights {chosen.kind}"
    found = " or ".join(repr(naming.in_file("")) for naming in fitting)
    why = f"What fits the network has names that begin with {found}." if fitting else ""
    return RepfuseError(
        f"{about} no weights for {asked}.", why, f"Leave --weights out, or give {_options(fitting, chosen)}."
    )


def _options(fitting: list[Naming], chosen: ChosenWeights) -> str:
    keys = (".".join((*chosen.way, naming.in_file("")[:-1])) for naming in fitting)
    return " or ".join(f"--weights {key}" for key in keys if key) or "--weights auto"


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if hasattr(value, "shape") else None


def match_dtype(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give ``network`` the floating dtype of ``state``, where it has only one.

    The weights bring their dtypes themselves; this is for what is not in a state dict (non-persistent buffers).
    """
    tensors = [tensor for tensor in state.values() if isinstance(tensor, Tensor)]
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()}
    if len(dtypes) == 1 and (dtype := dtypes.pop()).is_floating_point:
        network.to(dtype)


def load_weights(network: nn.Module, state: dict[str, Tensor], path: Path, built_by: str) -> tuple[str, ...]:
    """Load ``state`` into ``network``, which takes over its tensors, dtypes and strides; return notes for the user.

    Raises RepfuseError with the missing, unexpected and wrong-shaped names where the two do not fit exactly.
    """
    groups, filled, notes = ties(network), list[str](), list[str]()
    for names in groups:  # safetensors files often hold a tied tensor under one name only
        absent = [name for name in names if name not in state]
        if held := [state[name] for name in names if name in state]:
            state.update(dict.fromkeys(absent, held[0]))
            filled += absent
    if filled:
        notes.append(f"the file leaves out {', '.join(filled)}, which the network shares with other names")
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except (RuntimeError, AttributeError, TypeError, KeyError) as error:
        raise _mismatch(network, state, path, built_by, error) from error
    loaded = dict(stored_tensors(network))
    for names in groups:
        first, *others = names
        if not all(equal(loaded[first], loaded[name]) for name in others):
            differ = f"{' and '.join(names)} are one tensor in the network, but differ in the file"
            notes.append(f"{differ}: they are kept apart")
            continue
        for name in others:
            owner, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(owner), attribute, loaded[first])
    return tuple(notes)


def ties(network: nn.Module) -> list[list[str]]:
    """Return the groups of names under which the network holds one and the same parameter or buffer."""
    names: defaultdict[int, list[str]] = defaultdict(list)
    persistent = network.state_dict().keys()
    for name, tensor in stored_tensors(network):
        if name in persistent:
            names[id(tensor)].append(name)
    return [group for group in names.values() if len(group) > 1]


def _mismatch(
    network: nn.Module, state: Mapping[str, Tensor], path: Path, built_by: str, error: Exception
) -> RepfuseError:
    expected = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    shapes = [
        f"{name} ({_size(state[name])} in the file, {_size(value)} in the network)"
        for name, value in expected.items()
        if isinstance(state.get(name), Tensor) and state[name].shape != value.shape
    ]
    lists = {
        "missing from the file": [name for name in expected if name not in state],
        "unexpected in the file": [name for name in state if name not in expected],
        "of another shape": shapes,
    }
    told = (f"{len(names)} {title}: {listed(names)}" for title, names in lists.items() if names)
    hint = "Check the name of the network, its arguments (--model-arg), and that the file is not fused already."
    if shapes and len(shapes) < len(expected) / 2:
        hint = "The network is close: check its arguments, such as --model-arg num_classes=... or in_chans=..."
    why = "\n".join(told) or str(error).replace("\n\t", " ")
    return RepfuseError(f"The weights of {path} do not fit {built_by}.", why, hint)


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


# Deploy mode: a file whose blocks are fused already, and a network that has their branches; or the other way round. The
# mismatch says it first. Where a block is fused, one side has plain weights in it and the other has branches, which are
# known by their normalisation statistics: so every surplus name of the fused side lies in a module in which the other
# side has names that it lacks. The names that authors give to fused layers and to branches then say it for sure.

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


def _names_in(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the names of which a part is one that authors give to fused layers, and to branches."""
    names = list(names)
    branches = [name for name in names if not set(name.split(".")).isdisjoint(BRANCHES)]
    fused = [name for name in names if not set(name.split(".")).isdisjoint(FUSED) and name not in branches]
    return fused, branches


def deploy_mode(names: Iterable[str]) -> str:
    """Say in words what the names give away of fused blocks; empty where they give nothing away."""
    fused, branches = _names_in(names)
    owners = listed(_owners(fused))
    if not fused:
        return ""
    if branches:
        return f"some of its blocks are fused already ({owners}), others are not"
    return f"its blocks are fused already: {owners}"


def check_deploy_mode(held: Mapping[str, Any], expected: Mapping[str, Any], source: ModelSource, about: str) -> None:
    """Raise RepfuseError where the names ``held`` by a file and ``expected`` by its network differ in mode alone."""
    unexpected = [name for name in held if name not in expected]
    missing = [name for name in expected if name not in held]
    fused, branches = _names_in(held)
    if missing and unexpected and fused and branches:
        raise RepfuseError(
            f"{about} is fused in part: neither the network of training nor that of deployment fits it.",
            f"Fused are {listed(_owners(fused))}\nBranches are in {listed(_owners(branches))}",
            f"Convert the checkpoint of training, or give a --model that builds {source.spec} fused in these places.",
        )
    if _is_fused_form(unexpected, missing):
        sure, _ = _names_in(unexpected)
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
    blocks = {path for name in branches for path in above(name)}
    within = (set(above(name)[-2:]) & blocks for name in plain)  # what owns it, or what that is in
    return all(within) and all(name.endswith((".weight", ".bias")) for name in plain)


def _owners(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))
