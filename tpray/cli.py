"""The command line. Exit codes: 0 done; 1 it failed; 2 something you gave cannot work; 130 interrupted."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.status import Status
from rich.table import Table

from tpray import __version__
from tpray.config import (
    BatchConfig,
    DtypeName,
    InstanceFamily,
    ModelConfig,
    NeuronLayout,
    ParallelConfig,
    RuntimeName,
    ServeConfig,
    log_level,
    stay_quiet,
)
from tpray.errors import (
    ArtifactError,
    CheckpointError,
    ConfigError,
    InputError,
    ModelNotFoundError,
    StoreError,
    TprayError,
)

if TYPE_CHECKING:
    from tpray.group.life import PhaseReport
    from tpray.serving.bench import Outcome
    from tpray.serving.doctor import PlanLine
    from tpray.serving.local import LocalClassifier

USER_ERRORS = (ConfigError, ModelNotFoundError, CheckpointError, ArtifactError, InputError)

app = typer.Typer(
    name="tpray",
    help="Tensor-parallel transformer classifiers on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out, err = Console(), Console(stderr=True)

Model = Annotated[
    str | None,
    typer.Argument(
        envvar="TPRAY_MODEL",
        help="Hub id, checkpoint directory, or a traced artifact's directory or URL.",
        show_default="the embedded demo",
    ),
]
ModelFlag = Annotated[
    str | None,
    typer.Option(
        "--model",
        envvar="TPRAY_MODEL",
        help="Hub id, checkpoint directory, or a traced artifact's directory or URL.",
        show_default="the embedded demo",
    ),
]
Tp = Annotated[int, typer.Option(min=1, envvar="TPRAY_TP", help="Tensor-parallel degree: ranks that share one model.")]
Dtype = Annotated[DtypeName, typer.Option(envvar="TPRAY_DTYPE", help="What the shards compute in.")]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        envvar="TPRAY_PLAN",
        help="JSON file that says how to shard the model.",
        show_default="tpray's table",
    ),
]
Buckets = Annotated[
    str | None,
    typer.Option(
        "--buckets",
        envvar="TPRAY_BUCKETS",
        help="Shapes to trace one program each for, BATCHxLENGTH: 1x128,8x32,8x128.",
        show_default="any shape, in one program",
    ),
]
Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="TPRAY_STORE",
        help="URL of a folder that machines share, s3://, gs:// or file://: what one traced, the others fetch.",
        show_default="none",
    ),
]
Runtime = Annotated[RuntimeName, typer.Option(envvar="TPRAY_RUNTIME", help="The kind of core.")]
CoresPerRank = Annotated[
    int | None,
    typer.Option(
        min=1,
        envvar="TPRAY_CORES_PER_RANK",
        help="Cores of each rank.",
        show_default="one NeuronCore; CPU cores shared out evenly",
    ),
]
Family = Annotated[
    InstanceFamily | None,
    typer.Option(
        "--instance-family", envvar="TPRAY_INSTANCE_FAMILY", help="Of NeuronCores.", show_default="this one's"
    ),
]
LogicalCores = Annotated[
    Literal["1", "2"] | None,
    typer.Option("--lnc", envvar="TPRAY_LNC", help="Physical NeuronCores in a logical one.", show_default="Neuron's"),
]
Layout = Annotated[
    NeuronLayout,
    typer.Option(
        "--neuron-layout", envvar="TPRAY_NEURON_LAYOUT", help="On NeuronCores: a process for each rank, or one for all."
    ),
]


def _version(value: bool) -> None:
    if value:
        out.print(f"tpray {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _start(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    stay_quiet()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("tpray").setLevel(log_level())


@app.command()
def serve(
    model: Model = None,
    tp: Tp = 1,
    replicas: Annotated[
        int, typer.Option(min=1, envvar="TPRAY_REPLICAS", help="Groups, each with the whole model.")
    ] = 1,
    dtype: Dtype = "auto",
    runtime: Runtime = "auto",
    plan: PlanFile = None,
    buckets: Buckets = None,
    store: Store = None,
    cores_per_rank: CoresPerRank = None,
    instance_family: Family = None,
    neuron_layout: Layout = "process-per-rank",
    lnc: LogicalCores = None,
    host: Annotated[str, typer.Option(envvar="TPRAY_HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, envvar="TPRAY_PORT", help="Port to listen on.")] = 8000,
    max_batch_tokens: Annotated[
        int, typer.Option(min=1, envvar="TPRAY_MAX_BATCH_TOKENS")
    ] = BatchConfig().max_batch_tokens,
    max_concurrent_requests: Annotated[
        int,
        typer.Option(min=1, envvar="TPRAY_MAX_CONCURRENT_REQUESTS", help="Texts queued or running; more get a 429."),
    ] = BatchConfig().max_concurrent_requests,
    max_client_batch_size: Annotated[
        int, typer.Option(min=1, envvar="TPRAY_MAX_CLIENT_BATCH_SIZE", help="Items in one request.")
    ] = BatchConfig().max_client_batch_size,
    payload_limit: Annotated[
        int, typer.Option(min=1024, envvar="TPRAY_PAYLOAD_LIMIT", help="Bytes in one request body.")
    ] = BatchConfig().payload_limit_bytes,
) -> None:
    """Serve a classifier over HTTP until Ctrl-C."""
    from tpray.runtime.buckets import parse

    config = ServeConfig(
        model=ModelConfig(source=model, dtype=dtype, plan=plan, buckets=parse(buckets) if buckets else (), store=store),
        parallel=ParallelConfig(
            tp=tp,
            cores_per_rank=cores_per_rank,
            runtime=runtime,
            instance_family=instance_family,
            neuron_layout=neuron_layout,
            lnc=_number(lnc),
        ),
        batch=BatchConfig(
            max_batch_tokens=max_batch_tokens,
            max_concurrent_requests=max_concurrent_requests,
            max_client_batch_size=max_client_batch_size,
            payload_limit_bytes=payload_limit,
        ),
        replicas=replicas,
    )
    from tpray.serving import launch

    named = model or "the embedded demo"
    with launch.stopping_on_signals(), err.status(f"Starting {named}") as status:

        def show(report: PhaseReport) -> None:
            if report.done:
                _show_phase(report)
            _show_progress(status, f"Starting {named}", report)

        with launch.Server(config, host, port, show) as server:
            status.stop()
            _announce(server.url, named, config)
            server.wait()
            err.print("Stopping")
    err.print("Stopped")


def _announce(url: str, named: str, config: ServeConfig) -> None:
    groups = f"{config.replicas} group{'s' if config.replicas > 1 else ''} of tp {config.parallel.tp}"
    out.print(f"[bold green]Ready[/] {named}, {groups}, at [bold]{url}[/]", highlight=False)
    example = {"inputs": ["The company is based in New York City", "The headquarters are situated in Manhattan"]}
    out.print(
        f"  curl {url}/predict -H 'content-type: application/json' -d '{json.dumps(example)}'",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    out.print(f"  {url}/docs describes the routes; Ctrl-C stops.", highlight=False)


@app.command()
def classify(
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts; with --pair, exactly two that are read together.")
    ] = None,
    model: ModelFlag = None,
    tp: Tp = 1,
    dtype: Dtype = "auto",
    runtime: Runtime = "auto",
    plan: PlanFile = None,
    cores_per_rank: CoresPerRank = None,
    instance_family: Family = None,
    neuron_layout: Layout = "process-per-rank",
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
    from tpray.serving import jsonl

    if bool(texts) == (input_file is not None):
        raise ConfigError("name texts to classify, or a JSONL file with --in, and not both")
    if pair and (texts is None or len(texts) != 2):
        raise ConfigError("--pair takes exactly two texts; in a JSONL file a pair has a text_pair")
    if input_file is not None and str(input_file) != "-" and not input_file.is_file():
        raise ConfigError(f"there is no file {input_file}")
    if output_file is not None and not output_file.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder {output_file.absolute().parent} to write {output_file.name} in")
    with _load(
        model,
        tp=tp,
        dtype=dtype,
        runtime=runtime,
        cores=cores_per_rank,
        plan=plan,
        instance_family=instance_family,
        neuron_layout=neuron_layout,
    ) as classifier:
        if input_file is not None:
            done = jsonl.classify_file(classifier, input_file, output_file, raw_scores, truncate, err)
            err.print(f"{done.classified} classified, {done.refused} refused", highlight=False)
            raise typer.Exit(1 if done.refused else 0)
        assert texts, "checked above"
        items: list[Any] = [(texts[0], texts[1])] if pair else list(texts)
        _print_scores(items, classifier.classify(items, raw_scores, truncate), as_json)


def _print_scores(items: list[Any], rows: list[Any], as_json: bool) -> None:
    if as_json:
        for item, scores in zip(items, rows, strict=True):
            sys.stdout.write(json.dumps({"input": item, "scores": scores}, ensure_ascii=False) + "\n")
        return
    table = Table("text", "label", "score")
    for item, scores in zip(items, rows, strict=True):
        for i, score in enumerate(scores):
            text = "" if i else (item if isinstance(item, str) else "\n".join(item))
            table.add_row(text, score["label"], f"{score['score']:.4f}", end_section=i == len(scores) - 1)
    out.print(table)


@app.command()
def trace(
    model: Model = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Where to put the artifact.", show_default="the cache")
    ] = None,
    tp: Tp = 1,
    dtype: Dtype = "auto",
    runtime: Runtime = "auto",
    plan: PlanFile = None,
    instance_family: Family = None,
    neuron_layout: Layout = "process-per-rank",
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
) -> None:
    """Trace a model's shards ahead of time, check them, and print where the artifact is."""
    from tpray.runtime.artifact import is_artifact

    if out_dir is not None and out_dir.exists():
        if not is_artifact(out_dir) and (not out_dir.is_dir() or any(out_dir.iterdir())):
            raise ConfigError(f"{out_dir} exists and is no artifact: name another folder")
        if is_artifact(out_dir) and not force:
            raise ConfigError(f"{out_dir} is an artifact already: use it, or replace it with --force")
    if model is not None and is_artifact(Path(model)):
        raise ConfigError(f"{model} is an artifact already; trace takes a checkpoint or a Hub id")
    if buckets == "auto":
        buckets = _auto_buckets(model, samples, programs, batch)
        err.print(f"Buckets: {buckets}", highlight=False)
    elif samples is not None:
        raise ConfigError("--samples is for --buckets auto")
    with _load(
        model,
        tp=tp,
        dtype=dtype,
        runtime=runtime,
        out=out_dir,
        plan=plan,
        buckets=buckets or (),
        instance_family=instance_family,
        neuron_layout=neuron_layout,
        lnc=_number(lnc),
        store=store,
    ) as classifier:
        artifact = classifier.group.artifact
        assert artifact is not None, "a loaded group has an artifact"
        url = classifier.group.url
    if store is not None and url is None:
        raise StoreError(f"the artifact is in {artifact.directory}, but could not be put into the store; see above")
    out.print(url or str(artifact.directory), soft_wrap=True, highlight=False)


def _auto_buckets(model: str | None, samples: Path | None, programs: int, batch: int) -> str:
    from tpray.runtime.buckets import Bucket, choose_lengths
    from tpray.serving.bench import read_texts
    from tpray.serving.text import lengths_of

    if samples is None:
        raise ConfigError("--buckets auto chooses by the lengths of your texts: name a file of some with --samples")
    lengths = lengths_of(model, [tuple(text) if isinstance(text, list) else text for text in read_texts(samples)])
    return ",".join(str(Bucket(batch, length)) for length in choose_lengths(lengths, programs))


@app.command()
def doctor(model: Model = None, tp: Tp = 1, plan: PlanFile = None) -> None:
    """Say what this machine has, and what `auto` would choose on it; or, given a MODEL, how it would be sharded."""
    from tpray.serving import doctor as checks

    if model is not None or plan is not None:
        _print_plan(checks.explain_plan(ModelConfig(source=model, plan=plan), tp), tp)
        return
    problems = 0
    table = Table("", "", show_header=False, box=None, padding=(0, 2, 0, 0))
    for finding in checks.examine():
        mark = "" if finding.problem is None else "[red]✗[/] "
        table.add_row(f"[bold]{finding.name}[/]", f"{mark}{finding.value}")
        if finding.problem:
            problems += 1
            table.add_row("", f"[red]{finding.problem}[/]")
    out.print(table)
    raise typer.Exit(1 if problems else 0)


def _print_plan(lines: list[PlanLine], tp: int) -> None:
    table = Table("layers", "how", "count", "whole", f"a rank of {tp}", title="Sharding plan, bytes in float32")
    for line in lines:
        how = f"{line.how}: {line.why}" if line.why else line.how
        sizes = [f"{size / 2**20:.2f} MiB" for size in (line.whole_bytes, line.rank_bytes)]
        table.add_row(line.pattern, how, str(line.layers), *sizes)
    whole, own = (sum(sizes) for sizes in zip(*((n.whole_bytes, n.rank_bytes) for n in lines), strict=True))
    table.add_section()
    table.add_row("", "", str(sum(n.layers for n in lines)), f"{whole / 2**20:.2f} MiB", f"{own / 2**20:.2f} MiB")
    out.print(table)


@app.command()
def status(
    url: Annotated[
        str, typer.Argument(envvar="TPRAY_URL", help="Where a tpray server listens.")
    ] = "http://127.0.0.1:8000",
) -> None:
    """Ask a running server whether it is healthy, and what it serves."""
    from urllib.error import HTTPError, URLError
    from urllib.request import urlopen

    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url} is no URL: it starts with http:// or https://")
    try:
        with urlopen(f"{url}/info", timeout=10) as answer:
            info = json.load(answer)
        try:
            urlopen(f"{url}/health", timeout=30).close()
            healthy = True
        except HTTPError:
            healthy = False
    except (URLError, OSError, ValueError) as e:
        reason = getattr(e, "reason", e)
        raise TprayError(f"no tpray server answers at {url}: {reason}") from e
    table = Table("", "", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("[bold]health[/]", "[green]healthy[/]" if healthy else "[red]unhealthy[/]")
    for key in (
        "model_id",
        "model_type",
        "model_dtype",
        "tp_degree",
        "runtime",
        "labels",
        "restarts",
        "version",
    ):
        table.add_row(f"[bold]{key.replace('_', ' ')}[/]", str(info.get(key)))
    for rank in info.get("ranks", []):
        size = (rank["sharded_bytes"] + rank["replicated_bytes"]) / 2**20
        pinned = f"cores {rank['cores']}" if rank["cores"] else "unpinned"
        table.add_row(f"[bold]rank {rank['rank']}[/]", f"process {rank['pid']}, {pinned}, {size:.1f} MiB of weights")
    out.print(table)
    raise typer.Exit(0 if healthy else 1)


@app.command()
def bench(
    url: Annotated[
        str, typer.Argument(envvar="TPRAY_URL", help="A server that speaks TEI's dialect.")
    ] = "http://127.0.0.1:8000",
    concurrency: Annotated[str, typer.Option(help="Closed loops: numbers of clients, e.g. 1,8,32.")] = "1,8,32",
    rate: Annotated[str, typer.Option(help="Open loops: requests a second that arrive, e.g. 20,50.")] = "",
    duration: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds of each run.")] = 10.0,
    warm_up: Annotated[float, typer.Option(min=0, max=600, help="Seconds before the first.")] = 2.0,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests of each run, at most.")] = 100_000,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until a request counts as lost.")] = 30.0,
    texts: Annotated[
        Path | None, typer.Option(help='Texts to send, one a line, or JSON lines with "text" and "text_pair".')
    ] = None,
    length: Annotated[
        str, typer.Option(help="Words of the texts made up otherwise: mean,deviation,shortest,longest.")
    ] = "53,15,16,128",
    single: Annotated[bool, typer.Option("--single", help="Make up single texts, not pairs.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    png_file: Annotated[Path | None, typer.Option("--plot", help="Draw latency against throughput, a PNG.")] = None,
) -> None:
    """Measure a running server: latency, throughput and errors under closed and open loops of requests."""
    import asyncio

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from tpray.serving import bench as load

    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url} is no URL: it starts with http:// or https://")
    if png_file is not None:
        load.check_plots()
    clients = [load.Load(concurrency=int(n)) for n in _numbers("--concurrency", concurrency, whole=True)]
    loads = clients + [load.Load(rate=r) for r in _numbers("--rate", rate)]
    if not loads:
        raise ConfigError("name at least one --concurrency or --rate")
    if texts is not None:
        inputs = load.read_texts(texts)
    else:
        sizes = _numbers("--length", length)
        if len(sizes) != 4:
            raise ConfigError(f"--length {length}: give mean,deviation,shortest,longest")
        inputs = load.generated(sizes[0], sizes[1], int(sizes[2]), int(sizes[3]), not single)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=err, transient=True
    ) as progress:
        task = progress.add_task("warming up", total=duration)

        def tick(so_far: load.Outcome) -> None:
            failed = sum(so_far.errors.values())
            text = f"{so_far.load.name}: {so_far.per_second:.0f} requests/s, {failed} errors"
            progress.update(task, description=text, completed=min(duration, so_far.seconds))

        generator = load.Generator(url, inputs, timeout, tick)
        outcomes = asyncio.run(generator.run(loads, duration, warm_up, max_requests))
    _print_outcomes(outcomes)
    if json_file is not None:
        json_file.write_text(json.dumps({"url": url, "runs": [o.summary() for o in outcomes]}, indent=2) + "\n")
    if png_file is not None:
        load.plot(outcomes, png_file, url)
    raise typer.Exit(0 if any(o.latencies_ms for o in outcomes) else 1)


def _numbers(flag: str, value: str, whole: bool = False) -> list[float]:
    try:
        numbers = [float(int(part) if whole else float(part)) for part in value.split(",") if part.strip()]
    except ValueError as e:
        raise ConfigError(f"{flag} {value}: give numbers with commas between them") from e
    if any(not number > 0 for number in numbers):
        raise ConfigError(f"{flag} {value}: every number must be positive")
    return numbers


def _print_outcomes(outcomes: list[Outcome]) -> None:
    table = Table("load", "requests/s", "tokens/s", "p50 ms", "p90 ms", "p99 ms", "max ms", "answered", "errors")
    for column in table.columns[1:-1]:
        column.justify = "right"
    for o in outcomes:
        latencies = [f"{o.percentile(share):.1f}" if o.latencies_ms else "-" for share in (50, 90, 99, 100)]
        tokens = f"{o.tokens_per_second:.0f}" if o.tokens else "-"
        errors = ", ".join(f"{count} x {reason}" for reason, count in o.errors.items()) or "0"
        table.add_row(o.load.name, f"{o.per_second:.1f}", tokens, *latencies, str(len(o.latencies_ms)), errors)
    out.print(table)


def _load(model: str | None, **options: Any) -> LocalClassifier:
    from tpray.serving.local import load

    with err.status(f"Starting {model or 'the embedded demo'}") as status:

        def show(report: PhaseReport) -> None:
            _show_progress(status, f"Starting {model or 'the embedded demo'}", report)

        return load(model, progress=show, **options)


def _number(lnc: Literal["1", "2"] | None) -> Literal[1, 2] | None:
    """Typer takes words to choose from, the configuration numbers."""
    return None if lnc is None else 1 if lnc == "1" else 2


def _show_progress(status: Status, what: str, report: PhaseReport) -> None:
    """In a terminal the spinner says how far it is; elsewhere, in a log, long phases get a line for each part."""
    status.update(f"{what}: {report.name} {'done' if report.done else report.note}")
    if not report.done and not err.is_terminal:
        _show_phase(report)


def _show_phase(report: PhaseReport) -> None:
    note = f"  [dim]{report.note}[/]" if report.note else ""
    err.print(f"  {report.number} {report.name:<8} {report.seconds:6.2f} s{note}", highlight=False, soft_wrap=True)


def main() -> NoReturn:
    """The console script: errors that a user can mend are one line, without a traceback."""
    try:
        app()
    except TprayError as e:
        err.print(f"[bold red]tpray:[/] {_escaped(e)}", highlight=False, soft_wrap=True)
        sys.exit(2 if isinstance(e, USER_ERRORS) else 1)
    except KeyboardInterrupt:
        err.print("Interrupted")
        sys.exit(130)
    sys.exit(0)


def _escaped(error: Exception) -> str:
    from rich.markup import escape

    return escape(str(error))
