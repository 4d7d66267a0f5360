"""Figures of this machine's CPU cores, measured once and kept: a process of its own, which has torch, takes them."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tpray.cache_files import write_whole
from tpray.config import cache_dir, environment
from tpray.platforms.choose import Figures, Layout, ModelFacts
from tpray.platforms.cores import core_count, usable_cores
from tpray.platforms.cpu import cpu_model
from tpray.version import __version__

log = logging.getLogger(__name__)

MEASURE = "tpray.runtime.cpu.measure"
ANSWER_S = 60.0
"""For the whole, on a machine that has other work to do."""
TOKENS = 64
"""Of the row that is measured: what a request of two sentences has."""
ROWS = 8
"""Of the step that is measured for throughput."""


def step_seconds(model: ModelFacts, layouts: Sequence[Layout], rows: int) -> Figures:
    """How long a step of ``rows`` rows takes in each layout, seconds; nothing where that cannot be measured.

    Only the first start of a model of this shape in this environment measures, some two seconds with the import of
    torch; the answer is in the cache. On a busy machine there is none, and the next start asks again.
    """
    shape = {
        "hidden": model.hidden,
        "intermediate": model.intermediate,
        "heads": model.heads,
        "layers": model.layers,
        "dtype": model.dtype,
        "rows": rows,
        "length": min(TOKENS, model.length),
    }
    lists = [[one.replicas, one.tp, one.cores_per_rank] for one in layouts]
    found = _ask({"shape": shape, "layouts": lists})
    if not isinstance(found, list) or len(found) != len(layouts):
        return {}
    return {layout: float(layer_s) * model.layers for layout, layer_s in zip(layouts, found, strict=True)}


def times_float32(dtype: str) -> float | None:
    """How many times as long as in float32 a matrix product takes here in ``dtype``; None: it cannot be measured."""
    found = _ask({"dtype": dtype})
    return float(found) if isinstance(found, (int, float)) else None


def _ask(question: dict[str, Any]) -> Any:
    """The answer of the measuring process, or the one that it gave before; None, and a warning, if it fails."""
    here = {
        "cpu": cpu_model(),
        "cores": [usable_cores(), core_count()],
        "isa": environment().get("ONEDNN_MAX_CPU_ISA"),
        "versions": [__version__, version("torch")],
    }
    key = hashlib.sha256(json.dumps([question, here], sort_keys=True).encode()).hexdigest()[:24]
    path = cache_dir() / "measured" / f"{key}.json"
    try:
        return json.loads(path.read_bytes())["answer"]
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged
        pass
    try:
        process = subprocess.run(
            [sys.executable, "-m", MEASURE],
            input=json.dumps(question), capture_output=True, text=True, timeout=ANSWER_S, check=True,
        )  # fmt: skip
        answer = json.loads(process.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as e:
        said = str(getattr(e, "stderr", None) or e).strip().splitlines()
        log.warning("this machine's cores could not be measured: %s", said[-1])
        return None
    if answer is None:
        log.info("this machine is too busy to be measured")
        return None
    _keep(path, {"question": question, "here": here, "answer": answer})
    return answer


def _keep(path: Path, what: dict[str, Any]) -> None:
    try:
        write_whole(path, json.dumps(what))
    except OSError as e:
        log.warning("what was measured cannot be kept: %s", e)
