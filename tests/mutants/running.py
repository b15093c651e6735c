"""A mutant is tried in a fork of a process that has imported torch, so that one takes a second or two."""

from __future__ import annotations

import importlib.util
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType

import hypothesis
import pytest

ROOT = Path.cwd()
CPU_SECONDS = 120
MEMORY = 4 << 30
_QUIET = ("-x", "-q", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:unraisableexception")

# Few examples, always the same, and none made smaller: that one fails is all there is to know.
hypothesis.settings.register_profile(
    "mutants",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=20,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
os.environ |= {"HYPOTHESIS_PROFILE": "mutants", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.source, self.path, "exec")


class _Mutated(MetaPathFinder):
    """Gives one module another source."""

    def __init__(self, path: str, source: str) -> None:
        self.name = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        self.path, self.source = str(ROOT / path), source

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=_Loader(name, self.path, self.source))


class _Order:
    """Runs these tests first, and writes down which one fails."""

    def __init__(self, first: Sequence[str], noticed: int) -> None:
        self.first, self.noticed = first, noticed

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: item.nodeid not in self.first)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            os.write(self.noticed, report.nodeid.encode())


@dataclass(frozen=True)
class Trial:
    """The tests of one mutant, in a process of their own."""

    process: int
    noticed: int

    def verdict(self, status: int) -> str | None:
        """Return which test failed, or how else the process ended; None where all passed, as nobody noticed."""
        with os.fdopen(self.noticed) as pipe:
            test = pipe.read()
        return (test or f"exit {os.waitstatus_to_exitcode(status)}") if status else None


def started(path: str, source: str, tests: Sequence[str], first: Sequence[str] = ()) -> Trial:
    """Start the tests with this source in place of the file, beginning with those of ``first``."""
    reading, writing = os.pipe()
    if (process := os.fork()) != 0:
        os.close(writing)
        return Trial(process, reading)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))  # a loop without end ends
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    sys.meta_path.insert(0, _Mutated(path, source))
    code = 3
    try:
        for file in sorted(tests, key=lambda file: not any(test.startswith(file) for test in first)):
            if (code := int(pytest.main([*_QUIET, file], plugins=[_Order(first, writing)]))) != 0:
                break
    finally:
        os._exit(code)


def preload() -> None:
    """Import what takes long and is not mutated."""
    import torch
    import torch.ao.quantization

    sys.path.insert(0, str(ROOT / "tests"))
    from support import torchvision_schemas

    torchvision_schemas.install()
    import torchvision  # noqa: F401

    torch.set_num_threads(1)
