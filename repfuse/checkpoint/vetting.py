"""What a pickle asks for, followed opcode by opcode before torch's restricted unpickler may do it.

That unpickler calls nothing but torch's own parts, yet some of these make memory of any size, or work without end,
from a few bytes. The rules: of torch's own parts only those that restore a tensor are called, and with what torch
itself writes; a storage is no larger than the file has bytes for it; work grows with the pickle and not faster.
"""

from __future__ import annotations

from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.serialization import StorageType

from repfuse.checkpoint.calls import BYTEARRAY, ENCODE, ENOUGH, Value, VettingError, check_call, weight_of
from repfuse.checkpoint.inert import GlobalName

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

FREE_WORK = 1_000_000  # objects that may be read over and above what each opcode allows
WORK_OF_OPCODE = 32
WORK_OF_CHARACTER = 4  # bytes that a text may become: a pickle of bytes is text, and what holds them may copy them
OPCODES = 2_000_000  # some seconds; the largest networks have some hundred thousand
NAME = 1000  # characters; torch looks for parts of a name in a way that takes minutes for long ones


class Scan(NamedTuple):
    """What a pickle says of itself: the names that it uses, its protocol, and its first opcode that torch refuses."""

    names: frozenset[GlobalName]
    protocol: int
    unknown: str | None


def scan(opcodes: Iterable[tuple[Any, Any, Any]], room: Callable[[str | None], int]) -> Scan:
    """Return what ``opcodes`` say; ``room`` gives the bytes that the file has for a storage, by its key.

    Raises VettingError where the pickle breaks one of the rules above.
    """
    names: set[GlobalName] = set()
    protocol, machine, unknown = 0, _Machine(room), None
    for count, (opcode, argument, _) in enumerate(opcodes):
        if count >= OPCODES:
            raise VettingError(f"its pickle has more than {OPCODES:,} instructions")
        if opcode.name == "PROTO":
            protocol = max(protocol, int(argument))
        elif opcode.name in ("GLOBAL", "INST"):
            names.add(_name(str(argument)))
        if opcode.name in ("GLOBAL", "NEWOBJ", "REDUCE"):
            machine.spend(len(names))  # for each of these, torch's unpickler goes through all names
        if unknown is None and not machine.step(opcode.name, argument):
            unknown = opcode.name
    return Scan(frozenset(names), protocol, unknown)


class _Machine:
    """The stack, the marks and the memo of an unpickler that makes no objects."""

    def __init__(self, room: Callable[[str | None], int]) -> None:
        self.room = room
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.work = -FREE_WORK
        self.stopped = False

    def step(self, opcode: str, argument: Any) -> bool:
        """Do one opcode; say whether it is one that torch's unpickler knows."""
        if self.stopped:
            return True
        if opcode in CONSTANTS:
            self.stack.append(argument)
            self.work -= WORK_OF_CHARACTER * _length(argument)
        elif opcode in STEPS:
            STEPS[opcode](self, argument)
        elif opcode not in ("PROTO", "STOP"):
            return False
        self.work -= WORK_OF_OPCODE
        return True

    def pop(self) -> Any:
        return self.stack.pop()

    def to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(Value(reversed(items)))

    def hold(self, items: list[Any], hashed: int = 0) -> None:
        """Put ``items`` into the container on the stack; each ``hashed``-th of them is a key."""
        if hashed:
            self.spend(sum(map(weight_of, items[::hashed])))
        if isinstance(self.stack[-1], Value):
            self.stack[-1].weight = min(ENOUGH, self.stack[-1].weight + sum(map(weight_of, items)))

    def spend(self, weight: int) -> None:
        self.work += weight
        if self.work > 0:
            raise VettingError("its objects hold each other so often that reading them would not end")

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        self.spend(weight_of(arguments))
        check_call(function, arguments)
        made = Value()
        if function in (ENCODE, BYTEARRAY):  # each time that bytes are made or handed on they may be copied
            made.weight += sum(map(_length, arguments.items))
            self.spend(made.weight)
        self.stack.append(made)

    def storage(self) -> None:
        match self.pop():
            case Value(items=("storage", GlobalName() as kind, key, _, int(count), *_)):
                if not 0 <= count * _item_size(kind) <= self.room(key if isinstance(key, str) else None):
                    raise VettingError(f"a storage of {count} numbers is more than the file holds")
            case Value(items=(str() as tag, *_)) if tag != "storage":
                self.stopped = True  # it refers to source code: torch's unpickler refuses that
            case Value(items=tuple()):
                raise VettingError("it does not say how large a storage is")
            case _:
                self.stopped = True  # likewise: it refers to something by another thing than a tuple
        self.stack.append(Value())


CONSTANTS = {
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1"),
    *("BINUNICODE", "SHORT_BINSTRING"),
}
STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "GLOBAL": lambda machine, argument: machine.stack.append(_name(str(argument))),
    "MARK": lambda machine, _: machine.mark(),
    "EMPTY_TUPLE": lambda machine, _: machine.tuple_of(0),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "TUPLE": lambda machine, _: _push_tuple(machine, machine.to_mark()),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"), lambda machine, _: machine.stack.append(Value())),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda machine, key: machine.memo.update({key: machine.stack[-1]})),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, key: machine.stack.append(machine.memo[key])),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda machine, _: machine.call()),
    "BUILD": lambda machine, _: machine.hold([machine.pop()], hashed=1),  # copies the keys of a dictionary
    "APPEND": lambda machine, _: machine.hold([machine.pop()]),
    "APPENDS": lambda machine, _: machine.hold(machine.to_mark()),
    "SETITEM": lambda machine, _: machine.hold([machine.pop(), machine.pop()][::-1], hashed=2),
    "SETITEMS": lambda machine, _: machine.hold(machine.to_mark(), hashed=2),
    "BINPERSID": lambda machine, _: machine.storage(),
}


def _push_tuple(machine: _Machine, items: list[Any]) -> None:
    machine.stack.append(Value(items))


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes)) else 0


def _item_size(kind: GlobalName) -> int:
    try:
        return 1 if kind.name == "UntypedStorage" else int(StorageType(kind.name).dtype.itemsize)  # type: ignore[no-untyped-call]
    except (KeyError, AttributeError):
        raise VettingError(f"{kind} is no storage") from None


def _name(argument: str) -> GlobalName:
    """Return the name as Python 3 spells it; pickles of protocol 2 may use Python 2's."""
    if len(argument) > NAME:
        raise VettingError(f"it names something with {len(argument):,} characters")
    module, _, name = argument.partition(" ")
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return GlobalName(module, name)
