"""Plan files, which anybody may edit: they are read and replayed on a network."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from repfuse.plan_file import read_plan_file
from repfuse.planning.planner import plan
from repfuse.rewriting import rewrite
from repfuse.samples import NotebookBlock

from .attack import Attack
from .shards import WRONG

HUGE = 1 << 30


def network() -> NotebookBlock:
    torch.manual_seed(0)
    return NotebookBlock().eval()


@cache
def made() -> str:
    return json.dumps(plan(network(), (torch.randn(1, NotebookBlock().conv3.in_channels, 8, 8),)).to_dict())


def replays(path: Path, *, trust: bool) -> object:
    """Read the plan and apply it, which is what `convert --plan` does."""
    return rewrite(network(), read_plan_file(path).plan)


def raw(text: str, **options: Any) -> Attack:
    return Attack(lambda _folder, _canary: text.encode("utf-8", "surrogateescape"), by=replays, **options)


def changed(change: Callable[[Any], object], **options: Any) -> Attack:
    def make(_folder: Path, _canary: Path) -> bytes:
        data = json.loads(made())
        change(data)
        return json.dumps(data).encode()

    return Attack(make, by=replays, **options)


def given(arguments: Any) -> Attack:
    """A part that was traced with these arguments."""
    return changed(lambda data: data.update(arguments=arguments))


def called(*values: Any) -> Attack:
    return given({"tuple": [{"tuple": list(values)}, {"dict": {}}]})


def tensor(*sizes: Any, dtype: Any = "float32") -> Any:
    return {"shape": list(sizes), "dtype": dtype}


def nested(levels: int) -> Any:
    value: Any = {"value": 1}
    for _ in range(levels):
        value = {"list": [value]}
    return value


def site(*, may_load: bool = False, **changes: Any) -> Attack:
    return changed(lambda data: data["sites"][0].update(changes), may_load=may_load)


def of_4_gb(folder: Path, _canary: Path) -> bytes:
    with (folder / "plan.json").open("wb") as file:
        file.write(b"{")
        file.truncate(4 << 30)
    return b"x"


PLANS = {
    **{name: raw(text) for name, text in WRONG.items()},
    "of 4 GB": Attack(of_4_gb, name="x", loads="plan.json", by=replays),
    "Infinity": raw('{"schema": Infinity}'),
    "one name twice": raw('{"schema": 3, "schema": 3}'),
    "a schema of 4000 digits": changed(lambda data: data.update(schema=10**4000)),
    "an input of a gigabyte": called(tensor(1, 3, 1 << 14, 1 << 14)),
    "a hundred inputs of a gigabyte": called(*[tensor(1 << 14, 1 << 14)] * 100),
    "an input of 2**30 numbers": called(tensor(HUGE)),
    "an input of nothing and 2**60": called(tensor(0, 1 << 60)),
    "an input of 2**70": called(tensor(1 << 70)),
    "an input of less than nothing": called(tensor(-1)),
    "an input of a thousand axes": called(tensor(*[1] * 1000)),
    "a dtype that is a function": called(tensor(1, dtype="load")),
    "a dtype that is a path": called(tensor(1, dtype="hub.load")),
    "arguments nested without end": called(nested(200)),
    "arguments of text": given("x"),
    "arguments of nothing": given({"tuple": []}),
    "arguments by odd names": given({"tuple": [{"tuple": []}, {"dict": {"self": {"value": 1}}}]}),
    **{
        f"a {field} of {title}": site(**{field: value}, may_load=field in ("path", "owner"))
        for field in ("path", "owner", "part", "form", "source", "output")
        for title, value in {"dunders": "__class__.__init__", "a megabyte": "x" * 1_000_000, "a number": 7}.items()
        if (field, title)
        not in {("form", "dunders"), ("form", "a megabyte"), ("path", "dunders"), ("owner", "dunders")}
    },
    "control characters": site(path="\x1b]0;owned\x07"),
    "half a character": site(source="\ud800"),
    "nodes without end": site(nodes=["x"] * 1_000_000),
    "costs of 4000 digits": site(before={"macs": 10**4000, "bytes": 0, "launches": 0, "parameters": 0}),
}
