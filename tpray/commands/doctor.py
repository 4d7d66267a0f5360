"""``tpray doctor``."""

from __future__ import annotations

import typer

from tpray.commands.console import print_checks, print_plan
from tpray.commands.flags import Model, PlanFile, Revision, Tp
from tpray.config import ModelConfig


def doctor(model: Model = None, revision: Revision = None, tp: Tp = 1, plan: PlanFile = None) -> None:
    """Say what this machine has, and what `auto` would choose on it; or, given a MODEL, how it would be sharded."""
    from tpray.commands.machine_checks import examine
    from tpray.commands.plan_report import explain_plan

    if model is not None or plan is not None:
        print_plan(explain_plan(ModelConfig(source=model, revision=revision, plan=plan), tp), tp)
        return
    checks = list(examine())
    print_checks(checks)
    raise typer.Exit(1 if any(check.problem for check in checks) else 0)
