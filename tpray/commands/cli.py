"""The console script ``tpray``. Exit codes: 0 done; 1 it failed; 2 something you gave cannot work; 130 interrupted."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from tpray.commands.bench import bench
from tpray.commands.classify import classify
from tpray.commands.console import err, out, print_error
from tpray.commands.doctor import doctor
from tpray.commands.rerank import rerank
from tpray.commands.serve import serve
from tpray.commands.status import status
from tpray.commands.trace import trace
from tpray.config import set_up_logging, stay_quiet
from tpray.errors import ArtifactError, CheckpointError, ConfigError, InputError, ModelNotFoundError, TprayError
from tpray.version import __version__

USER_ERRORS = (ConfigError, ModelNotFoundError, CheckpointError, ArtifactError, InputError)

app = typer.Typer(
    name="tpray",
    help="Tensor-parallel transformer classifiers on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (serve, classify, rerank, trace, doctor, status, bench):
    app.command()(command)


def _version(value: bool) -> None:
    if value:
        out.print(f"tpray {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _start(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    stay_quiet()
    set_up_logging()


def main() -> NoReturn:
    """The console script: errors that a user can mend are one line, without a traceback."""
    try:
        app()
    except TprayError as e:
        print_error(e)
        sys.exit(2 if isinstance(e, USER_ERRORS) else 1)
    except KeyboardInterrupt:
        err.print("Interrupted")
        sys.exit(130)
    sys.exit(0)
