"""What a person sees in a browser: the page at ``/``, and the API's documentation at ``/docs``.

Both are static files of `page/`, without a build step, and take nothing from another host. Their policy for browsers
lets no script run but those: what checkpoints and users have written (labels, errors) cannot become one.

Source: https://www.w3.org/TR/CSP3.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

FOLDER = Path(__file__).parent / "page"

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'{styles}; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "cache-control": "no-cache",  # a browser asks whether it has changed
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class _Files(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(_HEADERS)
        return response


def swagger_ui() -> Path:
    """The folder of Swagger UI 5, which shows OpenAPI 3.1: `fastapi_offline` carries it."""
    found = find_spec("fastapi_offline")
    assert found is not None, "it is among the dependencies"
    return Path(str(found.origin)).parent / "static"


def add_pages(app: FastAPI) -> None:
    """Have ``app`` answer ``GET /`` and ``GET /docs``, and what their pages need."""

    def add(path: str, file: str, policy: str) -> None:
        async def show(_: Request) -> Response:
            return FileResponse(FOLDER / file, headers=_HEADERS | {"content-security-policy": policy})

        app.add_route(path, show, include_in_schema=False)

    add("/", "index.html", _POLICY.format(styles=""))
    add("/docs", "docs.html", _POLICY.format(styles=" 'unsafe-inline'"))  # Swagger UI sets styles so
    app.mount("/docs/assets", _Files(directory=swagger_ui()), name="docs-assets")
    app.mount("/page", _Files(directory=FOLDER), name="page")
