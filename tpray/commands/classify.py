"""``tpray classify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tpray.commands.console import err, print_entities, print_scores
from tpray.commands.flags import (
    Aggregate,
    ChatTemplateFile,
    CoresPerRank,
    Dtype,
    Family,
    FromToken,
    InChunks,
    Layout,
    LogicalCores,
    MaxChunks,
    ModelFlag,
    PlanFile,
    Revision,
    Runtime,
    Stride,
    Tp,
    chunks_of,
    lnc_number,
    words_of,
)
from tpray.config import AUTO
from tpray.errors import ConfigError
from tpray.parallel_layers.tasks import TOKEN

if TYPE_CHECKING:
    from tpray.serving.entities import Strategy


def classify(
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts; with --pair, exactly two that are read together.")
    ] = None,
    model: ModelFlag = None,
    revision: Revision = None,
    tp: Tp = AUTO,
    dtype: Dtype = AUTO,
    runtime: Runtime = AUTO,
    plan: PlanFile = None,
    chat_template: ChatTemplateFile = None,
    classifier_from_token: FromToken = None,
    cores_per_rank: CoresPerRank = None,
    instance_family: Family = None,
    neuron_layout: Layout = AUTO,
    lnc: LogicalCores = None,
    pair: Annotated[bool, typer.Option("--pair", help="The two texts are one pair.")] = False,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--in",
            help='JSONL to read: {"text": ...}, {"text": ..., "text_pair": ...} or {"messages": [...]} a line; - is '
            "standard input.",
        ),
    ] = None,
    output_file: Annotated[
        Path | None, typer.Option("--out", help="JSONL to write; standard output without it.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the output file of a run that was interrupted.")
    ] = False,
    raw_scores: Annotated[bool, typer.Option("--raw-scores", help="Logits instead of probabilities.")] = False,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long.")] = False,
    chunks: InChunks = False,
    stride: Stride = None,
    aggregate: Aggregate = None,
    max_chunks: MaxChunks = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")] = False,
) -> None:
    """Classify texts, or a JSONL file, without a server."""
    from tpray.commands import jsonl
    from tpray.commands.loading import load_with_progress

    if bool(texts) == (input_file is not None):
        raise ConfigError("name texts to classify, or a JSONL file with --in, and not both")
    if pair and (texts is None or len(texts) != 2):
        raise ConfigError("--pair takes exactly two texts; in a JSONL file a pair has a text_pair")
    if input_file is None and (output_file is not None or resume):
        raise ConfigError("--out and --resume go with a JSONL file: name it with --in, or use --json for texts")
    read = chunks_of(chunks, stride, aggregate, max_chunks)
    if input_file is not None:
        jsonl.check_files(input_file, output_file, resume)
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
        instance_family=instance_family,
        neuron_layout=neuron_layout,
        lnc=lnc_number(lnc),
        in_process=input_file is None,  # a file may take hours, and its ranks are brought back
    ) as classifier:
        if input_file is not None:
            done = jsonl.classify_file(classifier, input_file, output_file, raw_scores, truncate, err, resume, read)
            if not done.classified and not done.refused and not done.kept:
                err.print(f"{input_file} has no lines: there was nothing to classify", highlight=False, soft_wrap=True)
            else:
                err.print(str(done), highlight=False, soft_wrap=True)
            raise typer.Exit(1 if done.refused else 0)
        assert texts, "checked above"
        items: list[Any] = [(texts[0], texts[1])] if pair else list(texts)
        if classifier.task == TOKEN:
            strategy: Strategy = "none" if raw_scores else "simple"
            found = classifier.classify_tokens(items, strategy, raw_scores=raw_scores, truncate=truncate)
            print_entities(items, found, as_json)
        else:
            print_scores(items, classifier.classify(items, raw_scores, truncate, read), as_json)
