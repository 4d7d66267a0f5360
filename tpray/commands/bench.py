"""``tpray bench``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tpray.commands.console import err, print_outcomes
from tpray.commands.flags import ClientKey
from tpray.errors import ConfigError


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
    api_key: ClientKey = None,
    single: Annotated[bool, typer.Option("--single", help="Make up single texts, not pairs.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw latency against throughput, a PNG or SVG; points say their load."),
    ] = None,
) -> None:
    """Measure a running server: latency, throughput and errors under closed and open loops of requests."""
    import asyncio

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from tpray.commands import load_generator as load
    from tpray.serving.client import bearer

    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url} is not a URL: it starts with http:// or https://")
    if plot_file is not None:
        load.check_plots(plot_file)
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

        generator = load.Generator(url, inputs, timeout, tick, bearer(api_key))
        outcomes = asyncio.run(generator.run(loads, duration, warm_up, max_requests))
    print_outcomes(outcomes)
    if json_file is not None:
        json_file.write_text(json.dumps({"url": url, "runs": [o.summary() for o in outcomes]}, indent=2) + "\n")
    if plot_file is not None:
        load.plot(load.curves(outcomes), plot_file, url)
    raise typer.Exit(0 if any(o.latencies_ms for o in outcomes) else 1)


def _numbers(flag: str, value: str, whole: bool = False) -> list[float]:
    try:
        numbers = [float(int(part) if whole else float(part)) for part in value.split(",") if part.strip()]
    except ValueError as e:
        raise ConfigError(f"{flag} {value}: give numbers with commas between them") from e
    if any(not number > 0 for number in numbers):
        raise ConfigError(f"{flag} {value}: every number must be positive")
    return numbers
