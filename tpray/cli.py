"""The command line. Exit codes: 0 done; 1 it failed; 2 something you gave cannot work; 130 interrupted."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from tpray import __version__
from tpray.config import BatchConfig, ModelConfig, ParallelConfig, ServeConfig, log_level, stay_quiet
from tpray.errors import (
    ArtifactError,
    CheckpointError,
    ConfigError,
    InputError,
    ModelNotFoundError,
    StoreError,
    TprayError,
)
from tpray.flags import (
    Buckets,
    CoresPerRank,
    Dtype,
    Family,
    Layout,
    LogicalCores,
    Model,
    ModelFlag,
    PlanFile,
    Runtime,
    Store,
    Tp,
)
from tpray.screen import (
    err,
    out,
    print_error,
    print_findings,
    print_outcomes,
    print_plan,
    print_ready,
    print_scores,
    print_status,
    show_phase,
    show_progress,
    spinner,
)

if TYPE_CHECKING:
    from tpray.group.life import PhaseReport
    from tpray.serving.local import LocalClassifier

USER_ERRORS = (ConfigError, ModelNotFoundError, CheckpointError, ArtifactError, InputError)

app = typer.Typer(
    name="tpray",
    help="Tensor-parallel transformer classifiers on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    with launch.stopping_on_signals(), spinner(f"Starting {named}") as status:

        def show(report: PhaseReport) -> None:
            if report.done:
                show_phase(report)
            show_progress(status, f"Starting {named}", report)

        with launch.Server(config, host, port, show) as server:
            status.stop()
            print_ready(server.url, named, config)
            server.wait()
            err.print("Stopping")
    err.print("Stopped")


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
        lnc=_number(lnc),
    ) as classifier:
        if input_file is not None:
            done = jsonl.classify_file(classifier, input_file, output_file, raw_scores, truncate, err)
            err.print(f"{done.classified} classified, {done.refused} refused", highlight=False)
            raise typer.Exit(1 if done.refused else 0)
        assert texts, "checked above"
        items: list[Any] = [(texts[0], texts[1])] if pair else list(texts)
        print_scores(items, classifier.classify(items, raw_scores, truncate), as_json)


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
    out.print(url or str(artifact.directory), soft_wrap=True, highlight=False, markup=False)


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
        print_plan(checks.explain_plan(ModelConfig(source=model, plan=plan), tp), tp)
        return
    findings = list(checks.examine())
    print_findings(findings)
    raise typer.Exit(1 if any(finding.problem for finding in findings) else 0)


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
    print_status(info, healthy)
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
    print_outcomes(outcomes)
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


def _load(model: str | None, **options: Any) -> LocalClassifier:
    from tpray.serving.local import load

    what = f"Starting {model or 'the embedded demo'}"
    with spinner(what) as status:

        def show(report: PhaseReport) -> None:
            show_progress(status, what, report)

        return load(model, progress=show, **options)


def _number(lnc: Literal["1", "2"] | None) -> Literal[1, 2] | None:
    """Typer takes words to choose from, the configuration numbers."""
    return None if lnc is None else 1 if lnc == "1" else 2


def main() -> NoReturn:
    """The console script: errors that a user can mend are one line, without a traceback."""
    try:
        app()
    except TprayError as e:
        print_error(e)
        sys.exit(2 if isinstance(e, USER_ERRORS) else 1)
    except KeyboardInterrupt:
        err.print("Interrupted")
        sys.exit(130)
    sys.exit(0)
