"""What a network does, from runs at the example and at other sizes: the graph that the planner walks."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from itertools import chain, compress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from repfuse.errors import RepfuseError
from repfuse.networks import (
    as_before,
    check_rewritable,
    join,
    named_modules,
    named_tensors,
    stored_tensors,
    why_refused,
)
from repfuse.plans import ROOT
from repfuse.recording.arguments import Arguments, other_ranks, try_other_sizes
from repfuse.recording.comparing import WRITES_STATE, Mark, SizeComparison
from repfuse.recording.constants import Constants, Memory, called
from repfuse.recording.copies import changed_copy
from repfuse.recording.read_only import OverwritesItself
from repfuse.recording.recorder import TAKING_SIZES, AsksForValues, Recorder, Subject, address, noting_calls
from repfuse.recording.run import ModuleCall, Run
from repfuse.recording.sizes import RANK, SIZE
from repfuse.recording.stock import is_stock
from repfuse.wording import described


class Recording:
    """The graph of ``module``, and what holds of it at all sizes.

    ``inputs`` are the example, and the arguments of other sizes that the network took. ``marks`` say which calls are
    left alone, and why: their own operations, and what goes from one call to another through them. Calls that are
    ``leaking`` compute with numbers that they made of sizes: their own operations are left alone; so are those of
    ``unwritable`` ones, which cannot be written down anew. Nothing merges across the borders of ``closed`` modules.
    ``uneven`` nodes are given other numbers at other sizes, ``uneven_by_rank`` where the inputs have another number of
    axes; in the place of their ``foreign`` operands they are given others.
    Of ``sized`` values the sizes are read, which no other value has; ``escaping`` ones are read unseen, and tensors of
    the network ``elsewhere`` at other sizes.
    """

    def __init__(self, comparison: SizeComparison, inputs: Sequence[Arguments]) -> None:
        run = self.run = comparison.first
        self.module = comparison.module
        self.inputs = inputs
        self.graph, self.nodes = run.graph, run.nodes
        self.call_of, self.calls, self.root = run.call_of, run.calls, run.root
        self.shape_of, self.dtype_of = run.shape_of, run.dtype_of
        self.escaping, self.elsewhere = run.escaping, frozenset(comparison.elsewhere)
        self.uneven, self.foreign = comparison.uneven, dict(comparison.foreign)
        self.uneven_by_rank = comparison.uneven_by_rank
        self._comparison = comparison
        self.memory = Memory(run)
        self.order = self.memory.order
        self.sizes = self._settle_sizes()
        self._doubt = cache(self._doubt_anew)
        self.marks: dict[ModuleCall, Mark] = dict(comparison.marks)
        self.leaking: set[ModuleCall] = set()
        self.unwritable: dict[ModuleCall, Mark] = {}
        self.closed: set[str] = set()
        self.sized: set[fx.Node] = set()
        self.constants = Constants(self)
        self._mark()

    def relied_on_again(self) -> Recording:
        """Return the same without what was left alone and closed since it was made."""
        return Recording(self._comparison, self.inputs)

    @cached_property
    def paths(self) -> dict[str, list[str]]:
        """All paths of the module at each path."""
        found: dict[nn.Module, list[str]] = defaultdict(list)
        for path, module in self.modules.items():
            found[module].append(path)
        return {path: found[module] for path, module in self.modules.items()}

    @property
    def depends_on_weights(self) -> bool:
        """Whether what was seen holds for these weights alone: some forward, or the reader, asked for their numbers."""
        return any(call.asked for call in self.run.every_call()) or bool(self.constants.asked)

    @cached_property
    def names(self) -> dict[fx.Node, str]:
        """A name for each node, the same in each run: the call that made it, and which of its operations it is."""
        return {node: name for call in self.run.every_call() for node, name in _named(call)}

    def where(self, node: fx.Node) -> str:
        """Return where a node stands, for people: a module of PyTorch's, or the module in whose forward it is."""
        path = self.call_of[node].path
        if path and is_stock(self.modules[path]):
            return path
        return f"{path or ROOT}: {self.names[node].rpartition('/')[2]}"

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The modules by each of their paths."""
        return dict(named_modules(self.module, remove_duplicate=False))

    def shapes(self, node: fx.Node) -> list[tuple[int, ...]]:
        """Return the shapes that a value had, at the example and at the other sizes."""
        return self._comparison.shapes(node)

    def shapes_at_other_ranks(self, node: fx.Node) -> list[tuple[int, ...]]:
        """Return the shapes that a value had for inputs of another number of axes, as far as the network takes any."""
        others = self._comparison.at_other_ranks.get(node, ())
        return [run.shape_of[other] for run, other in others if other in run.shape_of]

    def all_shapes(self, node: fx.Node) -> list[tuple[int, ...]]:
        """Return the shapes that a value had: at the example, at other sizes, and for other numbers of axes."""
        return self.shapes(node) + self.shapes_at_other_ranks(node)

    def operand_shapes(self, node: fx.Node) -> list[list[tuple[int, ...]]]:
        """Return the shapes of the tensors that a node was given, at the example and at the other sizes.

        Without those of constants, where it was given as many tensors there.
        """
        runs = [(self.run, node), *self._comparison.alike.get(node, ())]
        given = [x for x in node.all_input_nodes if x in self.run.shape_of]
        varies = [self.constants.name_of(x) is None for x in given]
        found = [[run.shape_of[x] for x in other.all_input_nodes if x in run.shape_of] for run, other in runs]
        return [list(compress(shapes, varies)) if len(shapes) == len(varies) else shapes for shapes in found]

    def is_fixed(self, node: fx.Node, axis: int) -> bool:
        """Whether an axis of a value has the same size at all sizes of the input."""
        shapes = self.shapes(node)
        return len({(len(shape), shape[axis]) for shape in shapes if -len(shape) <= axis < len(shape)}) == 1

    def between(self, node: fx.Node, reader: fx.Node) -> Mark | None:
        """Return why it is not certain that ``reader`` always reads the value of ``node``; None where it is."""
        if node in self.foreign.get(reader, ()):
            return "changes-with-size", "it reads another value at other sizes"
        state_of = self.run.autocast_of.get
        if state_of(node) != state_of(reader) and _computes(node):
            return _AUTOCAST
        return self._doubt(self.call_of[node], self.call_of[reader])

    def _doubt_anew(self, one: ModuleCall, other: ModuleCall) -> Mark | None:
        if not (self.marks or self.closed):
            return None
        above = set(other.chain())
        common = next(call for call in one.chain() if call in above)
        crossed = [*one.up_to(common), *other.up_to(common)]
        if shut := next((call.path for call in crossed if call.path in self.closed), None):
            return "called-differently", f"{shut!r} is called several times, not always alike"
        passed = [common, *crossed]
        return next((self.marks[call] for call in passed if call in self.marks), None)

    def leave_alone(self, call: ModuleCall, mark: Mark) -> None:
        """Leave the own operations of a call alone from now on; at the second time all that goes through it."""
        for each in self.calls[call.path]:
            if each in self.unwritable:
                self.marks.setdefault(each, self.unwritable[each])
            self.unwritable.setdefault(each, mark)
        self._doubt.cache_clear()
        self.constants.settle()

    def close(self, path: str) -> None:
        """Let nothing merge across the border of the module at ``path`` from now on: its calls are not alike there."""
        self.closed.add(path)
        self._doubt.cache_clear()
        self.constants.settle()

    def mark_of(self, node: fx.Node, *, any_rank: bool = True) -> Mark | None:
        """Return why an operation itself is left alone; None where it is not.

        Unless it is to be so at ``any_rank``, it may be given other numbers where the inputs have another number of
        axes.
        """
        if self.run.autocast_of.get(node) != self.call_of[node].autocast and node.op != "placeholder":
            return _AUTOCAST
        if node in self.uneven or (any_rank and node in self.uneven_by_rank):
            return "changes-with-size", "it is given other numbers at other sizes"
        call = self.call_of[node]
        if call in self.leaking and _computes(node) and not self._is_of_module(node, call):
            return _LEAKING
        concerned = call in self.unwritable and _computes(node)
        return self.marks.get(call) or (self.unwritable[call] if concerned else None)

    def _is_of_module(self, node: fx.Node, call: ModuleCall) -> bool:
        """Whether a node is the convolution that its module says it is, with the weight and the settings of that."""
        module = self.modules[call.path]
        if not isinstance(module, _ConvNd) or called(node) not in ("conv1d", "conv2d", "conv3d") or node.kwargs:
            return False
        weight = node.args[1] if len(node.args) == 7 else None
        own = isinstance(weight, fx.Node) and weight.op == "get_attr" and weight.target == join(call.path, "weight")
        _, _, _, stride, padding, dilation, groups = node.args if own else (None,) * 7
        plain = padding in (module.padding, 0, (0,) * len(module.kernel_size))
        return own and plain and (stride, dilation, groups) == (module.stride, module.dilation, module.groups)

    def fingerprint(self) -> str:
        """Return a digest of the modules and of the tensors' shapes: equal for equal models, whatever their weights.

        What the forwards do is not in it: who plans the recording again looks for each site by its names.
        """
        digest = hashlib.sha256()
        for path, module in self.modules.items():
            digest.update(f"{path} {type(module).__name__}\n".encode())
        for name, tensor in stored_tensors(self.module):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        return digest.hexdigest()

    def _settle_sizes(self) -> dict[fx.Node, int]:
        """Write numbers for sizes that the weights fix, and for what is computed from those alone.

        What is computed from others may come out equal at each size that was tried, and differ at the next.
        """
        run, fixed = self.run, dict[fx.Node, int]()
        deciding = set(self._comparison.decided(leaves=False))
        for node, value in run.size_of.items():
            if node.op == "call_method":
                x, *axis = node.args
                assert isinstance(x, fx.Node)
                if run.call_of[x] in deciding:  # another answer, another size
                    continue
                axes = axis if node.target == SIZE else [] if node.target == RANK else range(len(run.shape_of[x]))
                settled = all(self.is_fixed(x, each) for each in axes)
            else:
                settled = all(x in fixed for x in node.all_input_nodes)
            if settled:
                fixed[node] = value
        for node in fixed:
            for user in list(node.users):
                user.args = map_arg(user.args, lambda x: fixed.get(x, x))
                user.kwargs = map_arg(user.kwargs, lambda x: fixed.get(x, x))
        return fixed

    def _mark(self) -> None:  # noqa: C901 - a paragraph for each kind
        """Mark the calls that cannot be relied on, until no constant depends on another answer."""
        for call in chain.from_iterable(map(_and_who_is_told, self._comparison.decided(leaves=False))):
            self.marks.setdefault(call, ("decides-by-size", "its forward decides by a size, always the same way here"))
        for call in chain.from_iterable(map(_and_who_is_told, self._comparison.decided(leaves=True))):
            self.leaking.add(call)
            own = (node for node in call.own if isinstance(node, fx.Node))
            if not any(called(node) in TAKING_SIZES for node in own):  # the numbers are not for these: to decide by
                self.marks.setdefault(call, _LEAKING)
            inside = (item for item in call.own if isinstance(item, ModuleCall))
            self.leaking.update(inner for inner in inside if _has_number((inner.args, inner.kwargs)))
        for call in self.run.every_call():
            if call.meets_errors:
                self.marks.setdefault(call, ("decides-by-value", "its forward catches an error"))
            if call.changes_state:
                self.marks.setdefault(call, WRITES_STATE)
        for node, tensor in self.run.unknown.items():
            call = self.call_of[node]
            if id(tensor) not in self._comparison.outside and node not in self.run.returned:
                self.marks.setdefault(call, ("unseen-operation", "a tensor is made there by no function of torch"))
        asking = [call for call in self.run.every_call() if call.asked]
        before = -1
        while len(self.marks) > before:
            before = len(self.marks)
            self._doubt.cache_clear()
            self.constants.settle()
            for call in asking:
                if not all(map(self.constants.is_constant, call.asked)):
                    told = _and_who_is_told(call, by_value=True)
                    self.marks |= {each: _BY_VALUE for each in told if each not in self.marks}


_MOST_WORK = 6.0
"""How many times the work of the example's run may go into runs at other sizes."""

_SMALL = 1 << 17
"""As many numbers as an input may have to be no work to speak of."""

_LEAKING = "decides-by-size", "its forward computes with numbers that it makes of sizes, which may be others elsewhere"
_BY_VALUE = "decides-by-value", "its forward asks what numbers a tensor holds"
_AUTOCAST = "autocast", "it runs in a region of automatic mixed precision"


def record(module: nn.Module, arguments: Arguments) -> Recording:
    """Run a network at the example, and at other sizes as far as it takes them, and return what it does.

    A network that never asks for a size is run at one other size, which is larger along some axes and smaller along
    others; any other network also at one where it is the other way round.

    ``module`` is untouched. Raises RepfuseError where it does not take the example.
    """
    check_rewritable(module)
    arguments = arguments.distinct()
    with noting_calls() as running:
        runs = Runs(module, running)
        try:
            first = runs.run(arguments)
        except RepfuseError:
            raise
        except Exception as error:
            raise _does_not_run(module, arguments, error) from error
        comparison, inputs = SizeComparison(first, module), [arguments]
        spent = 0.0

        def attempt(others: Arguments, needed: bool) -> bool:
            nonlocal spent
            if spent > _MOST_WORK and not needed:
                return False
            run, done = runs.attempt(others, comparison)
            spent += others.numbers / max(arguments.numbers, _SMALL) * done / max(len(first.nodes), 1)
            if run is not None:
                comparison.add(run)
                inputs.append(others)
            return run is not None

        try_other_sizes(arguments, attempt, thoroughly=first.asks_for_sizes, cuts=comparison.cuts)
        for others in other_ranks(arguments, comparison.decides_by_rank):
            run, _ = runs.attempt(others, comparison)
            if run is not None:
                comparison.add_rank(run)
    return Recording(comparison, inputs)


class Runs:
    """Runs copies of a network: over its own memory and without arithmetic, where both can be.

    Calls of modules are noted by the last recorder that is ``running``.
    """

    def __init__(self, module: nn.Module, running: list[Recorder]) -> None:
        self.module = module
        self.running = running
        self.shares = not any(x.layout is not torch.strided or x.is_inference() for _, x in named_tensors(module))
        self.sketches = True
        self.subject: Subject | None = None
        self.may_hold_more = True  # after a run that failed: nothing says yet that it keeps nothing of what it does

    def run(self, arguments: Arguments, example: Run | None = None) -> Run:
        """Run the network once, to be compared with the ``example`` if there is one. Raises what it raises."""
        with as_before(self.module):
            while True:
                subject = self.subject = self.subject or self._copy()
                subject.guard.wrong = False
                self.sketches &= not subject.has_scripts
                recorder = Recorder(subject, example=example, sketches=self.sketches)
                self.running.append(recorder)
                try:
                    run = recorder.run(arguments.copied())  # a forward may write into what it is given
                except OverwritesItself:
                    self.shares, self.subject = False, None
                except AsksForValues:
                    self.sketches, self.subject = False, None
                except Exception as error:
                    if self.may_hold_more:
                        self.subject = None
                    if not self.sketches or not (example is None or _may_be_of_numbers(error)):
                        raise
                    self.sketches = False
                else:
                    if subject.guard.wrong:
                        self.shares, self.subject = False, None
                    elif self.sketches and run.meets_errors:
                        self.sketches, self.subject = False, None
                    else:
                        self.may_hold_more = run.changes_state
                        self.subject = None if self.may_hold_more else subject
                        return run
                finally:
                    self.running.pop()

    def _copy(self) -> Subject:
        storages: dict[int, Any] = {}
        copy = changed_copy(self.module, lambda _, x: x if self.shares else _cloned(storages, x), to_run=True)
        return Subject(copy, shares_memory=self.shares)

    def attempt(self, arguments: Arguments, comparison: SizeComparison) -> tuple[Run | None, int]:
        """Run the network at another size; None where it does not take that. Return also how many nodes it made."""
        try:
            run = self.run(arguments, comparison.first)
        except Exception as error:
            failed = getattr(error, "__repfuse_run__", None)
            if failed is None:
                return None, 0
            comparison.add_failed(failed)
            return None, len(failed.nodes)
        return run, len(run.nodes)


def _cloned(storages: dict[int, Any], tensor: Tensor) -> Tensor:
    """Return a copy of a tensor; what shared memory goes on doing so."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return tensor.clone()
    at = address(tensor)
    if at not in storages:
        storages[at] = tensor.untyped_storage().clone()  # type: ignore[no-untyped-call]
    made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return made.set_(storages[at], tensor.storage_offset(), tensor.size(), tensor.stride())


def _may_be_of_numbers(error: Exception) -> bool:
    """Whether a run without arithmetic may have failed because numbers meant nothing: as places in a table, say."""
    return isinstance(error, IndexError) or any(word in str(error) for word in ("index", "probability", "linalg"))


def _computes(node: fx.Node) -> bool:
    return node.op not in ("placeholder", "get_attr")


def _and_who_is_told(call: ModuleCall, *, by_value: bool = False) -> Iterator[ModuleCall]:
    """Yield a call that decides, and those around it that may learn how: it returns something else than so many values
    of the graph, or changes what its module holds.

    What returned nothing at several sizes, as guards do, tells nothing; at one value it may.
    """
    kept = call.changes_state
    while True:
        yield call
        if call.caller is None or not (kept or _tells(call.output, by_value)):
            return
        call = call.caller


def _tells(output: Any, by_value: bool) -> bool:
    if type(output) is tuple and output:
        return any(_tells(part, by_value) for part in output)
    return not isinstance(output, fx.Node) and (output is not None or by_value)


def _has_number(value: Any) -> bool:
    leaves = tree_leaves(value)
    return any(isinstance(leaf, int | float) and not isinstance(leaf, bool) for leaf in leaves)


def _does_not_run(module: nn.Module, arguments: Arguments, error: Exception) -> RepfuseError:
    shapes = ", ".join("x".join(map(str, getattr(x, "shape", ()))) or repr(x) for x in arguments.args)
    refused = why_refused(module, arguments.args, described(error))
    return RepfuseError(f"The model does not run on the example input {shapes}.", *refused)


def _named(call: ModuleCall) -> Iterator[tuple[fx.Node, str]]:
    place = f"{call.path}@{call.number}" if call.number else call.path
    counts: dict[str, int] = {}
    for node in (item for item in call.own if isinstance(item, fx.Node)):
        kind = _kind(node)
        counts[kind] = counts.get(kind, 0) + 1
        yield node, f"{place}/{kind}" if counts[kind] == 1 else f"{place}/{kind}_{counts[kind]}"


def _kind(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return str(node.target).rpartition(".")[2]
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", "value"))
