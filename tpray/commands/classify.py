"""``tpray classify``."""

from __future__ import annotations

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
    InputFile,
    Layout,
    LogicalCores,
    MaxChunks,
    ModelFlag,
    PlanFile,
    Replicas,
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
    replicas: Replicas = AUTO,
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
    pair: Annotated[bool, typer.Option("--pair", help="The two texts are one pair.")] = False,
    input_file: InputFile = None,
    output_file: Annotated[
        str | None,
        typer.Option(
            "--out", help="File or URL to write, of the same kind; standard output without it. A folder, for several."
        ),
    ] = None,
    text_column: TextColumn = "text",
    pair_column: Annotated[
        str | None,
        typer.Option(
            "--pair-column", help="What the second text of a pair is called.", show_default="text_pair, if any"
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what a run that was interrupted has written.")
    ] = False,
    raw_scores: Annotated[bool, typer.Option("--raw-scores", help="Logits instead of probabilities.")] = False,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long.")] = False,
    chunks: InChunks = False,
    stride: Stride = None,
    aggregate: Aggregate = None,
    max_chunks: MaxChunks = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")] = False,
) -> None:
    """Classify texts, or a file of them, without a server."""
    from tpray.commands.classify_file import How, classify_file
    from tpray.commands.classify_files import classify_files, is_many
    from tpray.commands.loading import load_with_progress
    from tpray.commands.records import check_source, check_target
    from tpray.data.columns import Columns

    if bool(texts) == (input_file is not None):
        raise ConfigError("name texts to classify, or a file of them with --in, and not both")
    if pair and (texts is None or len(texts) != 2):
        raise ConfigError("--pair takes exactly two texts; in a file a pair has a text_pair, or see --pair-column")
    if input_file is None and (output_file is not None or resume):
        raise ConfigError("--out and --resume go with a file: name it with --in, or use --json for texts")
    read = chunks_of(chunks, stride, aggregate, max_chunks)
    columns = Columns(text_column, pair_column)
    how = How(raw_scores, truncate, read, columns, resume)
    options = {
        "revision": revision,
        "dtype": dtype,
        "runtime": runtime,
        "plan": plan,
        "chat_template": chat_template,
        "classifier_from_token": words_of(classifier_from_token),
        "verify_key": verify_key,
        "instance_family": instance_family,
        "neuron_layout": neuron_layout,
        "lnc": lnc_number(lnc),
    }
    if input_file is not None and is_many(input_file):
        if output_file is None:
            raise ConfigError(f"{input_file} names many files: name a folder to write with --out")
        totals = classify_files(input_file, output_file, how, model, tp, replicas, cores_per_rank, options, err)
        err.print(str(totals), highlight=False, soft_wrap=True)
        raise typer.Exit(1 if totals.failed or totals.refused else 0)
    if input_file is not None:
        if replicas not in (1, AUTO):
            raise ConfigError("--replicas is for a folder or a pattern of files: one file is one group's work")
        check_source(input_file, columns)
        check_target(input_file, output_file, resume)
    in_process = input_file is None  # a file may take hours, and its ranks are brought back
    with load_with_progress(model, tp=tp, cores=cores_per_rank, in_process=in_process, **options) as classifier:
        if input_file is not None:
            done = classify_file(classifier, input_file, output_file, err, how)
            if not done.classified and not done.refused and not done.kept:
                err.print(
                    f"{input_file} has no {done.unit}s: there was nothing to classify", highlight=False, soft_wrap=True
                )
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
