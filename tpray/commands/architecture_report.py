"""What `tpray doctor --architectures` lists: the architectures that can be served, read from their plans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tpray.errors import UnsupportedModelError
from tpray.parallel_layers.architectures import PLANS
from tpray.parallel_layers.architectures.common import HEAD, ONE_TOKEN, SMALL
from tpray.parallel_layers.architectures.decoders import VARIANTS
from tpray.parallel_layers.architectures.upstream import (
    ONE_FOR_ALL,
    VECTOR,
    classifier_types,
    default_config,
    derive,
    why_not,
)
from tpray.parallel_layers.plan import Cut, Plan, Split, Unit

HEADS = ("architecture (`model_type`)", "sharded", "found by", "notes")
OWN, DERIVED, NEITHER = "tpray's table", "transformers' plan", ""
_USUAL = {SMALL, ONE_TOKEN, VECTOR, HEAD, ONE_FOR_ALL}
"""Why norms, positions, poolers and heads stay whole everywhere."""


@dataclass(frozen=True)
class ArchitectureLine:
    """Architectures of which the same is to be said."""

    names: tuple[str, ...]
    sharded: str
    found_by: str
    notes: str

    def cells(self) -> tuple[str, str, str, str]:
        """What stands under `HEADS`."""
        return ", ".join(self.names), self.sharded, self.found_by, self.notes


def list_architectures() -> list[ArchitectureLine]:
    """Every architecture with a plan, and those that are refused for a reason, in lines of the same facts."""
    names: dict[tuple[str, str, str], list[str]] = {}
    for name, *facts in _facts():
        names.setdefault((facts[0], facts[1], facts[2]), []).append(name)
    return [ArchitectureLine(tuple(found), *facts) for facts, found in names.items()]


def _facts() -> Iterator[tuple[str, str, str, str]]:
    for name, plan in PLANS.items():
        yield name, _sharded(plan), OWN, _notes(plan)
        for variant in VARIANTS.get(name, ()):
            yield f"{name} {variant.when}", _sharded(variant.plan), OWN, _notes(variant.plan)
    refused = []
    for name in classifier_types():
        if name in PLANS:
            continue
        config = default_config(name)
        reason = why_not(config)
        if reason is not None:
            refused.append((name, "refused", NEITHER, reason))
            continue
        try:
            derived = derive(config)
        except UnsupportedModelError as e:
            refused.append((name, "refused", NEITHER, str(e)))
            continue
        if derived is not None:
            yield name, _sharded(derived), DERIVED, _notes(derived)
    yield from refused


def _sharded(plan: Plan) -> str:
    cuts = {rule.cut for rule in plan.rules}
    heads = any(cut.unit is not Unit.FEATURE for cut in cuts)
    parts = {
        "attention": heads,
        "its norms": any(cut.split is Split.NORM for cut in cuts),
        "feed-forward": Cut.DOWN in cuts,
        "vocabulary": Cut.VOCAB in cuts,
    }
    return ", ".join(name for name, holds in parts.items() if holds)


def _notes(plan: Plan) -> str:
    whole = {rule.why: rule.pattern for rule in plan.rules if rule.cut is Cut.REPLICATED and rule.why not in _USUAL}
    notes = [f"`{pattern}` is whole: {why}" for why, pattern in whole.items()]
    if plan.reads_last_token:
        notes.append("needs `pad_token_id` in config.json")
    if plan.reads_padding:
        notes.append("batches hold one length: it reads padding")
    return "; ".join(notes)


def as_markdown(lines: list[ArchitectureLine]) -> str:
    """The table as the README has it."""

    def row(cells: Sequence[str]) -> str:
        return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|\n"

    return "".join([row(HEADS), f"|{'---|' * len(HEADS)}\n", *(row(line.cells()) for line in lines)])
