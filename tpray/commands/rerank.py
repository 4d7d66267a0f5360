"""``tpray rerank``."""

from __future__ import annotations

from typing import Annotated

import typer

from tpray.commands.console import print_ranking
from tpray.commands.flags import (
    Aggregate,
    ChatTemplateFile,
    CoresPerRank,
    Dtype,
    Family,
    FromToken,
    InChunks,
    InputFile,
    Layout,
    LogicalCores,
    MaxChunks,
    ModelFlag,
    PlanFile,
    Revision,
    Runtime,
    Stride,
    TextColumn,
    Tp,
    VerifyKey,
    chunks_of,
    lnc_number,
    words_of,
)
from tpray.config import AUTO
from tpray.errors import ConfigError, ItemError


def rerank(
    query: Annotated[str, typer.Argument(help="What the documents are to answer.")],
    documents: Annotated[list[str] | None, typer.Argument(help="Texts.")] = None,
    model: ModelFlag = None,
    revision: Revision = None,
    tp: Tp = AUTO,
    dtype: Dtype = AUTO,
    runtime: Runtime = AUTO,
    plan: PlanFile = None,
    chat_template: ChatTemplateFile = None,
    classifier_from_token: FromToken = None,
    verify_key: VerifyKey = None,
    cores_per_rank: CoresPerRank = None,
    instance_family: Family = None,
    neuron_layout: Layout = AUTO,
    lnc: LogicalCores = None,
    input_file: InputFile = None,
    text_column: TextColumn = "text",
    top_n: Annotated[
        int | None, typer.Option("--top-n", min=1, help="How many of the best to print.", show_default="all")
    ] = None,
    raw_scores: Annotated[bool, typer.Option("--raw-scores", help="Logits instead of probabilities.")] = False,
    truncate: Annotated[
        bool, typer.Option("--truncate/--no-truncate", help="Cut documents that are too long, or refuse them.")
    ] = True,
    chunks: InChunks = False,
    stride: Stride = None,
    aggregate: Aggregate = None,
    max_chunks: MaxChunks = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")] = False,
) -> None:
    """Rank documents by how relevant they are for a query, the best first, without a server."""
    from tpray.commands.classify_file import read_texts
    from tpray.commands.loading import load_with_progress
    from tpray.commands.records import check_source
    from tpray.data.columns import Columns

    if bool(documents) == (input_file is not None):
        raise ConfigError("name documents to rank, or a file of them with --in, and not both")
    read = chunks_of(chunks, stride, aggregate, max_chunks)
    unit, lines = "document", list(enumerate(documents or ()))
    if input_file is not None:
        columns = Columns(text_column)
        check_source(input_file, columns)
        unit, lines = read_texts(input_file, columns)
    texts = [text for _, text in lines]
    with load_with_progress(
        model,
        revision=revision,
        tp=tp,
        dtype=dtype,
        runtime=runtime,
        cores=cores_per_rank,
        plan=plan,
        chat_template=chat_template,
        classifier_from_token=words_of(classifier_from_token),
        verify_key=verify_key,
        instance_family=instance_family,
        neuron_layout=neuron_layout,
        lnc=lnc_number(lnc),
        in_process=True,
    ) as classifier:
        try:
            ranking = classifier.rerank(query, texts, top_n, True, raw_scores, truncate, read)
        except ItemError as e:
            raise type(e)(e.said_of(f"{unit} {lines[e.item or 0][0]}")) from e
        print_ranking(ranking, as_json)
