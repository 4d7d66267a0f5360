"""``tpray trace``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tpray.commands.console import err, out
from tpray.commands.flags import (
    ChatTemplateFile,
    Dtype,
    Family,
    For,
    FromToken,
    Layout,
    LogicalCores,
    Model,
    PlanFile,
    Revision,
    Runtime,
    SignKey,
    Store,
    Tp,
    lnc_number,
    words_of,
)
from tpray.config import AUTO, DEMO_DIR, ModelConfig, ParallelConfig, ServeConfig
from tpray.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from tpray.tokenizer import Plain


def trace(
    model: Model = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Where to put the artifact.", show_default="the cache")
    ] = None,
    revision: Revision = None,
    tp: Tp = AUTO,
    goal: For = "latency",
    dtype: Dtype = AUTO,
    runtime: Runtime = AUTO,
    plan: PlanFile = None,
    chat_template: ChatTemplateFile = None,
    classifier_from_token: FromToken = None,
    instance_family: Family = None,
    neuron_layout: Layout = AUTO,
    lnc: LogicalCores = None,
    buckets: Annotated[
        str | None,
        typer.Option(
            help="Shapes to trace one program each for, BATCHxLENGTH: 1x128,8x32,8x128; or auto, from --samples.",
            show_default="any shape, in one program",
        ),
    ] = None,
    samples: Annotated[
        Path | None, typer.Option(help="Texts like those to come, one a line or JSON lines; for --buckets auto.")
    ] = None,
    programs: Annotated[int, typer.Option(min=1, max=64, help="For --buckets auto: how many programs, at most.")] = 4,
    batch: Annotated[int, typer.Option(min=1, help="For --buckets auto: rows of each bucket.")] = 8,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that is there.")] = False,
    store: Store = None,
    sign_key: SignKey = None,
) -> None:
    """Trace a model's shards ahead of time, check them, and print where the artifact is."""
    from tpray.artifacts.folder import is_artifact
    from tpray.artifacts.settle import settle
    from tpray.artifacts.signature import read_private, sign
    from tpray.commands.loading import load_with_progress

    if out_dir is not None and out_dir.exists():
        if not is_artifact(out_dir) and (not out_dir.is_dir() or any(out_dir.iterdir())):
            raise ConfigError(f"{out_dir} exists and is not an artifact: name another folder")
        if is_artifact(out_dir) and not force:
            raise ConfigError(f"{out_dir} is an artifact already: use it, or replace it with --force")
    if model is not None and is_artifact(Path(model)):
        raise ConfigError(f"{model} is an artifact already; trace takes a checkpoint or a Hub id")
    if sign_key is not None:
        read_private(sign_key)  # before what takes long
    if buckets == "auto":
        buckets = auto_buckets(model, samples, programs, batch)
        err.print(f"Buckets: {buckets}", highlight=False)
    elif samples is not None:
        raise ConfigError("--samples is for --buckets auto")
    if tp == AUTO:
        parallel = ParallelConfig(runtime=runtime, instance_family=instance_family, lnc=lnc_number(lnc))
        settled = settle(
            ServeConfig(model=ModelConfig(source=model, revision=revision, dtype=dtype), parallel=parallel, goal=goal)
        )
        err.print(f"auto chooses {settled.why}", highlight=False, markup=False, soft_wrap=True)
        tp = settled.topology.tp
    with load_with_progress(
        model,
        revision=revision,
        tp=tp,
        dtype=dtype,
        runtime=runtime,
        out=out_dir,
        plan=plan,
        chat_template=chat_template,
        classifier_from_token=words_of(classifier_from_token),
        buckets=buckets or (),
        instance_family=instance_family,
        neuron_layout=neuron_layout,
        lnc=lnc_number(lnc),
        store=store,
        trace_only=True,
    ) as classifier:
        artifact, url = classifier.group.artifact, classifier.group.url
        checked = bool(classifier.group.workers)
    if store is not None and url is None:
        raise StoreError(f"the artifact is in {artifact.directory}, but could not be put into the store; see above")
    if sign_key is not None:
        sign(artifact.directory, sign_key, url)
    if not checked:
        err.print("There are no cores here to check it on, or none that are free: that is done wherever it is loaded.")
    out.print(url or str(artifact.directory), soft_wrap=True, highlight=False, markup=False)


def auto_buckets(model: str | None, samples: Path | None, programs: int, batch: int) -> str:
    """Up to so many buckets of ``batch`` rows for texts like those in ``samples``, as ``--buckets`` takes them.

    Raises:
        ConfigError: there are no samples.
    """
    from tpray.commands.load_generator import read_texts
    from tpray.runtime.buckets import Bucket, choose_lengths

    if samples is None:
        raise ConfigError("--buckets auto chooses by the lengths of your texts: name a file of some with --samples")
    lengths = _lengths_of(model, [tuple(text) if isinstance(text, list) else text for text in read_texts(samples)])
    return ",".join(str(Bucket(batch, length)) for length in choose_lengths(lengths, programs))


def _lengths_of(model: str | None, items: Sequence[Plain]) -> list[int]:
    """How many tokens each item has for ``model`` (None: the demo), special ones included.

    Raises:
        ModelNotFoundError, CheckpointError: there is no such model, or it has no tokenizer.
    """
    from tpray.parallel_layers.checkpoint import find_checkpoint
    from tpray.tokenizer import load_tokenizer, stock_rows

    checkpoint = find_checkpoint(model or DEMO_DIR)
    limit = checkpoint.plan.max_length(checkpoint.config)
    rows = stock_rows(load_tokenizer(checkpoint.directory, checkpoint.source), items)
    return [min(len(row), limit) for row in rows]
