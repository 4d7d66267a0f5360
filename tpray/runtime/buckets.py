"""Static shapes: the [batch, length] for which programs are traced, where a program cannot take any shape.

A step is padded to the bucket that wastes least. Fewer buckets mean fewer programs to compile and keep, more of them
less padding; `choose_lengths` finds the best lengths for a number of programs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tpray.errors import ConfigError, InputTooLongError

Array = npt.NDArray[np.int64]


class Bucket(NamedTuple):
    """One shape: rows, and tokens in each."""

    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}"


def parse(text: str) -> tuple[Bucket, ...]:
    """``8x32,8x128`` as buckets.

    Raises:
        ConfigError: it is not written so, or a number is below 1.
    """
    try:
        found = [Bucket(*map(int, part.strip().split("x"))) for part in text.split(",")]
        if not all(bucket.batch >= 1 and bucket.length >= 1 for bucket in found):
            raise ValueError
    except (TypeError, ValueError):
        raise ConfigError(f"buckets are written BATCHxLENGTH, as in 1x128,8x32,8x128; this is {text!r}") from None
    return tuple(sorted(set(found)))


def fitting(buckets: Iterable[Bucket], batch: int, length: int) -> Bucket | None:
    """The bucket with the fewest tokens that holds ``batch`` rows of ``length`` tokens; None if none does."""
    able = [bucket for bucket in buckets if bucket.batch >= batch and bucket.length >= length]
    return min(able, key=lambda bucket: (bucket.batch * bucket.length, bucket), default=None)


def largest_batch(buckets: Iterable[Bucket], length: int) -> int:
    """How many rows of ``length`` tokens fit one step.

    Raises:
        InputTooLongError: not one does.
    """
    buckets = tuple(buckets)
    batch = max((bucket.batch for bucket in buckets if bucket.length >= length), default=0)
    if batch == 0:
        longest = max(bucket.length for bucket in buckets)
        raise InputTooLongError(f"a row of {length} tokens fits no bucket; the longest that was traced has {longest}")
    return batch


def size_in(buckets: Sequence[Bucket], rows: int, length: int) -> tuple[int, int]:
    """How many tokens a program computes for so many rows, padding included, and how many it could at once."""
    batch = largest_batch(buckets, length)
    parts = [min(batch, rows - start) for start in range(0, rows, batch)]
    chosen = [bucket for part in parts if (bucket := fitting(buckets, part, length)) is not None]
    return sum(each.batch * each.length for each in chosen), max(each.batch * each.length for each in buckets)


def pad_to(inputs: Sequence[Array], bucket: Bucket, pad_id: int) -> list[Array]:
    """ids, mask and types ``[B, S]`` as those of ``bucket``'s shape.

    Rows that are added have one token, so that no attention is over nothing.
    """
    made = [np.full(bucket, fill, dtype=np.int64) for fill in (pad_id, 0, 0)]
    for array, given in zip(made, inputs, strict=True):
        array[: given.shape[0], : given.shape[1]] = given
    made[1][len(inputs[0]) :, 0] = 1
    return made


def choose_lengths(lengths: Iterable[int], programs: int) -> list[int]:
    """The up to ``programs`` lengths that pad rows of these ``lengths`` least, the longest of them included.

    Exact, by dynamic programming over the distinct lengths: O(programs x distinct^2).

    Raises:
        ConfigError: there are no lengths, or no program is allowed.
    """
    counts = sorted(Counter(lengths).items())
    if not counts or programs < 1:
        raise ConfigError("choosing buckets takes at least one sample text and one program")
    sizes = np.array([size for size, _ in counts])
    rows = np.concatenate([[0], np.cumsum([count for _, count in counts])])
    tokens = np.concatenate([[0], np.cumsum([size * count for size, count in counts])])

    def waste(first: int, last: int) -> int:
        """Padding of the rows of sizes first..last, all padded to the last."""
        return int(sizes[last] * (rows[last + 1] - rows[first]) - (tokens[last + 1] - tokens[first]))

    count = len(sizes)
    # By the last size: the least padding of all sizes up to it, and which sizes were chosen for it.
    best: list[tuple[int, tuple[int, ...]]] = [(waste(0, last), (last,)) for last in range(count)]
    for _ in range(1, min(programs, count)):
        best = [
            min([best[last], *((best[cut][0] + waste(cut + 1, last), (*best[cut][1], last)) for cut in range(last))])
            for last in range(count)
        ]
    return [int(sizes[i]) for i in best[-1][1]]
