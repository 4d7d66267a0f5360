"""The flags about traces and logs; each has an environment variable, ``TPRAY_<FLAG>``."""

from __future__ import annotations

from typing import Annotated

import typer
from pydantic import ValidationError

from tpray.config import LogFormat, TelemetryConfig
from tpray.errors import ConfigError

OtlpEndpoint = Annotated[
    str | None,
    typer.Option(
        "--otlp-endpoint",
        envvar="TPRAY_OTLP_ENDPOINT",
        metavar="URL",
        help="Collector that gets OpenTelemetry traces by OTLP over HTTP: http://localhost:4318.",
        show_default="as OTEL_EXPORTER_OTLP_ENDPOINT says",
    ),
]
LogFormatFlag = Annotated[
    LogFormat, typer.Option("--log-format", envvar="TPRAY_LOG_FORMAT", help="Of all logs: text, or JSON lines.")
]
LogRequests = Annotated[
    bool, typer.Option("--log-requests", envvar="TPRAY_LOG_REQUESTS", help="A line in the log for each request.")
]
LogInputs = Annotated[
    bool,
    typer.Option(
        "--log-inputs",
        envvar="TPRAY_LOG_INPUTS",
        help="What requests send, in these lines and in traces; else no text of a client is there.",
    ),
]


def telemetry_of(otlp_endpoint: str | None, form: LogFormat, requests: bool, inputs: bool) -> TelemetryConfig:
    """What is told of requests, as flags say it.

    Raises:
        ConfigError: one of them cannot be.
    """
    try:
        return TelemetryConfig(
            otlp_endpoint=otlp_endpoint or None, log_format=form, log_requests=requests, log_inputs=inputs
        )
    except ValidationError as e:
        raise ConfigError(f"--otlp-endpoint: {e.errors()[0]['msg'].removeprefix('Value error, ')}") from e
