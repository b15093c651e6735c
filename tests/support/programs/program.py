"""A program: steps that read earlier values, counted backwards, and make the next one.

It is built by running it once: every step sees the real values that it reads and becomes an operation that fits them,
so that forward itself decides nothing. A step for which there is no such operation is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from support.programs import joining, layers, moving, others, scaling
from support.programs.made import Made, Pick, Spelled, Unfit, called
from torch import Tensor, nn

LARGEST = 4500
"""Numbers in a value; a step that makes more is left out."""


@dataclass(frozen=True)
class Step:
    """A ``kind`` of operation on the values ``reads`` steps back; ``digits`` choose among its variants."""

    kind: str
    reads: tuple[int, ...] = ()
    digits: tuple[int, ...] = ()
    inner: tuple[Step, ...] = ()


Builder = Callable[..., Made]
Fits = Callable[[Tensor, Tensor], bool]


def _alike(x: Tensor, other: Tensor) -> bool:
    return x.shape == other.shape


def _beside(x: Tensor, other: Tensor) -> bool:
    """Whether both can stand beside each other along the channels."""
    return x.ndim == other.ndim > 1 and x.shape[:1] + x.shape[2:] == other.shape[:1] + other.shape[2:]


def _broadcasts(x: Tensor, other: Tensor) -> bool:
    return x.ndim == other.ndim and all(b in (a, 1) for a, b in zip(x.shape, other.shape, strict=True))


UNARY: dict[str, Builder] = {
    "conv": layers.conv,
    "kept": layers.kept,
    "transposed": layers.transposed,
    "averaged": layers.averaged,
    "linear": layers.linear,
    "product": layers.product,
    "lora": layers.lora,
    "fixed": layers.fixed,
    "pool": layers.pool,
    "norm": scaling.norm,
    "side by side": layers.side_by_side,
    "instance norm": scaling.instance_norm,
    "constant": scaling.constant,
    "toward": scaling.toward,
    "number": scaling.number,
    "pad": moving.pad,
    "crop": moving.crop,
    "choose": moving.choose,
    "shuffle": moving.shuffle,
    "space": moving.space,
    "split": moving.branches_of_channels,
    "filled": moving.filled,
    "nothing": others.nothing,
    "relu": others.relu,
    "written": others.written,
    "checkpointed": others.checkpointed,
}
SEVERAL: dict[str, tuple[Builder, int, Fits]] = {
    "add": (joining.add, 2, _alike),
    "total": (joining.total, 3, _alike),
    "cat": (moving.cat, 3, _beside),
    "broadcast": (joining.broadcast, 2, _broadcasts),
    "gate": (joining.gate, 2, _alike),
}
_FAILURES = (RuntimeError, ValueError, IndexError, NotImplementedError, AssertionError, TypeError)


class Program(nn.Module):
    """Runs its steps on one input and returns the last value, or with ``also`` earlier ones too."""

    def __init__(self, steps: Sequence[Step], *examples: Tensor, also: Sequence[int] = ()) -> None:
        super().__init__()
        self.also = tuple(also)
        self.parts = nn.ModuleDict()
        self.lines: list[tuple[Callable[..., Any], str | None, tuple[int, ...]]] = []
        self._built: list[tuple[Callable[..., Any], str | None]] = []
        values = [example.clone().float() for example in examples]  # the modules are not yet in another dtype
        for step in steps:
            self._add(step, values)

    def forward(self, x: Tensor) -> Any:
        return self.run(x)

    def run(self, *inputs: Tensor) -> Any:
        values: list[Any] = list(inputs)
        for run, name, reads in self.lines:
            values.append(run(None if name is None else self.parts[name], *(values[place] for place in reads)))
        return (values[-1], *(values[i % len(values)] for i in self.also)) if self.also else values[-1]

    @torch.no_grad()
    def _add(self, step: Step, values: list[Tensor]) -> None:
        """Add the operation of a step, if there is one, and its value."""
        reads = self._reads(step, values)
        operands = [values[place] for place in reads]
        try:
            run, name = self._again(step) if step.kind == "again" else self._new(_made(step, operands))
            value = run(None if name is None else self.parts[name].eval(), *(x.clone() for x in operands))
        except _FAILURES:
            value = None
        if not isinstance(value, Tensor) or not 0 < value.numel() <= LARGEST:
            return
        self.lines.append((run, name, reads))
        self._built.append((run, name))
        values.append(value)

    def _reads(self, step: Step, values: Sequence[Tensor]) -> tuple[int, ...]:
        backs = [*step.reads, 0, 0, 0]
        first = max(len(values) - 1 - backs[0], 0)
        _, arity, fits = SEVERAL.get(step.kind, (None, 1, _alike))
        if step.kind == "block":
            arity = 1 + sum(step.digits[:1]) % 2
        fitting = [place for place, value in enumerate(values) if fits(values[first], value)]
        return (first, *(fitting[max(len(fitting) - 1 - back, 0)] for back in backs[1:arity]))

    def _new(self, made: Made) -> tuple[Callable[..., Any], str | None]:
        if made.part is None:
            return made.run, None
        name = f"p{len(self.parts)}"
        self.parts[name] = made.part
        return made.run, name

    def _again(self, step: Step) -> tuple[Callable[..., Any], str | None]:
        """An operation that was there before, with its part."""
        known = [line for line in self._built if line[1] is not None]
        if not known:
            raise Unfit("nothing to run again")
        return Pick(step.digits).of(known)


class ProgramOfTwo(Program):
    """The same with two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.run(x, y)


def program(steps: Sequence[Step], examples: Sequence[Tensor], also: Sequence[int] = ()) -> Program:
    """Return the program of as many inputs as there are examples."""
    kind = Program if len(examples) == 1 else ProgramOfTwo
    return kind(steps, *examples, also=also)


def _made(step: Step, operands: Sequence[Tensor]) -> Made:
    pick = Pick(step.digits)
    if step.kind == "block":
        return called(program(step.inner, operands))
    if step.kind == "branches":
        return called(Branched(step.inner, operands[0], pick))
    if step.kind in SEVERAL:
        return SEVERAL[step.kind][0](pick, *operands)
    own_forward = pick.of((False, False, False, True))
    made = UNARY[step.kind](pick, *operands)
    return called(Spelled(made)) if own_forward else made


class Branched(nn.Module):
    """Several steps of one value, and their sum, nested to the left or to the right."""

    def __init__(self, steps: Sequence[Step], x: Tensor, pick: Pick) -> None:
        super().__init__()
        self.to_the_right = pick.of((False, True))
        branches = [_made(step, [x]) for step in steps]
        shapes = [made.run(None if made.part is None else made.part.eval(), x.clone()).shape for made in branches]
        self.runs = [made.run for made, shape in zip(branches, shapes, strict=True) if shape == shapes[0]]
        parts = [made.part for made, shape in zip(branches, shapes, strict=True) if shape == shapes[0]]
        self.parts = nn.ModuleList(nn.Identity() if part is None else part for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        values = [run(part, x) for run, part in zip(self.runs, self.parts, strict=True)]
        return sum(values[::-1] if self.to_the_right else values)
