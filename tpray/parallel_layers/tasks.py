"""What a classifier's head gives scores to: a text, or each of its tokens. Named as transformers' pipelines are."""

from __future__ import annotations

from typing import Any

TEXT, TOKEN = "text-classification", "token-classification"


def task_of(config: Any) -> str:
    """The task of a transformers configuration, by the class that its checkpoint was saved from."""
    saved = next(iter(config.architectures or ()), "")
    return TOKEN if saved.endswith("ForTokenClassification") else TEXT


def auto_class(config: Any) -> Any:
    """transformers' Auto class that builds the whole model, head included."""
    import transformers

    kinds = {
        TEXT: transformers.AutoModelForSequenceClassification,
        TOKEN: transformers.AutoModelForTokenClassification,
    }
    return kinds[task_of(config)]


def classifiers(config: Any) -> Any:
    """transformers' table of the classes that do its task: type of configuration -> class."""
    return auto_class(config)._model_mapping
