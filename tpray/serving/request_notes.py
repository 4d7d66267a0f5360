"""What is noted of a request while it is answered, for its log line and its trace (`observer`, `telemetry`).

Where nobody asks for either there are no notes, and what would be noted costs the look whether there are: 0.1 us for a
request and for each of its rows. Times are `time.time_ns`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence, Sized
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

from tpray.errors import NotReadyError
from tpray.group.channel import StepResult


@dataclass(slots=True, eq=False)
class RequestNotes:
    """A request under way. span: of the SDK; None: it has no trace. fields: what is known of it, by names.

    error: what it was refused with, or failed with. waiting_ns: since when its rows wait for a step.
    steps: those with rows of it, and since when each was waited for.
    """

    request_id: str
    began_ns: int
    span: Any = None
    fields: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = None
    tokenized: tuple[int, int] | None = None
    waiting_ns: int = 0
    steps: list[tuple[StepNotes, int]] = field(default_factory=list)
    passed_on: bool = False


NOTES: ContextVar[RequestNotes | None] = ContextVar("tpray_request_notes", default=None)
"""Of the request that the current task answers."""


def of_no_request() -> Context:
    """What steps begin in: they are of many requests, and what is logged then is not to be said of one of these."""
    return Context()


def note_rows(rows: Sequence[Sized], started: float) -> None:
    """The rows are made of a request's items. started: when that began, `time.perf_counter` seconds."""
    notes = NOTES.get()
    if notes is None:
        return
    now = time.time_ns()
    notes.tokenized = now - int((time.perf_counter() - started) * 1e9), now
    notes.waiting_ns = now
    notes.fields |= {"rows": len(rows), "tokens": sum(map(len, rows))}


def note_error(error: BaseException) -> None:
    """The request is answered with an error."""
    if (notes := NOTES.get()) is not None:
        notes.error = error


class NotedRow(Protocol):
    """A row that waits for its step. notes: of its request."""

    notes: RequestNotes | None

    def __len__(self) -> int: ...


class StepNotes:
    """A step, or an attempt at one: a block, in which it runs. Every request that has rows in it has it in its notes.

    requests: how many these are. result: without its outputs. error: what became of it, if not a result.
    """

    __slots__ = ("_of", "began_ns", "ended_ns", "error", "requests", "result", "rows", "tokens")

    def __init__(self, rows: Sequence[NotedRow], requests: Iterable[RequestNotes]) -> None:
        self.rows, self.tokens, self._of = len(rows), sum(map(len, rows)), list(requests)
        self.requests = len(self._of)
        self.result: StepResult | None = None
        self.error: BaseException | None = None
        self.ended_ns = 0

    def __enter__(self) -> StepNotes:
        self.began_ns = time.time_ns()
        for request in self._of:
            request.steps.append((self, request.waiting_ns))
        return self

    def answered(self, result: StepResult) -> None:
        """What the ranks said."""
        self.result = StepResult((), result.compute_s, result.total_s, result.ranks)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.ended_ns, self.error = time.time_ns(), error
        if isinstance(error, NotReadyError):  # nothing was sent
            for request in self._of:
                request.steps = [each for each in request.steps if each[0] is not self]
        elif error is not None:
            for request in self._of:
                request.waiting_ns = self.ended_ns
        self._of = []  # or a step and its requests would hold each other until garbage is collected


def of_row(row: NotedRow) -> dict[str, Any]:
    """For ``extra`` of a message about a row: whose it is, if that is noted."""
    return {} if row.notes is None else {"fields": {"request_id": row.notes.request_id}}


class _NoNotes:
    """In place of `StepNotes` where no request of the step has notes."""

    __slots__ = ()

    def __enter__(self) -> _NoNotes:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def answered(self, result: StepResult) -> None:
        return None


_NO_NOTES = _NoNotes()


def step_notes(rows: Sequence[NotedRow]) -> StepNotes | _NoNotes:
    """For the block in which the step of these rows runs."""
    for row in rows:
        if row.notes is not None:
            return StepNotes(rows, [notes for notes in dict.fromkeys(row.notes for row in rows) if notes is not None])
    return _NO_NOTES
