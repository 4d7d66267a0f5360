"""Where an `Observer` watches in a replica of Serve, and how a replica logs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from tpray import logs
from tpray.config import TelemetryConfig, log_level
from tpray.serving.observer import Observer, log_context
from tpray.serving.oip.service import GRPC, SERVICE

CALLS = ("classify", "classify_tokens", "rerank")
"""The methods of a Python handle."""
RPCS = (
    "ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer", "ModelConfig",
    "ModelStatistics",
)  # fmt: skip
"""Those of the Open Inference Protocol; not grpc.health.v1's, which machines ask again and again."""
CLASSIFIES = "ModelInfer"
"""The one of them that counts for a dialect in the metrics."""


def settings_of(config: TelemetryConfig) -> logs.LogSettings:
    """How a process logs whose environment a configuration goes before."""
    settings = logs.LogSettings.of_environment()
    return settings if config.log_format is None else replace(settings, form=config.log_format)


def serve_logging(config: TelemetryConfig) -> dict[str, Any]:
    """How Serve itself logs in a replica, its ``logging_config``.

    A line for each request costs as much as a third of what a Serve application without any work costs.
    """
    level = log_level()
    access_log = level in ("DEBUG", "INFO")
    return {"log_level": level, "enable_access_log": access_log, "encoding": settings_of(config).form.upper()}


def set_up_logs(config: TelemetryConfig, request_id: Callable[[], str]) -> None:
    """Have a replica log as configured. request_id: Serve's, of the current task."""
    logs.set_up(settings_of(config), partial(log_context, request_id))


def watch_methods(deployment: Any, observer: Observer) -> None:
    """Have a deployment's methods watched: Serve looks for them in the object, and there it finds these."""
    for name in CALLS:
        setattr(deployment, name, observer.call(getattr(deployment, name), name))
    for name in RPCS:
        dialect = GRPC if name == CLASSIFIES else ""
        setattr(deployment, name, observer.rpc(getattr(deployment, name), SERVICE, name, dialect))
