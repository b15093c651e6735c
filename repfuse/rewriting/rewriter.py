"""plan + module -> fused module. The module that is given is never changed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from repfuse.algebra.geometry import NotAffine
from repfuse.errors import RepfuseError
from repfuse.networks import holders, join, named_tensors
from repfuse.placing.edits import Block, Fused
from repfuse.planning.replaying import Replayed, replay
from repfuse.planning.storage import stored_like
from repfuse.plans import AGAIN, Plan
from repfuse.rewriting.edited import EditedPart, clone, stand_in
from repfuse.rewriting.emit import (
    convolution_module,
    graph_module,
    keep_plain_attributes,
    leave_unset,
    with_padding,
    write_weights,
)
from repfuse.tracing.skeleton import copy_with


def rewrite(module: nn.Module, plan: Plan, *, weights: bool = True) -> nn.Module:
    """Return a copy of ``module`` with every site of ``plan`` rewritten into its one convolution.

    The weights may differ from those the plan was made with: a plan is about structure. Without ``weights`` the fused
    ones are left unset, for who loads them next. Raises RepfuseError where the plan does not fit the module or its
    weights, or where a fused weight overflows the dtype of the weights that it replaces.
    """
    return _Rewriting(module, replay(module, plan), weights=weights).run()


class _Rewriting:
    """One rewrite: a copy of the module without the tensors that will be replaced, then the edits of each part."""

    def __init__(self, module: nn.Module, parts: Sequence[Replayed], *, weights: bool) -> None:
        self.weights = weights
        self.parts = [EditedPart(part) for part in parts]
        self.replaced = {id(tensor): tensor for part in self.parts for tensor in part.replaced()}
        self.stand_ins = {key: stand_in(tensor) for key, tensor in self.replaced.items()}
        self.result = copy_with(module, dict(self.stand_ins))
        self.successors: dict[nn.Module, nn.Module] = {}
        self.holders = holders(self.result)
        if any(part.exported for part in self.parts):
            self._put_exported(module)
            self.holders = holders(self.result)

    def _put_exported(self, module: nn.Module) -> None:
        """Put the exported form in the place of a block, over the tensors of the result."""
        both = zip(named_tensors(module), named_tensors(self.result), strict=True)
        copied = {id(original): copy for (_, original), (_, copy) in both}
        for part in (part for part in self.parts if part.exported):
            self._replace(part.path, copy_with(part.module, dict(copied)))

    def run(self) -> nn.Module:
        """Make the edits, the innermost first, so that an outer block takes its inner ones over as they are."""
        for part in sorted(self.parts, key=lambda part: _depth(part.path), reverse=True):
            self._edit(part)
        self._replace_unregistered()
        self._restore()
        return self.result

    def _edit(self, part: EditedPart) -> None:
        for fused in part.layout.folds:
            self._write(self._module(part, fused.path), fused, part)
        for path in part.layout.identities:
            self._replace(join(part.path, path), nn.Identity())
        for block in sorted(part.layout.blocks, key=lambda block: _depth(block.path), reverse=True):
            owner = self._module(part, block.path)
            self._replace(join(part.path, block.path), self._body(block, owner, part))

    def _module(self, part: EditedPart, path: str) -> nn.Module:
        return self.result.get_submodule(join(part.path, path))

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

    def _body(self, block: Block, owner: nn.Module, part: EditedPart) -> nn.Module:
        """Return the new body of a block: the plainest module that computes its graph."""
        made = {name: self._convolution(fused, part) for name, fused in zip(block.names, block.fused, strict=True)}
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

    def _convolution(self, fused: Fused, part: EditedPart) -> nn.Module:
        geometry = fused.expression.geometry
        convolution = convolution_module(geometry)
        self._write(convolution, fused, part)
        return with_padding(convolution, geometry).train(self._module(part, fused.owner).training)

    def _write(self, convolution: nn.Module, fused: Fused, part: EditedPart) -> None:
        """Write the fused weights; dtype, device and memory format come from the largest weight that is merged."""
        largest = stored_like(fused.expression, part.constants, part.tensors.__getitem__)
        if not self.weights:
            leave_unset(convolution, fused.expression.geometry, largest)
            return
        try:
            write_weights(convolution, fused.expression, part.tensor, largest)
        except NotAffine as error:
            raise RepfuseError(
                f"The plan does not fit the weights at {join(part.path, fused.path)!r}.",
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
