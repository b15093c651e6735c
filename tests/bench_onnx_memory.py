"""How much memory a large ONNX graph takes, above what reading it takes: one process that opens it and runs it.

`python tests/bench_onnx_memory.py [CHANNELS] [BLOCKS]`: a graph is written to a temporary folder, and each command is
watched. What counts is memory that the system cannot take back (`RssAnon`): pages of files that are mapped are none.
The process that reads the result again is one of its own, and is shown beside the first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from support.onnx_models import wide

ROOT = Path(__file__).parents[1]
MIB = 2**20
WANTED = 1.3  # times the weights of the largest site
READING = """
import sys
from pathlib import Path
import repfuse
from repfuse.checkpoint import onnx_file
from repfuse.memory import keep_little
keep_little()
checkpoint = repfuse.load(sys.argv[1], input=sys.argv[2])
print(onnx_file.runner(Path(sys.argv[1]), ["y"])(checkpoint.example_inputs).error)
"""
"""As `repfuse convert` opens a file, and runs it in ONNX Runtime."""


def peaks(*command: str) -> list[int]:
    """Run Python with these arguments; return the most bytes that it and each process that it starts had.

    They are looked at every few milliseconds: it may be more, never less.
    """
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "support")))
    found: dict[int, int] = {}
    with subprocess.Popen(
        [sys.executable, *command], env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE
    ) as run:
        while run.poll() is None:
            for pid in _family(run.pid):
                found[pid] = max(found.get(pid, 0), _anonymous(pid))
            time.sleep(0.005)
        assert run.stdout is not None
        assert run.returncode == 0, run.stdout.read()
    return list(found.values())


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:  # it has ended
        return []
    return [pid, *(each for child in children for each in _family(int(child)))]


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def main() -> None:
    """Print what reading takes, and what the commands take."""
    channels, blocks = (int(each) for each in (*sys.argv[1:], "1024", "8")[:2])
    with TemporaryDirectory() as folder:
        path, out = Path(folder) / "in.onnx", Path(folder) / "out.onnx"
        site = wide(path, channels, blocks)
        size = path.with_name("in.onnx.data").stat().st_size
        example = f"1x{channels}x8x8"
        print(f"{size / MIB:.0f} MiB of weights in {blocks} sites of {site / MIB:.0f} MiB; in MiB:")
        (reading,) = peaks("-c", READING, str(path), example)
        print(f"{'reading':8} {reading / MIB:5.0f}")
        for name, *rest in (
            ("convert", str(path), str(out), "--input", example),
            ("inspect", str(path), "--input", example),
            ("verify", str(path), str(out), "--input", example),
        ):
            most, *others = peaks("-m", "repfuse", name, *rest, "--quiet")
            more = f"; the process that reads again {others[0] / MIB:5.0f}" if others else ""
            print(
                f"{name:8} {most / MIB:5.0f}: reading and {(most - reading) / site:5.2f} sites ({WANTED} wanted){more}"
            )


if __name__ == "__main__":
    main()
