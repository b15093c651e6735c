"""The application: the commands by name, and the options that come before them."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from repfuse import __version__
from repfuse.cli import options
from repfuse.cli.bench import bench
from repfuse.cli.convert import convert, inspect
from repfuse.cli.output import Form, check_page, say, say_error, show, show_json, write_pages
from repfuse.cli.verify import check, verify
from repfuse.errors import EXIT_BAD_INPUT, RepfuseError
from repfuse.explanations import REFUSALS, TOPICS
from repfuse.report.convert_view import explain_view, list_view, topic_view
from repfuse.report.schema import read, told
from repfuse.wording import described, json_ready

EXIT_INTERRUPTED = 130
UNEXPECTED = "Something happened that repfuse does not expect. This is a mistake in repfuse."


UsageError: Any = typer.BadParameter.__mro__[1]  # typer has no name of its own for it


class Commands(TyperGroup):
    """All commands. What one raises becomes a message and an exit code, and so does what is wrong with how it is used.

    `repfuse --debug COMMAND` lets errors through with their traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except RepfuseError as error:
            if ctx.obj:
                traceback.print_exc()
            say_error(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            say("interrupted: nothing that is not whole was written.")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except (typer.Exit, typer.Abort, UsageError):
            raise
        except Exception as error:
            if ctx.obj:
                raise
            hint = f"Please report it with what `repfuse --debug {' '.join(sys.argv[1:])}` prints."
            say_error(RepfuseError(UNEXPECTED, described(error), hint))
            raise typer.Exit(EXIT_BAD_INPUT) from None

    def main(self, *args: Any, **options: Any) -> Any:
        """Run what the arguments say, and end the process."""
        try:
            code = super().main(*args, **options | {"standalone_mode": False})
        except UsageError as error:
            say_error(_usage(error))
            code = EXIT_BAD_INPUT
        sys.exit(code if isinstance(code, int) else 0)


def _usage(error: Any) -> RepfuseError:
    """Return in repfuse's words what is wrong with the arguments."""
    context, kind, message = error.ctx, type(error).__name__, str(error.message)
    command = context.command_path if context else "repfuse"
    option = getattr(error, "option_name", None) or _name_of(getattr(error, "param", None))
    what, hint = f"{message[:1].upper()}{message[1:]}", f"`{command} --help` shows how to use it."
    if kind == "MissingParameter":
        arguments = [param for param in context.command.params if param.param_type_name == "argument"]
        names = (_name_of(param) if param.required else f"[{_name_of(param)}]" for param in arguments)
        what, hint = f"{option} is missing.", f"Write: {command} {' '.join(names)} [OPTIONS]"
    elif kind == "NoSuchOption":
        known = [name for param in context.command.params for name in param.opts] if context else []
        what, hint = f"{command} has no option {option}.", _close(str(option), known) + hint
    elif kind == "BadOptionUsage":
        what = f"{option} needs a value."
    elif found := re.search(r"No such command '(.*?)'", message):
        known = context.command.list_commands(context)
        what, hint = f"There is no command {found[1]}.", _close(found[1], known) + hint
    elif found := re.search(r"unexpected extra argument\S* \((.*)\)", message):
        what = f"{command} takes fewer arguments: what is {found[1]}?"
    elif option:
        matches = ((re.search(pattern, message), text) for pattern, text in WANTED)
        texts = (match.expand(text).replace("'", "") for match, text in matches if match)
        wanted = next(texts, f"does not take this: {message.rstrip('.')}")
        what = f"{option} {wanted}."
    return RepfuseError(what, "", hint)


WANTED = (
    (r"valid integer", "takes a whole number"),
    (r"valid (number|float)", "takes a number"),
    (r"(?:greater than or equal to|x>=) ?(\S+?)\.?$", r"takes a number that is at least \1"),
    (r"is not one of (.*?)\.?$", r"takes one of \1"),
)
"""What the message says of a value that an option does not take, and what it does take."""


def _name_of(param: Any) -> str:
    if param is None:
        return ""
    return str(param.opts[0] if param.param_type_name == "option" else param.metavar or param.name)


def _close(name: str, known: Iterable[str], most: int = 2) -> str:
    close = get_close_matches(name, known, most)
    return f"Did you mean {' or '.join(close)}? " if close else ""


# The two commands that need no checkpoint.


def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE",
            show_default=False,
            help="The report of a conversion, as fused.pt.report.json; beside it, if you like, what `repfuse bench "
            "--json` and `repfuse verify --json` printed of the same two files.",
        ),
    ],
    *,
    html: Path | None = options.output(metavar="OUT", help="Write a page; - prints it."),
    markdown: Path | None = options.output(metavar="OUT", help="Write a comment for a pull request; - prints it."),
    force: bool = options.output(default=False, help="Replace OUT."),
) -> None:
    """Make a page of a report, to be forwarded.

    The page is one file of HTML: no script, nothing that is fetched; light and
    dark, on a screen and on paper. As Markdown it is ten lines and a folded
    table.

    \b
    Examples:
      repfuse report fused.pt.report.json --html fused.html
      repfuse report fused.pt.report.json --markdown -
      repfuse bench model.pt fused.pt --json > bench.json
      repfuse verify model.pt fused.pt --data val/ --json > verify.json
      repfuse report fused.pt.report.json bench.json verify.json --html all.html
    """
    wanted: tuple[tuple[Form, Path | None], ...] = (("html", html), ("markdown", markdown))
    pages = [(form, out) for form, out in wanted if out]
    if not pages:
        raise typer.BadParameter("give --html OUT, --markdown OUT or both.", param_hint="--html")
    if html == markdown:
        raise typer.BadParameter("give two places, one for each.", param_hint="--markdown")
    for form, out in pages:
        check_page(out, files, form, force=force)
    write_pages(told([read(path) for path in files]), pages)


def _names(begun: str) -> list[str]:
    return [name for name in (*TOPICS, *sorted(REFUSALS)) if name.startswith(begun)]


def explain(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="A topic, or a refusal's code. Without it: the list of all.",
            autocompletion=_names,
        ),
    ] = None,
    as_json: bool = options.JSON,
) -> None:
    """Say what a refusal means and what to do about it, or all about a topic.

    \b
    Examples:
      repfuse explain
      repfuse explain training-norm
      repfuse explain verdicts
    """
    topics = {key: topic for key, topic in TOPICS.items() if name in (None, key)}
    codes = {key: refusal for key, refusal in REFUSALS.items() if name in (None, key)}
    if not topics and not codes:
        hint = f"{_close(str(name), (*TOPICS, *REFUSALS), 3)}`repfuse explain` lists all."
        raise RepfuseError(f"There is no refusal code or topic {name!r}.", "", hint)
    if as_json:
        show_json("explanations", json_ready({"topics": topics, "codes": codes}))
    elif name is None:
        show(list_view(topics, codes))
    elif name in topics:
        show(topic_view(name, topics[name]))
    else:
        show(explain_view(name, codes[name]))


# Typer keeps the line breaks of a help text, so its lines are written for a terminal of 80 columns.
HELP = """
Rewrite the parallel linear branches of a trained network into single
convolutions, and prove it.

A block such as conv3(x) + conv1(x) + x, with or without BatchNorm, computes
what one convolution computes. repfuse finds such blocks in a checkpoint,
writes the checkpoint that has one convolution in each place, and shows in
float64 that nothing else changed.

\b
Examples:
  repfuse convert model.pt fused.pt
  repfuse convert weights.safetensors fused.safetensors --model timm:repvgg_a0
  repfuse verify model.pt fused.pt --data images.npz
  repfuse bench model.pt fused.pt

Exit codes: 0 done or same, 1 a check failed or different, 2 bad input or
could not tell, 130 interrupted.
"""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    cls=Commands,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (convert, verify, bench, report, inspect, check, explain):
    app.command()(options.spread(command))


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"repfuse {__version__}")
        raise typer.Exit


@app.callback()
def before(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Keep what holds for every command."""
    context.obj = debug
