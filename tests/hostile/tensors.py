"""Tensors of absurd sizes, and torch's own helpers with arguments that torch never writes."""

from __future__ import annotations

from .assembling import call, items, name, pickled, push, text, torch_archive, touching
from .attack import Attack, fixed

HOOKS = call("collections:OrderedDict")
EXABYTE = 1 << 60


def storage(count: object = 4, key: object = "0", kind: str = "torch:FloatStorage", place: str = "cpu") -> bytes:
    """Push a storage."""
    return items(text("storage"), name(kind), push(key), text(place), push(count)) + b"Q"


def tensor(size: object, stride: object, *, offset: object = 0, of: bytes | None = None) -> bytes:
    """Push a tensor."""
    parts = (of or storage(), push(offset), push(size), push(stride), b"\x89", HOOKS)
    return call("torch._utils:_rebuild_tensor_v2", *parts)


GOOD = tensor((4,), (1,))


def state(value: bytes) -> Attack:
    """A state dict with one good weight and ``value``."""
    body = b"}(" + text("weight") + GOOD + text("other") + value + b"u"
    return Attack(fixed(torch_archive(pickled(body), {"0": bytes(16)})), options={"model": "torch.nn:Identity"})


def swapped(value: bytes) -> Attack:
    """The same, with the bytes in an order that has them written again."""
    body = b"}(" + text("weight") + value + b"u"
    return Attack(fixed(torch_archive(pickled(body), {"0": bytes(16)}, byteorder=b"big")))


QUANTISED = (name("torch:per_tensor_affine"), b"G?\xf0\0\0\0\0\0\0", b"K\0")
INDICES = call(
    "torch._utils:_rebuild_tensor_v2",
    storage(2, "1", "torch:LongStorage"),
    b"K\0",
    push((1, 2)),
    push((2, 1)),
    b"\x89",
    HOOKS,
)

STORAGE_OF_400 = (name("torch:FloatStorage"), text("0"), text("cpu"), push(400))

TENSORS = {
    "2**60 numbers": state(tensor((EXABYTE,), (1,))),
    "2**60 numbers that are one": state(tensor((EXABYTE,), (0,))),
    "a gigabyte that is one number": state(tensor((1 << 28,), (0,))),
    "many that are one number": state(b"](" + tensor((1 << 24,), (0,)) * 100 + b"e"),
    "a size that overflows": state(tensor((1 << 40, 1 << 40), (0, 0))),
    "a size that is no number": state(tensor(("4",), (1,))),
    "a size beyond 64 bits": state(tensor((1 << 70,), (1,))),
    "a negative size": state(tensor((-4,), (1,))),
    "a stride beyond the storage": state(tensor((4,), (1000,))),
    "a negative stride": state(tensor((4,), (-1,))),
    "an offset beyond the storage": state(tensor((4,), (1,), offset=1 << 40)),
    "a negative offset": state(tensor((4,), (1,), offset=-4)),
    "more axes than strides": state(tensor((4, 4, 4), (1,))),
    "64 thousand axes": state(tensor((1,) * 65_000, (1,) * 65_000)),
    "a storage of 2**60": state(tensor((4,), (1,), of=storage(EXABYTE))),
    "a storage larger than its bytes": state(tensor((400,), (1,), of=storage(400))),
    "a storage larger than its bytes, swapped": swapped(tensor((400,), (1,), of=storage(400))),
    "a storage smaller than its bytes": state(tensor((1,), (1,), of=storage(1))),
    "a storage of a wider kind": state(tensor((4,), (1,), of=storage(4, kind="torch:DoubleStorage"))),
    "a negative storage": state(tensor((4,), (1,), of=storage(-4))),
    "a storage of an unknown size": state(tensor((4,), (1,), of=storage(4.5))),
    "a storage that is nowhere": state(tensor((4,), (1,), of=storage(4, "7"))),
    "a storage outside": state(tensor((4,), (1,), of=storage(4, "../../data/0"))),
    "a storage by a number": state(tensor((4,), (1,), of=storage(4, 0))),
    "a storage whose tag is made": state(
        tensor((400,), (1,), of=items(call("_codecs:encode", text("storage"), text("latin1")), *STORAGE_OF_400) + b"Q")
    ),
    "a storage on no device": state(tensor((4,), (1,), of=storage(place="mars"))),
    "a storage on meta": state(tensor((4,), (1,), of=storage(place="meta"))),
    "a storage that is a function": state(tensor((4,), (1,), of=storage(kind="torch:save"))),
    "a persistent id of nothing": state(b")Q"),
    "a persistent id of text": state(text("storage") + b"Q"),
    "a persistent id of a number": state(b"K\x07Q"),
    "a persistent id of a module": state(items(text("module"), name("os:system"), text("x"), text("y")) + b"Q"),
    "a persistent id in text": state(b"Pstorage\n"),
    "a persistent id of a list": state(b"]" + text("storage") + b"aQ"),
    "torch.Tensor of a size": state(call("torch:Tensor", push(1 << 33))),
    "torch.Tensor made of a size": state(name("torch:Tensor") + items(push(1 << 33)) + b"\x81"),
    "torch.FloatTensor of a size": state(call("torch:FloatTensor", push(1 << 33))),
    "UntypedStorage of a size": state(call("torch.storage:UntypedStorage", push(1 << 33))),
    "bytearray of a size": state(call("__builtin__:bytearray", push(1 << 33))),
    "bytearray of the size in a tensor": state(call("__builtin__:bytearray", GOOD)),
    "bytearray in another's name": state(
        call(
            "torch._tensor:_rebuild_from_type_v2",
            name("__builtin__:bytearray"),
            name("torch:Tensor"),
            items(push(1 << 33)),
            b"N",
        )
    ),
    "a codec that unpacks": state(call("_codecs:encode", text("x"), text("bz2"))),
    "a codec that is slow": state(call("_codecs:encode", text("\u00e9x" * 500_000), text("punycode"))),
    "a codec by an odd name": state(call("_codecs:encode", text("x"), text("os.system"))),
    "a type for a function": state(
        call("torch._tensor:_rebuild_from_type_v2", name("os:system"), name("torch:Tensor"), items(text("x")), b"N")
    ),
    "a type within a type, without end": state(
        name("torch._tensor:_rebuild_from_type_v2")
        + b"\x89"
        + b"".join(b"(" + name("torch._tensor:_rebuild_from_type_v2") + name("torch:Tensor") for _ in range(3000))
        + b")"
        + b"Nt" * 3000
        + b"R"
    ),
    "a wrapper of 2**60": state(
        call(
            "torch._utils:_rebuild_wrapper_subclass",
            name("torch:Tensor"),
            name("torch:float32"),
            push((EXABYTE,)),
            push((1,)),
            b"K\0",
            name("torch:strided"),
            text("cpu"),
            b"\x89",
        )
    ),
    "a nested tensor": state(call("torch._utils:_rebuild_nested_tensor", GOOD, INDICES, INDICES, INDICES)),
    "a tensor on another device": state(
        call(
            "torch._utils:_rebuild_device_tensor_from_cpu_tensor",
            tensor((1 << 30,), (0,)),
            name("torch:float64"),
            text("cpu"),
            b"\x89",
        )
    ),
    "an array": state(
        call("torch._utils:_rebuild_device_tensor_from_numpy", text("x"), name("torch:float32"), text("cpu"), b"\x89")
    ),
    "a meta tensor of 2**60": state(
        call(
            "torch._utils:_rebuild_meta_tensor_no_storage", name("torch:float32"), push((EXABYTE,)), push((1,)), b"\x89"
        )
    ),
    "a quantised tensor of 2**60": state(
        call(
            "torch._utils:_rebuild_qtensor",
            storage(16, kind="torch:QInt8Storage"),
            b"K\0",
            push((EXABYTE,)),
            push((0,)),
            items(*QUANTISED),
            b"\x89",
            HOOKS,
        )
    ),
    "a sparse tensor that points outside": state(
        call(
            "torch._utils:_rebuild_sparse_tensor",
            call("torch.serialization:_get_layout", text("torch.sparse_coo")),
            items(INDICES, tensor((2,), (1,)), push((1,)), b"\x88"),
        )
    ),
    "a sparse tensor of 2**60": state(
        call(
            "torch._utils:_rebuild_sparse_tensor",
            call("torch.serialization:_get_layout", text("torch.sparse_coo")),
            items(INDICES, tensor((2,), (1,)), push((EXABYTE,)), b"\x88"),
        )
    ),
    "a layout that is none": state(call("torch.serialization:_get_layout", text("os.system"))),
    "a parameter of numbers": state(call("torch.nn.parameter:Parameter", push([1, 2]))),
    "hooks that call": state(
        call(
            "torch._utils:_rebuild_tensor_v2",
            storage(),
            b"K\0",
            push((4,)),
            push((1,)),
            b"\x89",
            b"}K\0" + name("os:system") + b"s",
        )
    ),
    "attributes over methods": state(
        call(
            "torch._utils:_rebuild_parameter_with_state", GOOD, b"\x89", HOOKS, b"}" + text("numel") + text("x") + b"s"
        )
    ),
    "BUILD to another size": state(GOOD + items(storage(), b"K\0", push((EXABYTE,)), push((0,))) + b"b"),
    "BUILD of a parameter": state(
        call("torch._utils:_rebuild_parameter", GOOD, b"\x89", HOOKS) + items(text("x"), touching("/nowhere")) + b"b"
    ),
    "SETITEM of a tensor": state(GOOD + b"K\0" + text("x") + b"s"),
}
