"""Training checkpoints whose harmless objects (dates, paths, arrays, ...) are given what their classes never write."""

from __future__ import annotations

import torch

from repfuse.samples import NotebookBlock

from .assembling import call, items, name, pickled, push, system, text, torch_archive, touching
from .attack import Attack
from .tensors import GOOD

BUILT = {"model": "torch.nn:Identity"}


def beside(body: bytes) -> Attack:
    """A training checkpoint with one weight, and ``body`` beside it."""
    pickle = b"}(" + text("state_dict") + b"}" + text("weight") + GOOD + b"s" + text("more") + body + b"u"
    return Attack(
        lambda _folder, _canary: torch_archive(pickled(pickle), {"0": bytes(16)}), options=BUILT, may_load=True
    )


def encoded(content: bytes) -> bytes:
    return call("_codecs:encode", content, text("latin1"))


def dtype(kind: str = "f4", state: bytes = b"") -> bytes:
    return call("numpy:dtype", text(kind), b"\x89", b"\x88") + (state + b"b" if state else b"")


def array(shape: object, content: bytes, kind: bytes = b"") -> bytes:
    new = call("numpy.core.multiarray:_reconstruct", name("numpy:ndarray"), push((0,)), encoded(text("b")))
    return new + items(b"K\1", push(shape), kind or dtype(), b"\x89", content) + b"b"


def namespace(state: bytes, kind: str = "argparse:Namespace") -> Attack:
    return beside(name(kind) + b")\x81" + state + b"b")


def versions(value: object) -> Attack:
    """A state dict whose notes of versions are something else."""

    def make(_folder: object, _canary: object) -> bytes:
        import io

        state = NotebookBlock().state_dict()
        state._metadata = value  # type: ignore[attr-defined]
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return buffer.getvalue()

    return Attack(make, options={"model": "repfuse.samples:NotebookBlock"}, may_load=True)


OBJECTS = {
    "an array of 2**60": beside(array((1 << 60,), encoded(text("x" * 16)))),
    "an array of nothing and 2**60": beside(array((0, 1 << 60), encoded(text("")))),
    "an array of 2**90": beside(array((1 << 90,), encoded(text("x" * 16)))),
    "an array of a thousand axes": beside(array((1,) * 1000, encoded(text("x" * 4)))),
    "an array of objects": beside(array((1,), encoded(text("x" * 8)), dtype("O"))),
    "an array of texts of 2**31": beside(array((1,), encoded(text("x" * 8)), dtype("U2147483647"))),
    "an array of texts of a million digits": beside(dtype("U" + "9" * 1_000_000)),
    "an array of a tensor": beside(array((4,), GOOD)),
    "an array of the state in a list": beside(array((4,), b"]")),
    "a scalar of objects": beside(call("numpy.core.multiarray:scalar", dtype("O"), encoded(text("x" * 8)))),
    "a scalar of nothing": beside(call("numpy.core.multiarray:scalar", dtype(), encoded(text("")))),
    "a dtype with a tensor for its state": beside(dtype("f4", GOOD)),
    "a dtype with a dict for its state": beside(dtype("f4", b"}K\0Ns")),
    "a dtype of a dict": beside(call("numpy:dtype", b"}")),
    "a dtype from a buffer": beside(
        call("numpy.core.multiarray:_frombuffer", encoded(text("x")), dtype(), push((1,)), text("C"))
    ),
    "numpy's functions": beside(call("numpy:fromfile", text("/etc/passwd")) + call("numpy:load", text("x")) + b"\x86"),
    "a path of a number of thousands of digits": beside(call("pathlib:PosixPath", push(1 << 2000))),
    "a path of a tensor": beside(call("pathlib:PosixPath", GOOD)),
    "a date of 2**70": beside(call("datetime:datetime", push(1 << 70), b"K\1", b"K\1")),
    "a date of bytes": beside(call("datetime:datetime", encoded(text("\xff" * 10)))),
    "a time of 2**60 days": beside(call("datetime:timedelta", push(1 << 60))),
    "a time of NaN": beside(call("datetime:timedelta", push(float("nan")))),
    "a zone of itself": beside(call("datetime:timezone", text("x"))),
    "a namespace of a tensor": namespace(GOOD),
    "a namespace of a list": namespace(b"]"),
    "a namespace with another class": namespace(b"}" + text("__class__") + text("x") + b"s"),
    "a namespace with other attributes": namespace(b"}" + text("__dict__") + b"}s"),
    "a namespace with a function": namespace(b"}" + text("_get_kwargs") + name("os:system") + b"s"),
    "a namespace with a self": namespace(b"}" + text("self") + b"K\1s"),
    "a namespace of numbers": namespace(b"}K\1K\1s"),
    "a simple namespace of a tensor": namespace(GOOD, "types:SimpleNamespace"),
    "a default of os.system": beside(call("collections:defaultdict", name("os:system")) + b"q\x01" + text("a") + b"Ns"),
    "a dictionary of another library that calls": Attack(
        lambda _, canary: torch_archive(
            pickled(
                b"}("
                + text("state_dict")
                + b"}"
                + text("weight")
                + GOOD
                + b"s"
                + text("more")
                + call("lightning.fabric.utilities.data:AttributeDict", system(touching(canary)))
                + b"u"
            ),
            {"0": bytes(16)},
        ),
        options=BUILT,
        may_load=True,
        executes=False,
    ),
    "an origin that is a tensor": beside(call("collections:OrderedDict") + b"}" + text("origin") + GOOD + b"sb"),
    **{
        f"versions that are {value!r}": versions(value)
        for value in (
            7,
            "x",
            [1],
            None,
            {7: 8},
            {"": 7},
            {"conv3": "x"},
            {"": {"version": "x"}},
            {"": {"version": 1 << 90}},
        )
    },
}
