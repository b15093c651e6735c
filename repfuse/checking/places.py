"""The fused weights in float64, computed from the original's one site at a time, when they are asked for."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from repfuse.algebra.evaluation import Tensors, behind_norm, constant, evaluate
from repfuse.algebra.expression import Expression
from repfuse.checking.comparison import TOLERANCE, answers_in_float64, half_the_digits, tabulate
from repfuse.checking.inputs import Trial
from repfuse.checking.results import Comparison
from repfuse.checking.runs import Change, Outcome, empty, in_float64, narrow_in
from repfuse.errors import RepfuseError
from repfuse.networks import join, main_dtype, named_tensors
from repfuse.planning.edits import Fused, is_affine_norm
from repfuse.planning.planner import Planner
from repfuse.planning.region import Group, Piece, Region, pieces
from repfuse.planning.replaying import replay
from repfuse.plans import AGAIN, Plan
from repfuse.recording.constants import lookup
from repfuse.rewriting import without_neighbours

NORM = "BatchNorm with statistics, a weight and a bias"

# Each region by itself, before and after the rewrite, as modules of its sources.
#
# Neither knows the algebra: before are the original's own operations, after the fused modules as they are.


@dataclass(frozen=True)
class Place:
    """One region of the network ``module``; ``written`` are the convolutions that its groups became, by their ids.

    Groups without one stay what they are, a factor of their source. Named after its first convolution.
    """

    planner: Planner
    module: nn.Module
    region: Region
    written: Mapping[int, Fused]

    @property
    def path(self) -> str:
        """Where its first convolution is after the rewrite."""
        return next(iter(self.written.values())).path

    @property
    def output(self) -> str:
        """What its sites call what it computes."""
        return self.planner.recording.names[self.region.root]

    @cached_property
    def pieces(self) -> list[Piece]:
        """The parts of the region, where values are put elsewhere in between; else none."""
        return pieces(self.region, self.planner.meanings)

    @property
    def sources(self) -> list[fx.Node]:
        """The nodes that it takes its inputs from, each once."""
        return list(dict.fromkeys(group.source for group in self.region.groups))

    @cached_property
    def before(self) -> nn.Module:
        """What computes the region's root from its sources, over the tensors of ``module``."""
        return self._computed({})

    def in_parts(self, others: Iterable[Place], fused: nn.Module) -> nn.Module:
        """Return the same, where those of the ``others`` that lie within it are what they became in ``fused``.

        They are of a planner of the same recording.
        """
        parts = (each for each in others if each.region.nodes <= self.region.nodes)
        return self._computed({each.region.root: (each.sources, each.after(fused)) for each in parts})

    def _computed(self, parts: Mapping[fx.Node, tuple[Sequence[fx.Node], nn.Module | None]]) -> nn.Module:
        """Return what computes the region's root, some nodes by a module of other nodes; by none, they are what they
        read.
        """
        graph, origin, recording = fx.Graph(), self.planner.meanings.origin, self.planner.recording
        env: dict[fx.Node, Any] = {source: graph.placeholder(source.name) for source in self.sources}
        read = {root: sources for root, (sources, _) in parts.items()}
        others = _needed(self.region.root, set(env), origin, {})
        # It may read sizes and dtypes of tensors that are not its own.
        if any(node.op == "placeholder" for node in others):
            (source, x), *_ = env.items()
            env |= recording.run.size_of
            for node in (node for node in recording.nodes if node in others and node in recording.run.attribute_of):
                value = recording.run.attribute_of[node]  # in float64, a dtype is that of the source
                alike = not isinstance(value, torch.dtype) or value is recording.dtype_of[source]
                env[node] = graph.call_function(getattr, (x, node.args[1])) if alike else value
        needed = _needed(self.region.root, set(env), origin, read)
        held: dict[str, Any] = {}

        def known(node: fx.Node) -> Any:
            return env[node if node in env else origin(node)]

        def operand(node: fx.Node, reader: fx.Node) -> Any:
            """A source of its own for who writes into one: others may read a copy that the original made before."""
            x = known(node)
            writes = recording.memory.writes(reader) and isinstance(x, fx.Node) and x.op == "placeholder"
            return graph.call_method("clone", (x,)) if writes else x

        for node in (node for node in recording.nodes if node in needed):
            sources, part = parts.get(node, ((), None))
            name = f"held{len(held)}"
            if part is not None:
                held[name] = part
                env[node] = graph.call_module(name, tuple(map(known, sources)))
            elif node.op == "get_attr":  # by a name without dots, so that there are no modules to copy
                held[name] = operator.attrgetter(str(node.target))(self.module)
                env[node] = graph.get_attr(name)
            else:
                env[node] = known(sources[0]) if sources else graph.node_copy(node, partial(operand, reader=node))
        graph.output(env[self.region.root])
        return _Computed(held, graph)

    def after(self, fused: nn.Module, factor: Callable[[float], float] = lambda by: by) -> nn.Module:
        """Return the convolutions of the network ``fused`` that replace the region, over its tensors.

        A source that is only added up, times a number, is multiplied by ``factor`` of it.
        """
        if self.pieces:  # what puts values elsewhere stays as it is around each that became a convolution
            (group,) = (each for each in self.region.groups if id(each) in self.written)
            part = self._part(fused, group)
            return self._computed({each.root: ((each.source,), part if each.layered else None) for each in self.pieces})
        number = {source: position for position, source in enumerate(self.sources)}
        terms = list[tuple[int, nn.Module | float]]()
        for group in self.region.groups:
            made = id(group) in self.written
            terms.append((number[group.source], self._part(fused, group) if made else factor(group.of_source or 1)))
        return _Sum(terms, self.region.joined_along)

    def _part(self, fused: nn.Module, group: Group) -> nn.Module:
        path, norm = self.written[id(group)].path, self.written[id(group)].norm
        part = fused.get_submodule(path)
        return nn.Sequential(part, fused.get_submodule(norm)) if norm and norm != join(path, "norm") else part

    def norms(self, fused: nn.Module) -> dict[str, _BatchNorm]:
        """Return the norms of the network ``fused`` that stay behind its convolutions, by path. Raises RepfuseError
        where one is missing.
        """
        return {item.norm: norm_at(fused, item.norm) for item in self.written.values() if item.norm}


class _Sum(nn.Module):
    """A sum of terms: a module of one of the inputs, or that input times a number; each with the input's position. Or
    these joined ``along`` an axis.
    """

    def __init__(self, terms: Sequence[tuple[int, nn.Module | float]], along: int | None) -> None:
        super().__init__()
        self.along = along
        self.parts = nn.ModuleList(term for _, term in terms if isinstance(term, nn.Module))
        self.steps = tuple((number, None if isinstance(term, nn.Module) else term) for number, term in terms)

    def forward(self, *inputs: Tensor) -> Tensor:
        parts = iter(self.parts)
        terms = [self._term(inputs[at], by, parts) for at, by in self.steps]
        return reduce(operator.add, terms) if self.along is None else torch.cat(terms, self.along)

    @staticmethod
    def _term(x: Tensor, by: float | None, parts: Iterator[nn.Module]) -> Tensor:
        if by is None:
            return next(parts)(x)  # type: ignore[no-any-return]
        return x if by == 1 else x * by


class _Computed(nn.Module):
    """What a graph over modules and tensors computes, as a plain module: copying a GraphModule compiles it again, and
    each place is copied several times.
    """

    def __init__(self, root: dict[str, Any], graph: fx.Graph) -> None:
        super().__init__()
        made = fx.GraphModule(root, graph)
        vars(self).update({table: vars(made)[table] for table in ("_parameters", "_buffers", "_modules")})
        self.computed = type(made).forward

    def forward(self, *inputs: Tensor) -> Tensor:
        result: Tensor = self.computed(self, *inputs)
        return result


def places(original: nn.Module, plan: Plan) -> Iterator[Place]:
    """Yield the regions that ``plan`` replaces in ``original``, in the order in which they run."""
    planner, layout = replay(original, plan)
    order = planner.recording.order
    found: dict[fx.Node, list[Fused]] = {}
    for item in layout.fused:
        found.setdefault(item.region.root, []).append(item)
    for _, items in sorted(found.items(), key=lambda entry: order[entry[0]]):
        yield Place(planner, original, items[0].region, {id(item.group): item for item in items})


def _needed(
    root: fx.Node,
    sources: set[fx.Node],
    origin: Callable[[fx.Node], fx.Node],
    read: Mapping[fx.Node, Sequence[fx.Node]],
) -> set[fx.Node]:
    """Return the nodes between the sources and ``root``, what they take their weights and sizes from included.

    ``read`` says of some what they read in place of their operands.
    """
    needed: set[fx.Node] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node not in needed and origin(node) not in sources:
            needed.add(node)
            waiting += read.get(node, node.all_input_nodes)
    return needed


class StoredWeight(NamedTuple):
    """A stored tensor of a fused convolution, and what computes it in float64."""

    stored: torch.Tensor
    exact: Callable[[], torch.Tensor]


class ExactWeights:
    """What the weights of a fused network would be without rounding: ``all``, and those ``of_place``, by its path.

    ``name_of`` are the names of the stored ones by id.
    """

    def __init__(self, fused: nn.Module, places: Iterable[Place]) -> None:
        self.of_place = {place.path: list(_weights(fused, place)) for place in places}
        self.all = [weight for weights in self.of_place.values() for weight in weights]
        stored = {id(weight.stored) for weight in self.all}
        self.name_of = {id(tensor): name for name, tensor in named_tensors(fused) if id(tensor) in stored}

    def change(self, network: nn.Module) -> Change:
        """Return what makes the tensors of ``network``, which holds fused convolutions, exact as they are read."""
        return exactly(self.all, network)


def exactly(weights: Iterable[StoredWeight], network: nn.Module) -> Change:
    """Return what makes these tensors of ``network`` exact as they are read.

    Those stored in float64 are taken as they are: they are themselves what has to be proven.
    """
    exact = {id(weight.stored): weight.exact for weight in weights if weight.stored.dtype is not torch.float64}
    narrow = {name: exact[id(x)] for name, x in named_tensors(network) if id(x) in exact}
    return lambda name, tensor: narrow[name]() if name in narrow else in_float64(name, tensor)


def _weights(fused: nn.Module, place: Place) -> Iterator[StoredWeight]:
    def weight(expression: Expression, tensors: Tensors, device: torch.device) -> torch.Tensor:
        return evaluate(expression, tensors, torch.empty(0, dtype=torch.float64, device=device), empty)[0]

    tensors = lookup(place.module, place.planner.recording.constants)
    for group in place.region.groups:
        if item := place.written.get(id(group)):
            convolution = convolution_at(fused, item.path)
            if not {"weight", "bias"} <= convolution._parameters.keys():  # a parametrization computes it
                raise _misfit(item.path)
            if item.norm:
                yield from _behind_norm(convolution, norm_at(fused, item.norm), group.expression, tensors)
                continue
            for name, compute in (("weight", weight), ("bias", constant)):
                stored = convolution._parameters[name]
                if stored is not None:  # a missing bias is not the one that was computed: what is compared shows it
                    yield StoredWeight(stored, partial(compute, group.expression, tensors, stored.device))


def _behind_norm(
    convolution: nn.Module, norm: _BatchNorm, expression: Expression, tensors: Tensors
) -> Iterator[StoredWeight]:
    """Yield the tensors of a convolution and its norm: with whatever statistics it has, together they are the map."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None and var is not None

    def computed(number: int) -> torch.Tensor:
        return behind_norm(expression, tensors, mean, var, norm.eps)[number]

    weight, bias = convolution._parameters["weight"], convolution._parameters.get("bias")
    assert weight is not None
    for number, stored in enumerate((weight, norm.weight, norm.bias)):
        yield StoredWeight(stored, partial(computed, number))
    if bias is not None:
        yield StoredWeight(bias, lambda: torch.zeros_like(mean, dtype=torch.float64))
    for statistics in (mean, var):
        yield StoredWeight(statistics, statistics.double)


def norm_at(fused: nn.Module, path: str) -> _BatchNorm:
    """Return the norm behind the convolution of a site. Raises RepfuseError where there is none with statistics."""
    found = _at(fused, path, NORM)
    if not is_affine_norm(found):
        raise _misfit(path, NORM)
    return found


def convolution_at(fused: nn.Module, path: str) -> nn.Module:
    """Return the convolution or linear layer of a site: behind its padding, where that is a module apart.

    Raises RepfuseError where there is none.
    """
    found = without_neighbours(_at(fused, path, "convolution"))
    if not isinstance(found, _ConvNd | nn.Linear):
        raise _misfit(path)
    return found


def _at(fused: nn.Module, path: str, layer: str) -> nn.Module:
    try:
        return fused.get_submodule(path)
    except AttributeError as error:
        raise _misfit(path, layer) from error


def _misfit(path: str, layer: str = "convolution") -> RepfuseError:
    return RepfuseError("The plan does not fit the fused network.", f"It has no {layer} at {path!r}.", AGAIN)


def compare_exact(
    fused: nn.Module, change: Change, trials: Sequence[Trial], expected: Sequence[Outcome], *, sound: bool = True
) -> Comparison:
    """Compare what the network computes in float64, its weights not rounded, with what the original does.

    ``change`` gives them so.

    Where each site is ``sound`` by itself, a larger error is accepted as far as the order of summation explains it.
    Where a module has no float64, half of the digits of its dtype have to agree, which wrong algebra does not leave:
    what differs in the last digit of float64 may be rounded apart there.
    """
    found = answers_in_float64(fused, trials, expected, change)
    network = tabulate(trials, expected, found)
    narrow, dtype = narrow_in((*expected, *found)), main_dtype(fused)
    if narrow and dtype:
        return replace(network, tolerance=half_the_digits(dtype), narrow=narrow)
    if not network.passed and not network.mismatches and sound:
        network = replace(network, tolerance=_explained(fused, change, trials, expected, network))
    return network


def _explained(
    network: nn.Module, change: Change, trials: Sequence[Trial], outcomes: Sequence[Outcome], seen: Comparison
) -> float:
    """Return the tolerance that rounding in float64 explains in ``network``, where it explains the errors.

    TOLERANCE holds for layers that hand an error on as large as it is. Some networks amplify it at some inputs, by
    orders of magnitude; by how much is measured there, as ``repfuse.checking.rounding`` says.
    """
    from repfuse.checking.rounding import allowed, on, summation  # few networks need it

    above = [
        index for index, row in enumerate(seen.trials) if any(each.relative.max > TOLERANCE for each in row.outputs)
    ]
    effect = summation(network, on([trials[index] for index in above]), [outcomes[index] for index in above], change)
    limits = {key: limit.max for key, limit in allowed([effect]).items()}
    most = max(limits.values(), default=TOLERANCE)
    explained = math.isfinite(most) and all(  # where an output changes its shape, nothing is explained
        output.relative.max <= limits[position, output.name]
        for position, index in enumerate(above)
        for output in seen.trials[index].outputs
    )
    return most if explained else TOLERANCE
