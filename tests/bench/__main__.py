"""Run the side-by-side and print the table of targets; see ``--help``.

Everything of one table is measured in one run, because machines differ from hour to hour: only ratios are compared.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from tests.bench import report, traffic
from tests.bench.sections import SECTIONS, Run
from tpray.commands.load_generator import check_plots
from tpray.config import cache_dir
from tpray.platforms.cpu import native_dtypes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument(
        "--only",
        default="",
        metavar="NAMES",
        help=f"sections, with commas between: {', '.join(SECTIONS)}; all but the last",
    )
    parser.add_argument("--dtypes", default="", help="float32, bfloat16; those that this CPU multiplies itself")
    parser.add_argument("--short", action="store_true", help="a quick look: one run of each load, and shorter")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder for the table and the figures")
    parser.add_argument("--plot", type=Path, help="draw latency against throughput, SVG or PNG; needs the section http")
    options = parser.parse_args()
    able = [name for name in native_dtypes() if name != "int8"][::-1]
    dtypes = [name for name in able if name in (options.dtypes or ",".join(able)).split(",")]
    names = options.only.split(",") if options.only else list(SECTIONS)[:-1]
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"--only {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    if not dtypes:
        parser.error(f"--dtypes {options.dtypes}: this CPU multiplies {', '.join(able)}")
    if options.plot is not None:
        check_plots(options.plot)
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(traffic.checkpoint(cache_dir() / "bench"), dtypes, options.short, options.out)
    started = time.monotonic()
    for name in names:
        run.section(name)
    seconds = time.monotonic() - started
    text = report.text(run, seconds)
    print(text)
    (options.out / "table.md").write_text(text)
    values = {"machine": report.machine(), "values": run.values, "skipped": run.skipped, "seconds": round(seconds)}
    loads = {engine: {n: asdict(point) for n, point in points.items()} for engine, points in run.http.items()}
    (options.out / "results.json").write_text(json.dumps(values | {"http": loads}, indent=2) + "\n")
    if options.plot is not None:
        report.plot(run, options.plot)


if __name__ == "__main__":
    main()
