"""The code made of open_inference.proto, the file itself, and what Triton publishes: they say the same.

In processes of their own: one cannot hold messages of the same names twice.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import tpray.serving.oip

FOLDER = Path(tpray.serving.oip.__file__).parent

DESCRIBE = """
import json, sys
from google.protobuf.descriptor import FieldDescriptor as F
module = __import__(sys.argv[1], fromlist=["DESCRIPTOR"])
names = {getattr(F, name): name[5:].lower() for name in dir(F) if name.startswith("TYPE_")}
found = {}
def describe(message):
    for field in message.fields:
        kind = names[field.type] if field.message_type is None else field.message_type.name
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, value = field.message_type.fields
            kind = f"map<{names[key.type]}, {value.message_type.name}>"
        elif getattr(field, "is_repeated", None) or getattr(field, "label", 0) == 3:
            kind = f"repeated {kind}"
        found[f"{message.full_name}.{field.name}"] = [kind, field.number]
    for nested in message.nested_types:
        if not nested.GetOptions().map_entry:
            describe(nested)
for message in module.DESCRIPTOR.message_types_by_name.values():
    describe(message)
for service in module.DESCRIPTOR.services_by_name.values():
    for method in service.methods:
        found[method.full_name] = [method.input_type.name, method.output_type.name]
print(json.dumps(found))
"""


def described(module: str) -> dict[str, list[object]]:
    """Every field with its type and number, and every method with its messages."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DESCRIBE, module], capture_output=True, text=True, check=True
    )
    found: dict[str, list[object]] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def made() -> dict[str, list[object]]:
    return described("tpray.serving.oip.open_inference_pb2")


def test_the_code_is_made_of_the_file(made: dict[str, list[object]]) -> None:
    inside, found = ["inference"], dict[str, list[object]]()
    for line in (FOLDER / "open_inference.proto").read_text().splitlines():
        said = line.split("//")[0].strip()
        if field := re.fullmatch(r"((?:repeated )?\w+|map<\w+, \w+>) (\w+) = (\d+);", said):
            found[".".join([*(name for name in inside if name), field[2]])] = [field[1], int(field[3])]
        elif method := re.fullmatch(r"rpc (\w+)\((\w+)\) returns \((\w+)\) {}", said):
            found[f"inference.GRPCInferenceService.{method[1]}"] = [method[2], method[3]]
        elif opened := re.fullmatch(r"(message|service|oneof) (\w+) {", said):
            inside.append(opened[2] if opened[1] == "message" else "")
        elif said == "}":
            inside.pop()
    assert found == made
    assert len(found) > 50


@pytest.mark.skipif(find_spec("tritonclient") is None, reason="Triton's client is not installed")
def test_names_and_numbers_are_those_that_triton_publishes(made: dict[str, list[object]]) -> None:
    published = described("tritonclient.grpc.service_pb2")
    assert {name: published.get(name) for name in made} == made
