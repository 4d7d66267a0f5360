"""A command to try a server with, that fits what its model does; and which of its pages there are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError

from tpray.parallel_layers.tasks import TOKEN
from tpray.serving.client import get

if TYPE_CHECKING:
    from tpray.serving.entrance import Entrance

ONE, ANOTHER = "The company is based in New York City", "The headquarters are situated in Manhattan"
OF_PAIRS = ("entail", "contradict", "paraphrase", "duplicate")
"""Parts of the names of labels that say how two texts go together."""


def curl(url: str, info: dict[str, Any], keyed: bool = False) -> str:
    """A request that the model is made for.

    Args:
        info: what ``/info`` says.
        keyed: a key is asked for.
    """
    labels = [str(label).lower() for label in info.get("labels", ())]
    body: dict[str, Any]
    if info.get("task") == TOKEN:
        route, body = "token_classification", {"inputs": ONE}
    elif len(labels) == 1 or sorted(labels) == ["no", "yes"]:
        route, body = "rerank", {"query": "Where is the company?", "texts": [ONE, "Apples are healthy"]}
    elif any(part in label for part in OF_PAIRS for label in labels):
        route, body = "predict", {"inputs": [ONE, ANOTHER]}
    else:
        route, body = "predict", {"inputs": ONE}
    shown = ' -H "authorization: Bearer $TPRAY_API_KEY"' if keyed else ""
    return f"curl {url}/{route}{shown} -H 'content-type: application/json' -d '{json.dumps(body)}'"


def present(at: Entrance, routes: Iterable[str]) -> Iterator[str]:
    """Those of the routes that a server of this process has."""
    for route in routes:
        try:
            get(f"{at.url}{route}", 5, at.key, at.context).close()
        except HTTPError as e:
            if e.code == HTTPStatus.NOT_FOUND:
                continue
        except OSError:  # it is busy, or ends: nobody is told of a page that is perhaps not there
            continue
        yield route
