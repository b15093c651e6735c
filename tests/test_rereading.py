"""A file counts once another process has read it again: what is wrong with it, or with that process, fails closed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import Cli, Run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.agreement import randomised
from torch import nn

import repfuse
from repfuse import saving
from repfuse.checking.runs import Outcome
from repfuse.errors import RepfuseError
from repfuse.readback import process, reading
from repfuse.readback.process import SAME_PROCESS, Reader
from repfuse.readback.reading import Job, fingerprint_of

MODEL = "repfuse.samples:DigitsRepVGG"
Change = Callable[[Path], None]
NET = """
    from torch import nn

    class Net(nn.Module):
        def __init__(self, width=4):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(1, width, 1)
            self.head = nn.Linear(width, 2)

        def forward(self, x):
            return self.head((self.a(x) + self.b(x)).relu().mean((2, 3)))
"""


def converted(source: Path, out: Path, **options: Any) -> saving.Saved:
    checkpoint = repfuse.load(source, **{"input": "1x1x8x8", **options})
    result = repfuse.fuse(checkpoint.module, checkpoint.example_inputs)
    return repfuse.save(checkpoint, result.module, out, plan=result.plan)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SAME_PROCESS)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("repvgg_digits.safetensors", "out.safetensors"),
        pytest.param("repvgg_digits.pt", "out.pt2", marks=pytest.mark.slow),
        pytest.param("repvgg_digits_training.pt", "out.pt", marks=pytest.mark.slow),
        pytest.param("repvgg_digits.pt", "out.pt", marks=pytest.mark.slow),
        pytest.param("repvgg_digits.pt", "out.onnx", marks=pytest.mark.slow),
        pytest.param("repvgg_digits_state_dict.pth", "out.pth", marks=pytest.mark.slow),
    ],
)
def test_each_format_is_read_and_run_in_a_fresh_process(
    source: str, target: str, samples: Path, tmp_path: Path, fresh: None
) -> None:
    if target.endswith("onnx"):
        pytest.importorskip("onnxruntime")
    found = converted(samples / source, tmp_path / target, model=MODEL).verified
    assert found and found.where == "a fresh process"
    assert found.compared[0] == "the example" and len(found.compared) >= 2
    assert found.tensors == (0 if target.endswith("onnx") else 12)
    assert found.identical or (found.error is not None and found.allowed is not None and found.error <= found.allowed)
    assert found.seconds > 0
    assert [path.name for path in tmp_path.iterdir()] == [target]


@pytest.mark.parametrize(
    ("target", "kind"), [("whole.pt", ("--format", "pt")), pytest.param("out.pth", (), marks=pytest.mark.slow)]
)
def test_a_network_of_a_file_beside_is_built_again_and_its_result_needs_no_repfuse(
    target: str, kind: tuple[str, ...], cli: Cli, python: Run, tmp_path: Path
) -> None:
    (tmp_path / "net.py").write_text(textwrap.dedent(NET))
    scope: dict[str, Any] = {}
    exec(textwrap.dedent(NET), scope)
    torch.save(randomised(scope["Net"](6), dtype=torch.float32).half().state_dict(), tmp_path / "in.pth")
    options = ("--model", "net.py:Net", "--model-arg", "width=6", "--input", "1x1x8x8", "--json", *kind)
    done = cli("convert", "in.pth", target, *options, cwd=tmp_path, env={SAME_PROCESS: "0"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["output"]["verified"]
    assert (found["where"], found["identical"]) == ("a fresh process", True)
    load = f"import sys, torch; sys.modules['repfuse'] = None; torch.load({target!r}, weights_only=False)"
    assert python("-c", load, cwd=tmp_path, bare=True).returncode == 0


def test_without_verify_the_file_is_only_read_back(samples: Path, tmp_path: Path) -> None:
    checkpoint = repfuse.load(samples / "notebook_block.pt")
    assert repfuse.save(checkpoint, checkpoint.module, tmp_path / "out.pt", verify=False).verified is None


def rewrite_torch(change: Callable[[Any], Any]) -> Change:
    def rewrite(path: Path) -> None:
        data = torch.load(path, weights_only=False)
        torch.save(change(data) or data, path)

    return rewrite


def rewrite_safetensors(change: Callable[[dict[str, Any]], Any]) -> Change:
    def rewrite(path: Path) -> None:
        state = load_file(path)
        with safe_open(path, "pt") as file:
            text = file.metadata()
        change(state)
        save_file(state, path, text)

    return rewrite


def flip_a_bit(tensor: torch.Tensor) -> None:
    tensor.detach().flatten().view(torch.int32)[3] ^= 1


def flip_in_state(state: dict[str, Any]) -> None:
    flip_a_bit(state["head.weight"])


def to_double(state: dict[str, Any]) -> None:
    state["head.weight"] = state["head.weight"].double()


def dilated(network: Any) -> None:
    network.blocks[1].fused.padding = (2, 2)
    network.blocks[1].fused.dilation = (2, 2)


def unrolled(network: Any) -> None:
    network.blocks[1].fused = nn.Sequential(network.blocks[1].fused)


FAULTS = {
    "pt: a bit": ("repvgg_digits.pt", "out.pt", rewrite_torch(lambda net: flip_a_bit(net.head.weight)), "head.weight"),
    "pt: a dilation": ("repvgg_digits.pt", "out.pt", rewrite_torch(dilated), "blocks.1.fused, dilation"),
    "pt: a module": ("repvgg_digits.pt", "out.pt", rewrite_torch(unrolled), "blocks.1.fused"),
    "pt: an attribute": (
        *("repvgg_digits.pt", "out.pt"),
        rewrite_torch(lambda net: setattr(net, "input_shape", (1, 1, 9, 9))),
        "the network, input_shape",
    ),
    "pt: no network": ("repvgg_digits.pt", "out.pt", rewrite_torch(lambda net: [1]), "holds no network"),
    "pt: cut off": ("repvgg_digits.pt", "out.pt", lambda path: os.truncate(path, 5000), "out.pt"),
    "training: a bit": (
        *("repvgg_digits_training.pt", "out.pt"),
        rewrite_torch(lambda tree: flip_in_state(tree["model"])),
        "head.weight",
    ),
    "training: the epoch": (
        *("repvgg_digits_training.pt", "out.pt"),
        rewrite_torch(lambda tree: tree.update(epoch=1234)),
        "around the network, epoch",
    ),
    "safetensors: a bit": (
        *("repvgg_digits.safetensors", "out.safetensors"),
        rewrite_safetensors(flip_in_state),
        "head.weight",
    ),
    "safetensors: a dtype": (
        *("repvgg_digits.safetensors", "out.safetensors"),
        rewrite_safetensors(to_double),
        "head.weight",
    ),
    "safetensors: a key": (
        *("repvgg_digits.safetensors", "out.safetensors"),
        rewrite_safetensors(lambda state: state.pop("head.bias")),
        "head.bias",
    ),
}


def corrupted(change: Change, patch: pytest.MonkeyPatch) -> None:
    """Have the file changed between the moment that it is written and that it is read again."""
    for name in ("_write_network", "_write_weights"):
        write = getattr(saving, name)

        def wrong(*arguments: Any, write: Callable[..., Any] = write) -> Any:
            wrote = write(*arguments)
            change(arguments[-1])
            return wrote

        patch.setattr(saving, name, wrong)


@pytest.mark.parametrize(("source", "target"), sorted({fault[:2] for fault in FAULTS.values()}))
def test_without_a_fault_each_is_kept(source: str, target: str, samples: Path, tmp_path: Path) -> None:
    assert converted(samples / source, tmp_path / target, model=MODEL).verified
    assert [path.name for path in tmp_path.iterdir()] == [target]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_not_what_was_written_is_not_kept(
    fault: str, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, change, said = FAULTS[fault]
    corrupted(change, monkeypatch)
    with pytest.raises(RepfuseError) as raised:
        converted(samples / source, tmp_path / target, model=MODEL)
    assert raised.value.exit_code == 1
    assert "nothing was kept" in raised.value.what
    assert said in raised.value.why
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["pt: a bit", "training: a bit", "safetensors: a dtype", "safetensors: a key"])
def test_without_verify_wrong_tensors_are_not_kept_either(
    fault: str, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, change, said = FAULTS[fault]
    checkpoint = repfuse.load(samples / source, model=MODEL)
    corrupted(change, monkeypatch)
    with pytest.raises(RepfuseError, match="nothing was kept") as raised:
        repfuse.save(checkpoint, checkpoint.module, tmp_path / target, verify=False)
    assert said in raised.value.why
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["out.pt", "out.safetensors"])
def test_outputs_that_are_not_the_same_bits_are_judged_as_drift(
    target: str, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factor = 1 + 2e-7
    call = reading.call

    def other_order(network: nn.Module, inputs: tuple[object, ...]) -> Outcome:
        found = call(network, inputs)
        return Outcome({name: output * factor for name, output in found.outputs.items()}, found.error)

    monkeypatch.setattr(reading, "call", other_order)
    source = samples / "repvgg_digits.safetensors"
    found = converted(source, tmp_path / target, model=MODEL).verified
    assert found and not found.identical
    assert found.error is not None and found.own is not None and found.allowed is not None
    assert 0 < found.error <= found.allowed < 1e-5
    (tmp_path / target).unlink()
    factor = 1 + 1e-4
    with pytest.raises(RepfuseError, match=r"out has a relative error of 1.0e-04, where arithmetic explains"):
        converted(source, tmp_path / target, model=MODEL)
    monkeypatch.setattr(reading, "call", lambda *_: Outcome({}, "it breaks"))
    with pytest.raises(RepfuseError, match="the example: only the network in memory runs"):
        converted(source, tmp_path / target, model=MODEL)
    assert list(tmp_path.iterdir()) == []


def program(said: str) -> tuple[str, ...]:
    return ("-c", said)


LOST = {
    "killed": (program("import os; os.kill(os.getpid(), 9)"), "killed by SIGKILL, as a system does that runs out"),
    "fails": (program("import sys; print('a\\nno space', file=sys.stderr); sys.exit(3)"), "exit code 3. The last that"),
    "raises": (program("raise MemoryError('too much')"), "it said: MemoryError: too much"),
    "prints": (program("print('hello')"), "What it answered is none"),
    "says nothing": (program("import sys; sys.stdin.read()"), "What it answered is none"),
    "half an answer": (program('print(\'{"runtime": "x"}\')'), "What it answered is none"),
    "hangs": (program("import time; time.sleep(60)"), "did not answer within"),
    "hangs on its input": (program("import sys, time; sys.stdin.read(); time.sleep(60)"), "did not answer within"),
}


@pytest.mark.parametrize("way", LOST)
def test_a_process_that_does_not_answer_fails_closed(
    way: str, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    command, said = LOST[way]
    monkeypatch.setattr(process, "COMMAND", command)
    monkeypatch.setattr(process, "PATIENCE", 1.0 if "hangs" in way else 60.0)
    monkeypatch.setattr(process, "SLOWER", 1)
    started = time.monotonic()
    with pytest.raises(RepfuseError) as raised:
        converted(samples / "notebook_block.pt", tmp_path / "out.pt", input="1x16x8x8")
    assert raised.value.exit_code == 1
    assert said in raised.value.why
    assert list(tmp_path.iterdir()) == []
    assert time.monotonic() - started < 30


def test_a_process_that_died_before_it_was_asked_is_said(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    monkeypatch.setattr(process, "COMMAND", program("import os; os.kill(os.getpid(), 9)"))
    with Reader() as reader:
        assert reader._process is not None
        os.waitid(os.P_PID, reader._process.pid, os.WEXITED | os.WNOWAIT)
        reader.ask(Job("weights", __file__, 1))
        with pytest.raises(RepfuseError, match="killed by SIGKILL"):
            reader.answer()


def test_the_process_ends_with_what_it_is_for_however_that_ends(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    monkeypatch.setattr(process, "COMMAND", program("import time; time.sleep(60)"))
    for error in (KeyboardInterrupt, None):
        try:
            with Reader() as started:
                running = started._process
                assert running.poll() is None
                if error:
                    raise error
        except KeyboardInterrupt:
            pass
        assert running.poll() is not None


@pytest.mark.slow
def test_it_ends_with_a_parent_that_is_killed(fresh: None) -> None:
    parent = textwrap.dedent("""
        import time
        from repfuse.readback.process import Reader
        with Reader() as started:
            print(started._process.pid, flush=True)
            time.sleep(60)
    """)
    running = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    child = int(running.stdout.readline())
    time.sleep(5)
    running.kill()
    running.wait()
    for _ in range(100):
        time.sleep(0.1)
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
    os.kill(child, signal.SIGKILL)
    raise AssertionError("it is still there")


def of_module(name: str, text: str = NET) -> nn.Module:
    """Return a network whose class is of a Python module that exists here alone, as a notebook does."""
    module = ModuleType(name)
    sys.modules[name] = module
    exec(textwrap.dedent(text), vars(module))
    return randomised(module.Net(), dtype=torch.float32)


def test_what_only_this_process_has_is_checked_here_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    monkeypatch.setitem(sys.modules, "some_notebook", ModuleType("some_notebook"))
    torch.save(of_module("some_notebook"), tmp_path / "in.pt")
    checkpoint = repfuse.load(tmp_path / "in.pt", trust=True, input="1x1x8x8")
    kept = repfuse.save(checkpoint, checkpoint.module, tmp_path / "out.pt").verified
    assert kept and kept.where == "this process, because some_notebook exists in no other"
    assert kept.identical and kept.tensors == 6


def test_a_process_finds_what_was_found_after_it_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    (tmp_path / "found_later.py").write_text("import pathlib\n" + textwrap.dedent(NET))
    marked = tmp_path / "imported"
    with Reader() as started:
        monkeypatch.syspath_prepend(tmp_path)
        network = __import__("found_later").Net().eval()
        with (tmp_path / "found_later.py").open("a") as file:
            file.write(f"pathlib.Path({str(marked)!r}).touch()\n")
        torch.save(network, tmp_path / "in.pt")
        assert started.prepare(network) and not started.prepare(nn.ReLU())  # torch it has
        for _ in range(600):  # without a job
            time.sleep(0.1)
            if marked.exists():
                break
        started.ask(Job("network", str(tmp_path / "in.pt"), 1, loading={"trust": True}, module=True))
        assert started.answer().network == fingerprint_of(network, module=True)
    assert marked.exists()


@pytest.mark.parametrize("way", ["frozen", "no python", "no process"])
def test_where_no_process_can_be_started_it_is_said(
    way: str, monkeypatch: pytest.MonkeyPatch, samples: Path, tmp_path: Path, fresh: None
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    if way == "no process":
        monkeypatch.setattr(subprocess, "Popen", refuse)
    else:
        monkeypatch.setattr(sys, *(("frozen", True) if way == "frozen" else ("executable", "/opt/app")), raising=False)
    with Reader() as found:
        assert found.name.startswith("this process, because ")
    checked = converted(samples / "notebook_block.pt", tmp_path / "out.pt", input="1x16x8x8").verified
    assert checked and checked.where == found.name


def test_a_fingerprint_tells_networks_apart_by_one_bit_or_one_setting() -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))

    def told(change: Callable[[Any], object]) -> str:
        other = made()
        change(other)
        return fingerprint_of(made(), module=True).differs(fingerprint_of(other, module=True))

    assert told(lambda net: None) == ""
    assert told(lambda net: flip_a_bit(net[0].weight)) == "the tensors 0.weight"
    assert "1.weight" in told(lambda net: net[1].double())
    assert told(lambda net: setattr(net[1], "eps", 1e-3)) == "1, eps: 1e-05 was written, 0.001 was read"
    assert told(lambda net: net.append(nn.ReLU())).startswith("which modules there are: 2")
    assert "which tensors" in told(lambda net: net[0].register_buffer("more", torch.zeros(1)))
    assert "its class" in told(lambda net: setattr(net[0], "__class__", nn.Conv1d))
    assert "nothing was written, 5" in told(lambda net: setattr(net, "extra", 5))
