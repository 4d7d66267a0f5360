"""An application of several models, chosen by name: ``import_path: tpray.serving.models:build`` in a config file.

Each model is a deployment of its own, with its own groups, limits and autoscaling; in front of them is one that takes
no core and only passes requests on (`model_router`). That costs a request one more hop, about a millisecond; with one
model `tpray.serving.app` has none. (Annotations are evaluated here, for Serve reads the builder's.)
"""

import asyncio
import re
import time
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from starlette.types import ASGIApp

from tpray.config import ModelsConfig, ServeConfig, stay_quiet
from tpray.errors import ConfigError, DeadlineError, GroupError, InputError, UnknownModelError
from tpray.ray_private import by_reference, keep_replica_on_loopback, request_id
from tpray.serving.access import Access
from tpray.serving.app import application_of
from tpray.serving.dialects.base import Rendered
from tpray.serving.handle import as_there
from tpray.serving.model_router import Ask, Asked, ModelRouter
from tpray.serving.observer import Observer
from tpray.serving.observing import serve_logging, set_up_logs
from tpray.serving.one_write import join_writes
from tpray.serving.request_notes import NOTES
from tpray.serving.upgrades import digest, replaceable

DEPLOYMENT_NAME = "Models"

HEARD_WITHIN_S = 3.0
"""Until then a handle has heard which replicas there are."""


@serve.deployment(name=DEPLOYMENT_NAME)
@serve.ingress()
class Models:
    """The deployment that requests come to. models: the handles of the models' deployments, by name."""

    async def __init__(self, config: ModelsConfig, models: dict[str, Any]) -> None:  # type: ignore[misc]
        set_up_logs(config.telemetry, request_id)
        keep_replica_on_loopback()
        join_writes()
        batches = [model.batch for model in config.models.values()]
        self._handles, self._default = models, config.default
        router = ModelRouter(
            {name: _asking(name, handle, config.models[name]) for name, handle in models.items()},
            config.default,
            max(batch.payload_limit_bytes for batch in batches),
            max(batch.request_timeout_s for batch in batches),
            Access.of(config.access),
            lambda name: models[name].running_replicas_populated(),
        )
        self._observer = Observer.of(config.telemetry, request_id)
        self._app: ASGIApp = router if self._observer is None else self._observer.app(router)
        give_up = time.monotonic() + HEARD_WITHIN_S
        while time.monotonic() < give_up and not all(h.running_replicas_populated() for h in models.values()):
            await asyncio.sleep(0.05)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Serve's hook."""
        return self._app

    async def __del__(self) -> None:
        observer = getattr(self, "_observer", None)  # __init__ may have failed before it was there
        if observer is not None:
            await observer.close()

    async def classify(self, *asked: Any, model: str | None = None, **options: Any) -> Any:
        """What a Python handle calls; see `tpray.serving.app.Classifier.classify`. model: which one, by its name."""
        return await self._call("classify", model, asked, options)

    async def classify_tokens(self, *asked: Any, model: str | None = None, **options: Any) -> Any:
        """Likewise, of `Classifier.classify_tokens`."""
        return await self._call("classify_tokens", model, asked, options)

    async def rerank(self, *asked: Any, model: str | None = None, **options: Any) -> Any:
        """Likewise, of `Classifier.rerank`."""
        return await self._call("rerank", model, asked, options)

    async def _call(self, method: str, model: str | None, asked: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        name, names = model or self._default, ", ".join(self._handles)
        if name is None:
            raise InputError(f"this server has several models: say which, as in model={next(iter(self._handles))!r}")
        if name not in self._handles:
            raise UnknownModelError(f"there is no model {name!r} here: there is {names}")
        try:
            return await getattr(self._handles[name], method).remote(*asked, **options)
        except RayTaskError as e:
            raise as_there(e) from None
        except (RayError, RayServeException) as e:
            raise _silent(name, e) from e


def _asking(name: str, handle: Any, config: ServeConfig) -> Ask:
    answer, limit_s = by_reference(handle, through_ray=False).answer, config.batch.request_timeout_s + 1

    async def ask(asked: Asked) -> Rendered:
        try:
            # The model keeps to its time itself; a deployment whose only replica is being replaced has nobody who does.
            rendered: Rendered = await asyncio.wait_for(answer.remote(asked), limit_s)
        except TimeoutError as e:
            raise DeadlineError(f"the model {name!r} has not answered within {limit_s:g} s") from e
        except (RayError, RayServeException) as e:
            raise _silent(name, e) from e
        if (notes := NOTES.get()) is not None:
            notes.passed_on = True
        return rendered

    return ask


def _silent(name: str, error: Exception) -> GroupError:
    return GroupError(f"the model {name!r} does not answer now ({type(error).__name__}): try again")


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
    # What is in front needs no core, and its next version is there before the old one goes.
    limits = {name: [m.batch.payload_limit_bytes, m.batch.request_timeout_s] for name, m in args.models.items()}
    told = [each.model_dump(mode="json") for each in (args.access, args.telemetry)]
    version = digest(limits, args.default, *told)
    front: Any = Models
    ingress = front.options(
        num_replicas=1, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1_000_000,
        health_check_period_s=2, health_check_timeout_s=10, max_surge_percent=100,
        logging_config=serve_logging(args.telemetry),
        graceful_shutdown_timeout_s=max(timeout_s for _, timeout_s in limits.values()) + 5,
    )  # fmt: skip
    made: serve.Application = replaceable(ingress, version).bind(args, bound)
    return made
