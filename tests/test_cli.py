"""The command line as such: help without torch, exit codes, streams, what happens to errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SAMPLES, SUPPORT, Cli, Run
from typer.testing import CliRunner, Result

from repfuse import RepfuseError, __version__
from repfuse.cli.app import app
from repfuse.explanations import REFUSALS, TOPICS

COMMAND = [sys.executable, "-m", "repfuse", "--version"]
COMMANDS = ["convert", "verify", "bench", "report", "inspect", "explain"]
MODULE = SAMPLES / "repvgg_digits.pt"


def in_turn(typed: list[list[str]], heavy: set[str]) -> str:
    """Return a program that runs several commands in one process, which is to load none of ``heavy``.

    Below what each prints stands its exit code, and which of ``heavy`` are loaded.
    """
    return f"""
import sys
from repfuse.cli import main
for args in {typed!r}:
    sys.argv[1:], code = args, None
    try:
        main()
    except SystemExit as done:
        code = done.code
    print("code", code or 0, "loaded", sorted({heavy!r} & sys.modules.keys()))
"""


def test_help_and_explain_import_no_torch() -> None:
    typed = [["--help"], ["--version"], ["explain"], *([name, "--help"] for name in COMMANDS)]
    program = in_turn(typed, {"torch", "numpy", "safetensors", "timm"})
    environment = os.environ | {"PYTHONPATH": str(SUPPORT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split("code 0 loaded []\n")
    assert len(printed) == len(typed) + 1 and all(printed[:-1]) and not printed[-1], done.stdout


def test_no_command_loads_a_compiler(tmp_path: Path, python: Run) -> None:
    """torch._dynamo and what comes with it take longer to load than torch."""
    typed = [
        ["inspect", MODULE],
        ["convert", MODULE, tmp_path / "out.pt"],
        ["verify", MODULE, MODULE, "--quick"],
        ["bench", MODULE, MODULE, "--seconds", "0.1"],
    ]
    compilers = {"torch._dynamo", "torch._inductor", "torch.onnx", "sympy", "torchvision"}
    done = python("-c", in_turn([list(map(str, args)) for args in typed], compilers), bare=True)
    codes = [line for line in done.stdout.splitlines() if line.startswith("code ")]
    assert codes == ["code 0 loaded []"] * 4, done.stderr + done.stdout


@pytest.mark.parametrize("columns", [80, 120])
def test_every_command_has_help_with_examples_that_fits(columns: int, python: Run) -> None:
    done = python("-c", in_turn([[name, "--help"] for name in COMMANDS], set()), env={"COLUMNS": str(columns)})
    printed = done.stdout.split("code 0 loaded []\n")
    assert len(printed) == len(COMMANDS) + 1 and not printed[-1], done.stderr + done.stdout
    for name, shown in zip(COMMANDS, printed, strict=False):
        assert "Examples:" in shown and f"repfuse {name} " in shown and "…" not in shown
        assert max(map(len, shown.splitlines())) <= columns


def test_the_version_is_the_packages(cli: Cli) -> None:
    assert cli("--version").stdout == f"repfuse {__version__}\n"


def test_explain_lists_every_topic_and_code_and_gives_each_as_json(cli: Cli) -> None:
    listed = cli("explain").stdout
    assert all(name in listed for name in (*TOPICS, *REFUSALS))
    document = json.loads(cli("explain", "--json").stdout)
    assert set(document["codes"]) == set(REFUSALS) and set(document["topics"]) == set(TOPICS)
    code, topic = next(iter(REFUSALS)), next(iter(TOPICS))
    assert json.loads(cli("explain", code, "--json").stdout)["codes"] == {code: vars(REFUSALS[code])}
    assert json.loads(cli("explain", topic, "--json").stdout)["topics"] == {topic: vars(TOPICS[topic])}


def test_topics_and_codes_have_names_of_their_own() -> None:
    assert not set(TOPICS) & set(REFUSALS)


def test_a_reader_that_goes_away_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen(
        [sys.executable, "-m", "repfuse", "explain"], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


ENDS = {  # what is going on when the command is done -> what has to come of it, and whether Python ends the process
    "nothing": ("", "", False),
    "a function for the end": ("atexit.register(print, 'at the end')", "at the end", False),
    "a thread": (
        "threading.Thread(target=lambda: time.sleep(0.3) or print('of a thread')).start()",
        "of a thread",
        True,
    ),
    "a profiler": ("sys.setprofile(lambda *_: None)", "", True),
    "a tool": ("sys.monitoring = types.SimpleNamespace(get_tool=lambda number: 'a tool' * (number == 2))", "", True),
}
WATCHED = """
import atexit, sys, threading, time, types
from repfuse.cli import program
class Held:
    def __del__(self):
        print("taken apart")
held = Held()
"""


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize(("typed", "code"), [("--version", 0), ("nonsense", 2)])
def test_the_program_ends_at_once_and_loses_nothing(name: str, typed: str, code: int) -> None:
    going_on, shown, by_python = ENDS[name]
    program = [sys.executable, "-c", f"{WATCHED}{going_on}\nprogram()", typed]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=buffered)
    assert done.returncode == code and ("error: " in done.stderr if code else __version__ in done.stdout)
    assert shown in done.stdout and ("taken apart" in done.stdout) == by_python


@pytest.mark.parametrize("closed", [1, 2])
def test_a_program_without_a_stream_does_its_work(closed: int) -> None:
    program = [sys.executable, "-c", f"import os\nos.close({closed})\nos.execv({sys.executable!r}, {COMMAND!r})"]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and (__version__ in done.stdout) == (closed == 2) and not done.stderr


def test_output_without_a_terminal_has_no_control_codes(cli: Cli) -> None:
    done = cli("inspect", SAMPLES / "notebook_block.pt")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stderr == ""


def test_an_old_code_page_is_no_error(cli: Cli) -> None:
    done = cli("inspect", SAMPLES / "notebook_block.pt", env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Type a command whose work raises this error."""
    import repfuse.cli.conversion as conversion

    def run(error: BaseException, *options: str) -> Result:
        def work(*_: object) -> None:
            raise error

        monkeypatch.setattr(conversion, "run", work)
        return CliRunner().invoke(app, [*options, "inspect", str(MODULE)])

    return run


def test_an_interruption_is_one_line_and_130(raising: Callable[..., Result]) -> None:
    done = raising(KeyboardInterrupt())
    assert done.exit_code == 130
    assert done.stderr.startswith("interrupted") and done.stderr.count("\n") == 1


def test_a_known_error_says_what_why_and_what_to_do(raising: Callable[..., Result]) -> None:
    done = raising(RepfuseError("It broke.", "It was old.", "Get a new one.", exit_code=1))
    assert done.exit_code == 1
    assert done.stderr == "error: It broke.\n  why: It was old.\n  do: Get a new one.\n"
    assert done.stdout == ""


def test_an_unexpected_error_asks_for_a_report_and_shows_its_traceback_only_on_demand(
    raising: Callable[..., Result],
) -> None:
    done = raising(ZeroDivisionError("by zero"))
    assert done.exit_code == 2
    assert "ZeroDivisionError: by zero" in done.stderr
    assert "report it" in done.stderr
    assert "Traceback" not in done.stderr
    shown = raising(ZeroDivisionError("by zero"), "--debug")
    assert isinstance(shown.exception, ZeroDivisionError)


def test_a_failed_check_writes_nothing_and_is_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import repfuse.cli.conversion as conversion

    real = conversion.convert

    def failing(*args: object, **options: object) -> object:
        done = real(*args, **options)  # type: ignore[arg-type]
        return replace(done, proof=replace(done.proof, unproven=("blocks.1",)))

    monkeypatch.setattr(conversion, "convert", failing)
    done = CliRunner().invoke(app, ["convert", str(MODULE), str(tmp_path / "out.pt")])
    assert done.exit_code == 1, done.output
    assert "FAILED" in done.stdout
    assert "The network is not what the plan makes of the original: blocks.1" in " ".join(done.stdout.split())
    assert "nothing was written" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("", {"convert", "verify", "bench", "report", "inspect", "explain"}),
        ("explain cost", {"cost"}),
        ("explain verd", {"verdicts"}),
        ("convert --pol", {"--policy"}),
    ],
)
def test_the_shell_completes_commands_options_and_codes_without_torch(
    typed: str, offered: set[str], cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    paths = f"{tmp_path}:{SUPPORT.parents[1]}"
    line = f"repfuse {typed}"
    asked = {"_REPFUSE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    done = cli(env=asked | {"PYTHONPATH": paths}, fresh=True)
    assert offered <= set(done.stdout.split()), done.stderr
    assert "torch was imported" not in done.stderr
