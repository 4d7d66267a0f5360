"""A classifier that a command uses, and what is shown while it comes up."""

from __future__ import annotations

from typing import Any

from tpray.commands.console import show_progress, spinner
from tpray.group.phases import PhaseReport
from tpray.serving.local import LocalClassifier


def load_with_progress(model: str | None, **options: Any) -> LocalClassifier:
    """`tpray.load`, with a spinner. options: its own."""
    from tpray.serving.local import load

    what = f"Starting {model or 'the embedded demo'}"
    with spinner(what) as status:

        def show(report: PhaseReport) -> None:
            show_progress(status, what, report)

        return load(model, progress=show, **options)
