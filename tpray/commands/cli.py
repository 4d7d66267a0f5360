"""The console script ``tpray``. Exit codes: 0 done; 1 it failed; 2 something you gave cannot work; 130 interrupted."""

from __future__ import annotations

import sys
from shutil import get_terminal_size
from typing import Annotated, Any, NoReturn

import typer

from tpray import logs
from tpray.commands.bench import bench
from tpray.commands.classify import classify
from tpray.commands.console import err, out, print_error
from tpray.commands.doctor import doctor
from tpray.commands.examples import epilog
from tpray.commands.rerank import rerank
from tpray.commands.serve import serve
from tpray.commands.status import status
from tpray.commands.trace import trace
from tpray.config import environment, stay_quiet
from tpray.errors import ArtifactError, CheckpointError, ConfigError, InputError, ModelNotFoundError, TprayError
from tpray.version import __version__

USER_ERRORS = (ConfigError, ModelNotFoundError, CheckpointError, ArtifactError, InputError)

PANELS = 110
"""Columns that the panels of a command's help take."""

UsageError: Any = typer.BadParameter.__mro__[1]
"""What typer raises for arguments that it cannot take; its own name for it has moved between versions."""

app = typer.Typer(
    name="tpray",
    help="Tensor-parallel transformer classifiers on Ray.",
    rich_markup_mode="rich" if get_terminal_size().columns >= PANELS else None,  # whose panels cut the flags' names
    pretty_exceptions_enable=False,
)
for command in (serve, classify, rerank, trace, doctor, status, bench):
    app.command(short_help=command.__doc__, epilog=epilog(command.__name__))(command)


def _version(value: bool) -> None:
    if value:
        out.print(f"tpray {__version__}", highlight=False)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)
    stay_quiet()
    logs.set_up(logs.LogSettings.of_environment())


def main() -> NoReturn:
    """The console script: errors that a user can mend are one line, without a traceback."""
    code: Any = None
    try:
        code = app(prog_name="tpray", standalone_mode=False)
    except UsageError as e:
        print_error(said_of_usage(e))
        code = e.exit_code
    except TprayError as e:
        print_error(e)
        code = 2 if isinstance(e, USER_ERRORS) else 1
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        err.print("Interrupted")
    sys.exit(code if isinstance(code, int) else 0)


def said_of_usage(error: Any) -> str:
    """What is wrong with the arguments, in a sentence that names the flag, or the variable that gave its value.

    Args:
        error: a `UsageError`, of a parameter or of the whole.
    """
    context, parameter = error.ctx, getattr(error, "param", None)
    command = "tpray" if context is None else context.command_path
    message = error.message.removeprefix("Value error, ").rstrip(".")
    if parameter is None or not isinstance(error, typer.BadParameter) or not message:
        return f"{error.format_message().rstrip('.')}; see `{command} --help`"
    source = None if context is None else context.get_parameter_source(parameter.name)
    if source is not None and source.name == "ENVIRONMENT":
        return f"{parameter.envvar}={environment().get(parameter.envvar)}: {_lower(message)}"
    name = parameter.opts[0] if parameter.param_type_name == "option" else parameter.human_readable_name
    return f"{name}: {_lower(message)}; see `{command} --help`"


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
