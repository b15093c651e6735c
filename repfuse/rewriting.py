"""plan + module -> fused module. The module that is given is never changed."""

from __future__ import annotations

import copy
import itertools
import operator
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, jit, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repfuse.algebra.evaluation import behind_norm, evaluate
from repfuse.algebra.geometry import Geometry, NotAffine
from repfuse.algebra.transposed import TransposedGeometry
from repfuse.errors import EXIT_FAILED_CHECK, RepfuseError
from repfuse.memory import APART, collecting_later, is_streamed, put_aside
from repfuse.networks import holders, is_plain, join, keep_attributes, named_modules, named_tensors, own_tensors
from repfuse.planning.cost import needs_separate_pad
from repfuse.planning.edits import Block, Fused, Layout, left_range, stored_like
from repfuse.planning.replaying import replay
from repfuse.plans import AGAIN, Plan
from repfuse.recording.constants import lookup
from repfuse.recording.copies import attributes, copy_with, is_copied_plainly, like
from repfuse.wording import dtype_name

# Fused maps as modules: the plainest stock module that computes them.


_PADS = {"zeros": "Zero", "reflect": "Reflection", "replicate": "Replication", "circular": "Circular"}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Memory formats by number of axes of the weight."""


def _convolution_module(geometry: Geometry) -> nn.Module:
    """Return a convolution of ``geometry`` without data, or a linear layer where it has no spatial axes.

    It has no bias yet. Padding is in explicit integers, 0 where it is a module apart.
    """
    channels = geometry.in_channels, geometry.out_channels
    if not geometry.ndim:
        return nn.Linear(*channels, bias=False, device="meta")
    apart = needs_separate_pad(geometry)
    options: dict[str, Any]
    kind, options = "Conv", {"padding_mode": "zeros" if apart else geometry.padding_mode}
    if isinstance(geometry, TransposedGeometry):
        kind, options = "ConvTranspose", {"output_padding": geometry.output_padding}
    options |= {"stride": geometry.stride, "dilation": geometry.dilation, "groups": geometry.groups, "bias": False}
    padding = 0 if apart else tuple(before for before, _ in geometry.padding)
    made: nn.Module = getattr(nn, f"{kind}{geometry.ndim}d")(
        *channels, geometry.kernel, padding=padding, device="meta", **options
    )
    return made


def _with_neighbours(
    convolution: nn.Module, geometry: Geometry, norm: _BatchNorm | None, *, ones: bool = False
) -> nn.Module:
    """Return the convolution before the norm, behind what puts a channel of ``ones`` beside its input, and behind a
    padding or a crop of its own where it cannot do that itself.
    """
    steps: list[tuple[str, nn.Module]] = []
    if ones:
        steps.append(("ones", getattr(nn, f"ConstantPad{geometry.ndim}d")((0, 0) * geometry.ndim + (0, 1), 1.0)))
    if needs_separate_pad(geometry):
        kind = getattr(nn, f"{_PADS[geometry.padding_mode]}Pad{geometry.ndim}d")
        both = zip(("pad", "crop"), geometry.pad_then_crop, strict=True)
        steps += [(name, kind(part)) for name, part in both if any(part)]
    behind = [("norm", norm)] if norm is not None else []
    return nn.Sequential(OrderedDict([*steps, ("conv", convolution), *behind])) if steps or behind else convolution


def without_neighbours(module: nn.Module) -> nn.Module:
    """Return the convolution of a module that ``rewrite`` made, and any other module as it is."""
    padded = isinstance(module, nn.Sequential) and "conv" in module._modules
    return module.get_submodule("conv") if padded else module


FOLDED_BY_HOST = ("forward_fuse", "fuseforward", "fuse")
"""Methods of layers that their library folds itself, whatever ``bn`` is: the forward without it of ultralytics and
YOLOv5 and 6, of YOLOX and YOLOv7; what gives the folded layer of LeViT and its heirs."""


def _folded_norm(mean: Tensor | None, owners: Iterable[nn.Module]) -> nn.Module:
    """Return what takes the place of a folded normalisation with this running mean: nothing to do.

    Some libraries fold what is left once more before they run or export a network, by its numbers and not by its class:
    for them it has numbers that change nothing, which are no part of the state dict.
    """
    nothing: Any = nn.Identity()
    folds = any(hasattr(owner, method) for owner in owners for method in FOLDED_BY_HOST)
    if mean is not None and folds:
        nothing.eps = 0.0
        for name, value in (("running_mean", 0), ("running_var", 1), ("weight", 1), ("bias", 0)):
            nothing.register_buffer(name, torch.full_like(mean, value), persistent=False)
    return nothing  # type: ignore[no-any-return]


def _graph_module(owner: nn.Module, graph: fx.Graph, made: dict[str, nn.Module], kept: Iterable[str]) -> fx.GraphModule:
    """Return ``graph`` as a module named like ``owner``, whose children it calls; ``made`` are new children."""
    for name, module in made.items():
        setattr(owner, name, module)
    body = fx.GraphModule(owner, copy.deepcopy(graph), class_name=type(owner).__name__)
    for name in kept:
        _keep(owner, body, name)
    body._non_persistent_buffers_set |= owner._non_persistent_buffers_set & body._buffers.keys()
    for table in ("_parameters", "_buffers", "_modules"):
        _in_order(getattr(body, table), list(getattr(owner, table)))
    for path, module in body.named_modules():
        if type(module) is nn.Module:  # what torch.fx puts around children that are called one by one
            module.training = owner.get_submodule(path).training
    return body


def _in_order(table: dict[str, Any], names: list[str]) -> None:
    """Put the entries of a table in the order of the owner's, so that ``state_dict`` keeps its order."""
    for name in [*(name for name in names if name in table), *(name for name in table if name not in names)]:
        table[name] = table.pop(name)


def _keep(owner: nn.Module, body: nn.Module, name: str) -> None:
    """Register the tensor ``name`` of ``owner`` under the same name in ``body``.

    A module that is rewritten already, in another place where it also stands, may no longer have it: then that module.
    """
    first, _, rest = name.partition(".")
    if not rest:
        _keep_own(owner, body, first)
        return
    child = owner._modules[first]
    assert child is not None
    if isinstance(child, jit.ScriptModule):  # of which nothing can stand alone
        body.add_module(first, child)
        return
    if first not in body._modules:
        body.add_module(first, nn.Module() if _has(child, rest) else child)
    if body._modules[first] is not child:
        _keep(child, body.get_submodule(first), rest)


def _has(module: nn.Module, name: str) -> bool:
    try:
        operator.attrgetter(name)(module)
    except AttributeError:
        return False
    return True


def _keep_own(module: nn.Module, holder: nn.Module, leaf: str) -> None:
    if leaf in module._parameters:
        holder.register_parameter(leaf, module._parameters[leaf])
    elif leaf in module._buffers:
        holder.register_buffer(leaf, module._buffers[leaf], leaf not in module._non_persistent_buffers_set)
    elif hasattr(module, leaf):
        setattr(holder, leaf, getattr(module, leaf))


def _keep_plain_attributes(owner: nn.Module, body: nn.Module) -> None:
    """Copy what an owner and its class carry as plain data: others read it (``layer.f`` in YOLO, ``model.names``)."""
    classes = itertools.takewhile(lambda kind: kind is not nn.Module, type(owner).__mro__)
    tables = [vars(owner), *map(vars, classes)]
    found = {name: value for table in reversed(tables) for name, value in table.items() if not name.startswith("_")}
    kept = {name: value for name, value in found.items() if is_plain(value) and not hasattr(body, name)}
    keep_attributes(body, kept)


def rewrite(module: nn.Module, plan: Plan, *, weights: bool = True, share: bool = False) -> nn.Module:
    """Return a copy of ``module`` with every site of ``plan`` rewritten into its one convolution.

    The weights may differ from those the plan was made with: a plan is about structure. Without ``weights`` the fused
    ones are left unset, for who loads them next; with ``share`` all others are those of ``module``, for who changes
    neither. Raises RepfuseError where the plan does not fit the module or its weights, or where a fused weight
    overflows the dtype of the weights that it replaces.
    """
    with collecting_later():
        return _Rewriting(module, plan, weights=weights, share=share).run()


def _dissolved(module: nn.Module, layout: Layout) -> dict[str, nn.Module]:
    """Return by path what is registered within ``module`` and in no new body: branches, norms that become no-ops.

    Nothing within a module whose class copies itself its own way, which may look at its parts.
    """
    blocks, identities = {block.path: block for block in layout.blocks}, set(layout.identities)
    edited = [path.rpartition(".")[0] for path in identities]
    edited += [path for fused in layout.fused for path in (fused.path, fused.norm, fused.owner)]
    met = {part for path in edited for part in _on_the_way(module, path)}
    seen, left = set[tuple[nn.Module, bool]](), [("", module, True)]
    while left:
        path, part, plain = left.pop()
        met.add(part)
        plain = plain and is_copied_plainly(part)
        prefix = f"{path}." if path else ""
        if plain and path in blocks:
            for name in _held_by(blocks[path]):
                way = list(_on_the_way(part, name))
                met.update(way)
                odd = (place for place, each in enumerate(way) if not is_copied_plainly(each))
                place = next(odd, len(way) - 1)
                if place:  # else it is a tensor of its own, or new
                    left.append((prefix + ".".join(name.split(".")[:place]), way[place], True))
        elif (part, plain) not in seen:
            seen.add((part, plain))
            children = ((prefix + name, child) for name, child in part._modules.items() if child is not None)
            left += [(at, child, plain) for at, child in children if not (plain and at in identities)]
    found = {path: part for path, part in named_modules(module) if part not in met}
    return {path: part for path, part in found.items() if not isinstance(part, jit.ScriptModule)}


def _held_by(block: Block) -> Iterator[str]:
    """Yield what the new body of a block takes over from the old one: modules, and tensors within them."""
    yield from (str(node.target) for node in block.graph.nodes if node.op in ("call_module", "get_attr"))
    yield from block.steps or ()
    yield from (name.partition(".")[0] for name in block.kept)


def _on_the_way(module: nn.Module, path: str) -> Iterator[nn.Module]:
    """Yield a module, and those below it on the way to ``path``, as far as there are any."""
    part: Any = module
    for name in path.split(".") if path else ():
        yield part
        part = getattr(part, name, None)
        if not isinstance(part, nn.Module):
            return
    yield part


def _shell(part: nn.Module) -> nn.Module:
    """Return a module of the same class with copies of the plain attributes, and nothing else in it."""
    shell: nn.Module = object.__new__(type(part))
    nn.Module.__init__(shell)
    held = {name: vars(part)[name] for name in attributes(part) if is_plain(vars(part)[name])}
    vars(shell).update(copy.deepcopy(held), training=part.training)
    return shell


class _Rewriting:
    """One rewrite: a copy of the module without what will be replaced, then the edits."""

    def __init__(self, module: nn.Module, plan: Plan, *, weights: bool, share: bool) -> None:
        planner, self.layout = replay(module, plan)
        self.weights = weights
        self.constants = planner.recording.constants
        same = module is self.constants.module
        self.tensors = self.constants.tensors if same else dict(named_tensors(module, remove_duplicate=False))
        self.tensor = lookup(module, self.constants)
        dissolved = _dissolved(module, self.layout)
        named = dict.fromkeys(name for fused in self.layout.fused for name in fused.expression.tensor_names)
        leaves = (leaf for name in named for leaf in self.constants.leaves(name))
        merged = [self.tensors[leaf] for leaf in leaves if leaf.rpartition(".")[0] not in dissolved]
        stand_ins = {id(x): like(x, x.to("meta")) for x in merged}  # so that no data is copied
        self.originals = {stand_ins[id(x)]: x for x in merged}
        self.streamed = is_streamed(module)
        kept: dict[int, Any] = {id(x): x for x in self.tensors.values()} if share or self.streamed else {}
        outermost = (part for path, part in dissolved.items() if path.rpartition(".")[0] not in dissolved)
        self.shells = {_shell(part): part for part in outermost}  # what is in them is not copied
        kept |= stand_ins | {id(part): shell for shell, part in self.shells.items()}
        self.result = copy_with(module, kept)
        self.successors: dict[nn.Module, nn.Module] = {}
        self.holders = holders(self.result)

    def run(self) -> nn.Module:
        """Make the edits, the innermost first, so that an outer block takes its inner ones over as they are."""
        for fused in self.layout.folds:
            self._write(self.result.get_submodule(fused.path), self._norm_there(fused), fused)
        for path in self.layout.identities:
            norm = self.result.get_submodule(path)
            owners = [owner for owner, _ in self.holders[norm]]
            self._replace(norm, _folded_norm(self.tensors.get(f"{path}.running_mean"), owners))
        depth = {block.path: block.path.count(".") + bool(block.path) for block in self.layout.blocks}
        for block in sorted(self.layout.blocks, key=lambda block: depth[block.path], reverse=True):
            owner = self.result.get_submodule(block.path)
            self._replace(owner, self._body(block, owner))
        self._replace_unregistered()
        self._restore()
        return self.result

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put ``new`` wherever a module is registered, so that what was shared stays shared."""
        new.training = old.training
        _keep_plain_attributes(old, new)
        if old is self.result:
            self.result = new
        for parent, name in self.holders[old]:
            setattr(parent, name, new)
        self.successors[old] = new

    def _replace_unregistered(self) -> None:
        """Put the new modules also where old ones stand in plain lists, tuples and dicts."""
        seen: set[int] = set()
        for _, module in named_modules(self.result):
            held = vars(module)
            for name in attributes(module):
                if isinstance(held[name], (nn.Module, tuple, list, dict)):  # what may be, or hold, a module
                    held[name] = self._succeeded(held[name], seen)

    def _succeeded(self, value: Any, seen: set[int]) -> Any:
        """Return ``value`` with the new modules in it; lists and dicts stay the objects that they are."""
        if isinstance(value, nn.Module):
            while value in self.successors:
                value = self.successors[value]
            if value in self.shells:  # it is needed after all
                vars(value).update(vars(copy_with(self.shells.pop(value), {})))
        elif type(value) is tuple and not is_plain(value):
            return tuple(self._succeeded(item, seen) for item in value)
        elif type(value) in (list, dict) and id(value) not in seen:
            seen.add(id(value))
            for key, item in value.items() if type(value) is dict else enumerate(value):
                value[key] = self._succeeded(item, seen)
        return value

    def _body(self, block: Block, owner: nn.Module) -> nn.Module:
        """Return the new body of a block: the plainest module that computes its graph."""
        made = {name: self._convolution(fused) for name, fused in block.fused.items()}
        if block.steps is None:
            return _graph_module(owner, block.graph, made, block.kept)
        if any(fused.path == block.path for fused in block.fused.values()):
            return next(iter(made.values()))
        steps = [(name, made[name] if name in made else owner.get_submodule(name)) for name in block.steps]
        return nn.Sequential(OrderedDict(steps)) if steps else nn.Identity()

    def _convolution(self, fused: Fused) -> nn.Module:
        geometry = fused.expression.geometry.plainest
        convolution, norm = _convolution_module(geometry), self._norm_there(fused)
        own: _BatchNorm | None = None
        if fused.norm and norm is None:
            own = getattr(nn, f"BatchNorm{max(geometry.ndim, 1)}d")(geometry.out_channels, device="meta")
        self._write(convolution, norm or own, fused)
        whole = _with_neighbours(convolution, geometry, own, ones=fused.expression.has_ones)
        return whole.train(self.result.get_submodule(fused.owner).training)

    def _norm_there(self, fused: Fused) -> _BatchNorm | None:
        """Return the norm of the network itself that stays behind a convolution; None where there is none."""
        if not fused.norm or fused.norm == join(fused.path, "norm"):
            return None
        norm = self.result.get_submodule(fused.norm)
        assert isinstance(norm, _BatchNorm)
        return norm

    def _write(self, convolution: nn.Module, norm: _BatchNorm | None, fused: Fused) -> None:
        """Give ``convolution`` the fused weights, and ``norm`` what it multiplies and adds, with statistics that change
        nothing. Dtype, device and memory format come from the largest weight that is merged.
        """
        like = stored_like(fused.expression, self.constants, self.tensors.__getitem__)
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        channels = fused.expression.geometry.out_channels
        mean, var = torch.zeros(channels, **options), torch.ones(channels, **options)
        assert isinstance(convolution.weight, Tensor)
        if self.weights:
            weight, *numbers = self._numbers(fused, norm, mean, var, like)
        else:
            weight, *numbers = torch.empty(convolution.weight.shape, **options), var, mean
        bias: Tensor | None = numbers[-1]
        if norm is not None:
            norm.weight, norm.bias = (nn.Parameter(x.clone(), like.requires_grad) for x in numbers)
            norm.running_mean, norm.running_var = mean, var
            norm.num_batches_tracked = torch.zeros((), dtype=torch.long, device=like.device)
            bias = None if convolution.bias is None else torch.zeros_like(mean)
        channels_last = _CHANNELS_LAST.get(like.dim())
        if channels_last and not like.is_contiguous() and like.is_contiguous(memory_format=channels_last):
            weight = weight.contiguous(memory_format=channels_last)
        if self.streamed and self.weights and weight.nbytes >= APART:
            weight = put_aside(weight)
        convolution.weight = nn.Parameter(weight, like.requires_grad)
        convolution.register_parameter("bias", None if bias is None else nn.Parameter(bias, like.requires_grad))

    def _numbers(self, fused: Fused, norm: _BatchNorm | None, mean: Tensor, var: Tensor, like: Tensor) -> list[Tensor]:
        """Return the weight and the bias, or what stands for the bias in a norm with these statistics: what it
        multiplies by and what it adds. Raises RepfuseError where the map cannot be stored.
        """
        expression = fused.expression
        try:
            if norm is None:
                made = [*evaluate(expression, self.tensor, like)]
            else:
                made = [x.to(like.dtype) for x in behind_norm(expression, self.tensor, mean, var, norm.eps)]
        except NotAffine as error:
            raise RepfuseError(
                f"The plan does not fit the weights at {fused.path!r}.",
                f"There is {error.reason}; with the weights that the plan was made with it was exact.",
                AGAIN,
            ) from error
        if left_range(made, map(self.tensor, expression.tensor_names)):
            raise RepfuseError(
                f"A fused weight does not fit into {dtype_name(like.dtype)}.",
                "The plan was made with other weights; of these, a product leaves the range of the format.",
                "Make the plan again with these weights, or convert in bfloat16 or float32.",
                EXIT_FAILED_CHECK,
            )
        return made

    def _restore(self) -> None:
        """Give real copies to the tensors that were left out of the copy and turn out to be used elsewhere."""
        copies: dict[Tensor, Tensor] = {}
        for _, module in named_modules(self.result):
            assert module not in self.shells, "a part that was left out"
            for name, tensor in own_tensors(module).items():
                original = self.originals.get(tensor)
                if original is not None:
                    if tensor not in copies:
                        copies[tensor] = original if self.streamed else like(original, original.detach().clone())
                    store: Any = next(x for x in (module._parameters, module._buffers, vars(module)) if name in x)
                    store[name] = copies[tensor]
