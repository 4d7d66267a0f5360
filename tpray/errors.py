"""Every error that tpray raises on purpose, in one tree::

    TprayError
    ├── InputError                 what a caller sent cannot be classified; the caller can mend it
    │   ├── EmptyInputError        no text, or no items
    │   ├── InputTooLongError      more tokens than the model takes, and truncation was not asked for
    │   └── PayloadTooLargeError   too many items in one request, or too many bytes
    ├── OverloadedError            the bounded queue is full; try again later
    ├── DeadlineError              the request's time ran out before its answer was ready
    ├── ConfigError                a setting that cannot work, named with those that would
    │   ├── DegreeError            the tensor-parallel degree does not fit the model
    │   ├── UnsupportedModelError  the sharding plan has no row for this architecture
    │   ├── StoreError             the store of artifacts at a URL cannot be read or written
    │   └── TraceError             a model of the user's own that raised, or cannot be traced; the line is shown
    ├── ModelNotFoundError         no such Hub id, directory or artifact, or no network to fetch it
    ├── CheckpointError            files that are no checkpoint, or do not match the architecture
    ├── ArtifactError              a traced artifact that is damaged, altered or of another version
    └── GroupError                 the ranks could not start, or stopped working together
        ├── PlacementError         no node can hold the group
        ├── StartTimeoutError      a start-up phase took longer than its limit
        ├── RankError              a rank died or reported an exception; the group is not usable
        ├── StepTimeoutError       a step did not finish before its deadline
        ├── CollectiveError        a collective failed inside a step
        ├── CompileError           an accelerator's compiler failed; the end of its log is shown
        └── ParityError            the sharded logits differ from the unsharded model's

Foreign errors (Ray, sockets, safetensors, the Hub client) are translated where they enter, with
``raise ... from``. Each class takes one message, so that each pickles and crosses Ray unchanged.
"""

from __future__ import annotations


class TprayError(Exception):
    """Base of the tree. ``str(error)`` is one sentence that says what is wrong and what to do."""


class InputError(TprayError):
    """What a caller sent cannot be classified; the caller can mend it."""


class EmptyInputError(InputError):
    """No text, or no items."""


class InputTooLongError(InputError):
    """More tokens than the model takes, and truncation was not asked for."""


class PayloadTooLargeError(InputError):
    """Too many items in one request, or too many bytes in its body."""


class OverloadedError(TprayError):
    """The bounded queue is full; the same request may succeed later."""


class DeadlineError(TprayError):
    """The request's time ran out before its answer was ready."""


class ConfigError(TprayError):
    """A setting that cannot work, named with those that would."""


class DegreeError(ConfigError):
    """The tensor-parallel degree does not fit the model: more ranks than heads, or a size that it must divide."""


class UnsupportedModelError(ConfigError):
    """The sharding plan has no row for this architecture."""


class StoreError(ConfigError):
    """The store of artifacts at a URL cannot be read or written."""


class TraceError(ConfigError):
    """A model of the user's own raised while it was built, or cannot be traced; the line is shown."""


class ModelNotFoundError(TprayError):
    """No such Hub id, directory or artifact, or no network to fetch it."""


class CheckpointError(TprayError):
    """Files that are no checkpoint, or that do not match the architecture."""


class ArtifactError(TprayError):
    """A traced artifact that is damaged, altered or of another version."""


class GroupError(TprayError):
    """The ranks could not start, or stopped working together."""


class PlacementError(GroupError):
    """No node can hold the group."""


class StartTimeoutError(GroupError):
    """A start-up phase took longer than its limit."""


class RankError(GroupError):
    """A rank died or reported an exception; the group is not usable until it is started again."""


class StepTimeoutError(GroupError):
    """A step did not finish before its deadline."""


class CollectiveError(GroupError):
    """A collective failed inside a step."""


class CompileError(GroupError):
    """An accelerator's compiler failed; the message has the last lines of its log, and where the rest is."""


class ParityError(GroupError):
    """The sharded logits differ from the unsharded model's by more than the dtype explains."""
