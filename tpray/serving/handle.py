"""What `tpray.connect` gives: a server's Serve handle, with types, and with tpray's own errors."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from tpray.errors import GroupError, TprayError
from tpray.serving.telemetry import traceparent_here
from tpray.serving.typed import Entity, LabelScore, Pair, RankedDocument, Texts, in_order

if TYPE_CHECKING:
    from ray.exceptions import RayTaskError

    from tpray.serving.codec import Direction
    from tpray.serving.entities import Strategy
    from tpray.serving.scores import Activation

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


LOOK_S = 0.5
"""How often it is looked whether the server that owes an answer is still there."""


@dataclass(frozen=True)
class Connected:
    """A server as it runs now. handle: Serve's own. over: set once the connection is no more."""

    handle: Any
    over: threading.Event


class Response(Generic[T_co]):
    """An answer to come: ``result()`` waits for it, and so does ``await``, where an event loop runs.

    Args:
        response: Serve's own. over: as of `Connected`. last: what is done with the answer.
    """

    def __init__(self, response: Any, over: threading.Event, last: Callable[[Any], T_co] | None = None) -> None:
        self._response, self._over, self._last = response, over, last

    def result(self, timeout_s: float | None = None) -> T_co:
        """The answer.

        Args:
            timeout_s: how long to wait for it, seconds; None: as long as it takes.

        Raises:
            TprayError: what the server raised, such as `InputError`; or `GroupError`: it is gone.
            TimeoutError: there is no answer yet.
        """
        give_up = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = LOOK_S if give_up is None else max(0.0, give_up - time.monotonic())
            try:
                with own_errors(self._over):
                    return self._finished(self._response.result(timeout_s=min(LOOK_S, left_s)))
            except TimeoutError:
                if left_s <= LOOK_S and give_up is not None:
                    raise TimeoutError(f"there is no answer after {timeout_s:g} s") from None

    def __await__(self) -> Generator[Any, None, T_co]:
        return self._awaited().__await__()

    async def _awaited(self) -> T_co:
        async def wait() -> Any:
            return await self._response

        waiting = asyncio.ensure_future(wait())
        try:
            while not waiting.done():
                await asyncio.wait({waiting}, timeout=LOOK_S)
                if self._over.is_set():
                    break
        finally:
            waiting.cancel()  # nothing, if it is done
        with own_errors(self._over):
            if not waiting.done():
                raise GroupError(GONE)
            return self._finished(waiting.result())

    def _finished(self, answer: Any) -> T_co:
        return answer if self._last is None else self._last(answer)

    def cancel(self) -> None:
        """Have the server give it up, if it has not started."""
        self._response.cancel()


GONE = "the server that was asked is gone: ask again, once it is back"


def as_there(error: RayTaskError) -> Exception:
    """What a call of another process has raised: tpray's own as it was there, any other as Ray wraps it."""
    return error.cause if isinstance(error.cause, TprayError) else error


@contextmanager
def own_errors(over: threading.Event) -> Iterator[None]:
    """Raise what a replica has raised as it was there, without Ray's wrapping and the traceback of another process.

    Args:
        over: set once there is no connection any more; whatever Ray raises then means that.
    """
    from ray.exceptions import RayActorError, RayTaskError
    from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

    try:
        yield
    except RayTaskError as e:
        raise as_there(e) from None
    except (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError) as e:
        said = "the replica that was asked has ended: ask again, there is a new one soon"
        raise GroupError(GONE if over.is_set() else said) from e
    except TprayError:
        raise
    except Exception as e:
        if over.is_set():
            raise GroupError(GONE) from e
        raise


class _Method:
    """A method of the replica. call: gives the first arguments of `Response`."""

    def __init__(self, call: Callable[..., tuple[Any, threading.Event]]) -> None:
        self._call = call


class Classify(_Method):
    """``handle.classify``."""

    @overload
    def remote(  # type: ignore[overload-overlap]  # a text is no batch of its letters
        self,
        inputs: str | Pair | Mapping[str, Any],
        raw_scores: bool = ...,
        truncate: bool = ...,
        truncation_direction: Direction | None = ...,
        chunks: Any = ...,
        activation: Activation | None = ...,
        top_k: int | None = ...,
    ) -> Response[list[LabelScore]]: ...
    @overload
    def remote(
        self,
        inputs: Texts,
        raw_scores: bool = ...,
        truncate: bool = ...,
        truncation_direction: Direction | None = ...,
        chunks: Any = ...,
        activation: Activation | None = ...,
        top_k: int | None = ...,
    ) -> Response[list[list[LabelScore]]]: ...
    @overload
    def remote(
        self,
        inputs: Any,
        raw_scores: bool = ...,
        truncate: bool = ...,
        truncation_direction: Direction | None = ...,
        chunks: Any = ...,
        activation: Activation | None = ...,
        top_k: int | None = ...,
    ) -> Response[list[Any]]: ...
    def remote(
        self,
        inputs: Any,
        raw_scores: bool = False,
        truncate: bool = False,
        truncation_direction: Direction | None = None,
        chunks: Any = None,
        activation: Activation | None = None,
        top_k: int | None = None,
    ) -> Response[list[Any]]:
        """See `tpray.serving.app.Classifier.classify`."""
        asked = inputs, raw_scores, truncate, truncation_direction, chunks, activation, top_k
        return Response(*self._call("classify", *asked))


class ClassifyTokens(_Method):
    """``handle.classify_tokens``."""

    @overload
    def remote(
        self,
        texts: str,
        aggregation_strategy: Strategy = ...,
        ignore_labels: Sequence[str] = ...,
        raw_scores: bool = ...,
        truncate: bool = ...,
    ) -> Response[list[Entity]]: ...
    @overload
    def remote(
        self,
        texts: list[str] | tuple[str, ...],
        aggregation_strategy: Strategy = ...,
        ignore_labels: Sequence[str] = ...,
        raw_scores: bool = ...,
        truncate: bool = ...,
    ) -> Response[list[list[Entity]]]: ...
    def remote(
        self,
        texts: str | Sequence[str],
        aggregation_strategy: Strategy = "none",
        ignore_labels: Sequence[str] = ("O",),
        raw_scores: bool = False,
        truncate: bool = False,
    ) -> Response[Any]:
        """See `tpray.serving.app.Classifier.classify_tokens`."""
        asked = texts, aggregation_strategy, ignore_labels, raw_scores, truncate
        return Response(*self._call("classify_tokens", *asked))


class Rerank(_Method):
    """``handle.rerank``."""

    def remote(
        self,
        query: str,
        documents: Sequence[str],
        top_n: int | None = None,
        return_documents: bool = False,
        raw_scores: bool = False,
        truncate: bool = True,
        chunks: Any = None,
    ) -> Response[list[RankedDocument]]:
        """See `tpray.serving.app.Classifier.rerank`."""
        asked = query, list(documents), top_n, return_documents, raw_scores, truncate, chunks
        return Response(*self._call("rerank", *asked))


class Score(_Method):
    """``handle.score``."""

    def remote(
        self,
        query: str,
        documents: Sequence[str],
        raw_scores: bool = False,
        truncate: bool = True,
        chunks: Any = None,
    ) -> Response[list[float]]:
        """How relevant each document is for the query, in the order of the documents; as `rerank` scores them."""
        asked = query, list(documents), None, False, raw_scores, truncate, chunks
        return Response(*self._call("rerank", *asked), in_order)


class Handle:
    """A server's handle: ``handle.classify.remote("a text").result()``, as Ray Serve's own are used.

    It outlives a restart of its server: as soon as one answers at the same URL again, it is asked.

    Args:
        find: gives the server as it runs now, or raises a `TprayError`.
        options: of Serve's handle.
    """

    def __init__(self, find: Callable[[], Connected], options: Mapping[str, Any] | None = None) -> None:
        self._find, self._options = find, dict(options or {})
        self.classify = Classify(self._call)
        self.classify_tokens = ClassifyTokens(self._call)
        self.rerank = Rerank(self._call)
        self.score = Score(self._call)

    def options(self, **options: Any) -> Handle:
        """The same with options of Serve's handle; see ``ray.serve.handle.DeploymentHandle.options``."""
        return Handle(self._find, self._options | options)

    def _call(self, method: str, *arguments: Any) -> tuple[Any, threading.Event]:
        server = self._find()
        with own_errors(server.over):
            handle = server.handle.options(**self._options) if self._options else server.handle
            here = traceparent_here()
            carried = {} if here is None else {"traceparent": here}
            return getattr(handle, method).remote(*arguments, **carried), server.over

    def __dir__(self) -> list[str]:
        return ["classify", "classify_tokens", "options", "rerank", "score"]
