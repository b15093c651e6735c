"""Snapshots of what the command line prints, without what changes from run to run and machine to machine.

`UPDATE_SNAPSHOTS=1 pytest tests/test_cli_snapshots.py` writes them anew; look at the difference before committing it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "snapshots"
INPUTS = r"the example|the data|random, seed \d+|batch \d+|(size|large|nearly constant|impulses|frame)( [\dx]+)?"
MASKS = (
    (r"[ \t]+", " "),
    (r"sha256:[0-9a-f]+(\.\.\.)?", "sha256:<digest>"),
    (r"repfuse \S+, torch \S+, Python \S+, [^;\n]+", "<versions>"),
    (r"PyTorch \S+ on", "PyTorch <version> on"),
    (r"\b\d+(\.\d+)?e[-+]\d+\b", "<error>"),
    (r"\b\d+ min \d+ s\b|\b\d+(\.\d+)? (µs|ms|s)\b", "<time>"),
    (r"<time>( → <time>)? a call: .*? \(batch", "<time> a call: <speed-up> (batch"),
    (r": worst: .*", ": worst: <place>"),
    (r"(exact to <error>), .*", r"\1, <speed-up>"),
    (r"(each alone) \S+ (?=1 x bound)", r"\1 <error> "),
    (rf"\b({INPUTS})(?!\w)(?=( <error>| 0 |, out))", "<input>"),
    (r"\b(each alone|the whole network( on \d+ inputs?)?) .*?(?= (<error>|0) )", r"\1 <worst>"),
    (r"[─━]+", "--"),
)


def masked(text: str, folder: Path) -> str:
    """Return ``text`` with stand-ins for paths, digests, versions, times and errors, and single spaces."""
    text = text.replace(str(folder), "<folder>")
    for pattern, replacement in MASKS:
        text = re.sub(pattern, replacement, text)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def check(name: str, text: str) -> None:
    """Compare with the snapshot, or write it where the environment asks for that."""
    path = FOLDER / f"{name}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"there is no snapshot {path.name}; UPDATE_SNAPSHOTS=1 writes it"
    assert text == path.read_text(encoding="utf-8")
