"""An application of several models, chosen by name: ``import_path: tpray.serving.models:build`` in a config file.

Each model is a deployment of its own, with its own groups, limits and autoscaling; in front of them is one that takes
no core and only passes requests on (`model_router`). That costs a request one more hop, about a millisecond; with one
model `tpray.serving.app` has none. (Annotations are evaluated here, for Serve reads the builder's.)
"""

import re
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.types import ASGIApp

from tpray.config import ModelsConfig, stay_quiet
from tpray.errors import ConfigError, GroupError
from tpray.local_ray.private import keep_replica_on_loopback, request_id
from tpray.serving.access import Access
from tpray.serving.app import application_of
from tpray.serving.dialects.base import Rendered
from tpray.serving.model_router import Ask, Asked, ModelRouter
from tpray.serving.observer import Observer
from tpray.serving.observing import set_up_logs
from tpray.serving.one_write import join_writes
from tpray.serving.request_notes import NOTES

DEPLOYMENT_NAME = "Models"


@serve.deployment(name=DEPLOYMENT_NAME)
@serve.ingress()
class Models:
    """The deployment that requests come to. models: the handles of the models' deployments, by name."""

    def __init__(self, config: ModelsConfig, models: dict[str, Any]) -> None:
        set_up_logs(config.telemetry, request_id)
        keep_replica_on_loopback()
        join_writes()
        batches = [model.batch for model in config.models.values()]
        router = ModelRouter(
            {name: _asking(name, handle) for name, handle in models.items()},
            config.default,
            max(batch.payload_limit_bytes for batch in batches),
            max(batch.request_timeout_s for batch in batches),
            Access.of(config.access),
        )
        self._observer = Observer.of(config.telemetry, request_id)
        self._app: ASGIApp = router if self._observer is None else self._observer.app(router)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Serve's hook."""
        return self._app

    async def __del__(self) -> None:
        observer = getattr(self, "_observer", None)  # __init__ may have failed before it was there
        if observer is not None:
            await observer.close()


def _asking(name: str, handle: Any) -> Ask:
    answer = handle.options(_by_reference=False).answer

    async def ask(asked: Asked) -> Rendered:
        try:
            rendered: Rendered = await answer.remote(asked)
        except (RayError, RayServeException) as e:
            raise GroupError(f"the model {name!r} does not answer now ({type(e).__name__}): try again") from e
        if (notes := NOTES.get()) is not None:
            notes.passed_on = True
        return rendered

    return ask


def build(args: ModelsConfig) -> serve.Application:
    """The Serve application.

    Args:
        args: from a Serve config file.

    Raises:
        ConfigError: two models would be one deployment; or see `tpray.serving.app.build`.
    """
    stay_quiet()
    names = {name: re.sub(r"[^A-Za-z0-9_-]", "-", name) for name in args.models}
    if len(set(names.values())) < len(names):
        raise ConfigError(f"the models' names {', '.join(names)} differ in signs alone: give them other names")
    behind = args.access.model_copy(update={"cors_origins": ()})  # these are let in by what is in front
    bound = {
        name: application_of(
            config.model_copy(update={"served_model_name": (name,), "access": behind, "telemetry": args.telemetry}),
            names[name],
            True,
        )
        for name, config in args.models.items()
    }
    front: Any = Models
    ingress = front.options(
        num_replicas=1, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1_000_000,
        health_check_period_s=2, health_check_timeout_s=10,
    )  # fmt: skip
    made: serve.Application = ingress.bind(args, bound)
    return made
