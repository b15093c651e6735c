"""What a rewrite changes, as data: which convolutions are written, stored as what, and which modules get new bodies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repfuse.algebra.evaluation import evaluate
from repfuse.algebra.expression import Expression, Scaled, convolutions
from repfuse.algebra.layers import Factor, Normalisation
from repfuse.planning.region import Group, Region
from repfuse.recording.constants import Constants
from repfuse.recording.recording import Recording
from repfuse.recording.run import ModuleCall


def is_affine_norm(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether it is a norm that can stay behind a merged convolution: with statistics, a weight and a bias."""
    return isinstance(module, _BatchNorm) and module.affine and module.running_var is not None


@dataclass(frozen=True)
class Fused:
    """One convolution to be written: the map, where it goes, and what it came from.

    ``norm`` is the path of the BatchNorm that stays behind it, in its module or on its own; "" where there is none.
    """

    path: str
    owner: str
    form: str
    region: Region
    group: Group
    norm: str = ""

    @property
    def expression(self) -> Expression:
        """The map, over tensors of the whole model by name."""
        return self.group.expression


@dataclass(frozen=True)
class Block:
    """The module at ``path`` gets a new body, ``graph``, whose targets are relative to it.

    ``steps`` are the children of the body in a row, where it is a chain. ``fused`` are new in it, by name; ``kept`` are
    names of tensors that no forward reads and that stay where they were.
    """

    path: str
    graph: fx.Graph
    steps: tuple[str, ...] | None
    fused: Mapping[str, Fused] = field(default_factory=dict)
    kept: tuple[str, ...] = ()


@dataclass
class Layout:
    """Everything that a rewrite changes: convolutions that get new weights, modules that become no-ops, new bodies."""

    folds: list[Fused] = field(default_factory=list)
    identities: list[str] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    refused: dict[ModuleCall, tuple[str, str]] = field(default_factory=dict)
    """Calls whose forward cannot be written down anew, with the code and the reason."""
    unlike: set[str] = field(default_factory=set)
    """Modules that are called several times, not always alike."""
    sized: set[fx.Node] = field(default_factory=set)
    """Values within a region that others take sizes of, which no value has that stays."""

    @property
    def fused(self) -> list[Fused]:
        """Every convolution that is written."""
        return [*self.folds, *(fused for block in self.blocks for fused in block.fused.values())]


def place_of(recording: Recording, region: Region) -> tuple[ModuleCall, tuple[int, ...]]:
    """Return where a region is to be written: the innermost call in which all of its nodes were made, and weights put
    where it reads them; and where it stands within the forward of that, which is the same in every call of the module.
    """
    names = (name for group in region.groups for name in group.expression.tensor_names)
    nodes = (*region.working, *recording.constants.written(names))
    first, *others = dict.fromkeys(map(recording.call_of.__getitem__, nodes))
    above = [set(call.chain()) for call in others]
    owner = next(call for call in first.chain() if all(call in chain for chain in above))
    return owner, tuple(sorted(recording.order[node] - owner.start for node in region.working))


# In what a fused map is stored: the dtype, device and memory format of the largest weight that it replaces.


_SMALL_RANGE = 1e6
"""What a format of less range than this holds has to be looked at: float16 ends at 65504."""
_SHORT = 4096
"""As many numbers as a tensor may have that is looked at with others."""
_LARGE = 1e9
"""Numbers below this leave no other format's range in the few products that a merge is made of."""


def stored_like(expression: Expression, constants: Constants, tensors: Callable[[str], Tensor]) -> Tensor:
    """Return the tensor of the model that the fused weight is to be stored like; ``tensors`` gives them by name."""
    weights = [layer.weight for layer in convolutions(expression)]
    # A filter that forward makes of numbers belongs to nobody: then the normalisation's tensors say what is wanted.
    leaves = constants.floating_leaves(weights) or constants.floating_leaves(expression.tensor_names)
    return max(map(tensors, leaves), key=Tensor.numel)


def overflows(
    expression: Expression, constants: Constants, tensors: Callable[[str], Tensor], large: Collection[str] | None
) -> torch.dtype | None:
    """Return the dtype that the fused weight or bias does not fit into, if it is made of finite numbers.

    The map is computed for this only where its numbers could be too large: some of its tensors are among ``large``, if
    these are known.
    """
    stored = constants.floating_leaves(expression.tensor_names)
    like = stored_like(expression, constants, tensors)
    could = large is None or any(name in large for name in stored)
    if torch.finfo(like.dtype).max > _SMALL_RANGE and not could:
        return None
    rounded = evaluate(expression, tensors, like)
    return like.dtype if left_range(rounded, map(tensors, expression.tensor_names)) else None


def divides(meaning: object) -> bool:
    """Whether it is a quotient that may be larger than _LARGE where all that is stored is small."""
    by = meaning.by if isinstance(meaning, Scaled) else None
    return (isinstance(by, Normalisation) and by.eps < _LARGE**-2) or (isinstance(by, Factor) and by.inverse)


def left_range(rounded: Iterable[Tensor], origins: Iterable[Tensor]) -> bool:
    """Whether finite numbers became infinite when they were multiplied and rounded. (What is not a number comes from a
    negative variance, and is one in the original too.)
    """
    # A sum is one pass, and not finite if any of its numbers is not; or if it is too large itself.
    infinite = any(not bool(x.sum().isfinite()) and bool(x.isinf().any()) for x in rounded)
    return infinite and all(bool(x.isfinite().all()) for x in origins)


def large_among(tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the names of those of which some product might leave the range of a format.

    One look at all short ones at once takes a tenth of the time of one at each, and nearly always suffices.
    """
    short: dict[tuple[torch.dtype, torch.device], list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.numel() <= _SHORT:
            short[tensor.dtype, tensor.device].append(name)
    fine = set[str]()
    for names in short.values():
        if not _is_large(torch.cat([tensors[name].detach().flatten() for name in names])):
            fine.update(names)
    return {name for name, tensor in tensors.items() if name not in fine and _is_large(tensor)}


def _is_large(tensor: Tensor) -> bool:
    if not tensor.numel():
        return False
    least, most = torch.aminmax(tensor.detach())
    return not (least.item() >= -_LARGE and most.item() <= _LARGE)
