"""Facts about a network that need no run."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import fx, jit, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from repfuse.errors import RepfuseError


def join(path: str, name: str) -> str:
    """Return the path of a descendant; the root has no name of its own."""
    return f"{path}.{name}".strip(".")


def named_modules(network: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Yield what ``network.named_modules`` does, which passes each module up through all that it lies in."""
    seen, left = set[nn.Module](), [("", network)]
    while left:
        path, module = left.pop()
        if not (remove_duplicate and module in seen):
            seen.add(module)
            if module._modules:
                prefix = f"{path}." if path else ""
                children = reversed(module._modules.items())
                left += [(prefix + name, child) for name, child in children if child is not None]
            yield path, module


def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters, buffers and plain tensor attributes of the module itself, without its children."""
    held = vars(module)
    found = {}
    if not _NO_TENSORS.issuperset(map(type, held.values())):  # a look at each takes three times as long
        found = {name: value for name, value in held.items() if isinstance(value, torch.Tensor)}
    for table in (module._buffers, module._parameters):
        if table:
            found |= {name: value for name, value in table.items() if value is not None}
    return found


_NO_TENSORS = frozenset({bool, int, float, str, tuple, list, dict, set, OrderedDict, type(None)})


def named_tensors(network: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each parameter, buffer and plain tensor attribute of the modules by its dotted name.

    What has several names comes once, under its first; without ``remove_duplicate`` under each.
    """
    seen: set[int] = set()
    for path, module in named_modules(network, remove_duplicate=remove_duplicate):
        prefix = f"{path}." if path else ""
        for name, value in own_tensors(module).items():
            if not (remove_duplicate and id(value) in seen):
                seen.add(id(value))
                yield prefix + name, value


def as_inputs(given: Sequence[Any] | torch.Tensor) -> tuple[Any, ...]:
    """Return the positional arguments of a call: a tensor by itself is the only one."""
    return (given,) if isinstance(given, torch.Tensor) else tuple(given)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Return the tensors in a value, in any nesting of tuples, lists and dicts."""
    found: list[torch.Tensor] = []
    _find_tensors(value, found)
    return found


def _find_tensors(value: Any, found: list[torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, (tuple, list)):  # without the union, which Python makes anew each time
        for part in value:
            if type(part) not in _NUMBERS:
                _find_tensors(part, found)
    elif isinstance(value, dict):
        _find_tensors([*value.values()], found)
    elif isinstance(value, slice):
        _find_tensors((value.start, value.stop, value.step), found)


_NUMBERS = frozenset({bool, int, float, str, type(None)})


def stored_tensors(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what ``state_dict`` returns of parameters and buffers, also where a class returns something else there.

    In its order and under its names; what is shared comes under each of its names.
    """
    for path, module in named_modules(network, remove_duplicate=False):
        kept = {name: x for name, x in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for name, value in {**module._parameters, **kept}.items():
            if value is not None:
                yield join(path, name), value


def holders(root: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Return where each module within ``root`` is registered: in which parents, under which names."""
    found: dict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
    for _, parent in named_modules(root):
        for name, child in parent._modules.items():
            if child is not None:
                found[child].append((parent, name))
    return found


def set_eval(network: nn.Module) -> None:
    """Put a network in eval mode, whatever its ``eval`` returns.

    One that is in it is left alone: some networks rewrite themselves when they are told so again.
    """
    if not any(getattr(module, "training", False) for module in network.modules()):  # a frozen script has no mode
        return
    try:
        network.eval()
    except NotImplementedError:  # by an exported program, whose mode was settled when it was exported
        for module in network.modules():
            module.training = False


def in_training(network: nn.Module) -> list[str]:
    """Return the paths of the modules that are in training mode; of those below one another the uppermost alone."""
    found: list[str] = []
    for path, module in named_modules(network):
        above = any(not upper or path.startswith(f"{upper}.") for upper in found)
        if not above and getattr(module, "training", False):  # a frozen script has no mode
            found.append(path)
    return found


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with all its numbers stored: sparse ones cannot be compared element by element."""
    return tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have one dtype and shape and equal numbers; what is not a number equals itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    a, b = dense(one).cpu(), dense(other).cpu()
    same = a == b  # torch.equal knows no float8
    return bool(same.all()) or (not a.is_quantized and bool((same | (a.isnan() & b.isnan())).all()))


def main_dtype(network: nn.Module) -> torch.dtype | None:
    """Return the floating dtype in which most of the network's numbers are stored; None where it has none."""
    counts: dict[torch.dtype, int] = {}
    for _, tensor in named_tensors(network):
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=None)


def between(original: nn.Module, fused: nn.Module) -> dict[torch.dtype, torch.dtype]:
    """Return the cast that makes inputs of the original's dtype inputs of the fused network's."""
    own, other = main_dtype(original), main_dtype(fused)
    return {own: other} if own and other else {}


PRESERVED = "_user_preserved_attributes"
"""Under this key in its ``meta`` a GraphModule has the attributes that PyTorch takes along when it is deep-copied."""


def keep_attributes(network: nn.Module, attributes: dict[str, Any]) -> None:
    """Give a network attributes, and its copies, too."""
    for name, value in attributes.items():
        setattr(network, name, value)
    if isinstance(network, fx.GraphModule):
        network.meta[PRESERVED] = attributes


def device_of(network: nn.Module) -> torch.device:
    """Return where the network's first tensor lies; the CPU where it has none."""
    return next((tensor.device for _, tensor in named_tensors(network)), torch.device("cpu"))


USUAL_SIZE = {0: 1, 1: 224, 2: 224, 3: 32}
"""By the number of spatial axes: the size of an input where nothing is known of it."""


def first_layer(network: nn.Module) -> tuple[str, int, int] | None:
    """Return the path of the first convolution or linear layer, its input channels and how many spatial axes it has."""
    for path, layer in named_modules(network):
        if isinstance(layer, _ConvNd | nn.Linear) and isinstance(layer.weight, torch.Tensor):
            channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
            axes = 0 if is_lazy(layer.weight) else layer.weight.dim() - 2
            if type(channels) is int and channels > 0 and axes in USUAL_SIZE:  # a file may say anything
                return path, channels, axes
    return None


def why_refused(network: nn.Module, inputs: Sequence[Any], error: str) -> tuple[str, str]:
    """Return why a network may not take its inputs, and which it may take, as far as its first layer tells of channels
    and axes; else why is ``error``.
    """
    shape = next((tuple(x.shape) for x in tensors_of(tuple(inputs)) if x.is_floating_point() and x.dim() > 1), None)
    first = first_layer(network)
    if shape is None or first is None:
        return f"{error}.", "Give inputs of the shape and dtype that the network takes."
    (path, channels, axes), fitting, found = first, list(shape), ""
    size, at = [USUAL_SIZE[axes]] * axes, 1 if axes else -1
    if axes and len(shape) != axes + 2:
        found, fitting = f"{len(shape)} axes, not {axes + 2}", [1, channels, *size]
    elif shape[at] != channels:
        found, fitting[at] = str(shape[at]), channels
    elif axes:
        fitting[2:] = size
    takes = f"Its first layer, {path or 'itself'}, takes {channels} channel{'s' * (channels != 1)}"
    why = f"{takes}, and the input has {found}." if found else f"{error}."
    return why, f"Give the shape that the network takes: --input {'x'.join(map(str, fitting))}, say."


def draw_alike(network: nn.Module, seed: int) -> None:
    """Let the random numbers of the CPU, and of the GPU where the network lies there, begin at ``seed``.

    ``torch.manual_seed`` asks every kind of device that there is, which takes as long as a small layer.
    """
    torch.default_generator.manual_seed(seed)
    if _gpus_of(network):
        torch.cuda.manual_seed_all(seed)


@contextmanager
def as_before(network: nn.Module) -> Iterator[None]:
    """After it random numbers go on as if nothing had been drawn in it, and PyTorch's default dtype is what it was: a
    forward that sets another one may fail before it puts it back.
    """
    dtype = torch.get_default_dtype()
    try:
        with torch.random.fork_rng(_gpus_of(network)):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _gpus_of(network: nn.Module) -> list[torch.device]:
    """Return the GPU where the network lies, if it does: looked for only where this process uses one."""
    device = device_of(network) if torch.cuda.is_initialized() else torch.device("cpu")  # type: ignore[no-untyped-call]
    return [device] if device.type == "cuda" else []


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads on the CPU, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def half_the_threads() -> AbstractContextManager[None]:
    """Let torch use half of its threads while another process works: two on the same cores would wait for each other
    at the end of each operation.
    """
    return using_threads((torch.get_num_threads() + 1) // 2)


def placed(inputs: tuple[Any, ...], device: torch.device, cast: Mapping[torch.dtype, torch.dtype]) -> tuple[Any, ...]:
    """Return copies of the tensors among the inputs, on ``device`` and in the dtypes that ``cast`` names.

    They may lie in tuples, lists and dicts.
    """

    def copied(x: Any) -> Any:
        return x.to(device=device, dtype=cast.get(x.dtype), copy=True) if isinstance(x, torch.Tensor) else x

    return tuple(tree_map(copied, inputs))


_PLAIN = (bool, int, float, str, bytes, type(None))


def is_plain(value: Any) -> bool:
    """Whether a value is numbers and text, in tuples, lists and dicts."""
    if type(value) in (tuple, list):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(map(is_plain, (*value, *value.values())))
    return type(value) in _PLAIN


# What no network may be, before anything is done with it: one clear message instead of an error from deep within.


AWARE = ("activation_post_process", "weight_fake_quant")
"""How PyTorch calls what it puts into a network that it prepares; an observer of one's own is a module like others."""
ROUNDING = "torch.ao.quantization.fake_quantize"
INT8 = ("torch.ao.nn.quantized.modules.conv", "torch.ao.nn.intrinsic.quantized")


def quantised(what: str, *, aware: bool) -> RepfuseError:
    """Return the error for a network whose training or calibration for int8 has begun (``aware``), or that is int8."""
    if aware:
        return RepfuseError(
            f"{what} is quantisation-aware: it is trained or calibrated for int8, branch by branch.",
            "Each branch has a range of its own, which the merged convolution has no use for.",
            "Merge first: convert the float checkpoint, then prepare the result and train or calibrate it.",
        )
    return RepfuseError(
        f"{what} is quantised to int8 already.",
        "Its weights are integers with a scale each: merging them would round anew, and could not be exact.",
        "Convert the float checkpoint that it was made from, and quantise the result.",
    )


def check_runnable(network: nn.Module) -> None:
    """Raise RepfuseError where the network cannot be run: it has no numbers, or its modules hold each other."""
    if not isinstance(network, nn.Module):
        raise RepfuseError(f"This is a {type(network).__name__}, no network.", "", "Give a torch.nn.Module.")
    if path := _cycle(network, "", (), set()):
        raise RepfuseError(
            f"The modules of this {type(network).__name__} hold each other without end.",
            f"{path!r} is a module that it is itself a part of: eval(), to() and state_dict() never return.",
            "Keep a reference to a parent where PyTorch does not look: self.parent = [parent].",
        )
    for name, tensor in named_tensors(network):
        if is_lazy(tensor):
            raise RepfuseError(
                f"{name!r} has no shape yet.",
                "A lazy layer gets its weights in its first call.",
                "Call the network once, then convert.",
            )
        if tensor.is_meta:
            raise RepfuseError(
                f"{name!r} is on the meta device: it has a shape, and no numbers.",
                "The network was built without its weights.",
                "Load the weights first: to_empty(device='cpu'), then load_state_dict().",
            )


def check_rewritable(network: nn.Module) -> None:
    """Raise RepfuseError where the network cannot be run, or is a compiled form of one."""
    check_runnable(network)
    if isinstance(network, jit.ScriptModule):
        raise RepfuseError(
            "A TorchScript module cannot be rewritten.",
            "Its forward is compiled, and has no Python code left.",
            "Convert the network that it was made from, and script the result.",
        )
    for _, module in named_modules(network):
        kind = type(module).__module__
        aware = kind != ROUNDING and any(name.startswith(AWARE) for name, x in module._modules.items() if x is not None)
        if aware or kind.startswith(INT8):
            raise quantised(f"This {type(network).__name__}", aware=aware)
    if type(network).__name__ == "OptimizedModule":  # telling it by its class would import the compiler
        raise RepfuseError(
            "A compiled network cannot be rewritten.",
            "torch.compile() keeps the network that it compiles under _orig_mod.",
            "Convert model._orig_mod, and compile the result.",
        )


def _cycle(module: nn.Module, path: str, above: tuple[nn.Module, ...], done: set[nn.Module]) -> str:
    """Return the path of a module that is also above itself, or ""."""
    if module in above:
        return path
    if module in done:
        return ""
    done.add(module)
    for name, child in module._modules.items():
        if child is not None and child._modules and (found := _cycle(child, join(path, name), (*above, module), done)):
            return found
    return ""
