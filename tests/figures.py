"""Counts what a newcomer has to read: `make figures`, or `python tests/figures.py [ROOT]`.

Files, lines and functions of the package; how long a function is; who imports whom, and in circles; which modules
`repfuse.fuse` and a conversion load, and how many of our files a conversion passes through. It measures the checkout
that it stands in, or another at ROOT.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median

PASSES = """
import json, sys, threading
import torch
from torch import nn
import repfuse
root = {root!r}
seen = set()
def note(frame, event, argument):
    if frame.f_code.co_filename.startswith(root):
        seen.add(frame.f_code.co_filename)
net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
x = torch.randn(1, 3, 8, 8)
repfuse.fuse(net, (x,))
ours = [name for name in sys.modules if name.partition(".")[0] == "repfuse"]
heavy = [name for name in ("torch._dynamo", "typer", "rich") if name in sys.modules]
torch.save(net, {file!r})
from repfuse.cli import main
sys.argv = ["repfuse", "convert", {file!r}, {out!r}, "--input", "1x3x8x8", "--quiet"]
sys.setprofile(note)
try:
    main()
except SystemExit as done:
    sys.setprofile(None)
    code = done.code
loaded = [name for name in sys.modules if name.partition(".")[0] == "repfuse"]
print(json.dumps(dict(fuse=len(ours), heavy=heavy, convert=len(loaded), passes=len(seen), code=code)))
"""


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve()
    package = sorted((root / "repfuse").rglob("*.py"))
    trees = {module_of(path, root): ast.parse(path.read_text(encoding="utf-8")) for path in package}
    lines = [count_lines(path) for path in package]
    functions = [length for tree in trees.values() for length in lengths(tree)]
    names = list(imported(trees))
    importers = defaultdict(set)
    for importer, module, name in names:
        importers[module, name].add(importer)
    alone = sum(len(each) == 1 for each in importers.values())
    tests = sorted((root / "tests").rglob("*.py"))
    internal = {(module, name) for path in tests for module, name in internals(path)}
    print(f"package: {len(package)} files, {sum(lines):,} lines, median file {median(lines):.0f}")
    short = sum(length <= 3 for length in functions) / len(functions)
    print(f"functions: {len(functions):,}, median {median(functions):.0f} lines, {short:.0%} of three lines or fewer")
    print(f"imports: {sum(imports(tree) for tree in trees.values()) / sum(lines):.1%} of the lines")
    print(f"shared names: {len(importers)}, of which {alone} with one importer")
    print(f"circles of rooms: {', '.join(' <-> '.join(c) for c in circles(rooms(names))) or 'none'}")
    print(f"tests: {len(tests)} files, {sum(map(count_lines, tests)):,} lines, {len(internal)} internal names used")
    print(run(root))


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def count_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def lengths(tree: ast.Module) -> Iterator[int]:
    """Yield the lines of the body of each function, its docstring apart."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            yield (node.end_lineno or 0) - body[0].lineno + 1


def imports(tree: ast.Module) -> int:
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))
    return sum((node.end_lineno or 0) - node.lineno + 1 for node in nodes)


def imported(trees: dict[str, ast.Module]) -> Iterator[tuple[str, str, str]]:
    """Yield who imports what name from which of our modules, for types too."""
    for importer, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "repfuse":
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    yield (importer, full, "") if full in trees else (importer, str(node.module), alias.name)


def internals(path: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("repfuse."):
            yield from ((str(node.module), alias.name) for alias in node.names)


def room(module: str) -> str:
    """Return the folder of a module, or the module itself where it lies at the top."""
    return ".".join(module.split(".")[:2])


def rooms(names: list[tuple[str, str, str]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for importer, module, _ in names:
        if room(importer) != room(module) and "repfuse" not in (importer, module):
            found[room(importer)].add(room(module))
    return found


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Return the rooms that reach each other, each set of them once (Tarjan's strongly connected components)."""
    reach = {start: reached(start, arrows) for start in arrows}
    groups = {frozenset(other for other in reach[one] if one in reach.get(other, ())) for one in arrows}
    return sorted(sorted(name.removeprefix("repfuse.") for name in group) for group in groups if len(group) > 1)


def reached(start: str, arrows: dict[str, set[str]]) -> set[str]:
    found, left = set[str](), [start]
    while left:
        new = arrows.get(left.pop(), set()) - found
        found |= new
        left += new
    return found


def run(root: Path) -> str:
    """Return what a process loads and passes through."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file, out = (str(Path(folder) / name) for name in ("net.pt", "fused.pt"))
        code = PASSES.format(root=str(root / "repfuse"), file=file, out=out)
        environment = os.environ | {"PYTHONPATH": str(root)}
        command = [sys.executable, "-W", "ignore", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    heavy = f", and {', '.join(found['heavy'])}" if found["heavy"] else ""
    return (
        f"repfuse.fuse loads {found['fuse']} of our modules{heavy}; convert loads {found['convert']} and passes "
        f"through {found['passes']} files (exit code {found['code']})"
    )


if __name__ == "__main__":
    main()
