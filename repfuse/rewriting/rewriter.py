"""plan + module -> fused module. The module that is given is never changed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repfuse.algebra.expression import tensor_names
from repfuse.algebra.geometry import NotAffine
from repfuse.errors import RepfuseError
from repfuse.memory import collecting_later
from repfuse.networks import holders, join, named_tensors
from repfuse.planning.edits import Block, Fused
from repfuse.planning.replaying import Replayed, replay
from repfuse.planning.storage import stored_like
from repfuse.plans import AGAIN, Plan
from repfuse.recording.constants import lookup
from repfuse.recording.copies import copy_with, like
from repfuse.rewriting.emit import (
    convolution_module,
    folded_norm,
    graph_module,
    keep_plain_attributes,
    leave_unset,
    norm_module,
    with_neighbours,
    write_weights,
)

# What a rewrite takes from the module that is given: the edits, and tensors for the copy.


class Edits:
    """The edits of a network, and the tensors that they take."""

    def __init__(self, replayed: Replayed) -> None:
        self.layout = replayed.layout
        self.constants = replayed.planner.recording.constants
        same = replayed.module is self.constants.module
        self.tensors = self.constants.tensors if same else dict(named_tensors(replayed.module, remove_duplicate=False))
        self.tensor = lookup(replayed.module, self.constants)

    def replaced(self) -> Iterator[Tensor]:
        """Yield the tensors that go into fused weights."""
        named = (name for fused in self.layout.fused for name in tensor_names(fused.expression))
        names = {leaf for name in named for leaf in self.constants.leaves(name)}
        return (self.tensors[name] for name in names)


def stand_in(tensor: Tensor) -> Tensor:
    """Return a tensor without data for one that is to be replaced, so that it is never copied."""
    return like(tensor, tensor.to("meta"))


def clone(tensor: Tensor) -> Tensor:
    """Return a copy without a history."""
    return like(tensor, tensor.detach().clone())


def rewrite(module: nn.Module, plan: Plan, *, weights: bool = True, share: bool = False) -> nn.Module:
    """Return a copy of ``module`` with every site of ``plan`` rewritten into its one convolution.

    The weights may differ from those the plan was made with: a plan is about structure. Without ``weights`` the fused
    ones are left unset, for who loads them next; with ``share`` all others are those of ``module``, for who changes
    neither. Raises RepfuseError where the plan does not fit the module or its
    weights, or where a fused weight overflows the dtype of the weights that it replaces.
    """
    with collecting_later():
        return _Rewriting(module, Edits(replay(module, plan)), weights=weights, share=share).run()


class _Rewriting:
    """One rewrite: a copy of the module without the tensors that will be replaced, then the edits."""

    def __init__(self, module: nn.Module, edits: Edits, *, weights: bool, share: bool) -> None:
        self.weights = weights
        self.edits = edits
        self.replaced = {id(tensor): tensor for tensor in edits.replaced()}
        self.stand_ins = {key: stand_in(tensor) for key, tensor in self.replaced.items()}
        kept = {id(tensor): tensor for _, tensor in named_tensors(module)} if share else {}
        self.result = copy_with(module, kept | self.stand_ins)
        self.successors: dict[nn.Module, nn.Module] = {}
        self.holders = holders(self.result)

    def run(self) -> nn.Module:
        """Make the edits, the innermost first, so that an outer block takes its inner ones over as they are."""
        layout = self.edits.layout
        for fused in layout.folds:
            self._write(self.result.get_submodule(fused.path), self._norm_there(fused), fused)
        for path in layout.identities:
            owners = [owner for owner, _ in self.holders[self.result.get_submodule(path)]]
            self._replace(path, folded_norm(self.edits.tensors.get(f"{path}.running_mean"), owners))
        for block in sorted(layout.blocks, key=lambda block: _depth(block.path), reverse=True):
            self._replace(block.path, self._body(block, self.result.get_submodule(block.path)))
        self._replace_unregistered()
        self._restore()
        return self.result

    def _replace(self, path: str, new: nn.Module) -> None:
        """Put ``new`` wherever the module at ``path`` is registered, so that what was shared stays shared."""
        old = self.result.get_submodule(path)
        new.training = old.training
        keep_plain_attributes(old, new)
        if old is self.result:
            self.result = new
        for parent, name in self.holders[old]:
            setattr(parent, name, new)
        self.successors[old] = new

    def _replace_unregistered(self) -> None:
        """Put the new modules also where old ones stand in plain lists, tuples and dicts."""
        seen: set[int] = set()
        for module in self.result.modules():
            for name, value in vars(module).items():
                if name not in _TABLES:
                    vars(module)[name] = self._succeeded(value, seen)

    def _succeeded(self, value: Any, seen: set[int]) -> Any:
        """Return ``value`` with the new modules in it; lists and dicts stay the objects that they are."""
        if isinstance(value, nn.Module):
            while value in self.successors:
                value = self.successors[value]
        elif type(value) is tuple:
            return tuple(self._succeeded(item, seen) for item in value)
        elif type(value) in (list, dict) and id(value) not in seen:
            seen.add(id(value))
            for key, item in value.items() if type(value) is dict else enumerate(value):
                value[key] = self._succeeded(item, seen)
        return value

    def _body(self, block: Block, owner: nn.Module) -> nn.Module:
        """Return the new body of a block: the plainest module that computes its graph."""
        made = {name: self._convolution(fused) for name, fused in zip(block.names, block.fused, strict=True)}
        if block.steps is None:
            body: nn.Module = graph_module(owner, block.graph, made, block.kept)
        elif block.fused and block.fused[0].path == block.path:
            (body,) = made.values()
        elif block.steps:
            steps = [(name, made[name] if name in made else owner.get_submodule(name)) for name in block.steps]
            body = nn.Sequential(OrderedDict(steps))
        else:
            body = nn.Identity()
        return body

    def _convolution(self, fused: Fused) -> nn.Module:
        geometry = fused.expression.geometry.plainest
        convolution, norm = convolution_module(geometry), self._norm_there(fused)
        own = norm_module(geometry) if fused.norm and norm is None else None
        if fused.norm:
            convolution.register_parameter("bias", None)
        self._write(convolution, norm or own, fused)
        return with_neighbours(convolution, geometry, own).train(self.result.get_submodule(fused.owner).training)

    def _norm_there(self, fused: Fused) -> _BatchNorm | None:
        """Return the norm of the network itself that stays behind a convolution; None where there is none."""
        if not fused.norm or fused.norm == join(fused.path, "norm"):
            return None
        norm = self.result.get_submodule(fused.norm)
        assert isinstance(norm, _BatchNorm)
        return norm

    def _write(self, convolution: nn.Module, norm: _BatchNorm | None, fused: Fused) -> None:
        """Write the fused weights; dtype, device and memory format come from the largest weight that is merged."""
        edits = self.edits
        largest = stored_like(fused.expression, edits.constants, edits.tensors.__getitem__)
        if not self.weights:
            leave_unset(convolution, norm, fused.expression.geometry, largest)
            return
        try:
            write_weights(convolution, norm, fused.expression, edits.tensor, largest)
        except NotAffine as error:
            raise RepfuseError(
                f"The plan does not fit the weights at {fused.path!r}.",
                f"There is {error.reason}; with the weights that the plan was made with it was exact.",
                AGAIN,
            ) from error

    def _restore(self) -> None:
        """Give real copies to the tensors that were left out of the copy and turn out to be used elsewhere."""
        originals = {id(stand_in): self.replaced[key] for key, stand_in in self.stand_ins.items()}
        copies: dict[int, Tensor] = {}
        for module in self.result.modules():
            for store in (module._parameters, module._buffers, vars(module)):
                for name, tensor in list(store.items()):
                    if id(tensor) in originals:
                        store[name] = copies.setdefault(id(tensor), clone(originals[id(tensor)]))  # type: ignore[assignment]


_TABLES = frozenset(vars(nn.Module()))
"""What PyTorch keeps in every module."""


def _depth(path: str) -> int:
    return len(path.split(".")) if path else 0
