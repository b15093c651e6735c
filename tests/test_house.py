"""No room imports another that imports it, and the core loads nothing of what it does not need."""

from __future__ import annotations

import ast
from pathlib import Path

from figures import circles, imported, module_of, rooms

ROOT = Path(__file__).parents[1]


def test_no_rooms_import_each_other():
    trees = {
        module_of(path, ROOT): ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.glob("repfuse/**/*.py")
    }
    assert not circles(rooms(list(imported(trees))))


def test_a_circle_would_be_seen():
    sources = {
        "repfuse.a.one": "from repfuse.b.two import f",
        "repfuse.b.two": "def g():\n    from repfuse.c import h",
        "repfuse.c": "from repfuse.a import one",
        "repfuse.d": "from repfuse.a.one import f",
    }
    trees = {name: ast.parse(source) for name, source in sources.items()}
    assert circles(rooms(list(imported(trees)))) == [["a", "b", "c"]]
