"""A classifier on ranks without a model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tpray.config import BatchConfig, ModelConfig
from tpray.group.classifier import ClassifierGroup
from tpray.group.fake_executor import FakeExecutor
from tpray.serving.local import LocalClassifier


@pytest.fixture
def executor() -> FakeExecutor:
    return FakeExecutor(2)


@pytest.fixture
def classifier(executor: FakeExecutor) -> Iterator[LocalClassifier]:
    with LocalClassifier(ClassifierGroup(ModelConfig(dtype="float32"), executor), BatchConfig()) as started:
        yield started
