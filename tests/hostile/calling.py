"""Pickles that call something, through every opcode and by way of every helper that one finds in such an environment.

All of these run where the file is trusted; that is the control.
"""

from __future__ import annotations

import io
import marshal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from repfuse.samples import NotebookBlock

from .assembling import call, items, name, pickled, push, short, system, text, torch_archive, touching
from .attack import Attack

EXTENSIONS = (0xF1, 0xF1F1, 0x7FF1F1F1)  # codes that the process registers for os.system
NEW_PARTIAL = name("functools:partial") + items(name("posix:system"))
Body = Callable[[Path], bytes]


def python(canary: Path) -> bytes:
    """Push Python source that touches the canary."""
    return text(f"open({str(canary)!r}, 'w')")


def code(canary: Path) -> bytes:
    """Push the marshalled code of a function."""
    return call(
        "_codecs:encode",
        push(marshal.dumps(compile(f"open({str(canary)!r}, 'w')", "x", "exec")).decode("latin1")),
        text("latin1"),
    )


OPCODES: dict[str, Body] = {  # protocol 2
    "REDUCE": lambda canary: system(touching(canary)),
    "INST": lambda canary: b"(" + touching(canary) + b"ios\nsystem\n",
    "OBJ": lambda canary: b"(" + name("os:system") + touching(canary) + b"o",
    "NEWOBJ": lambda canary: NEW_PARTIAL + b"\x81" + items(touching(canary)) + b"R",
    "BUILD with __setstate__": lambda canary: (
        call("types:SimpleNamespace")
        + b"}"
        + text("__setstate__")
        + name("os:system")
        + b"sb"
        + touching(canary)
        + b"b"
    ),
    "BUILD with slots": lambda canary: (
        *call("types:SimpleNamespace"),
        *b"N}",
        *text("__setstate__"),
        *name("os:system"),
        *b"s\x86b",
        *touching(canary),
        *b"b",
    ),
    "EXT1": lambda canary: b"\x82\xf1" + items(touching(canary)) + b"R",
    "EXT2": lambda canary: b"\x83\xf1\xf1" + items(touching(canary)) + b"R",
    "EXT4": lambda canary: b"\x84\xf1\xf1\xf1\x7f" + items(touching(canary)) + b"R",
    "Python 2's name": lambda canary: call("commands:getoutput", touching(canary)),
    "Python 2's builtins": lambda canary: call("__builtin__:eval", python(canary)),
    "memo": lambda canary: name("os:system") + b"q\x070" + touching(canary) + b"\x85q\x090h\x07h\x09R",
    "memo as text": lambda canary: name("os:system") + b"p7\n0" + touching(canary) + b"\x85p9\n0g7\ng9\nR",
    "long memo": lambda canary: name("os:system") + b"r\0\0\1\0000j\0\0\1\0" + touching(canary) + b"\x85R",
    "DUP": lambda canary: name("os:system") + b"2" + touching(canary) + b"\x85R0",
    "POP_MARK": lambda canary: b"(" + text("x") + b"1" + system(touching(canary)),
    "in a list": lambda canary: b"](" + text("x") + system(touching(canary)) + b"e",
    "as a key": lambda canary: b"}" + system(touching(canary)) + b"Ns",
    "in a set": lambda canary: call("__builtin__:set", b"]" + system(touching(canary)) + b"a"),
    "as a persistent id": lambda canary: system(touching(canary)) + b"Q",
    "in an attribute of an OrderedDict": lambda canary: (
        call("collections:OrderedDict") + b"}" + text("x") + system(touching(canary)) + b"sb"
    ),
    "before the end of another pickle": lambda canary: system(touching(canary)) + b"0}",
}
NEWER: dict[str, tuple[int, Body]] = {  # opcodes of later protocols
    "STACK_GLOBAL": (4, lambda canary: short("os") + short("system") + b"\x93" + touching(canary) + b"\x85R"),
    "dotted STACK_GLOBAL": (
        4,
        lambda canary: short("torch") + short("serialization.os.system") + b"\x93" + touching(canary) + b"\x85R",
    ),
    "NEWOBJ_EX": (4, lambda canary: NEW_PARTIAL + b"}\x92" + items(touching(canary)) + b"R"),
    "MEMOIZE": (4, lambda canary: name("os:system") + b"\x940" + touching(canary) + b"\x94\x850h\0h\x01\x85R"),
    "FRAME": (4, lambda canary: framed(system(touching(canary)))),
    "FROZENSET": (4, lambda canary: b"(" + system(touching(canary)) + b"\x91"),
    "BYTEARRAY8": (5, lambda canary: b"\x96" + bytes(8) + b"0" + system(touching(canary))),
}


def framed(body: bytes) -> bytes:
    return b"\x95" + (len(body) + 1).to_bytes(8, "little") + body


HELPERS: dict[str, Body] = {
    "posix": lambda canary: call("posix:system", touching(canary)),
    "subprocess.getoutput": lambda canary: call("subprocess:getoutput", touching(canary)),
    "subprocess.check_call": lambda canary: call("subprocess:check_call", push(["touch", str(canary)])),
    "exec": lambda canary: call("builtins:exec", python(canary)),
    "eval": lambda canary: call("builtins:eval", python(canary)),
    "open": lambda canary: call("builtins:open", text(str(canary)), text("w")),
    "getattr": lambda canary: (
        call("builtins:getattr", call("importlib:import_module", text("os")), text("system"))
        + items(touching(canary))
        + b"R"
    ),
    "operator.attrgetter": lambda canary: (
        call("operator:attrgetter", text("system"))
        + items(call("importlib:import_module", text("os")))
        + b"R"
        + items(touching(canary))
        + b"R"
    ),
    "operator.methodcaller": lambda canary: (
        call("operator:methodcaller", text("system"), touching(canary))
        + items(call("importlib:import_module", text("os")))
        + b"R"
    ),
    "functools.partial": lambda canary: call("functools:partial", name("os:system"), touching(canary)) + b")R",
    "functools.reduce": lambda canary: call("functools:reduce", name("builtins:exec"), b"](" + python(canary) + b"}e"),
    "map": lambda canary: call(
        "builtins:list", call("builtins:map", name("os:system"), b"]" + touching(canary) + b"a")
    ),
    "marshal": lambda canary: (
        call(
            "types:FunctionType",
            call("marshal:loads", code(canary)),
            b"}" + text("open") + name("builtins:open") + b"s",
        )
        + b")R"
    ),
    "pickle in a pickle": lambda canary: call(
        "pickle:loads",
        call("_codecs:encode", text(pickled(system(touching(canary))).decode("latin1")), text("latin1")),
    ),
    "runpy": lambda canary: call("runpy:run_path", text(script(canary))),
    "timeit": lambda canary: call("timeit:timeit", python(canary), text("pass"), name("time:time"), b"K\x01"),
    "cProfile": lambda canary: call("cProfile:run", python(canary), text(str(canary) + ".profile")),
    "imaplib": lambda canary: call("imaplib:IMAP4_stream", touching(canary)),
    "ctypes": lambda canary: (
        call("builtins:getattr", call("ctypes:CDLL", b"N"), text("system")) + items(as_bytes(f"touch {canary}")) + b"R"
    ),
    "numpy.load": lambda canary: call("numpy:load", text(array(canary)), b"N", b"\x88"),
    "torch.load": lambda canary: call(
        "torch:load", text(inner(canary)), b"N", call("importlib:import_module", text("pickle"))
    ),
    "torch.hub": lambda canary: call("torch.hub:_load_local", text(hub(canary)), text("entry")),
    "torch.jit": lambda canary: call("torch.jit.unsupported_tensor_ops:execWrapper", python(canary), b"}", b"}"),
    "torch.fx source": lambda canary: call("torch.fx.graph_module:_exec_with_source", python(canary), b"}"),
    "torch._utils._rebuild_from_type_v2": lambda canary: call(
        "torch._tensor:_rebuild_from_type_v2", name("os:system"), name("torch:Tensor"), items(touching(canary)), b"N"
    ),
    "torch.utils._rebuild_parameter": lambda canary: call(
        "torch._utils:_rebuild_parameter", system(touching(canary)), b"\x88", b"N"
    ),
    "an import": lambda canary: name(f"{landmine(canary)}:x"),
}


def as_bytes(value: str) -> bytes:
    return call("_codecs:encode", text(value), text("latin1"))


def beside(canary: Path, file: str, data: bytes) -> str:
    path = canary.parent / file
    path.write_bytes(data)
    return str(path)


def script(canary: Path) -> str:
    return beside(canary, "script.py", f"open({str(canary)!r}, 'w')".encode())


def landmine(canary: Path) -> str:
    """Put a module beside the canary, whose folder the process has on its path."""
    stem = "landmine_" + canary.parent.name
    beside(canary, f"{stem}.py", f"open({str(canary)!r}, 'w')\nx = 0".encode())
    return stem


def hub(canary: Path) -> str:
    beside(canary, "hubconf.py", f"open({str(canary)!r}, 'w')\ndef entry(): pass".encode())
    return str(canary.parent)


def inner(canary: Path) -> str:
    return beside(canary, "inner.pt", torch_archive(pickled(system(touching(canary)))))


class Touch:
    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> object:
        return open, (self.canary, "w")


def array(canary: Path) -> str:
    path = canary.parent / "array.npy"
    np.save(path, np.array([Touch(canary)], dtype=object), allow_pickle=True)
    return str(path)


def attack(body: Body, protocol: int = 2) -> Attack:
    return Attack(lambda _, canary: torch_archive(pickled(bytes(body(canary)), protocol)), executes=True)


NAMES = (  # that older readers, or a reader that follows dots, would find something under
    *("torch.serialization:os.system", "torch.serialization.os:system", "torch:serialization.os.system"),
    *("timm.models.byobnet:os.system", "torch.jit._serialization:load", "torch.utils.cpp_extension:load"),
    *("torch.ops:load_library", "torch.hub:load", "torch.__main__:Net", "repfuse.samples:torch.hub.load"),
    *("torch.nn.modules:container.Sequential.__init__.__globals__", "__main__:x", ":system", "os:", "os:system "),
)


def beside_a_network(_folder: Path, canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": NotebookBlock(), "more": Touch(canary)}, buffer)
    return buffer.getvalue()


CALLING = {
    **{f"opcode {title}": attack(body) for title, body in OPCODES.items()},
    **{f"opcode {title}": attack(body, protocol) for title, (protocol, body) in NEWER.items()},
    **{f"call of {title}": attack(body) for title, body in HELPERS.items()},
    "call of pathlib": attack(
        lambda canary: (
            short("pathlib")
            + short("Path.touch")
            + b"\x93"
            + items(call("pathlib:PosixPath", text(str(canary))))
            + b"R"
        ),
        4,
    ),
    **{
        f"{path!r} with --allow": Attack(
            lambda _, canary, path=path: torch_archive(pickled(call(path, touching(canary)))),
            options={"allow": ["torch"]},
        )
        for path in NAMES
    },
    "call beside a network": Attack(beside_a_network, executes=True, may_load=True),
}
