"""The example inputs of a network from a file: as given, as the file or the model source knows them, else a guess."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from repfuse.checkpoint import example
from repfuse.errors import RepfuseError
from repfuse.networks import device_of, placed

if TYPE_CHECKING:
    from torch import Tensor, nn

    from repfuse.checkpoint.network import Network
    from repfuse.checkpoint.opening import Opened

Shapes = tuple[example.Shape, ...]
UNASKED = 1 << 26  # numbers that an input may have without being asked for


def inputs_of(
    opened: Opened, network: Network, given: Shapes | None, module: nn.Module
) -> tuple[tuple[Tensor, ...], str, tuple[str, ...]]:
    """Return inputs for ``module``, the network where it runs now, where they are from, and what to say of that.

    Raises RepfuseError where nobody asked for their size, and it is out of all proportion.
    """
    if given is None and opened.program is not None:
        from repfuse.checkpoint.exported.network import flat_inputs  # torch.export takes a second to import

        inputs = placed(flat_inputs(opened.program), device_of(module), {})
        return inputs, "checkpoint", ()
    shapes, origin, said = _shapes(given, opened, network)
    return example.make_inputs(shapes, module), origin, said


def _shapes(given: Shapes | None, opened: Opened, network: Network) -> tuple[Shapes, str, tuple[str, ...]]:
    if given is not None:
        return given, "given", ()
    shapes, origin, said = _shapes_of(opened, network)
    if sum(prod(shape.sizes) for shape in shapes) > UNASKED:
        what = f"The input of {opened.path} would be {example.render(shapes)}, which is very large."
        raise RepfuseError(what, f"That shape is from the {origin}.", "If it is right, say so with --input.")
    return shapes, origin, said


def _shapes_of(opened: Opened, network: Network) -> tuple[Shapes, str, tuple[str, ...]]:
    if opened.recipe is not None and opened.recipe.input:
        return example.parse_shapes(opened.recipe.input), "checkpoint", ()
    if known := example.known_shape(network.module, network.source.arguments if network.source else {}):
        return (known,), "model source" if network.source else "checkpoint", ()
    guess = example.guessed_shape(network.module)
    return (guess,), "guess", (f"the input {guess} is a guess; --input says what it really is",)
