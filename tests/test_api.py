"""The public names: there, callable in whatever order things were imported, and not in the way of a fast start."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import Run

import repfuse

FUNCTIONS = sorted(set(repfuse.__all__) - {"Plan", "Policy", "RepfuseError", "__version__"})


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_functions_stay_functions_after_every_module_was_imported(python: Run):
    code = """
import importlib, pkgutil, repfuse
for found in pkgutil.walk_packages(repfuse.__path__, "repfuse."):
    if found.name != "repfuse.__main__":
        importlib.import_module(found.name)
print(*(name for name in repfuse.__all__ if type(getattr(repfuse, name)).__name__ == "function"))
"""
    assert python("-c", code).stdout.split() == FUNCTIONS


def test_importing_the_package_imports_no_torch():
    assert run("import sys, repfuse; print('torch' in sys.modules)") == "False"


def test_a_plan_is_made_without_what_reads_one(python: Run):
    code = "import sys, torch, repfuse; made = repfuse.plan(torch.nn.Conv2d(1, 1, 1), (torch.zeros(1, 1, 2, 2),));"
    code += "made.to_json(); print('pydantic' in sys.modules); made.from_dict(made.to_dict()); "
    code += "print('pydantic' in sys.modules)"
    assert python("-c", code, bare=True).stdout.split() == ["False", "True"]


def test_every_public_function_says_what_it_does():
    assert not [name for name in FUNCTIONS if not (getattr(repfuse, name).__doc__ or "").strip()]


def test_one_tensor_is_the_only_input_of_a_call():
    network, x = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval(), torch.randn(2, 3, 8, 8)
    result = repfuse.fuse(network, x)
    assert len(result.plan.sites) == 1 and result.plan == repfuse.plan(network, (x,))
    assert repfuse.verify(network, result.module, x, plan=result.plan).verdict == "same"
    assert repfuse.bench(network, result.module, x, rounds=8, seconds=0.01).shapes == ((2, 3, 8, 8),)
    assert type(repfuse.equalize(result.module, x).module) is type(network)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = repfuse.no_such_name
