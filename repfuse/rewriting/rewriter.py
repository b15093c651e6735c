"""plan + module -> fused module. The module that is given is never changed."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from repfuse.algebra.expression import tensor_names
from repfuse.algebra.geometry import NotAffine
from repfuse.errors import RepfuseError
from repfuse.networks import named_tensors, own_tensors
from repfuse.placing.edits import Block, Candidate, Fused, Layout, owner_of, place_of
from repfuse.planning.cost import Policy
from repfuse.planning.planner import Planner
from repfuse.planning.storage import stored_like
from repfuse.plans import Plan
from repfuse.rewriting.emit import (
    convolution_module,
    graph_module,
    is_plain,
    keep_plain_attributes,
    leave_unset,
    with_padding,
    write_weights,
)
from repfuse.tracing.constants import Constants, lookup
from repfuse.tracing.leaves import hooks_of
from repfuse.tracing.skeleton import copy_with
from repfuse.tracing.trace import trace


def rewrite(module: nn.Module, plan: Plan, *, weights: bool = True) -> nn.Module:
    """Return a copy of ``module`` with every site of ``plan`` rewritten into its one convolution.

    The weights may differ from those the plan was made with: a plan is about structure. Without ``weights`` the fused
    ones are left unset, for who loads them next. Raises RepfuseError where the plan does not fit the module or its
    weights, or where a fused weight overflows the dtype of the weights that it replaces.
    """
    planner, layout = lay_out_plan(module, plan)
    return _Rewriting(module, layout, planner.traced.constants, weights=weights).run()


def lay_out_plan(module: nn.Module, plan: Plan) -> tuple[Planner, Layout]:
    """Return the planner of ``module`` and the layout of the plan's sites. Raises RepfuseError where the plan does
    not fit.
    """
    planner, candidates = _live(module, plan)
    return planner, planner.lay_out(_chosen(planner, candidates, plan))


def _live(module: nn.Module, plan: Plan) -> tuple[Planner, list[Candidate]]:
    """Return the planner and candidates of the plan, made anew where the plan comes from a file."""
    if plan.live is not None and _structure(plan.live[0].traced.module) == _structure(module):
        planner, candidates = plan.live
        return planner, candidates
    traced = trace(module, _example(module, plan))
    if traced.fingerprint() != plan.fingerprint:
        raise RepfuseError(
            "The plan does not fit this model.",
            "It was made for a model with another graph or other shapes.",
            "Make the plan again from this model.",
        )
    planner = Planner(traced, Policy(plan.policy), plan.matching_borders)
    return planner, planner.candidates()


def _example(module: nn.Module, plan: Plan) -> list[Tensor]:
    """Return zeros in the shapes of the plan's example, their floats as the module holds them now."""
    held = next((x for x in chain(module.parameters(), module.buffers()) if x.is_floating_point()), None)
    examples = [torch.zeros(shape, dtype=getattr(torch, dtype)) for shape, dtype in plan.inputs]
    if held is None:
        return examples
    return [x.to(held.device, held.dtype if x.is_floating_point() else x.dtype) for x in examples]


def _structure(module: nn.Module) -> list[tuple[Any, ...]]:
    """Return what a graph of the module depends on, its weights apart: classes, shapes and settings such as strides."""
    return [
        (
            name,
            type(child),
            [(key, tensor.shape) for key, tensor in own_tensors(child).items()],
            {key: value for key, value in vars(child).items() if is_plain(value)},
            len(hooks_of(child)),
        )
        for name, child in module.named_modules()
    ]


def _chosen(planner: Planner, candidates: list[Candidate], plan: Plan) -> list[Candidate]:
    """Return the candidates that the plan still holds: whoever edits a plan may drop sites.

    A plan names a site once; in the other calls of its owner it stands at the same place.
    """
    wanted = {(site.source, site.output, frozenset(site.nodes)) for site in plan.sites}
    known = {key for candidate in candidates for key in _keys(candidate)}
    if not wanted <= known:
        raise RepfuseError(
            f"The plan names {len(wanted - known)} sites that this model does not have.",
            "The model is another one, or the plan was edited by more than dropping sites.",
            "Make the plan again from this model.",
        )
    places = {_place(planner, candidate) for candidate in candidates if _keys(candidate) <= wanted}
    return [candidate for candidate in candidates if _place(planner, candidate) in places]


def _keys(candidate: Candidate) -> set[tuple[str, str, frozenset[str]]]:
    root = candidate.region.root.name
    return {(group.source.name, root, frozenset(node.name for node in group.nodes)) for group in candidate.groups}


def _place(planner: Planner, candidate: Candidate) -> tuple[str, tuple[int, ...]]:
    region = candidate.region
    return owner_of(planner.traced, region).path, place_of(planner.traced, region)


class _Rewriting:
    """One rewrite: a copy of the module without the tensors that will be replaced, then the edits of the layout."""

    def __init__(self, module: nn.Module, layout: Layout, constants: Constants, *, weights: bool) -> None:
        self.weights = weights
        self.layout = layout
        self.constants = constants
        self.tensors = dict(named_tensors(module, remove_duplicate=False))
        self.tensor = lookup(module, constants)
        named = (name for fused in layout.fused for name in tensor_names(fused.expression))
        names = {leaf for name in named for leaf in constants.leaves(name)}
        self.replaced = {id(tensor): tensor for name, tensor in self.tensors.items() if name in names}
        self.stand_ins = {key: _stand_in(tensor) for key, tensor in self.replaced.items()}
        self.result = copy_with(module, dict(self.stand_ins))
        self.holders: dict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
        for parent in self.result.modules():
            for name, child in parent._modules.items():
                if child is not None:
                    self.holders[child].append((parent, name))

    def run(self) -> nn.Module:
        """Make the edits, the innermost first, so that an outer block takes its inner ones over as they are."""
        for fused in self.layout.folds:
            self._write(self.result.get_submodule(fused.path), fused)
        for path in self.layout.identities:
            self._replace(path, nn.Identity())
        for block in sorted(self.layout.blocks, key=lambda block: len(block.path.split(".")) if block.path else 0)[
            ::-1
        ]:
            self._replace(block.path, self._body(block, self.result.get_submodule(block.path)))
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
        geometry = fused.expression.geometry
        convolution = convolution_module(geometry)
        self._write(convolution, fused)
        return with_padding(convolution, geometry).train(self.result.get_submodule(fused.owner).training)

    def _write(self, convolution: nn.Module, fused: Fused) -> None:
        """Write the fused weights; dtype, device and memory format come from the largest weight that is merged."""
        largest = stored_like(fused.expression, self.constants, self.tensors.__getitem__)
        if not self.weights:
            leave_unset(convolution, fused.expression.geometry, largest)
            return
        try:
            write_weights(convolution, fused.expression, self.tensor, largest)
        except NotAffine as error:
            raise RepfuseError(
                f"The plan does not fit the weights at {fused.path!r}.",
                f"There is {error.reason}; with the weights that the plan was made with it was exact.",
                "Make the plan again from this model.",
            ) from error

    def _restore(self) -> None:
        """Give real copies to the tensors that were left out of the copy and turn out to be used elsewhere."""
        originals = {id(stand_in): self.replaced[key] for key, stand_in in self.stand_ins.items()}
        copies: dict[int, Tensor] = {}
        for module in self.result.modules():
            for store in (module._parameters, module._buffers, vars(module)):
                for name, tensor in list(store.items()):
                    if id(tensor) in originals:
                        store[name] = copies.setdefault(id(tensor), _clone(originals[id(tensor)]))  # type: ignore[assignment]


def _stand_in(tensor: Tensor) -> Tensor:
    return (
        nn.Parameter(tensor.to("meta"), tensor.requires_grad) if isinstance(tensor, nn.Parameter) else tensor.to("meta")
    )


def _clone(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
