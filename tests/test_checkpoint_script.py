"""Scripts: what of them runs for the sake of one name, and what does not."""

from __future__ import annotations

import pickle
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from repfuse.checkpoint.user_code import Script, playing_main, script

HEAD = "from __future__ import annotations\nran = []\n"


def made(text: str, folder: Path) -> Script:
    path = folder / "a_script.py"
    path.write_text(HEAD + textwrap.dedent(text))
    return Script(path)


@pytest.mark.parametrize(
    "text",
    [
        "class Net: pass",
        "BASE = object\nclass Net(BASE): pass",
        "def make(): return WIDTH\nWIDTH = 3\nclass Net:\n    width = make()",
        "class Net:\n    def width(self): return helper()\ndef helper(): return math.pi\nimport math",
        "from math import *\nclass Net:\n    width = pi",
        "SIZES = []\nSIZES.append(3)\nclass Net:\n    width = SIZES[0]",
        "TABLE = {}\nTABLE['a'] = 3\nclass Net:\n    width = TABLE['a']",
        "class Net: pass\nNet.width = 3\nassert Net.width",
        "try:\n    import missing\nexcept ImportError:\n    missing = None\nclass Net:\n    it = missing",
        "if 3 > 2:\n    class Net: pass",
        "def registered(cls): return cls\n@registered\nclass Net: pass",
        "x = 3\nclass Net:\n    values = [x for x in range(3)]\n    def f(self, x): return x",
    ],
)
def test_a_class_gets_what_it_refers_to(text: str, tmp_path: Path) -> None:
    net = made(text, tmp_path).get("Net")
    assert net.__module__ == "__main__"
    if hasattr(net, "width") and callable(net.width):
        net().width()


WORK = """
    class Net:
        def forward(self, x, y):
            for net in (x, y):
                epoch = net
            return epoch
    {}
"""


@pytest.mark.parametrize(
    "work",
    [
        "raise SystemExit('ran')",
        "net = Net() / 0",
        "for x in range(3): y = x / 0",
        "epoch = 1 / 0",
        "import no_such_module",
        "import math\n    math.pi / 0\n    math.sqrt(-1)",
        "def main(): pass\n    main(1, 2, 3)",
        "with open('/no/such/file') as x: pass",
        'if __name__ == "__main__": 1 / 0',
        'if "__main__" == __name__:\n        x = 1 / 0',
    ],
)
def test_it_gets_nothing_else(work: str, tmp_path: Path) -> None:
    assert made(WORK.format(work), tmp_path).get("Net")


def test_under_a_guard_all_but_the_guarded_runs_as_an_import_would(tmp_path: Path) -> None:
    found = made("ran.append(1)\nclass Net: count = ran\nif __name__ == '__main__':\n    ran.append(2)", tmp_path)
    assert found.get("Net").count == [1]


def test_each_statement_runs_once(tmp_path: Path) -> None:
    found = made("ran.append(1)\nclass Net: count = ran\nclass Other: count = ran\nclass Third(Net): pass", tmp_path)
    assert found.get("Net").count == found.get("Other").count == found.get("Third").count == [1]
    assert found.get("Third").__mro__[1] is found.get("Net")


@pytest.mark.parametrize(
    ("text", "works"),
    [
        ("import torch\ntorch.save(3, 'x')", True),
        ("for _ in range(3):\n    loss.backward()", True),
        ("def save(x): x.save()", False),
        ("class A:\n    def f(self): self.step()", False),
        ("if __name__ == '__main__':\n    x.save()", False),
        ("import torch\nlibrary = torch.library.Library('x', 'DEF')\nlibrary.define('y() -> ()')", False),
    ],
)
def test_whether_a_script_works_when_it_is_imported(text: str, works: bool, tmp_path: Path) -> None:
    assert made(text, tmp_path).works is works


def test_a_pickle_of_main_finds_the_script_and_nothing_stays(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("class OnlyHere:\n    pass\n1 / 0\n")
    cls: Any = script(tmp_path / "one.py").get("OnlyHere")
    before = sys.modules["__main__"]
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(cls())
    with playing_main():
        assert type(pickle.loads(pickle.dumps(cls()))) is cls
        assert sys.modules["__main__"].__dict__.keys() - vars(before).keys() == {"scripts"}
    assert sys.modules["__main__"] is before
