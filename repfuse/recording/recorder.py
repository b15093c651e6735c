"""One run of a network, and everything that it asks torch to do, as a graph.

The network runs as it is, on plain tensors: no forward can stop it or fool it, and what the graph holds is what
happened. Modules dissolve into the functions that they call; which call of which module made a node is kept beside.
"""

from __future__ import annotations

import gc
import inspect
import operator
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, jit, nn
from torch._ops import OpOverload
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from repfuse.networks import join, named_modules, own_tensors, tensors_of
from repfuse.recording.arguments import Arguments
from repfuse.recording.copies import State, States
from repfuse.recording.held import Held
from repfuse.recording.read_only import WRITING_UNSEEN, OverwritesItself, ReadOnly
from repfuse.recording.run import ModuleCall, Node, Run, Step, assigned, set_data, unknown
from repfuse.recording.shortcuts import SHORTCUTS, UNCHANGED
from repfuse.recording.sizes import PIECES, RANK, SIZE, Decision, Dimension, Sizes
from repfuse.recording.stock import CALLED, OF_TORCH, is_stock


class AsksForValues(Exception):
    """A run without arithmetic would have had to know what numbers a tensor holds."""


class Subject:
    """A network that is to be run, and what has to be known of it before.

    Where it ``shares_memory`` with one that is not to change, a forward that writes there ends with OverwritesItself.
    ``names`` are those of its tensors by id, ``path_of`` are its modules, ``stock`` the paths of PyTorch's own,
    ``states`` what the modules hold, ``lies_at`` numbers its storages by their addresses, and ``stored`` are by id
    the shape, dtype and storage of its tensors, which they have until the recorder sees that they get others. Of what a
    network that ``has_scripts`` does in these, nothing is seen.
    """

    def __init__(self, network: nn.Module, *, shares_memory: bool) -> None:
        self.network = network
        self.shares_memory = shares_memory
        tensors: dict[int, Tensor] = {}
        self.names: dict[int, list[str]] = defaultdict(list)
        self.path_of = dict[nn.Module, str]()
        for path, module in named_modules(network, remove_duplicate=False):
            self.path_of.setdefault(module, path)
            for name, tensor in own_tensors(module).items():
                tensors[id(tensor)] = tensor
                self.names[id(tensor)].append(join(path, name))
        at = {key: address(tensor) for key, tensor in tensors.items()}
        self.lies_at = {each: number for number, each in enumerate(dict.fromkeys(at.values()), 1)}
        self.stored = {key: (tuple(x.shape), x.dtype, self.lies_at[at[key]]) for key, x in tensors.items()}
        self.stock = {path for module, path in self.path_of.items() if is_stock(module)}
        self.has_scripts = any(isinstance(module, jit.ScriptModule) for module in self.path_of)
        self.generated = [module for module in self.path_of if _is_generated(module)]
        self.states = States(self.path_of)
        self.parameters = list(inspect.signature(network.forward).parameters.values())
        self.guard = ReadOnly(tensors.values(), shared=shares_memory)


class Recorder(TorchFunctionMode):
    """Records one call of the network of ``subject``.

    Where it ``sketches``, expensive operations whose results have known shapes are not computed: numbers mean nothing
    then, and a forward that asks for one ends with AsksForValues. A run that is to be compared with an earlier one, the
    ``example``, makes no graph; what modules of PyTorch's own did there is done again without running their code.
    """

    def __init__(self, subject: Subject, *, example: Run | None = None, sketches: bool = False) -> None:
        super().__init__()
        self.subject = subject
        self.guard = subject.guard
        self.sketches = sketches
        self.found = Run(with_graph=example is None)
        self._example = example
        self._repeats = example is not None and sketches
        self._path_of, self._stock = subject.path_of, subject.stock
        self._begun = ModuleCall.outermost(_autocast())
        self._call: ModuleCall | None = None
        self._inside = 0
        self._names, self._stored = subject.names, subject.stored
        self._values = _Values(subject.lies_at)
        self._left: dict[nn.Module, State] = {}
        """What modules held when their last call ended."""
        self._states = subject.states
        self._read: dict[tuple[ModuleCall, int], tuple[fx.Node, int]] = {}
        self._asked: dict[ModuleCall, dict[Any, fx.Node]] = defaultdict(dict)
        self._attributes: dict[tuple[ModuleCall, str, fx.Node], fx.Node] = {}
        self._sizes: dict[int, tuple[Dimension, fx.Node]] = {}
        self._writes = 0
        self._thread = threading.get_ident()

    def run(self, arguments: Arguments) -> Run:
        """Call the network once and return what it did."""
        placed = self._placeholders(arguments)
        own = (module for module, path in self._path_of.items() if path not in self._stock)
        held = Held(own if self.found.with_graph else ())
        try:
            with torch.no_grad(), self._interpreting(self.subject.generated), self.guard, self:
                self._modes = torch._C._len_torch_function_stack()
                result = self.subject.network(*arguments.args)
        except Exception as error:
            error.__repfuse_run__ = self.found  # type: ignore[attr-defined]
            raise
        finally:
            self._sizes.clear()  # each tells this recorder of decisions, and would keep the network that was run alive
        root = self.found.calls[""][0]
        self.found.root = root
        root.args = placed
        if self.found.with_graph:
            self.found.graph.output(root.output)
        self._find_kept((result, arguments.args))
        self._find_written(held)
        return self.found

    # What the run meets

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note one function of torch, and call it."""
        kwargs = kwargs or {}
        if self._call is None or self._inside or threading.get_ident() != self._thread:
            return func(*args, **kwargs)
        self._inside += 1
        try:
            return _function(func).handler(self, func, args, kwargs)
        finally:
            self._inside -= 1

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer what says nothing about the numbers, and does not depend on the size."""
        result, name = func(*args, **kwargs), _function(func).name
        if name in ("is_same_size", "nbytes", "stride"):
            shapes = tuple(tuple(x.shape) for x in tensors_of(args))
            self._call_decides(Decision(name, shapes, leaves=True))
        if isinstance(result, torch.dtype | torch.device):
            self._asked[self._current][result] = self._node(args[0])
        return result

    def size(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer with sizes that know where they come from."""
        result, x = func(*args, **kwargs), args[0]
        if not isinstance(x, Tensor):
            return result
        node, name = self._node(x), _function(func).name
        self.found.asks_for_sizes = True
        if isinstance(result, torch.Size):
            return torch.Size([Dimension(n, (SIZE, node, axis), self._decide) for axis, n in enumerate(result)])
        if type(result) is not int:
            return result
        if name == "__len__":  # Python makes a plain int of it
            self._call_decides(Decision(name, (result,), leaves=True))
        if name in ("size", "sym_size", "__len__"):
            given = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            return Dimension(result, (SIZE, node, int.__int__(given)), self._decide)
        return Dimension(result, ("numel", node), self._decide)

    def rank(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer with a number of axes that knows whose it is."""
        result, x = func(*args, **kwargs), args[0]
        return Dimension(result, (RANK, self._node(x)), self._decide) if isinstance(x, Tensor) else result

    def ask(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note that forward code wants to know numbers, or takes the memory itself."""
        tensors = tensors_of((args, kwargs))
        if self.subject.shares_memory and _function(func).name in TAKING and any(id(x) in self._names for x in tensors):
            raise OverwritesItself
        self._ask_for(tensors)
        return func(*args, **kwargs)

    def assign(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note ``x.data = y`` as what it does: from then on x holds the numbers of y."""
        x, y = args
        node = self._make("call_function", set_data, (self._node(x), self._noted(y)), {})
        in_model = address(x) in self.subject.lies_at
        if self.subject.shares_memory and in_model and not isinstance(y, Tensor):
            raise OverwritesItself
        self._write(node, [x])
        result = func(*args, **kwargs)
        self._values.moved(x)
        self._remember(x, node)
        return result

    def switch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note that the forward turns gradients on or off."""
        self._current.switches += (len(self.found.nodes),)
        return func(*args, **kwargs)

    def cut(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note an operation that returns as many pieces as a size makes of it."""
        named = {_CUT.get(name, name): value for name, value in kwargs.items()}
        x, how, dim = (*args, *(named.get(name, 0) for name in ("x", "how", "dim")[len(args) :]))
        if isinstance(x, Tensor) and type(how) is type(dim) is int:
            self._call_decides(Decision(PIECES, (x.shape[dim],), (how,)))
        return self.operate(func, args, kwargs)

    def cast(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note ``y.to(x)`` and ``y.type_as(x)`` as what they are: of x, they read the dtype and the device alone."""
        like = args[1] if len(args) > 1 else kwargs.get("other")
        if not isinstance(like, Tensor) or len(args) > 2:
            return self.operate(func, args, kwargs)
        rest = {name: value for name, value in kwargs.items() if name != "other"}
        return self.operate(Tensor.to, args[:1], self._kind_of(like) | rest)

    def make(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note ``x.new_zeros(4)`` as ``zeros(4)`` of the dtype and on the device of x."""
        x, *given = args
        said = {name: value for name, value in kwargs.items() if value is not None}
        plain = getattr(torch, _function(func).name.removeprefix("new_"))
        return self.operate(plain, tuple(given), self._kind_of(x) | said)

    def _kind_of(self, x: Tensor) -> dict[str, Any]:
        """Return the dtype and the device of a tensor, which are noted from now on as those of its node."""
        kind = {"dtype": x.dtype, "device": x.device}
        self._asked[self._current].update(dict.fromkeys(kind.values(), self._node(x)))
        return kind

    def operate(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note an operation, and do it."""
        name, _, op, target, swaps = _function(func)
        given = (args[0], name) if target is getattr else (args[1], args[0]) if swaps else args
        given, by_name = self._noted(given), self._noted(kwargs) if kwargs else kwargs
        guard = self.guard
        guard.forget()
        if name in WRITING_UNSEEN:
            guard.overwritten(args[:1])
        result = self._sketched(func, args, kwargs, given) if self.sketches else None
        if result is None:
            result = self._done(func, args, kwargs)
        if target is not assigned and not isinstance(result, Tensor) and not tensors_of(result):
            self._ask_for(tensors_of((args, kwargs)))
            if result is not None:
                return result
        if name in _CUTTING and self._current.path not in self._stock:
            self.found.asks_for_sizes = True
        node = self._make(op, target, given, by_name)
        if guard.counts:
            self._ask_for(tensors_of((args, kwargs)))
        if guard.draws:
            self.found.random.add(node)
        if guard.wrote:
            self._write(node, guard.wrote)
        if target is assigned:
            self._remember(args[0], node)
        else:
            self._remember_all(result, node)
        return result

    def _sketched(self, func: Any, args: Any, kwargs: dict[str, Any], given: Any) -> Any:
        """Return the result but for its numbers, where they depend on the inputs; None where that takes arithmetic.

        ``given`` are the positional arguments in nodes.
        """
        if _autocast() is not _FULL:
            return None
        parts = given[0] if given and type(given[0]) in (list, tuple) else given
        if not any(x in self.found.of_inputs for x in parts if type(x) in _NODES):
            return None
        return self._cut_short(func, args, kwargs)

    def _cut_short(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Return what has the shape of the result; None where that takes calling the function."""
        try:
            shortcut = SHORTCUTS.get(func)
            if shortcut is None:
                return None
            with torch._C._DisableTorchDispatch():  # the guard has nothing to see
                result = shortcut(*args, **kwargs)
        except TypeError:  # a function that cannot be hashed, or arguments that are none of it
            return None
        if result is args[0] and func not in UNCHANGED:
            self.guard.overwritten([result])
        return result

    def _done(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function. Whether it fails is a decision, if the forward goes on after that."""
        try:
            return func(*args, **kwargs)
        except Exception:
            self._current.meets_errors = True
            self.found.last_decisions.clear()
            raise

    # Nodes and values

    @property
    def _current(self) -> ModuleCall:
        assert self._call is not None
        return self._call

    def _make(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._current
        node = self.found.make(op, target, args, kwargs)
        self.found.add(node, call)
        state = self.found.autocast_of[node] = _autocast()
        call.enters_autocast |= state != call.autocast
        return node

    def _remember_all(self, value: Any, node: fx.Node) -> None:
        """Let the tensors in a result stand for ``node``, or for its parts."""
        if isinstance(value, Tensor):
            self._remember(value, node)
        elif isinstance(value, (tuple, list, dict)):
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                if tensors_of(part):
                    self._remember_all(part, self._make("call_function", operator.getitem, (node, key), {}))

    def _remember(self, tensor: Tensor, node: fx.Node) -> None:
        with torch._C.DisableTorchFunction():  # this recorder, which would give sizes that note what is asked of them
            shape, dtype = tuple(tensor.shape), tensor.dtype
        self.found.describe(node, shape, dtype, self._values.know(tensor, node))

    def _write(self, node: fx.Node, tensors: list[Tensor]) -> None:
        self._writes += 1
        self.found.write(node, {self._values.storage(x) for x in tensors})

    def _node(self, tensor: Tensor) -> fx.Node:
        """Return the node whose value a tensor is: a new one where it is read from the model, or comes from nowhere."""
        node, key = self._values.node(tensor), id(tensor)
        if node is not None:
            return node
        names = self._names.get(key)
        if names is None:
            return self._unknown(tensor)
        call = self._current
        read, writes = self._read.get((call, key), (None, -1))
        if read is None or writes != self._writes:
            read = self._make("get_attr", _nearest(names, call.path), (), {})
            self._read[call, key] = read, self._writes
            self.found.describe(read, *self._stored[key])
        return read

    def _unknown(self, tensor: Tensor) -> fx.Node:
        node: fx.Node = self._make("call_function", unknown, (), {})
        self.found.unknown[node] = tensor
        self._remember(tensor, node)
        return node

    def _noted(self, value: Any) -> Any:  # noqa: C901, PLR0911 - one for each kind
        """Return a value with nodes in the place of tensors and sizes."""
        kind = type(value)
        if kind is Tensor:
            return self._node(value)
        if kind in _ATOMS:
            return value
        if kind is tuple:
            return tuple([x if type(x) in _ATOMS else self._noted(x) for x in value])
        if isinstance(value, Tensor):
            return self._node(value)
        if kind is Dimension:
            return self._size_node(value)
        if isinstance(value, (tuple, list)):  # or torch.fx's kind of list
            parts = [self._noted(x) for x in value]
            if hasattr(value, "_fields"):
                return kind(*parts)
            return parts if isinstance(value, list) else (Sizes if kind is torch.Size else tuple)(parts)
        if kind is dict:
            return {key: x if type(x) in _ATOMS else self._noted(x) for key, x in value.items()}
        if kind is slice:
            return slice(*map(self._noted, (value.start, value.stop, value.step)))
        if isinstance(value, torch.dtype | torch.device):
            return self._attribute(value)
        if isinstance(value, dict) and tensors_of(value):
            return kind((key, self._noted(x)) for key, x in value.items()) if _is_plain_dict(value) else value
        return value

    def _size_node(self, size: Any) -> Any:
        """Return the node that computes a size; made where it is first needed."""
        if type(size) is not Dimension:
            return size
        known = self._sizes.get(id(size))
        if known is not None and known[0] is size:
            return known[1]
        first, *rest = size.origin
        if isinstance(first, str):
            node = self._make("call_method", first, tuple(rest), {})
        else:
            node = self._make("call_function", first, tuple(map(self._size_node, rest)), {})
        self.found.size_of[node] = int.__int__(size)
        self._sizes[id(size)] = size, node
        return node

    def _attribute(self, value: Any) -> Any:
        """Return ``x.dtype`` for a dtype that forward code has read off x, and so for a device."""
        for call in self._current.chain():
            node = self._asked[call].get(value) if call in self._asked else None
            if node is not None:
                name = "dtype" if isinstance(value, torch.dtype) else "device"
                key = (self._current, name, node)
                if key not in self._attributes:
                    self._attributes[key] = self._make("call_function", getattr, (node, name), {})
                    self.found.attribute_of[self._attributes[key]] = value
                return self._attributes[key]
        return value

    def _placeholders(self, arguments: Arguments) -> tuple[Any, ...]:
        """Make a node for each argument that is a tensor or holds one; return the arguments with nodes in them."""
        self._call = self._begun
        placed = []
        for name, value in zip(arguments.names(self.subject.parameters), arguments.args, strict=True):
            if tensors_of(value):
                self._remember_all(value, self._make("placeholder", name, (), {}))
            placed.append(self._noted(value))
        self._call = None
        return tuple(placed)

    # Calls of modules

    def call(self, plain: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module by ``plain``, and note it where it is one of the network."""
        path = self._path_of.get(module)
        if path is None or self._inside:
            return plain(module, *args, **kwargs)
        outer, stock = self._call, path in self._stock
        repeats = stock and self._repeats and outer is not None and not kwargs and len(args) == 1
        if repeats and type(args[0]) is Tensor and (repeated := self._repeated(path, module, args[0])) is not None:
            return repeated
        call = self._begin(path, outer, args, kwargs)
        self._note_settings(module, outer)
        before = None if stock and not module._forward_pre_hooks else self._states[module].now()
        compiled = isinstance(module, jit.ScriptModule)  # it decides unseen: what it does inside is not looked at
        self._inside += compiled
        if compiled:
            self.guard.forget()
        try:
            result = plain(module, *args, **kwargs)
        except Exception:
            call.meets_errors = True
            if outer is not None:
                outer.meets_errors = True
            raise
        finally:
            self._inside -= compiled
            self._call = outer
        self._call = call
        if before is not None:
            self._note_changes(call, before)
            self._left[module] = before.now()
        if isinstance(result, Tensor) and (call.decisions or call.asked or call.changes_state):
            result = self._passed(result, (args, kwargs))
        call.output = self._returned(result, call)
        if compiled and self.guard.wrote:
            self._write(self._make("call_function", unknown, (), {}), self.guard.wrote)
        call.stop = len(self.found.nodes)
        if stock and call.own and self._example is None and self._is_usual(module):
            call.single = self.found.single(call, type(module))
        self._call = outer
        return result

    def _is_usual(self, module: nn.Module) -> bool:
        """Whether the class of a module is PyTorch's and says all that a call does: nobody has changed the module, or
        hung anything on it, and nobody else looks at what it calls.
        """
        if not (type(module).__module__.startswith(OF_TORCH) and self._states[module].is_same()):
            return False
        hung = any(map(vars(module).get, CALLED)) or _has_any_global_hook()  # type: ignore[no-untyped-call]
        return not hung and torch._C._len_torch_function_stack() == self._modes

    def _repeated(self, path: str, module: nn.Module, x: Tensor) -> Tensor | None:
        """Do again the one function that a call of PyTorch's own did at the example; None where it may do another."""
        assert self._example is not None
        calls, known = self.found.calls[path], self._example.calls.get(path, ())
        if len(calls) >= len(known) or _autocast() is not _FULL:
            return None
        call = known[len(calls)]
        single = call.single
        if single is None or type(module) is not single.kind or not self._is_usual(module):
            return None
        node, source = single.node, self._node(x)
        given, actual, named = list[Any](node.args), list[Any](node.args), dict[str, Any](node.kwargs)
        with torch._C.DisableTorchFunction():
            if x.dim() != single.rank or source not in self.found.of_inputs:
                return None
            given[single.place], actual[single.place] = source, x
            for where, name in single.own:
                tensor = getattr(module, name)
                if self._values.node(tensor) is not None:  # its numbers are others by now
                    return None
                if isinstance(where, int):
                    actual[where] = tensor
                else:
                    named[where] = tensor
            self.guard.forget()
            result: Tensor | None = self._cut_short(node.target, actual, named)
        if result is not None:
            calls.append(call)
            made: Node = Step("call_function", node.target, tuple(given), node.kwargs, call)
            self.found.add(made, self._current)
            if self.guard.wrote:
                self._write(made, self.guard.wrote)
            self._remember(result, made)
        return result

    def _passed(self, result: Tensor, given: Any) -> Tensor:
        """Return what a call returned; where that is what it was ``given``, as it might not be another time, as a value
        of its own: else nobody could tell who reads which of the two.
        """
        if result.layout is not torch.strided or not any(x is result for x in tensors_of(given)):
            return result
        node = self._make("call_function", operator.pos, (self._node(result),), {})
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            alias = result.view_as(result)
        self._remember(alias, node)
        return alias

    def _begin(self, path: str, outer: ModuleCall | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModuleCall:
        if outer is None:
            call = self._begun
            self.found.calls[path].append(call)
        else:
            autocast = _autocast()
            given, by_name = self._noted(args), self._noted(kwargs) if kwargs else kwargs
            calls = self.found.calls[path]
            call = ModuleCall(path, len(calls), outer, given, by_name, len(self.found.nodes), autocast)
            calls.append(call)
            outer.own.append(call)
            outer.enters_autocast |= autocast != outer.autocast
        self._call = call
        return call

    def _returned(self, result: Any, call: ModuleCall) -> Any:
        """Return the result in nodes. Values from nowhere came out of the call: it may have read all it was given."""
        for x in tensors_of(result):
            node = self._values.node(x)
            if node is not None and x is result:  # as nearly always
                return node
            if node is None and id(x) not in self._names:
                given = tree_leaves((call.args, call.kwargs))
                self.found.escaping.update(leaf for leaf in given if type(leaf) in _NODES)
                self.found.returned.add(self._unknown(x))
        return self._noted(result)

    def _note_settings(self, module: nn.Module, outer: ModuleCall | None) -> None:
        """Note that what calls a module has set something on it since the module ran: a mask, a limit, a hook. It may
        be put back before anybody looks again.
        """
        left = self._left.get(module) or self._states[module]
        if outer and not left.is_same() and any(left.changes(forward=module not in self.subject.generated)):
            for call in outer.chain():
                call.changes_state = True

    def _note_changes(self, call: ModuleCall, before: State) -> None:
        for old, new in before.changes():
            self._replace(old)
            nodes = [self._values.node(x) for x in tensors_of(new)]
            call.stored += tuple(node for node in nodes if node is not None)
            if None in nodes or not nodes:
                call.changes_state = True

    def _replace(self, old: Any) -> None:
        """Note that something stands in the place of what the network held."""
        for x in tensors_of(old):
            self.found.replaced.update(self._names.get(id(x), ()))

    def _find_kept(self, outside: Any) -> None:
        """Find what is held since that no call of its own module put there; ``outside`` are arguments and results."""
        for module, changes in self._states.changed():
            calls = self._calls_around(module)
            if not any(call.stored or call.changes_state for call in calls):
                for old, _ in changes:
                    self._replace(old)
                around = {each for inner in calls for each in inner.chain()}
                self.found.keeps = True
                for call in around if self._example is None else ():  # else they may be the example's
                    call.changes_state = True
        held = list(_held(outside))
        bases = (x._base for x in held if x._is_view())  # a view keeps what it is a view of
        explained = {id(x) for x in (*held, *bases, *self.found.unknown.values())}
        stored = {node for call in self.found.every_call() for node in call.stored}
        for node in self._values.alive(explained, stored, self._names):
            self.found.escaping.add(node)
            for call in self.found.call_of[node].chain():
                call.stored += (node,)

    def _find_written(self, held: Held) -> None:
        """Find whose objects, and whose class or file, hold something else since."""
        changed = held.changed()
        for module in self._path_of if changed else ():
            if module in changed:
                for call in {each for inner in self._calls_around(module) for each in inner.chain()}:
                    call.changes_state = True
            if type(module) in changed:
                for call in self.found.calls.get(self._path_of[module], ()):
                    call.changes_state = True

    def _calls_around(self, module: nn.Module) -> list[ModuleCall]:
        """Return the calls of a module, or if there are none those of the next one around it that has some."""
        path = self._path_of[module]
        while path not in self.found.calls:
            path = path.rpartition(".")[0]
        return self.found.calls[path]

    def _decide(self, decision: Decision) -> None:
        if self._call is not None and not self._inside:
            self._call_decides(decision)

    def _call_decides(self, decision: Decision) -> None:
        call = self._current
        if call.path not in self._stock:
            self.found.last_decisions.append((call.path, call.number, len(call.decisions)))
            call.decisions += (decision,)

    def _ask_for(self, tensors: list[Tensor]) -> None:
        nodes = tuple(self._node(x) for x in tensors)
        if self.sketches and not self.found.of_inputs.isdisjoint(nodes):
            raise AsksForValues
        self._current.asked += nodes

    @contextmanager
    def _interpreting(self, modules: list[nn.Module]) -> Iterator[None]:
        """Run forwards that are graphs line by line, so that it is known which value belongs to which line."""
        for module in modules:
            vars(module)["forward"] = partial(_Lines.run_all, module, self)
        try:
            yield
        finally:
            for module in modules:
                vars(module).pop("forward", None)

    def line(self, number: int, result: Any) -> None:
        """Take note of what the line of this number of a graph computed."""
        if self._call is not None and isinstance(result, tuple | list):
            node = next((self._values.node(x) for x in tensors_of(result)), None)
            if node is not None and node.target is operator.getitem and node.args[0] not in self.found.shape_of:
                self._call.lines[number] = node.args[0]  # type: ignore[assignment]
        if isinstance(result, Tensor) and self._call is not None:
            node = self._values.node(result)
            if node is None and id(result) in self._names:
                node = self._node(result)
            if node is not None:
                self._call.lines[number] = node


class _Noting(threading.local):
    """The recorders that run in a thread: the last one notes the calls of modules that the thread makes."""

    running: list[Recorder] | None = None


_noting = _Noting()
_noted_by: list[Callable[..., Any]] = []
"""As often as somebody notes calls, what calls a module when nobody does."""
_lock = threading.Lock()


@contextmanager
def noting_calls() -> Iterator[list[Recorder]]:
    """Let the last recorder of a list, if there is one, note the calls of modules in this thread.

    What is replaced is what ``__call__`` calls: to replace that itself, Python would update all classes of modules.
    """
    outer, running = _noting.running, list[Recorder]()
    with _lock:
        plain = _noted_by[0] if _noted_by else nn.Module._call_impl
        if not _noted_by:

            def noted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                recorders = _noting.running
                return recorders[-1].call(plain, module, args, kwargs) if recorders else plain(module, *args, **kwargs)

            nn.Module._call_impl = noted  # type: ignore[assignment, method-assign]
        _noted_by.append(plain)
    _noting.running = running
    try:
        yield running
    finally:
        _noting.running = outer
        with _lock:
            _noted_by.pop()
            if not _noted_by:
                nn.Module._call_impl = plain  # type: ignore[method-assign]


class _Lines(fx.Interpreter):
    """Runs the forward of a module that is a graph once, and tells a recorder what each line of it computed."""

    def __init__(self, module: nn.Module, recorder: Recorder) -> None:
        super().__init__(module)
        self.extra_traceback = False  # to print the graph is to fix its symbolic sizes
        self._recorder = recorder
        self._number_of = {line: number for number, line in enumerate(self.graph.nodes)}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "output":
            self._recorder.line(self._number_of[n], result)
        return result

    @classmethod
    def run_all(cls, module: nn.Module, recorder: Recorder, *args: Any, **kwargs: Any) -> Any:
        """Stand for the forward of the module."""
        lines = cls(module, recorder)
        codegen = lines.graph._codegen
        given = codegen.process_inputs(*args, **kwargs)
        return codegen.process_outputs(lines.run(*given, enable_io_processing=False))


def _is_generated(module: nn.Module) -> bool:
    """Whether the forward of a module is the code that torch.fx wrote for its graph, and nobody's own."""
    if not isinstance(module, fx.GraphModule) or "forward" in vars(module):
        return False
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and code.co_filename.startswith("<eval_with_key>")


class _Values:
    """Which node each living tensor is the value of, and in which memory it lies.

    A tensor that dies gives its id away, and its memory, so entries go with it.
    """

    def __init__(self, model: Mapping[int, int]) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], fx.Node | None, int]] = {}
        self._memory: dict[int, list[int]] = {}  # by address of the storage: its number, and how many tensors lie there
        self._model = model
        """The numbers of the storages of the model by their addresses: they stay where they are."""
        self._count = len(model)

    def node(self, tensor: Tensor) -> fx.Node | None:
        """Return the node of a tensor, or None."""
        entry = self._entries.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def know(self, tensor: Tensor, node: fx.Node) -> int:
        """Let a tensor stand for ``node`` from now on; return the number of its storage."""
        key, at = id(tensor), address(tensor)
        entry = self._entries.get(key)
        if entry is not None:
            if entry[0]() is tensor and entry[2] == at:
                self._entries[key] = entry[0], node, at
                return self._number(at)
            self.moved(tensor)
        number = self._number(at)
        if at in self._memory:
            self._memory[at][1] += 1
        entries, forget = self._entries, self._forget

        def died(ref: Any) -> None:
            if key in entries and entries[key][0] is ref:
                forget(entries.pop(key)[2])

        entries[key] = weakref.ref(tensor, died), node, at
        return number

    def moved(self, tensor: Tensor) -> None:
        """Take note that a tensor lies in other memory than before."""
        entry = self._entries.pop(id(tensor), None)
        if entry is not None:
            self._forget(entry[2])

    def storage(self, tensor: Tensor) -> int:
        """Return the number of the storage that a tensor lies in."""
        return self._number(address(tensor))

    def alive(self, explained: set[int], stored: set[Node], lasting: Container[int]) -> list[Node]:
        """Return the nodes whose tensors somebody still holds, the ``explained`` and ``stored`` ones apart.

        ``lasting`` are the ids of tensors that live on in any case. Others may be held by a circle that nobody holds.
        """
        found = self._alive(explained, stored)
        if not all(key in lasting for key in found):
            gc.collect()
            found = self._alive(explained, stored)
        return list(found.values())

    def _alive(self, explained: set[int], stored: set[Node]) -> dict[int, Node]:
        entries = [(key, ref(), node) for key, (ref, node, _) in list(self._entries.items())]
        return {
            key: node
            for key, x, node in entries
            if x is not None and node is not None and node.op != "placeholder"
            if key not in explained and node not in stored
        }

    def _number(self, at: int) -> int:
        number = self._model.get(at)
        if number is not None:
            return number
        known = self._memory.get(at)
        if known is None:
            self._count += 1
            known = self._memory[at] = [self._count, 0]
        return known[0]

    def _forget(self, at: int) -> None:
        known = self._memory.get(at)
        if known is not None:
            known[1] -= 1
            if known[1] <= 0:
                del self._memory[at]


def address(tensor: Tensor) -> int:
    """Return what two tensors have in common that lie in the same storage, as long as they live."""
    with torch._C.DisableTorchFunction():
        try:
            return int(tensor.untyped_storage()._cdata)
        except (RuntimeError, NotImplementedError):  # sparse and nested tensors have none of their own
            return id(tensor)


# How functions are told apart

Handler = Callable[[Recorder, Any, tuple[Any, ...], dict[str, Any]], Any]


class _Function(NamedTuple):
    """What is to be known of a function or method of torch.

    Its ``name`` is ``shape`` for the reading of that attribute, ``add`` for aten.add. In a graph it is ``target``, its
    first two arguments in the other order where it ``swaps`` them.
    """

    name: str
    handler: Handler
    op: str
    target: Any
    swaps: bool


def _function(func: Any) -> _Function:
    try:
        return _known(func)
    except TypeError:  # a function that cannot be hashed
        return _looked_at(func)


def _looked_at(func: Any) -> _Function:
    own = str(getattr(func, "__name__", ""))
    name = str(func.__self__.__name__) if own in ("__get__", "__set__") else own.partition(".")[0]
    return _Function(name, _handler(own, name), *_spelling(func, own))


_known = cache(_looked_at)


def _handler(own: str, name: str) -> Handler:
    if own == "__set__":
        return Recorder.assign if name == "data" else Recorder.answer
    is_fact = name in _FACTS or (own == "__get__" and name not in _TENSORS)
    return _HANDLERS.get(name, Recorder.answer if is_fact else Recorder.operate)


def _spelling(func: Any, own: str) -> tuple[str, Any, bool]:
    if own == "__get__":
        return "call_function", getattr, False
    if isinstance(func, OpOverload):
        return "call_function", func, False
    of_tensor = getattr(Tensor, own, None) is func or getattr(func, "__module__", "") == "torch._tensor"
    if not of_tensor and type(func).__name__ not in ("method_descriptor", "wrapper_descriptor"):
        return "call_function", func, False
    if own in _SWAPPED:
        return "call_function", _SWAPPED[own], True
    if own in _OPERATORS:
        return "call_function", _OPERATORS[own], False
    return "call_method", own, False


_CUT = {"input": "x", "tensor": "x", "split_size": "how", "split_size_or_sections": "how", "chunks": "how"}
"""The arguments of functions that cut a tensor, by their names in torch."""
TAKING = frozenset(
    {"numpy", "__array__", "__dlpack__", "storage", "untyped_storage", "_typed_storage", "data_ptr", "share_memory_"}
)
"""What takes the memory of a tensor, past all operators."""
TAKING_SIZES = frozenset(
    {
        "view", "reshape", "pad", "expand", "repeat", "interpolate", "unflatten", "unfold", "fold", "tile", "upsample",
        "zeros", "ones", "full", "arange", "linspace", "grid_sample", "adaptive_avg_pool2d", "avg_pool2d", "max_pool2d",
        "constant_pad_nd", "meshgrid", "roll", "narrow", "split", "chunk", "unsafe_split", "unsafe_chunk",
    }
)  # fmt: skip
"""Operations whose numbers in the code are mostly computed from sizes."""
_CUTTING = TAKING_SIZES | frozenset(
    {
        "__getitem__", "__setitem__", "select", "index_select", "unbind", "tensor_split", "slice", "slice_scatter",
        "index", "where", "split_with_sizes",
    }
)  # fmt: skip
"""What may take another part at another size, or depend on it by numbers in the code."""
_QUESTIONS = (
    "item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__complex__", "__contains__", "__repr__",
    "__format__", "equal", "allclose", "is_nonzero", "_local_scalar_dense", "_assert",
)  # fmt: skip
_HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(("dim", "ndimension", "ndim"), Recorder.rank),
    **dict.fromkeys(("shape", "size", "sym_size", "numel", "nelement", "sym_numel", "__len__"), Recorder.size),
    **dict.fromkeys((*_QUESTIONS, *TAKING), Recorder.ask),
    **dict.fromkeys(("_set_grad_enabled", "_enter_inference_mode"), Recorder.switch),
    **dict.fromkeys(("split", "chunk", "unsafe_split", "unsafe_chunk"), Recorder.cut),
    **dict.fromkeys(("to", "type_as"), Recorder.cast),
    **dict.fromkeys((f"new_{kind}" for kind in ("tensor", "empty", "zeros", "ones", "full")), Recorder.make),
}
_TENSORS = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})
"""Attributes of a tensor that are tensors."""
_FACTS = frozenset(
    {
        "stride", "storage_offset", "element_size", "is_contiguous", "is_floating_point", "is_complex", "get_device",
        "is_same_size", "is_pinned", "is_shared", "is_inference", "is_signed", "is_conj", "is_neg", "_is_view",
        "result_type", "can_cast", "promote_types", "register_hook", "retain_grad", "requires_grad_", "is_tensor",
        "has_names", "is_coalesced", "dense_dim", "sparse_dim", "__dlpack_device__", "_is_zerotensor", "is_set_to",
        "_has_compatible_shallow_copy_type", "_assert_tensor_metadata", "sym_stride", "sym_storage_offset",
        "register_post_accumulate_grad_hook", "finfo", "iinfo", "_get_tracing_state", "_has_storage",
    }
)  # fmt: skip
"""What says nothing about the numbers that a tensor holds."""

_ATOMS = frozenset({int, float, bool, str, type(None), complex, type(Ellipsis), bytes})

_OPERATORS = {
    f"__{name}__": getattr(operator, f"__{name}__")
    for name in (
        "getitem", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "invert", "pow", "matmul", "floordiv",
        "lshift", "rshift", "iand", "ior", "ixor", "ipow", "ifloordiv", "ilshift", "irshift", "itruediv",
    )
} | {"__setitem__": assigned}  # fmt: skip
_SWAPPED = {
    f"__r{name}__": getattr(operator, f"__{name}__")
    for name in ("sub", "truediv", "pow", "mod", "floordiv", "matmul", "and", "or", "xor")
} | {"__rdiv__": operator.truediv}


def _autocast() -> tuple[bool, bool]:
    if not torch._C._is_any_autocast_enabled():
        return _FULL
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


_FULL = False, False
"""No mixed precision."""


def _held(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """Yield the tensors in a value, in objects of any kind too."""
    if isinstance(value, Tensor):
        yield value
    elif depth < _DEEPEST:
        parts = value if isinstance(value, tuple | list | set) else value.values() if isinstance(value, dict) else ()
        for part in (*parts, *getattr(value, "__dict__", {}).values()):
            yield from _held(part, depth + 1)


_DEEPEST = 8
"""How deep results lie in each other."""


_NODES = frozenset({fx.Node, Step})


def _is_plain_dict(value: dict[Any, Any]) -> bool:
    return type(value).__init__ is dict.__init__ or type(value).__module__ == "collections"


def _nearest(names: list[str], path: str) -> str:
    """Return the name, of several of one tensor, that lies within the module at ``path``, or else the first."""
    prefix = f"{path}." if path else ""
    return names[0] if len(names) == 1 else next((name for name in names if name.startswith(prefix)), names[0])
