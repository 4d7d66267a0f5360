"""The dashboard's picture in the README: its own queries, asked of a real Prometheus over a real server, drawn here.

`python -m tests.monitoring.picture` makes it anew in two minutes, with Prometheus and matplotlib (the extra `bench`).
It shows what Grafana asks for, in Grafana's places, and not Grafana itself.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tests.monitoring.prometheus import Prometheus
from tests.monitoring.queries import DASHBOARD, for_prometheus, panels
from tests.monitoring.scene import scene

PICTURE = Path(__file__).parent / "dashboard.png"
COLUMN, LINE = 0.58, 0.30
"""Inches of Grafana's units: of the 24 columns, and of a line."""
BACKGROUND, PANEL, TEXT, FAINT = "#111217", "#181b1f", "#ccccdc", "#2c3036"
COLORS = ["#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#37872d", "#8ab8ff"]
NAMED = {"green": COLORS[0], "yellow": COLORS[1], "red": COLORS[4], "blue": COLORS[2]}
Series = tuple[str, np.ndarray, np.ndarray]
"""A legend; the times, seconds after the start; the values."""


def said(value: float, unit: str) -> str:
    """A number with its unit, as short as Grafana's."""
    if not np.isfinite(value):
        return "-"
    if unit == "s" and 0 < abs(value) < 1:
        return f"{value * 1000:.3g} ms"
    if unit in ("s", "reqps"):
        return f"{value:.3g} {unit.replace('reqps', 'req/s')}"
    if unit == "percentunit":
        return f"{value * 100:.3g}%"
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {letter}{'B' if unit == 'bytes' else ''}"
    return f"{value:.3g}"


def after(value: float, _: int | None) -> str:
    """A time on the axis; its beginning is where the other axis has its labels."""
    return f"{value:.0f} s" if value else ""


class Drawing:
    """A figure with a place for each panel.

    Args:
        begin, end: of what is shown, seconds since the epoch.
    """

    def __init__(self, prometheus: Prometheus, begin: float, end: float) -> None:
        self._prometheus, self._begin, self._end = prometheus, begin, end
        rows = [panel["gridPos"] for panel in panels()]
        self._lines = max(at["y"] + at["h"] for at in rows)
        self.figure = Figure((24 * COLUMN, self._lines * LINE), facecolor=BACKGROUND)
        kinds: dict[str, Callable[[Axes, dict[str, Any]], None]] = {
            "stat": self._stat, "timeseries": self._lines_of, "heatmap": self._heatmap, "bargauge": self._bars,
            "table": self._table,
        }  # fmt: skip
        for row in json.loads(DASHBOARD.read_text())["panels"]:
            if row["type"] == "row":
                y = 1 - (row["gridPos"]["y"] + 0.65) / self._lines
                self.figure.text(0.005, y, row["title"], color=TEXT, size=10, va="center")
        for panel in panels():
            kinds[panel["type"]](self._place(panel), panel)

    def _place(self, panel: dict[str, Any]) -> Axes:
        """Axes within the panel's frame, below its title; a legend fits below them."""
        at = panel["gridPos"]
        x, w = at["x"] / 24, at["w"] / 24
        h = at["h"] / self._lines
        y = 1 - at["y"] / self._lines - h
        frame = self.figure.add_axes((x + 0.002, y + 0.0015, w - 0.004, h - 0.003), facecolor=PANEL)
        frame.set(xticks=[], yticks=[])
        self.figure.text(x + 0.006, y + h - 0.006, panel["title"], color=TEXT, size=9, weight="bold", va="top")
        for spine in frame.spines.values():
            spine.set_color(FAINT)
        line = 1 / self._lines
        axes = self.figure.add_axes((x + 0.042, y + 1.6 * line, w - 0.077, h - 2.9 * line), facecolor=PANEL)
        axes.tick_params(colors=TEXT, labelsize=7, length=0, pad=2)
        axes.grid(color=FAINT, linewidth=0.6)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return axes

    def _series(self, target: dict[str, Any]) -> list[Series]:
        every_s = self._prometheus.every_s
        query = for_prometheus(target["expr"], every_s, round(self._end - self._begin))
        found = self._prometheus.ask("query_range", query=query, start=self._begin, end=self._end, step=every_s)
        series = []
        for each in found["result"]:
            labels = each["metric"]
            legend = re.sub(r"{{(\w+)}}", lambda name: labels.get(name[1], ""), target["legendFormat"])  # noqa: B023
            times, values = np.array([[float(t), float(v)] for t, v in each["values"]]).T
            series.append((legend.strip() or "(none)", times - self._begin, values))
        return sorted(series, key=lambda one: one[0])

    def _stat(self, axes: Axes, panel: dict[str, Any]) -> None:
        axes.set_axis_off()
        defaults = panel["fieldConfig"]["defaults"]
        last = [values[-1] for target in panel["targets"] for _, _, values in self._series(target)]
        color = "green"
        for step in defaults["thresholds"]["steps"]:
            if step["value"] is None or (last and last[0] >= step["value"]):
                color = step["color"]
        places = 0 if defaults.get("decimals") == 0 else 3
        text = " of ".join(said(round(value, places), defaults["unit"]) for value in last) or "-"
        axes.text(0.5, 0.2, text, color=NAMED[color], size=17, ha="center", va="center", transform=axes.transAxes)

    def _lines_of(self, axes: Axes, panel: dict[str, Any]) -> None:
        defaults, overrides = panel["fieldConfig"]["defaults"], panel["fieldConfig"]["overrides"]
        left = [one for target in panel["targets"] for one in self._series(target)]
        right, unit_right = [], "short"
        for override in overrides:
            properties = {each["id"]: each["value"] for each in override["properties"]}
            right += [one for one in left if re.fullmatch(override["matcher"]["options"], one[0])]
            unit_right = properties.get("unit", defaults["unit"])
        names = [one[0] for one in left]
        if len(names) > len(set(names)):
            raise ValueError(f"{panel['title']}: two lines are called the same, of {names}")
        colors = dict(zip(names, COLORS * len(names), strict=False))
        stay = [one for one in left if one[0] not in {each[0] for each in right}]
        axes.set_xlim(0, self._end - self._begin)
        if defaults["custom"].get("stacking"):
            times = np.arange(0, self._end - self._begin + 1, self._prometheus.every_s)
            layers = [np.interp(times, t, np.nan_to_num(v), left=0) for _, t, v in stay]
            axes.stackplot(times, layers, colors=[colors[one[0]] for one in stay], alpha=0.75)
        else:
            for one in stay:
                axes.plot(one[1], one[2], color=colors[one[0]], linewidth=1.1)
        self._scale(axes, defaults["unit"])
        if right:
            other = axes.twinx()
            for one in right:
                other.plot(one[1], one[2], color=colors[one[0]], linewidth=1.1)
            other.tick_params(colors=TEXT, labelsize=7, length=0, pad=2)
            other.spines[:].set_visible(False)
            self._scale(other, unit_right)
        handles = [mpl.lines.Line2D([], [], color=colors[name], linewidth=3) for name in names]
        axes.legend(
            handles, names, loc="upper left", bbox_to_anchor=(-0.12, -0.1), ncols=6, frameon=False, labelcolor=TEXT,
            fontsize=7, handlelength=1, handletextpad=0.4, columnspacing=1, borderpad=0,
        )  # fmt: skip

    @staticmethod
    def _scale(axes: Axes, unit: str) -> None:
        top = axes.get_ylim()[1]
        axes.set_ylim(0, top if top > 0 and axes.dataLim.ymax > 0 else 1)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=unit == "short" and axes.dataLim.ymax >= 1))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: said(value, unit)))
        axes.xaxis.set_major_formatter(FuncFormatter(after))

    def _heatmap(self, axes: Axes, panel: dict[str, Any]) -> None:
        found = self._series(panel["targets"][0])
        found.sort(key=lambda one: float(one[0]))
        times = np.arange(0, self._end - self._begin + 1, self._prometheus.every_s)
        upto = np.array([np.interp(times, t, v, left=0) for _, t, v in found])
        counts = np.diff(upto, axis=0, prepend=0)
        used = np.flatnonzero(counts.max(1) > 0.01)
        counts, bounds = counts[used[0] : used[-1] + 1], [found[i][0] for i in range(used[0], used[-1] + 1)]
        shown = np.ma.masked_less(counts, 0.01)
        axes.pcolormesh(times, np.arange(len(bounds) + 1), shown[:, :-1], cmap="YlOrBr_r", norm="log")
        labels = ["" if bound == "+Inf" else said(float(bound), "s") for bound in bounds]
        axes.set_yticks(np.arange(1, len(bounds) + 1), labels)
        axes.xaxis.set_major_formatter(FuncFormatter(after))

    def _bars(self, axes: Axes, panel: dict[str, Any]) -> None:
        found = [(name, values[-1]) for name, _, values in self._series(panel["targets"][0])]
        unit = panel["fieldConfig"]["defaults"]["unit"]
        axes.set_position(axes.get_position().shrunk(0.72, 1.15).translated(0.075, -0.01))
        axes.barh([name for name, _ in found], [value for _, value in found], color=NAMED["blue"], height=0.6)
        for line, (_, value) in enumerate(found):
            axes.text(value, line, f" {said(value, unit)}", color=TEXT, size=7, va="center")
        axes.set_xticks([])
        axes.grid(visible=False)
        axes.invert_yaxis()

    def _table(self, axes: Axes, panel: dict[str, Any]) -> None:
        axes.set_axis_off()
        hidden = panel["transformations"][0]["options"]["excludeByName"]
        (found,) = self._prometheus.value(for_prometheus(panel["targets"][0]["expr"], 1, 1), self._end)
        lines = [f"{name:<12} {value}" for name, value in found["metric"].items() if not hidden.get(name)]
        axes.text(0, 1, "\n".join(lines), color=TEXT, size=8, va="top", family="monospace", linespacing=1.6)

    def save(self, path: Path) -> None:
        """As a PNG of few colours, which is a third as large."""
        from io import BytesIO

        from PIL import Image

        drawn = BytesIO()
        self.figure.savefig(drawn, dpi=100)
        Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    with TemporaryDirectory() as folder, scene(Path(folder), free_port(), free_port()) as found:
        begin = time.time()
        with ThreadPoolExecutor() as pool:
            clients = pool.submit(found.traffic, 100, in_burst=lambda share: 0.25 < share < 0.55)
            time.sleep(70)
            found.restart()
            clients.result()
        Drawing(found.prometheus, begin, time.time()).save(PICTURE)


if __name__ == "__main__":
    main()
