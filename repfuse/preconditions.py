"""What no network may be, before anything is done with it: one clear message instead of an error from deep within."""

from __future__ import annotations

from torch import jit, nn
from torch.nn.parameter import is_lazy

from repfuse.errors import RepfuseError
from repfuse.networks import join, named_modules, named_tensors

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
    if path := _cycle(network):
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


def _cycle(network: nn.Module) -> str:
    """Return the path of a module that is also above itself, or ""."""
    above, done, left = dict[nn.Module, None](), set[nn.Module](), [("", network, False)]
    while left:
        path, module, leaving = left.pop()
        if leaving:
            del above[module]
        elif module in above:
            return path
        elif module not in done:
            done.add(module)
            above[module] = None
            left.append((path, module, True))
            below = reversed(module._modules.items())
            left += [(join(path, name), child, False) for name, child in below if child is not None]
    return ""
