"""A classifier for ``map_batches``: each actor of Ray Data's has a group of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from tpray.config import AUTO
from tpray.data.answers import Asking, given
from tpray.data.columns import Columns, arrow_types, check_ray_data, prefix_of
from tpray.data.host import Hosted, leaving_a_cpu, settled
from tpray.errors import ConfigError, InputError, ItemError
from tpray.group.nodes import NODE_PATIENCE_S
from tpray.parallel_layers.tasks import TOKEN
from tpray.serving.chunks import Chunks

if TYPE_CHECKING:
    import pyarrow
    from ray.data import Dataset

NAMES = ("text_column", "pair_column")
"""How the columns are named here."""

BLOCK_BATCHES = 8
"""How many batches make a block: what a group is given at once, and what is asked again if its actor dies."""


class Classifier:
    """Classifies a dataset's rows: give it to ``map_batches``, or the dataset to `classify`, which does that.

    A group comes up for each actor, in a placement group of its own, and ends with it. One that loses a rank restarts
    itself, and answers the batches that it has; an actor that is lost Ray Data starts again, and asks again.

    Args:
        model: as of `tpray.load`.
        replicas: how many groups share the cores of a machine; the number of actors, where they are on one.
        text_column, pair_column: what texts, and second texts, are called; the defaults are ``text`` and, if there is
            such a column, ``text_pair``. Without a ``text`` there may be ``messages``, which are conversations.
        raw_scores, truncate, chunks: see `LocalClassifier.classify`.
        errors: what becomes of a text that cannot be classified: ``column`` says why in its row's column ``error``,
            ``raise`` fails the dataset.
        patience_s: how long to wait for room for the group, seconds; longer only while an autoscaler starts nodes.
        options: of `tpray.load`: ``tp``, ``cores``, ``dtype``, ``store`` and so on.

    Raises:
        TprayError: the model, the degree or the machine does not fit; the message says what would.
    """

    def __init__(
        self,
        model: str | None = None,
        replicas: int = 1,
        text_column: str = "text",
        pair_column: str | None = None,
        raw_scores: bool = False,
        truncate: bool = False,
        chunks: Any = None,
        errors: Literal["column", "raise"] = "column",
        patience_s: float = NODE_PATIENCE_S,
        **options: Any,
    ) -> None:
        if errors not in ("column", "raise"):
            raise ConfigError(f"errors={errors!r}: it is 'column' or 'raise'")
        self._columns, self._errors = Columns(text_column, pair_column), errors
        self._how = Asking(raw_scores, truncate, Chunks.of(chunks))
        self._group = Hosted(settled({"model": model, **options}, replicas), patience_s)

    async def __call__(self, batch: Any) -> pyarrow.Table:
        """The batch, whatever its format, with columns for the answers; see `tpray.data.columns.ADDED`.

        They are ``label``, ``score``, ``scores`` and ``error``, or ``entities`` and ``error``; where there are such
        already, ``tpray_label`` and so on. Ray Data asks with several batches at once, so that the group is not idle
        between them, and keeps their order.

        Raises:
            ConfigError: a column is missing.
            InputError: a text cannot be classified, and ``errors`` is ``raise``.
            GroupError: the group could not be brought back.
        """
        table = _table(batch)
        if not table.column_names:  # a block of nothing, which shuffles and repartitions make
            return table
        self._columns.check(table.column_names, "the dataset", NAMES)
        items, answers = [], dict[int, Any]()
        for number, record in enumerate(table.select(self._columns.read_of(table.column_names)).to_pylist()):
            try:
                items.append(self._columns.item(record))
            except InputError as e:
                answers[number] = e
        found = iter(await self._group.answer(items, self._how))
        rows = [answers[number] if number in answers else next(found) for number in range(table.num_rows)]
        refused = next((row for row in rows if isinstance(row, ItemError)), None)
        if refused is not None and self._errors == "raise":
            raise type(refused)(refused.said_of("a text"))
        return _with_answers(table, [given(row, self._group.task, "the text") for row in rows], self._group.task)


def _table(batch: Any) -> pyarrow.Table:
    """A batch of any of Ray Data's formats."""
    from ray.data.block import BlockAccessor, BlockType

    return BlockAccessor.for_block(BlockAccessor.batch_to_block(batch, BlockType.ARROW)).to_arrow()


def _with_answers(table: pyarrow.Table, answers: list[dict[str, Any]], task: str) -> pyarrow.Table:
    """A table with the columns that a model's answers have; their types do not depend on the batch."""
    import pyarrow

    prefix, types = prefix_of(table.column_names), arrow_types()
    for name in ("entities", "error") if task == TOKEN else ("label", "score", "scores", "error"):
        values = [answer.get(name) for answer in answers]
        table = table.append_column(prefix + name, pyarrow.array(values, types[name]))
    return table


def classify(
    dataset: Dataset,
    model: str | None = None,
    tp: int | Literal["auto"] = AUTO,
    replicas: int = 1,
    batch_size: int = 256,
    **options: Any,
) -> Dataset:
    """A dataset with the labels of its texts, each of ``replicas`` groups with ``tp`` ranks.

    It is as lazy as any transform: groups come up when it is consumed, and end with that.

    Args:
        dataset: with a column of texts.
        batch_size: rows that a group is given at a time.
        options: others of `Classifier`.

    Returns:
        The rows with all that they had, and ``label``, ``score``, ``scores`` (``entities``) and ``error``.

    Raises:
        ConfigError: a package is missing, or a column; it is refused here if the dataset knows its columns. Or the
            groups would take all CPUs of this Ray.
        TprayError: the model's name or the degree cannot be.
    """
    check_ray_data()
    import ray
    from ray.data import ActorPoolStrategy

    own = {name: options.pop(name) for name in _OWN if name in options}
    may_shrink = options.get("cores") is None
    options = settled({"model": model, "tp": tp, **options}, replicas)
    if ray.is_initialized():
        options = leaving_a_cpu(options, replicas, ray.cluster_resources().get("CPU", 0.0), may_shrink)
    schema = dataset.schema(fetch_if_missing=False)
    if schema is not None:
        Columns(own.get("text_column", "text"), own.get("pair_column")).check(schema.names, "the dataset", NAMES)
    # Ray Data reads many small files as one block, which is one actor's work.
    blocks = dataset.repartition(target_num_rows_per_block=BLOCK_BATCHES * batch_size)
    return blocks.map_batches(
        Classifier,
        fn_constructor_kwargs={**options, **own},
        batch_format="pyarrow",
        batch_size=batch_size,
        zero_copy_batch=True,
        num_cpus=0,  # its group has a placement group
        compute=ActorPoolStrategy(size=replicas, max_concurrent_calls_per_actor=2),
    )


_OWN = ("text_column", "pair_column", "raw_scores", "truncate", "chunks", "errors", "patience_s")
