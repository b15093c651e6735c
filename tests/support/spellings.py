"""One block in several spellings: the author's own classes (so that tracing sees functions), and ATen."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn


def in_functions(block: nn.Module) -> nn.Module:
    """The block, its layers now of classes with a forward of their own: traced through, they are functions."""
    for module in block.modules():
        if type(module).forward.__module__.startswith("torch.nn.modules") and not isinstance(module, nn.Sequential):
            module.__class__ = _own(type(module))
    return block


def _own(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, input: Tensor) -> Tensor:
        return kind.forward(self, input)

    return type(f"Own{kind.__name__}", (kind,), {"forward": forward, "__module__": __name__})


@torch.no_grad()
def exported(block: nn.Module, inputs: list[Tensor], channels: int, decomposed: bool = False) -> nn.Module:
    """The block as torch.export writes it, for all sizes that it can, except of the axis ``channels``.

    It is in core ATen where ``decomposed``.
    """
    sizes = tuple({axis: torch.export.Dim.AUTO for axis in range(x.ndim) if axis != channels} for x in inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(block, tuple(inputs), dynamic_shapes=sizes)
        return (program.run_decompositions() if decomposed else program).module()
