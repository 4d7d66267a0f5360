"""A classifier on ranks without a model, as the commands' tests have it."""

from tests.commands.conftest import classifier, executor

__all__ = ["classifier", "executor"]
