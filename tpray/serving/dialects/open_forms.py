"""The forms of the Open Inference Protocol over HTTP: paths, bodies and answers."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tpray.serving.dialects.open_infer import VERSION

ROOT, MODEL, VERSIONED = "/v2", "/v2/models/{model:path}", "/v2/models/{model:path}/versions/{version}"
LIVE, READY = f"{ROOT}/health/live", f"{ROOT}/health/ready"
INFER = "/infer"
PLATFORM = "tpray"
JSON_BYTES = "inference-header-content-length"
"""The header that says how long the JSON is, where binary tensor data comes after it."""


_MODEL_IN_PATH = {
    "name": "model",
    "in": "path",
    "required": True,
    "description": "any name, or one of --served-model-name",
    "schema": {"type": "string", "minLength": 1},
}
IN_PATH: dict[str, list[dict[str, Any]]] = {
    "model": [_MODEL_IN_PATH],
    "version": [
        _MODEL_IN_PATH,
        {"name": "version", "in": "path", "required": True, "schema": {"type": "string", "enum": [VERSION]}},
    ],
}
"""The parameters of the paths, for OpenAPI."""


class InputTensor(BaseModel):
    """One input."""

    model_config = ConfigDict(extra="forbid")

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = Field({}, description="binary_data_size: so many bytes after the JSON are its data")
    data: Any = Field(None, description="its elements, row by row or flat")


class RequestedOutput(BaseModel):
    """One output that is asked for."""

    model_config = ConfigDict(extra="forbid")

    name: str
    parameters: dict[str, Any] = Field({}, description="classification: so many labels; binary_data: after the JSON")


class InferRequest(BaseModel):
    """The body of ``POST /v2/models/M/infer``, or the JSON before its binary tensor data."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["some text"]}]},
            ]
        },
    )

    inputs: list[InputTensor]
    id: str | None = None
    parameters: dict[str, Any] = Field(
        {},
        description="truncation (true, false, left or right; without it as the server's --auto-truncate says), timeout "
        "(microseconds), binary_data_output",
    )
    outputs: list[RequestedOutput] | None = Field(None, description="none: all")


class OutputTensor(BaseModel):
    """One output."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = Field(None, description="its elements, flat; none where they are after the JSON")


class InferResponse(BaseModel):
    """What a successful answer looks like."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


class ErrorResponse(BaseModel):
    """What every error looks like."""

    error: str
