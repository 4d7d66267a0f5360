"""What is noted of a request while it is answered, for its log line and its trace (`observer`, `telemetry`).

Where nobody asks for either there are no notes, and what would be noted costs the look whether there are: 0.1 us for a
request and for each of its rows. Times are `time.time_ns`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence, Sized
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

from tpray.errors import NotReadyError
from tpray.group.channel import StepResult


@dataclass(slots=True, eq=False)
class RequestNotes:
    """A request under way. span: of the SDK; None: it has no trace. fields: what is known of it, by names.

    error: what it was refused with, or failed with. waiting_ns: since when its rows wait for a step.
    """

    request_id: str
    began_ns: int
    span: Any = None
    fields: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = None
    tokenized: tuple[int, int] | None = None
    waiting_ns: int = 0
    steps: list[StepNotes] = field(default_factory=list)
    passed_on: bool = False


NOTES: ContextVar[RequestNotes | None] = ContextVar("tpray_request_notes", default=None)
"""Of the request that the current task answers."""


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

    error: what became of it, if not a result. waited_ns: of each of those requests, since when it had waited.
    """

    __slots__ = ("began_ns", "ended_ns", "error", "requests", "result", "rows", "tokens", "waited_ns")

    def __init__(self, rows: Sequence[NotedRow], requests: Iterable[RequestNotes]) -> None:
        self.rows, self.tokens, self.requests = len(rows), sum(map(len, rows)), list(requests)
        self.result: StepResult | None = None
        self.error: BaseException | None = None
        self.ended_ns = 0
        self.waited_ns: list[int] = []

    def __enter__(self) -> StepNotes:
        self.began_ns = time.time_ns()
        self.waited_ns = [request.waiting_ns for request in self.requests]
        for request in self.requests:
            request.steps.append(self)
        return self

    def answered(self, result: StepResult) -> None:
        """What the ranks said."""
        self.result = result

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.ended_ns, self.error = time.time_ns(), error
        if isinstance(error, NotReadyError):  # nothing was sent
            for request in self.requests:
                request.steps.remove(self)
        elif error is not None:
            for request in self.requests:
                request.waiting_ns = self.ended_ns


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
