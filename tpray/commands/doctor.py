"""``tpray doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

from tpray.commands.console import out, print_architectures, print_checks, print_plan
from tpray.commands.flags import Dtype, For, FromToken, Model, PlanFile, Revision, Tp, words_of
from tpray.config import AUTO, ModelConfig, ParallelConfig, ServeConfig
from tpray.errors import ConfigError


def doctor(
    model: Model = None,
    revision: Revision = None,
    tp: Tp = AUTO,
    goal: For = "latency",
    dtype: Dtype = AUTO,
    plan: PlanFile = None,
    classifier_from_token: FromToken = None,
    architectures: Annotated[bool, typer.Option(help="List the architectures that can be served.")] = False,
    markdown: Annotated[bool, typer.Option(help="List them as Markdown.")] = False,
) -> None:
    """Say what this machine has, and what `auto` would choose on it; or, given a MODEL, how it would be sharded."""
    if architectures or markdown:
        from tpray.commands.architecture_report import list_architectures

        print_architectures(list_architectures(), markdown)
        return
    from tpray.artifacts.settle import settle
    from tpray.commands.machine_checks import examine
    from tpray.commands.plan_report import explain_plan

    if model is not None or plan is not None:
        words = words_of(classifier_from_token)
        named = ModelConfig(source=model, revision=revision, plan=plan, dtype=dtype, classifier_from_token=words)
        settled = settle(ServeConfig(model=named, parallel=ParallelConfig(tp=tp), goal=goal))
        degree = settled.topology.tp
        report = explain_plan(named, degree)
        if settled.why:
            out.print(f"auto chooses {settled.why}", highlight=False, markup=False, soft_wrap=True)
        print_plan(report)
        return
    if tp != AUTO or goal != "latency" or dtype != AUTO or revision is not None or classifier_from_token is not None:
        raise ConfigError("--tp, --for, --dtype, --revision and --classifier-from-token are of a model: name one")
    checks = list(examine())
    print_checks(checks)
    raise typer.Exit(1 if any(check.problem for check in checks) else 0)
