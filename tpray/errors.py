"""Every error that tpray raises on purpose, in one tree::

    TprayError
    ├── InputError                 what a caller sent cannot be classified; the caller can mend it
    │   ├── EmptyInputError        no text, or no items
    │   ├── InputTooLongError      more tokens than the model takes, and truncation was not asked for
    │   ├── PayloadTooLargeError   too many items in one request, or too many bytes
    │   ├── UnknownModelError      the request names a model that is not served here
    │   └── UnsupportedTaskError   the model does not do what was asked of it, such as reranking with three labels
    ├── LogitsError                the model's logits for an item are not finite
    ├── StepError                  the model raised the same on every rank: an input's error, and nothing restarts
    ├── RefusedError               an item with which alone the group failed twice; it is not run for a while
    ├── OverloadedError            the bounded queue is full; try again later
    │   └── RateLimitError         a key has used what it may; the limit is named
    ├── UnauthorizedError          no key was shown, or none that is known
    ├── MisdirectedError           the request was meant for another server
    ├── StoppingError              the server is stopping and takes no new requests
    ├── DeadlineError              the request's time ran out before its answer was ready
    ├── ConfigError                a setting that cannot work, named with those that would
    │   ├── DegreeError            the tensor-parallel degree does not fit the model
    │   ├── UnsupportedModelError  the sharding plan has no row for this architecture
    │   └── TraceError             a user's own model that raised, or cannot be traced; the line is shown
    ├── ModelNotFoundError         no such Hub id, directory or artifact, or no network to fetch it
    ├── CheckpointError            files that are not a checkpoint, or do not match the architecture
    ├── ArtifactError              a traced artifact that is damaged, altered or of another version
    ├── StoreError                 the store of artifacts at a URL cannot be read or written
    └── GroupError                 the ranks could not start, or stopped working together
        ├── NotReadyError          the group takes no steps now: it starts, restarts or was stopped
        ├── PlacementError         no node can hold the group
        ├── StartTimeoutError      a start-up phase took longer than its limit
        ├── RankError              a rank died, or raised what the others did not; the group is not usable
        ├── StepTimeoutError       a step did not finish before its deadline
        ├── CollectiveError        a collective failed inside a step
        ├── CompileError           an accelerator's compiler failed; the end of its log is shown
        └── ParityError            the sharded logits differ from the unsharded model's

Foreign errors (Ray, sockets, safetensors, the Hub client) are translated where they enter, with
``raise ... from``. Each pickles with its fields, so that it crosses Ray unchanged.
"""

from __future__ import annotations


class TprayError(Exception):
    """Base of the tree. ``str(error)`` is one sentence that says what is wrong and what to do."""


class ItemError(TprayError):
    """An error that may be one item's. Not raised itself.

    Args:
        message: a sentence; or, for an ``item``, one that lacks its subject: "is empty: send some text".
        item: the number of the item in its request, from 0; None: the error is not one item's.
    """

    def __init__(self, message: str, item: int | None = None) -> None:
        super().__init__(message, item)
        self.message, self.item = message, item

    def __str__(self) -> str:
        return self.message if self.item is None else self.said_of(f"item {self.item}")

    def said_of(self, item: str) -> str:
        """The sentence with the name that the caller has for the item; as it is where the error is not one item's."""
        return self.message if self.item is None else f"{item} {self.message}"


class InputError(ItemError):
    """What a caller sent cannot be classified; the caller can mend it."""


class EmptyInputError(InputError):
    """No text, or no items."""


class InputTooLongError(InputError):
    """More tokens than the model takes, and truncation was not asked for."""


class PayloadTooLargeError(InputError):
    """Too many items in one request, or too many bytes in its body."""


class UnknownModelError(InputError):
    """The request names a model that is not served here; the message says which is."""


class UnsupportedTaskError(InputError):
    """The model does not do what was asked of it; the message says what it is."""


class LogitsError(ItemError):
    """The model's logits for an item are not finite: weights or dtype are at fault, not the text."""


class StepError(ItemError):
    """The model raised the same on every rank: what a step was given is at fault, and the group goes on."""


class RefusedError(ItemError):
    """An item with which the group failed twice, while nothing else was under way; it is not run for a while."""


class OverloadedError(TprayError):
    """The bounded queue is full; the same request may succeed later.

    Args:
        message: the sentence.
        retry_after_s: when there should be room for it, whole seconds from now.
    """

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message, retry_after_s)
        self.message, self.retry_after_s = message, retry_after_s

    def __str__(self) -> str:
        return self.message


class RateLimitError(OverloadedError):
    """A key has used what it may of requests or tokens; the message names the limit."""


class UnauthorizedError(TprayError):
    """No key was shown, or none that is known here."""


class MisdirectedError(TprayError):
    """The request was meant for another server."""


class StoppingError(TprayError):
    """The server is stopping and takes no new requests."""


class DeadlineError(TprayError):
    """The request's time ran out before its answer was ready."""


class ConfigError(TprayError):
    """A setting that cannot work, named with those that would."""


class DegreeError(ConfigError):
    """The tensor-parallel degree does not fit the model: more ranks than heads, or a size that it must divide."""


class UnsupportedModelError(ConfigError):
    """The sharding plan has no row for this architecture."""


class TraceError(ConfigError):
    """A user's own model raised while it was built, or cannot be traced; the line is shown."""


class ModelNotFoundError(TprayError):
    """No such Hub id, directory or artifact, or no network to fetch it."""


class CheckpointError(TprayError):
    """Files that are not a checkpoint, or that do not match the architecture."""


class ArtifactError(TprayError):
    """A traced artifact that is damaged, altered or of another version."""


class StoreError(TprayError):
    """The store of artifacts at a URL cannot be read or written."""


class GroupError(TprayError):
    """The ranks could not start, or stopped working together."""


class NotReadyError(GroupError):
    """The group takes no steps now: it starts, restarts or was stopped. Nothing was sent to a rank."""


class PlacementError(GroupError):
    """No node can hold the group."""


class StartTimeoutError(GroupError):
    """A start-up phase took longer than its limit."""


class RankError(GroupError):
    """A rank died, or raised what the others did not; the group is not usable until it is started again."""


class StepTimeoutError(GroupError):
    """A step did not finish before its deadline."""


class CollectiveError(GroupError):
    """A collective failed inside a step."""


class CompileError(GroupError):
    """An accelerator's compiler failed; the message has the last lines of its log, and where the rest is."""


class ParityError(GroupError):
    """The sharded logits differ from the unsharded model's by more than the dtype explains."""


def named(kind: str, message: str) -> TprayError:
    """An error that came from another process as the name of its class and its sentence."""
    found = globals().get(kind)
    return (found if isinstance(found, type) and issubclass(found, TprayError) else TprayError)(message)
