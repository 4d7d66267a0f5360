"""Several models behind one address: a request names the one that answers it. No Ray.

A request names its model where its dialect has a place for it: ``model`` in the body (vLLM, Cohere, Jina, Infinity),
``/models/NAME`` (Hugging Face) and ``/v2/models/NAME/...`` (Open Inference) in the path. What has no place for a name,
as TEI's routes, is asked under ``/models/NAME``: ``POST /models/NAME/predict``. Names may have slashes, as Hub ids do.
What names no model goes to the default one, and is refused where there is none: nothing is answered by a model that
nobody meant.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

from pydantic_core import from_json
from starlette._utils import get_route_path  # that by which Starlette's routers find a route
from starlette.routing import BaseRoute, Router
from starlette.types import Receive, Scope, Send

from tpray.errors import DeadlineError, GroupError, InputError, PayloadTooLargeError, UnknownModelError
from tpray.serving import live, scrape
from tpray.serving.access import OPEN, Access
from tpray.serving.dialects import infinity, vllm
from tpray.serving.dialects.base import Bodies, Rendered, has_more_values, headers_of, send_answer
from tpray.serving.door import NONE, refusal, shared
from tpray.serving.keys import ASKING
from tpray.serving.load import Load
from tpray.serving.model_names import NO_NAMES
from tpray.serving.spoken import classifying, dialect_of

MODELS, V2_MODELS = "/models/", "/v2/models/"

MOST_VALUES = 65_536
"""JSON of more values is not parsed to find a name in it: that costs memory, and no model takes so many items."""

LISTS = (vllm.MODELS, *infinity.MODELS)
"""Where dialects list their models, as ``data``."""

ANY = ("/docs", "/openapi.json", "/page/")
"""With what paths begin whose answers are the same of every model."""


class Asked(NamedTuple):
    """A request, as it goes to a model."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


Ask = Callable[[Asked], Awaitable[Rendered]]
"""Has a model answer a request."""


class ModelRouter:
    """The ASGI application in front of several models.

    Args:
        models: what asks each, by name.
        default: which one answers what names none; None: that is refused.
        limit_bytes: of one body.
        timeout_s: how long a request may take to arrive.
        access: who may ask; None: everybody. The models ask for the key too, and count its tokens.
        has_started: whether a model has answered or could have, ever; those that have not are not asked.
    """

    def __init__(
        self,
        models: Mapping[str, Ask],
        default: str | None,
        limit_bytes: int,
        timeout_s: float,
        access: Access | None = None,
        has_started: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self._has_started = has_started
        self._models, self._default, self._access = dict(models), default, access or Access()
        self._shared = shared(self._respond, self._access.origins) if self._access.origins else self._respond
        self._limit_bytes, self._timeout_s = limit_bytes, timeout_s
        self._bodies = Bodies()
        self._load = Load()  # of what no model was asked, or has answered
        self.router = Router()  # for Serve, which starts it and names routes by it: there are none
        self.routes: list[BaseRoute] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._shared(scope, receive, send)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.router(scope, receive, send)
            return
        started, body, path = time.perf_counter(), bytearray(), get_route_path(scope) or "/"
        try:
            # The page of a model is open where that of a server is; the model itself looks again.
            self._access.check({**scope, "path": self._below(path), "root_path": ""})
            try:
                arriving = self._bodies.read(body, headers_of(scope), receive, self._limit_bytes)
                await asyncio.wait_for(arriving, self._timeout_s)
            except TimeoutError as e:
                raise DeadlineError(f"the request did not arrive within {self._timeout_s:g} s") from e
            query: bytes = scope.get("query_string", b"")
            headers = [each for each in scope["headers"] if each[0] not in (b"host", b"origin")]  # it was let in here
            asked = Asked(scope["method"], path, query, headers, bytes(body))
            answer = await self._answer(asked)
        except Exception as e:  # noqa: BLE001  # the boundary where errors become statuses
            answer = refusal(dialect_of(path, MODELS), e)
            self._note(scope["method"], path, answer, started)
        finally:
            self._bodies.drop(body)
        await send_answer(answer, send)

    def _note(self, method: str, path: str, answer: Rendered, started: float) -> None:
        """A request is answered here; what a model answers, it counts itself."""
        dialect = classifying(path, MODELS) if method == "POST" else None
        caller = ASKING.get() if self._access.keys else None
        name, key = NONE if dialect is None else dialect.name, "" if caller is None else caller.name
        self._load.answered(name, answer.status, key, time.perf_counter() - started, answer.error)

    async def _answer(self, asked: Asked) -> Rendered:
        if asked.path in OPEN["health"]:
            answers = await self._all(asked)
            return _first_bad(answers) or next(iter(answers.values()))
        if asked.path in LISTS and asked.method == "GET":
            return self._listed(await self._all(asked))
        if asked.path == scrape.PATH and asked.method in ("GET", "HEAD"):
            return await self._scraped(asked)
        if asked.path == "/info":
            return self._informed(await self._all(asked))
        if asked.path == "/" and asked.method in ("GET", "HEAD"):
            first = self._default or next(iter(self._models))
            return Rendered(307, b"", {"location": f"models/{quote(first)}/"})
        name, asked = self.route(asked)
        if asked.path == live.PATH:
            raise UnknownModelError(f"{live.PATH} is not passed on by an application of several models: poll /info")
        if not self._has_started(name):
            raise GroupError(f"the model {name!r} has not started yet: try again, or see what `serve status` says")
        return await self._models[name](asked)

    async def _all(self, asked: Asked) -> dict[str, Rendered]:
        """What each model answers that is there: one that comes or goes does not make the others ill."""
        names = [name for name in self._models if self._has_started(name)]
        answers = await asyncio.gather(*(self._models[name](asked) for name in names), return_exceptions=True)
        there = {}
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, Rendered):
                there[name] = answer
            elif not isinstance(answer, GroupError):
                raise answer
        if not there:
            raise GroupError("no model of this server answers now: try again")
        return there

    async def _scraped(self, asked: Asked) -> Rendered:
        """The metrics of all models; of one that does not answer, that; and of what was answered here."""

        async def answer(name: str) -> Rendered | None:
            if not self._has_started(name):
                return None
            try:
                return await asyncio.wait_for(self._models[name](asked._replace(method="GET")), scrape.MODEL_S)
            except (TimeoutError, GroupError):
                return None

        answers = dict(zip(self._models, await asyncio.gather(*map(answer, self._models)), strict=True))
        well = {name: each for name, each in answers.items() if each is not None and each.status == 200}
        if not well:
            if (bad := next((each for each in answers.values() if each is not None), None)) is not None:
                return bad
            raise GroupError("no model answers now: try again")
        accept = dict(reversed(asked.headers)).get(b"accept", b"").decode("latin-1")
        own, _ = await asyncio.to_thread(scrape.rendered, [scrape.of_router(self._load)], (), accept)
        texts = [each.body.decode() for each in well.values()] + [own.decode()]
        text = scrape.joined(texts, answers.keys() - well.keys())
        return Rendered(200, b"" if asked.method == "HEAD" else text.encode(), next(iter(well.values())).headers)

    def _informed(self, answers: Mapping[str, Rendered]) -> Rendered:
        if (bad := _first_bad(answers)) is not None:
            return bad
        infos = {name: json.loads(each.body) for name, each in answers.items()}
        return Rendered(200, json.dumps({"default": self._default, "models": infos}).encode())

    @staticmethod
    def _listed(answers: Mapping[str, Rendered]) -> Rendered:
        if (bad := _first_bad(answers)) is not None:
            return bad
        first = next(iter(answers.values()))
        whole: dict[str, Any] = json.loads(first.body)
        whole["data"] = [model for each in answers.values() for model in json.loads(each.body)["data"]]
        return Rendered(200, json.dumps(whole).encode(), first.headers)

    def route(self, asked: Asked) -> tuple[str, Asked]:
        """The name of the model that is asked, and what it is asked.

        Raises:
            UnknownModelError: the name is none of the models'. InputError: there is none, and no default.
        """
        for prefix in (MODELS, V2_MODELS):
            if asked.path.startswith(prefix):
                name = self._name_below(prefix, asked.path)
                if name is None:
                    raise self._unknown(asked.path[len(prefix) :].partition("/")[0])
                # POST /models/NAME by itself is Hugging Face's, whose dialect knows it under this path.
                keeps = prefix == V2_MODELS or (asked.method == "POST" and asked.path == f"{MODELS}{name}")
                return name, asked if keeps else asked._replace(path=self._below(asked.path))
        named = self._name_in(asked.body) if asked.method == "POST" else None
        if named is not None:
            if named not in self._models:
                raise self._unknown(named)
            return named, asked
        if self._default is None and not asked.path.startswith(ANY):
            raise InputError(
                f"this server has several models and the request names none: say `model` or post to "
                f"{MODELS}NAME{asked.path}, where NAME is {self._names()}"
            )
        return self._default or next(iter(self._models)), asked

    def _name_below(self, prefix: str, path: str) -> str | None:
        """The model whose name comes after ``prefix`` in ``path``; of several the longest."""
        rest = path[len(prefix) :] if path.startswith(prefix) else ""
        found = [name for name in self._models if rest == name or rest.startswith(f"{name}/")]
        return max(found, key=len, default=None)

    def _below(self, path: str) -> str:
        """What a model is asked under ``/models/NAME``; another path as it is."""
        name = self._name_below(MODELS, path)
        return path if name is None else path[len(MODELS) + len(name) :] or "/"

    @staticmethod
    def _name_in(body: bytes) -> str | None:
        if b'"model"' not in body:
            return None
        if has_more_values(body, MOST_VALUES):
            raise PayloadTooLargeError(f"the body has more than {MOST_VALUES} values: send smaller batches")
        try:
            whole = from_json(body)
        except ValueError:
            return None  # whoever answers says what is wrong with it
        name = whole.get("model") if isinstance(whole, dict) else None
        return name if isinstance(name, str) and name not in NO_NAMES else None

    def _unknown(self, name: str) -> UnknownModelError:
        return UnknownModelError(f"there is no model {name!r} here: there is {self._names()}")

    def _names(self) -> str:
        return ", ".join(self._models)


def _first_bad(answers: Mapping[str, Rendered]) -> Rendered | None:
    """The first answer that is no success; None: all are."""
    return next((each for each in answers.values() if each.status >= 300), None)


async def ask_app(app: Callable[[Scope, Receive, Send], Awaitable[None]], asked: Asked) -> Rendered:
    """Have an ASGI application of this process answer a request."""
    headers = [(name, value) for name, value in asked.headers if name != b"content-length"]
    headers.append((b"content-length", b"%d" % len(asked.body)))
    scope: Scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": asked.method, "scheme": "http",
        "path": asked.path, "raw_path": quote(asked.path).encode(), "query_string": asked.query, "root_path": "",
        "headers": headers, "client": None, "server": None,
    }  # fmt: skip
    sent = iter([{"type": "http.request", "body": asked.body, "more_body": False}])
    status, answer, body = 500, dict[str, str](), bytearray()

    async def receive() -> Any:
        for message in sent:
            return message
        return (
            await asyncio.get_running_loop().create_future()
        )  # nobody leaves: where the caller does, this is cancelled

    async def send(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            answer.update((name.decode("latin-1"), value.decode("latin-1")) for name, value in message["headers"])
        else:
            body.extend(message.get("body", b""))

    await app(scope, receive, send)
    return Rendered(status, bytes(body), {k: v for k, v in answer.items() if k.lower() != "content-length"})
