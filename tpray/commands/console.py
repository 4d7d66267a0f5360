"""What the commands print: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from tpray import logs
from tpray.config import ServeConfig

if TYPE_CHECKING:
    from tpray.commands.architecture_report import ArchitectureLine
    from tpray.commands.check import Check
    from tpray.commands.load_generator import Outcome
    from tpray.commands.plan_report import PlanReport
    from tpray.group.phases import PhaseReport
    from tpray.serving.typed import RankedDocument

log = logging.getLogger(__name__)
log.setLevel(logging.INFO)  # where logs are JSON, these are what the command says

out, err = Console(), Console(stderr=True)

ROUTES = {"/": "page", "/docs": "docs", "/health": "health"}
"""What a person may open of a server, and what it is called."""


def print_ready(
    url: str, named: str, config: ServeConfig, example: str, routes: Iterable[str], keys: Iterable[str] = ()
) -> None:
    """Where the server is, and a command to try it with.

    Args:
        example: the command; see `tpray.commands.try_it`.
        routes: of those that a person may open, the ones that there are: ``/docs``.
        keys: the names of those that are asked for.
    """
    groups = f"{config.replicas} group{'' if config.replicas == 1 else 's'} of tp {config.parallel.tp}"
    if logs.in_json():
        log.info("Ready %s, %s, at %s", named, groups, url, extra={"fields": {"url": url}})
        return
    out.print(f"[bold green]Ready[/] {escape(named)}, {groups}, at [bold]{escape(url)}[/]", highlight=False)
    for route in routes:
        name = ROUTES[route]
        out.print(f"  {name:<9} {url}{route}", soft_wrap=True, highlight=False, markup=False)
    if names := ", ".join(keys):
        out.print(f"  {'keys':<9} {names}", soft_wrap=True, highlight=False, markup=False)
    out.print(f"  {'try it':<9} {example}", soft_wrap=True, highlight=False, markup=False)
    out.print("  Ctrl-C stops.", highlight=False, markup=False)


def print_scores(items: list[Any], rows: list[Any], as_json: bool) -> None:
    """Every label's score for each text, as a table or as JSON lines."""
    if as_json:
        for item, scores in zip(items, rows, strict=True):
            sys.stdout.write(json.dumps({"input": item, "scores": scores}, ensure_ascii=False) + "\n")
        return
    table = _folded("text", "label", "score")
    for item, scores in zip(items, rows, strict=True):
        for i, score in enumerate(scores):
            text = "" if i else (item if isinstance(item, str) else "\n".join(item))
            table.add_row(
                escape(text), escape(score["label"]), f"{score['score']:.4f}", end_section=i == len(scores) - 1
            )
    out.print(table)


def print_ranking(ranking: list[RankedDocument], as_json: bool) -> None:
    """Documents with their numbers and scores, as they come."""
    if as_json:
        for each in ranking:
            sys.stdout.write(json.dumps(each, ensure_ascii=False) + "\n")
        return
    table = _folded("index", "document", "score")
    for each in ranking:
        table.add_row(str(each["index"]), escape(each["document"]), f"{each['score']:.4f}")
    out.print(table)


def print_entities(items: list[Any], rows: list[Any], as_json: bool) -> None:
    """The entities of each text, as a table or as JSON lines."""
    if as_json:
        for item, found in zip(items, rows, strict=True):
            sys.stdout.write(json.dumps({"input": item, "entities": found}, ensure_ascii=False) + "\n")
        return
    table = _folded("text", "words", "label", "score")
    for item, found in zip(items, rows, strict=True):
        for i, entity in enumerate(found or [{}]):
            label = entity.get("entity_group", entity.get("entity", ""))
            words, score = entity.get("word", ""), f"{entity['score']:.4f}" if entity else ""
            end = i >= len(found) - 1
            table.add_row("" if i else escape(item), escape(words), escape(label), score, end_section=end)
    out.print(table)


def print_plan(report: PlanReport) -> None:
    """How a model would be sharded, and what each rank would hold."""
    lines, title = report.lines, f"Sharding plan, weights in {report.dtype}"
    table = _folded("layers", "how", "count", "whole", f"a rank of {report.tp}", title=title)
    for line in lines:
        how = f"{line.how}: {line.why}" if line.why else line.how
        sizes = [f"{size / 2**20:.2f} MiB" for size in (line.whole_bytes, line.rank_bytes)]
        table.add_row(escape(line.pattern), escape(how), str(line.layers), *sizes)
    whole, own = (sum(sizes) for sizes in zip(*((n.whole_bytes, n.rank_bytes) for n in lines), strict=True))
    table.add_section()
    table.add_row("", "", str(sum(n.layers for n in lines)), f"{whole / 2**20:.2f} MiB", f"{own / 2**20:.2f} MiB")
    out.print(table)
    memory = ", ".join(f"{size / 2**20:.2f} MiB at tp {tp}" for tp, size in report.by_degree.items())
    out.print(f"a rank's weights in {report.dtype}, at most: {memory}", highlight=False, soft_wrap=True)


def print_architectures(lines: list[ArchitectureLine], markdown: bool) -> None:
    """What can be served, what of it is sharded, and what is refused."""
    from tpray.commands.architecture_report import HEADS, as_markdown

    if markdown:
        sys.stdout.write(as_markdown(lines))
        return
    table = _folded(*HEADS, show_lines=True)
    for line in lines:
        table.add_row(*map(escape, line.cells()))
    out.print(table)


def print_outcomes(outcomes: list[Outcome]) -> None:
    """A line for each load; what went wrong, by its reason, below."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, title="latencies in ms")
    table.add_column("load", no_wrap=True)
    for name in ("req/s", "tok/s", "p50", "p90", "p99", "max", "done", "errors"):
        table.add_column(name, justify="right", overflow="fold")
    for o in outcomes:
        latencies = [_short(o.percentile(share)) if o.latencies_ms else "-" for share in (50, 90, 99, 100)]
        tokens = f"{o.tokens_per_second:.0f}" if o.tokens else "-"
        counts = str(len(o.latencies_ms)), str(o.errors.total())
        table.add_row(o.load.name, _short(o.per_second), tokens, *latencies, *counts)
    out.print(table)
    for o in outcomes:
        for reason, count in o.errors.items():
            out.print(f"{o.load.name}: {count} x {reason}", highlight=False, markup=False)


def _short(figure: float) -> str:
    """With three figures or more."""
    return f"{figure:.1f}" if figure < 100 else f"{figure:.0f}"


def spinner(what: str) -> Status:
    """A sign of life on a terminal, within a ``with`` block."""
    return err.status(escape(what))


def show_progress(status: Status, what: str, report: PhaseReport) -> None:
    """In a terminal the spinner says how far it is; elsewhere, in a log, long phases get a line for each part."""
    status.update(escape(f"{what}: {report.name} {'done' if report.done else report.note}"))
    if not report.done and not err.is_terminal:
        show_phase(report)


def show_phase(report: PhaseReport) -> None:
    """A line for a phase of a group's start."""
    if logs.in_json():
        fields = {"phase": report.name, "seconds": round(report.seconds, 3)}
        log.info("phase %s: %s", report.name, report.note, extra={"fields": fields})
        return
    note = f"  [dim]{escape(report.note)}[/]" if report.note else ""
    number = report.number or " "
    err.print(f"  {number} {report.name:<9} {report.seconds:6.2f} s{note}", highlight=False, soft_wrap=True)


def print_checks(checks: list[Check]) -> None:
    """What `tpray doctor` found; under each problem the sentence that mends it."""
    table = _pairs()
    for check in checks:
        mark = "" if check.problem is None else "[red]✗[/] "
        table.add_row(f"[bold]{check.name}[/]", f"{mark}{escape(check.value)}")
        if check.problem:
            table.add_row("", f"[red]{escape(check.problem)}[/]")
    out.print(table)


def status_table(info: dict[str, Any], healthy: bool) -> Table:
    """What ``/info`` of a server says."""
    table = _pairs()
    table.add_row("[bold]health[/]", "[green]healthy[/]" if healthy else "[red]unhealthy[/]")
    for name, said in _load(info).items():
        table.add_row(f"[bold]{name}[/]", escape(said))
    for key in ("model_id", "architecture", "model_dtype", "tp_degree", "runtime", "labels", "restarts", "version"):
        table.add_row(f"[bold]{key.replace('_', ' ')}[/]", escape(str(info.get(key))))
    if info.get("layout"):
        why = f" ({info['layout_failure']})" if info.get("layout_failure") else ""
        table.add_row("[bold]layout[/]", escape(f"{info['layout']}{why}"))
    for rank in info.get("ranks", []):
        size = (rank["sharded_bytes"] + rank["replicated_bytes"]) / 2**20
        pinned = f"cores {rank['cores']}" if rank["cores"] else "unpinned"
        table.add_row(f"[bold]rank {rank['rank']}[/]", f"process {rank['pid']}, {pinned}, {size:.1f} MiB of weights")
    phases = [f"{each['phase']} {each['seconds']:.1f} s" for each in info.get("startup", []) if each["seconds"] >= 0.05]
    if phases:
        table.add_row("[bold]start[/]", escape(", ".join(phases)))
    if info.get("release"):
        table.add_row("[bold]release[/]", escape(str(info["release"])))
    return table


def status_line(info: dict[str, Any], healthy: bool) -> str:
    """The load of a server in one line, with the time."""
    said = "".join(f", {name} {value}" for name, value in _load(info).items())
    health = "healthy" if healthy else "unhealthy"
    return f"{time.strftime('%H:%M:%S')} {health}{said}, restarts {info.get('restarts')}"


def _load(info: dict[str, Any]) -> dict[str, str]:
    """How much a server has to do, and since when it is up; what an older one does not say is left out."""
    figures = info.get("metrics", {})
    waiting, speed = figures.get("tpray_queue_tokens"), figures.get("tpray_tokens_per_second")
    said = {"state": info.get("state")}
    if "uptime_s" in info:
        said["uptime"] = duration(info["uptime_s"])
    if waiting is not None:
        said["queue"] = f"{waiting:.0f} tokens"
    if speed:
        said["speed"] = f"{speed:.0f} tokens/s"
    return {name: str(value) for name, value in said.items() if value is not None}


def duration(seconds: float) -> str:
    """``59 s``, ``12 min 3 s``, ``5 h 2 min``, ``3 d 4 h``."""
    whole = int(seconds)
    units = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    parts = []
    for unit, size in units:
        count, whole = divmod(whole, size)
        parts.append((count, unit))
    while len(parts) > 1 and parts[0][0] == 0:
        parts.pop(0)
    return " ".join(f"{count} {unit}" for count, unit in parts[:2] if count or len(parts) == 1)


def say(what: str) -> None:
    """What the command does, in a line of standard error."""
    if logs.in_json():
        log.info("%s", what)
    else:
        err.print(what)


def print_error(error: Exception | str) -> None:
    """An error that the user can mend, in one line."""
    if logs.in_json():
        log.error("%s", error)
        return
    err.print(f"[bold red]tpray:[/] {escape(str(error))}", highlight=False, soft_wrap=True)


def _folded(*heads: str, **options: Any) -> Table:
    """A table that fits a narrow terminal with all that it holds: long words are broken, none is cut."""
    table = Table(**options)
    for head in heads:
        table.add_column(head, overflow="fold")
    return table


def _pairs() -> Table:
    """A table of names and values, without lines."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table
