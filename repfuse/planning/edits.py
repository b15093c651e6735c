"""What a rewrite changes, as data: which convolutions are written, and which modules get new bodies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeGuard

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repfuse.algebra.expression import Expression, tensor_names
from repfuse.planning.region import Region
from repfuse.planning.terms import Group
from repfuse.recording.recording import Recording
from repfuse.recording.run import Call


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

    ``steps`` are the children of the body in a row, where it is a chain. ``fused`` are new in it, called ``names``;
    ``kept`` are names of tensors that no forward reads and that stay where they were.
    """

    path: str
    graph: fx.Graph
    steps: tuple[str, ...] | None
    fused: tuple[Fused, ...] = ()
    names: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


@dataclass
class Layout:
    """Everything that a rewrite changes: convolutions that get new weights, modules that become no-ops, new bodies."""

    folds: list[Fused] = field(default_factory=list)
    identities: list[str] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    refused: dict[Call, tuple[str, str]] = field(default_factory=dict)
    """Calls whose forward cannot be written down anew, with the code and the reason."""
    unlike: set[str] = field(default_factory=set)
    """Modules that are called several times, not always alike."""

    @property
    def fused(self) -> list[Fused]:
        """Every convolution that is written."""
        return [*self.folds, *(fused for block in self.blocks for fused in block.fused)]


@dataclass(frozen=True)
class Candidate:
    """A region with the groups of it that become convolutions."""

    region: Region
    groups: tuple[Group, ...]


def owner_of(recording: Recording, region: Region) -> Call:
    """Return the innermost call in which all the nodes of a region were made, and weights put where it reads them."""
    names = (name for group in region.groups for name in tensor_names(group.expression))
    nodes = (*region.working, *recording.constants.written(names))
    chains = [list(recording.call_of[node].chain()) for node in nodes]
    return next(call for call in chains[0] if all(call in chain for chain in chains))


def place_of(recording: Recording, region: Region) -> tuple[int, ...]:
    """Return where a region stands within its owner's forward: the same in every call of the owner."""
    start = owner_of(recording, region).start
    return tuple(sorted(recording.order[node] - start for node in region.working))
