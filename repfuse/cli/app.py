"""The application: the commands by name, and the options that come before them."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from repfuse.cli import bench, convert, explain, inspect, verify
from repfuse.cli.output import say, say_error
from repfuse.errors import EXIT_BAD_INPUT, RepfuseError
from repfuse.version import __version__
from repfuse.wording import described

# Where errors end: every command runs in here, and what it raises becomes one message and an exit code.


EXIT_INTERRUPTED = 130


class Command(TyperCommand):
    """A command whose errors are messages. `repfuse --debug COMMAND` lets them through with their traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except RepfuseError as error:
            if ctx.find_root().obj:
                traceback.print_exc()
            say_error(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            say("interrupted: nothing that is not whole was written.")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            if ctx.find_root().obj:
                raise
            say_error(_unexpected(error))
            raise typer.Exit(EXIT_BAD_INPUT) from None


def _unexpected(error: Exception) -> RepfuseError:
    return RepfuseError(
        "Something happened that repfuse does not expect. This is a mistake in repfuse.",
        described(error),
        f"Please report it with what `repfuse --debug {' '.join(sys.argv[1:])}` prints.",
    )


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
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (convert.convert, verify.verify, bench.bench, inspect.inspect, explain.explain):
    app.command(cls=Command)(command)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"repfuse {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Keep what holds for every command."""
    context.obj = debug
