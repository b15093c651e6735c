"""recording -> scales: which numbers each tensor of a network may be multiplied with while nothing else changes.

What each operator does with scales is its law, with its formula beside it, at the end. A value x becomes ``x / s``,
with a positive s for each channel. An operator f has a law where its own tensors can be so changed that ``f(x / s)`` is
``f(x) / t``; the law says what t is, and what becomes of the tensors. It holds at every size, as the recording does.
Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721,
section 4.1.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from repfuse.algebra.expression import Joined, Scaled, Selected, Sum, Through
from repfuse.algebra.layers import Convolution, Factor, Filter, Normalisation, Offset, Phases
from repfuse.algebra.transposed import TransposedGeometry
from repfuse.equalizing.solving import Along, Numbers, Part, ScaledWeight, Scales
from repfuse.ops import channels
from repfuse.ops.channels import only_measures
from repfuse.ops.meaning import Meaning, Passage, Rearranged, Same, convolves, inputs_of
from repfuse.ops.spelling import Call, is_data, makes_zeros, spelled
from repfuse.ops.table import meaning_of
from repfuse.plans import Refusal
from repfuse.recording.constants import called
from repfuse.recording.recording import Recording


class Fixed(Exception):
    """All scales of what an operator reads and gives are 1: it has no law, or not here."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


@dataclass(frozen=True)
class Freedom:
    """``parts`` are the tensors that have scales, whose numbers are 0 to ``count``, number 0 being 1; ``refusals`` say
    why other values have none.
    """

    parts: tuple[Part, ...]
    count: int
    refusals: tuple[Refusal, ...]


class Reading:
    """Goes through the nodes in order. ``along`` are values with scales, ``parts`` the tensors, by one name each."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.scales = Scales()
        self.along: dict[fx.Node, Along] = {}
        self.parts: dict[str, Part] = {}
        self.writers: dict[str, set[fx.Node]] = defaultdict(set)
        self.refusals: dict[tuple[str, str], Refusal] = {}
        self.meanings: dict[fx.Node, Meaning | None] = {node: meaning_of(node, recording) for node in recording.nodes}
        tensors = recording.constants.tensors
        first: dict[int, str] = {}
        self.name_of = {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
        self.changeable = _changeable(recording, self.name_of)
        self.before_layers: set[fx.Node] = set()
        for node in reversed(recording.nodes):
            if any(user in self.before_layers or convolves(self.meanings.get(user)) for user in node.users):
                self.before_layers.add(node)

    # What laws are given

    def write(self, node: fx.Node, *parts: Part) -> None:
        """Let the law of a node change tensors. Raises Fixed where one of them is not to be changed."""
        for part in parts:
            if self.name_of.get(part.name) not in self.changeable:
                raise Fixed(
                    "unwritable-weight", f"{part.name.removeprefix('%')} is no tensor that can be changed alone"
                )
        for part in parts:
            name = self.name_of[part.name]
            known = self.parts.setdefault(name, replace(part, name=name))
            if known.form() == part.form():
                self.scales.tie(known.times, part.times)
                self.scales.tie(known.over, part.over)
            else:
                self.scales.fix(known.times, known.over, part.times, part.over)
            self.writers[name].add(node)

    # The walk

    def run(self) -> Freedom:
        """Return the scales of a network: those of its inputs and outputs, and of all that depends on these, are 1."""
        recording = self.recording
        for node in recording.nodes:
            idle = node.op in ("placeholder", "get_attr") or recording.constants.is_constant(node)
            if not idle and not self._reads_nothing(node):
                self._read(node)
        calls = [*recording.run.every_call()]
        asked = {node for call in calls for node in call.asked}
        self._fix("decides-by-value", "its forward asks what numbers a tensor holds", *asked)
        held = {*recording.escaping, *(node for call in calls for node in call.stored)}
        self._fix("fixed-scale", "something outside of the network may read it", *held)
        (output,) = recording.graph.find_nodes(op="output")
        self._fix("fixed-scale", "the network returns it", *output.all_input_nodes)
        self._fix_read_elsewhere(asked | held)
        return self._found()

    def _read(self, node: fx.Node) -> None:
        """Take in what a node gives, and what its law asks of others."""
        meaning = self.meanings[node]
        if isinstance(meaning, Passage):  # its reader names what it reads
            return
        try:
            self._check(node, meaning)
            law = OF_MEANINGS.get(type(meaning)) or OF_OPERATORS.get(called(node).rstrip("_")) or none
            found = law(node, meaning, self)
            self._check_written(node, found)
        except Fixed as error:
            if convolves(meaning) and node in self.before_layers:
                self._refuse(error.code, error.reason, self.recording.where(node))
            self._fix(error.code, error.reason, *node.all_input_nodes, *inputs_of(meaning), at=node)
            if node in self.recording.run.writes:
                self._fix(error.code, error.reason, *self.recording.memory.members(node), at=node)
        else:
            if found is not None:
                self.along[node] = found

    def _check(self, node: fx.Node, meaning: Meaning | None) -> None:
        """Raise Fixed where a node may do something else than was seen; fix what it may not always be given."""
        recording = self.recording
        if mark := recording.mark_of(node):
            raise Fixed(*mark)
        if recording.foreign.get(node):
            raise Fixed("changes-with-size", "it is given other tensors at other sizes")
        for x in dict.fromkeys((*node.all_input_nodes, *inputs_of(meaning))):
            if mark := recording.between(x, node):
                self._fix(*mark, x, at=node)
        dtype = recording.dtype_of.get(node)
        if dtype is None or not dtype.is_floating_point:
            raise Fixed("not-homogeneous", "it gives no numbers with a point")

    def _check_written(self, node: fx.Node, found: Along | None) -> None:
        """Raise Fixed where a node writes, into memory that others may share, what has other scales than was there."""
        if node not in self.recording.run.writes:
            return
        target = next(iter(node.all_input_nodes))
        before = self.along.get(target)
        own = self.recording.run.writes[node] == {self.recording.run.storage_of.get(target)}
        alike = own and before is not None and found is not None and before.axis == found.axis
        if not alike or not np.array_equal(self.scales.of(before.scales), self.scales.of(found.scales)):  # type: ignore[union-attr]
            raise Fixed("in-place", "it writes into a tensor")

    def _reads_nothing(self, node: fx.Node) -> bool:
        """Whether a node takes no more of its inputs than their sizes and dtypes."""
        run = self.recording.run
        return node in run.size_of or node in run.attribute_of or makes_zeros(node)

    def _fix(self, code: str, reason: str, *nodes: fx.Node, at: fx.Node | None = None) -> None:
        """Let the scales of these be 1; that is a refusal where layers come before and after."""
        for node in nodes:
            if at is not None and only_measures(at, node):
                continue
            if isinstance(self.meanings.get(node), Passage):
                self._fix(code, reason, *node.all_input_nodes, at=at)
            elif node in self.along:
                scales = self.along[node].scales
                if node in self.before_layers and self.scales.of(scales).any():
                    self._refuse(code, reason, self.recording.where(at or node))
                self.scales.fix(scales)

    def _refuse(self, code: str, reason: str, where: str) -> None:
        self.refusals.setdefault((code, where), Refusal(code, where, reason))

    def _fix_read_elsewhere(self, unseen: set[fx.Node]) -> None:
        """Leave tensors alone that something reads for which no law has said what becomes of them; what depends on
        them alone may be read ``unseen``.
        """
        for node in self.recording.nodes:
            name = self.name_of.get(str(node.target)) if node.op == "get_attr" else None
            if name not in self.parts or self._readers(node, unseen) <= self.writers[name]:
                continue
            part = self.parts[name]
            if any(self.scales.of(side).any() for side in (part.times, part.over)):
                self._refuse("unwritable-weight", "it is read in another way, too", name)
            self.scales.fix(part.times, part.over)

    def _readers(self, node: fx.Node, unseen: set[fx.Node]) -> set[fx.Node]:
        """Return what reads a tensor, or what is computed of it alone; itself, where that is ``unseen``."""
        found = {node} & unseen
        for user in node.users:
            constant = user.op != "output" and self.recording.constants.is_constant(user)
            found |= self._readers(user, unseen) if constant else set() if self._reads_nothing(user) else {user}
        return found

    def _found(self) -> Freedom:
        every = (part.numbered(self.scales.of) for part in self.parts.values())
        parts = [part for part in every if part.times.any() or part.over.any()]
        known = np.unique(np.concatenate([[0], *(side.ravel() for part in parts for side in (part.times, part.over))]))
        numbered = (part.numbered(lambda scales: np.searchsorted(known, scales)) for part in parts)
        return Freedom(tuple(numbered), len(known) - 1, tuple(self.refusals.values()))


def _changeable(recording: Recording, name_of: dict[str, str]) -> set[str]:
    """Return the names of tensors that nothing else shares memory with, or may read unseen."""
    tensors: dict[str, Tensor] = recording.constants.tensors
    unsure = {name_of.get(name) for name in (*recording.elsewhere, *recording.run.replaced)}
    strided = (name for name in set(name_of.values()) if tensors[name].layout is torch.strided)
    storages = {name: tensors[name].untyped_storage().data_ptr() for name in strided}
    users = Counter(storages.values())
    alone = {name for name, storage in storages.items() if users[storage] == 1}
    return {name for name in alone - unsure if tensors[name].is_floating_point()}


# What each operator does with scales.


Law = Callable[[fx.Node, Any, Reading], Along | None]


def same(_node: fx.Node, meaning: Any, known: Reading) -> Along | None:
    """``y = x``."""
    return known.along.get(meaning.input)


def through(node: fx.Node, meaning: Any, known: Reading) -> Along | None:
    """A layer or a fixed filter."""
    x, layer = known.along.get(meaning.input), meaning.layer
    if isinstance(layer, Convolution):
        return convolved(node, meaning, known)
    if x is None:
        return None
    if x.axis != 1 or (isinstance(layer, Filter) and layer.fill != 0):
        raise Fixed("not-homogeneous", "it pads with other numbers than 0, or acts on another axis")
    if not isinstance(layer, Phases):  # ``K * (x / s) = (K * x) / s`` for a depthwise K that is alike for all channels
        return x
    spread = np.repeat(x.scales, prod(layer.geometry.kernel))  # space to depth: each channel becomes several
    return Along(1, spread[list(layer.order)] if layer.order else spread)


def convolved(node: fx.Node, meaning: Any, known: Reading) -> Along:
    """``y / t = (W[o, i] s[i] / t[o]) ⋆ (x / s) + b / t``, with any t; padding with 0 is padding with 0 / s."""
    layer, geometry = meaning.layer, meaning.layer.geometry
    axis = 1 if geometry.ndim else len(known.recording.shape_of[node]) - 1
    read = _along(known.along.get(meaning.input), axis, geometry.in_channels)
    made = known.scales.new(geometry.out_channels)
    shape = geometry.groups, -1
    transposed = isinstance(geometry, TransposedGeometry)
    weight = ScaledWeight(layer.weight, read.reshape(shape), made.reshape(shape), transposed, layer.order)
    bias = [] if layer.bias is None else [Part(layer.bias, np.zeros_like(made), made)]
    known.write(node, weight, *bias)
    return Along(axis, made)


def scaled(node: fx.Node, meaning: Any, known: Reading) -> Along | None:
    """A multiple, a shift or a normalisation, channel by channel."""
    x, by = known.along.get(meaning.input), meaning.by
    if isinstance(by, Normalisation):
        return normalised(node, meaning, known)
    if x is None or isinstance(by, Factor):  # ``c (x / s) = (c x) / s``
        return x
    assert isinstance(by, Offset)  # ``(c x + b) / s = c (x / s) + b / s``
    if not isinstance(by.by, str) or meaning.axis != x.axis:
        raise Fixed("not-homogeneous", "it adds a number that is not one per channel")
    known.write(node, Part(by.by, np.zeros_like(x.scales), x.scales))
    return x


def normalised(node: fx.Node, meaning: Any, known: Reading) -> Along | None:
    """``y / t = (g s / t) (x / s - m / s) / d + b / t``, with any t; without g, t is s."""
    by, channels = meaning.by, known.recording.shape_of[node][1]
    read = _along(known.along.get(meaning.input), 1, channels)
    made, one = (read if by.weight is None else known.scales.new(channels)), np.zeros_like(read)
    parts = ((by.weight, read, made), (by.mean, one, read), (by.bias, one, made))
    known.write(node, *(Part(*part) for part in parts if part[0] is not None))
    return Along(1, made)


def selected(_node: fx.Node, meaning: Any, known: Reading) -> Along | None:
    """Some channels have their own scales; places of another axis have all of them."""
    x = known.along.get(meaning.input)
    return x if x is None or x.axis != meaning.axis else Along(x.axis, x.scales[list(meaning.indices)])


def joined(_node: fx.Node, meaning: Any, known: Reading) -> Along | None:
    """Channels one after the other have their own scales."""
    found = [known.along.get(x) for x in meaning.inputs]
    if not any(found):
        return None
    sizes = (known.recording.shape_of[x][meaning.axis] for x in meaning.inputs)
    return Along(meaning.axis, np.concatenate([_along(x, meaning.axis, n) for x, n in zip(found, sizes, strict=True)]))


def added(_node: fx.Node, meaning: Any, known: Reading) -> Along | None:
    """``x / s + y / s = (x + y) / s``."""
    return _tied([known.along.get(x) for x in inputs_of(meaning)], known)


def moved(node: fx.Node, meaning: Any, known: Reading) -> Along | None:
    """Pixels elsewhere, or means of them; of several channels, where pixels of those become pixels of one."""
    x = known.along.get(meaning.input)
    axis = None if x is None else dict(meaning.moves).get(x.axis)
    if x is None or axis is None:
        return flattened(node, meaning, known)
    scales = x.scales
    if meaning.channels:
        to = np.asarray(meaning.channels)
        first = np.unique(to, return_index=True)[1]
        known.scales.tie(scales, scales[first][to])
        scales = scales[first]
    return Along(axis, scales)


def flattened(node: fx.Node, _meaning: Any, known: Reading) -> Along | None:
    """``[N, C, H, W]`` as ``[N, C * H * W]``: each channel's scale for all of its pixels."""
    x, recording = known.along.get(node.all_input_nodes[0]), known.recording
    if x is None:
        return None
    before, after = recording.shapes(node.all_input_nodes[0]), recording.shapes(node)
    whole = all((a[0], prod(a[1:])) == b for a, b in zip(before, after, strict=False)) and len(before) == len(after)
    if x.axis != 1 or not whole or not recording.is_fixed(node, 1):
        raise Fixed("not-homogeneous", "its channels get to other axes")
    return Along(1, np.repeat(x.scales, prod(after[0][1:]) // len(x.scales)))


def homogeneous(node: fx.Node, _meaning: Any, known: Reading) -> Along | None:
    """``f(x / s) = f(x) / s`` for each number: rectifiers of whatever slopes, magnitudes."""
    return known.along.get(_only(node, known))


def clamped(node: fx.Node, meaning: Any, known: Reading) -> Along | None:
    """``max(x / s, 0) = max(x, 0) / s``, and so for minima; between other bounds it is no such thing."""
    bounds = (*node.args[1:], *node.kwargs.values())
    if any(bound is not None and not (type(bound) in (int, float) and bound == 0) for bound in bounds):
        raise Fixed("not-homogeneous", "its bounds are not 0")
    return homogeneous(node, meaning, known)


def pooled(node: fx.Node, _meaning: Any, known: Reading) -> Along | None:
    """The largest of some pixels, or their mean: ``max(x / s) = max(x) / s`` in each channel."""
    given = _only(node, known)
    x, shape_of = known.along.get(given), known.recording.shape_of
    if x is not None and (x.axis != 1 or shape_of[given][:2] != shape_of.get(node, ())[:2]):
        raise Fixed("not-homogeneous", "it acts on another axis than that of pixels")
    return x


def extreme(node: fx.Node, _meaning: Any, known: Reading) -> Along | None:
    """As ``pooled``, over whole axes."""
    given = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | node.kwargs
    known_input = is_data(given.get("input"), known.recording)
    meaning = channels.mean(Call(node, "mean", given), known.recording) if known_input else None
    if not isinstance(meaning, Rearranged):
        raise Fixed("not-homogeneous", "it compares channels with each other")
    return moved(node, meaning, known)


def gated(node: fx.Node, _meaning: Any, known: Reading) -> Along | None:
    """``(x / s) g = (x g) / s`` and ``(x / s) / g = (x / g) / s``, where g has no scale."""
    call = spelled(node)
    operands = [] if call is None else [call.input, call.get("other")]
    if call is not None and call.operator == "mul":
        operands.sort(key=lambda x: x not in known.along)
    x, *others = operands
    if any(g in known.along for g in others) or call is None or call.get("rounding_mode") is not None:
        raise Fixed("not-homogeneous", "it multiplies or divides what has scales itself, or rounds")
    if x in known.along and known.recording.shape_of[node] != known.recording.shape_of[x]:
        raise Fixed("not-homogeneous", "it enlarges what has scales")
    return known.along.get(x)


def _only(node: fx.Node, known: Reading) -> fx.Node:
    """Return the one value that a node reads, which comes first."""
    recording = known.recording
    constant = recording.constants.is_constant
    given = [x for x in node.all_input_nodes if x in recording.shape_of and not constant(x)]  # the others are sizes
    if len(given) != 1 or given[0] is not next(iter(node.args), None):
        raise Fixed("not-homogeneous", "it reads several values")
    return given[0]


def _along(x: Along | None, axis: int, size: int) -> Numbers:
    """Return the scales along this axis, 1 where there are none."""
    if x is not None and (x.axis != axis or len(x.scales) != size):
        raise Fixed("not-homogeneous", "it acts along another axis")
    return np.zeros(size, np.int64) if x is None else x.scales


def _tied(found: list[Along | None], known: Reading) -> Along | None:
    """Let all have the scales of the first."""
    first, *others = found
    for x in others:
        if first is None or x is None:
            if first is not x:
                raise Fixed("fixed-scale", "it is added to, or beside, what has the scale 1")
        elif x.axis != first.axis or len(x.scales) != len(first.scales):
            raise Fixed("not-homogeneous", "what it reads has its channels along different axes")
        else:
            known.scales.tie(first.scales, x.scales)
    return first


OF_MEANINGS: dict[type, Law] = {
    Same: same,
    Through: through,
    Scaled: scaled,
    Selected: selected,
    Joined: joined,
    Sum: added,
    Rearranged: moved,
}
"""By what a node means to the planner."""

OF_OPERATORS: dict[str, Law] = {
    **dict.fromkeys(("relu", "leaky_relu", "prelu", "abs"), homogeneous),
    **dict.fromkeys(("clamp", "clip", "clamp_min", "clamp_max"), clamped),
    **{f"{kind}_pool{ndim}d": pooled for kind in ("max", "adaptive_max", "avg") for ndim in (1, 2, 3)},
    **dict.fromkeys(("amax", "amin"), extreme),
    **dict.fromkeys(("mul", "multiply", "div", "divide", "true_divide", "truediv"), gated),
    **dict.fromkeys(("flatten", "view", "reshape"), flattened),
}
"""By its name, where it means nothing to the planner."""


def none(_node: fx.Node, _meaning: Any, _known: Reading) -> Along | None:
    """No law is known of any other operator."""
    raise Fixed("not-homogeneous", "it does not take positive factors through itself, as far as is known")
