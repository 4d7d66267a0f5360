"""``tpray classify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tpray.commands.console import err, print_scores
from tpray.commands.flags import (
    CoresPerRank,
    Dtype,
    Family,
    Layout,
    LogicalCores,
    ModelFlag,
    PlanFile,
    Runtime,
    Tp,
    lnc_number,
)
from tpray.config import AUTO
from tpray.errors import ConfigError


def classify(
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts; with --pair, exactly two that are read together.")
    ] = None,
    model: ModelFlag = None,
    tp: Tp = 1,
    dtype: Dtype = AUTO,
    runtime: Runtime = AUTO,
    plan: PlanFile = None,
    cores_per_rank: CoresPerRank = None,
    instance_family: Family = None,
    neuron_layout: Layout = "process-per-rank",
    lnc: LogicalCores = None,
    pair: Annotated[bool, typer.Option("--pair", help="The two texts are one pair.")] = False,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--in",
            help='JSONL to read: {"text": ...} or {"text": ..., "text_pair": ...} a line; - is standard input.',
        ),
    ] = None,
    output_file: Annotated[
        Path | None, typer.Option("--out", help="JSONL to write; standard output without it.")
    ] = None,
    raw_scores: Annotated[bool, typer.Option("--raw-scores", help="Logits instead of probabilities.")] = False,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")] = False,
) -> None:
    """Classify texts, or a JSONL file, without a server."""
    from tpray.commands import jsonl
    from tpray.commands.loading import load_with_progress

    if bool(texts) == (input_file is not None):
        raise ConfigError("name texts to classify, or a JSONL file with --in, and not both")
    if pair and (texts is None or len(texts) != 2):
        raise ConfigError("--pair takes exactly two texts; in a JSONL file a pair has a text_pair")
    if input_file is not None and str(input_file) != "-" and not input_file.is_file():
        raise ConfigError(f"there is no file {input_file}")
    if output_file is not None and not output_file.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder {output_file.absolute().parent} to write {output_file.name} in")
    with load_with_progress(
        model,
        tp=tp,
        dtype=dtype,
        runtime=runtime,
        cores=cores_per_rank,
        plan=plan,
        instance_family=instance_family,
        neuron_layout=neuron_layout,
        lnc=lnc_number(lnc),
    ) as classifier:
        if input_file is not None:
            done = jsonl.classify_file(classifier, input_file, output_file, raw_scores, truncate, err)
            err.print(f"{done.classified} classified, {done.refused} refused", highlight=False)
            raise typer.Exit(1 if done.refused else 0)
        assert texts, "checked above"
        items: list[Any] = [(texts[0], texts[1])] if pair else list(texts)
        print_scores(items, classifier.classify(items, raw_scores, truncate), as_json)
