"""Checkpoints, artifacts and templates that somebody wrote to do harm: none runs code, reads or writes elsewhere."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import tpray
from tpray.artifacts import store
from tpray.artifacts.folder import Artifact, rank_folder
from tpray.artifacts.manifest import FileRecord, read_manifest
from tpray.artifacts.manifest import Manifest as ClassifierManifest
from tpray.chat import Chat, ChatTemplate, check_template
from tpray.errors import ArtifactError, CheckpointError, ConfigError, InputError, StoreError
from tpray.parallel_layers import sharded
from tpray.parallel_layers.checkpoint import Checkpoint, find_checkpoint
from tpray.parallel_layers.plan import read_plan
from tpray.parallel_layers.weights import open_weights

ROOT = Path(tpray.__file__).parent


class Harm:
    """What is unpickled makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def _archive(harm: Harm, path: Path) -> None:
    torch.save({"weight": harm}, path)


def _before_archives(harm: Harm, path: Path) -> None:
    torch.save({"weight": harm}, path, _use_new_zipfile_serialization=False)


def _bare(harm: Harm, path: Path) -> None:
    path.write_bytes(pickle.dumps(harm))


def _key(harm: Harm, path: Path) -> None:
    """In the place of a name."""
    torch.save([harm, {"weight": torch.ones(2)}], path)


@pytest.mark.parametrize("write", [_archive, _before_archives, _bare, _key])
def test_no_file_of_weights_runs_code(write: Callable[[Harm, Path], None], tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    harm = Harm(marker)
    folder = tmp_path / "tp_rank_00_pp_rank_00"
    folder.mkdir()
    for path in (tmp_path / "pytorch_model.bin", tmp_path / "weights.safetensors", folder / "checkpoint.pt"):
        write(harm, path)
    for name in ("pytorch_model.bin", "weights.safetensors"):
        with pytest.raises(CheckpointError):
            open_weights(tmp_path / name)
    with pytest.raises(CheckpointError):
        sharded._read_part(folder)
    assert not marker.exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False) if write is not _bare else pickle.loads(
        (tmp_path / "pytorch_model.bin").read_bytes()
    )
    assert marker.exists(), "or this test would show nothing"


def test_nothing_unpickles() -> None:
    """All of tpray, by its syntax tree: Ray alone pickles, between processes that trust each other."""
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {getattr(node, "module", None), *(alias.name for alias in node.names)}
                assert not names & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}, path
            if isinstance(node, ast.Call):
                called, options = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
                assert called not in ("np.load", "numpy.load", "torch.export.load", "eval"), path
                assert called != "torch.jit.load" or path.name == "xla.py", (
                    "NeuronCores' programs alone are TorchScript"
                )
                assert called != "torch.load" or ast.unparse(options["weights_only"]) == "True", path
                assert "trust_remote_code" not in options or ast.unparse(options["trust_remote_code"]) == "False", path


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    copy = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint("bert"), copy)
    return copy


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/hostname", "a/../../x.bin"])
def test_an_index_names_no_file_elsewhere(name: str, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"bert.embeddings.word_embeddings.weight": name}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="files of weights lie beside their index"):
        _ = find_checkpoint(checkpoint).weight_files


def test_a_sharded_checkpoint_names_no_file_elsewhere(tmp_path: Path) -> None:
    torch.save(torch.ones(2), tmp_path / "other.pt")
    part = tmp_path / "parts" / "tp_rank_00_pp_rank_00"
    (part.parent / f"{part.name}.tensors" / "tensor_").mkdir(parents=True)
    referring: Any = tuple.__new__(sharded.TensorReference, ("/../../../other", "torch.FloatTensor"))
    with sharded._importable():
        torch.save({"weight": referring}, part)
    with pytest.raises(CheckpointError):
        sharded._read_part(part)


def test_a_tokenizer_reads_no_file_elsewhere(checkpoint: Path) -> None:
    secret = checkpoint.parent / "keys"
    secret.write_text("alice: correct-horse\n")
    config = checkpoint / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_file": str(secret)}))
    assert not [word for word in find_checkpoint(checkpoint).tokenizer.get_vocab() if "alice" in word]


HEADER = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    ("length", "header"),
    [
        (1 << 62, HEADER),
        (99_000_000, HEADER),
        (None, {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 8]}}),
        (None, {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
        (None, {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}),
        (None, HEADER | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}),
        (None, {"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]}}),
    ],
)
def test_headers_that_lie_are_refused(length: int | None, header: Any, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(12))
    with pytest.raises(CheckpointError):
        open_weights(path)


def test_a_file_that_unpacks_to_much_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(100_000_000))
        bomb.writestr("archive/version", "3")
    assert path.stat().st_size < 1_000_000
    with pytest.raises(CheckpointError):
        open_weights(path)


def test_json_that_is_too_deep_is_refused(tmp_path: Path) -> None:
    for name in ("config.json", "manifest.json", "plan.json", "model.safetensors.index.json"):
        (tmp_path / name).write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match="nested too deeply"):
        Checkpoint("it", tmp_path).stored_config()
    with pytest.raises(CheckpointError, match="nested too deeply"):
        _ = Checkpoint("it", tmp_path).weight_files
    with pytest.raises(ArtifactError, match="nested too deeply"):
        read_manifest(tmp_path, ClassifierManifest)
    with pytest.raises(ConfigError, match="nested too deeply"):
        read_plan(tmp_path / "plan.json")


def test_a_manifest_names_no_file_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("another's")
    (tmp_path / "artifact" / rank_folder(0)).mkdir(parents=True)
    (tmp_path / "artifact" / rank_folder(0) / "link").symlink_to(tmp_path / "other")
    record = FileRecord.of(tmp_path / "other")
    for name in ("../../other", str(tmp_path / "other"), "link"):
        artifact = Artifact.__new__(Artifact)
        artifact.directory = tmp_path / "artifact"
        with pytest.raises(ArtifactError, match="is missing"):
            artifact._check_files(rank_folder(0), {name: record})


class Bucket:
    """An object store, where any name may be."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def find(self, path: str) -> list[str]:
        return [f"{path}/{name}" for name in self.names]

    def get_file(self, name: str, target: str) -> None:
        Path(target).write_text("written")


@pytest.mark.parametrize("name", ["../escaped", "rank_00/../../../escaped", "/escaped"])
def test_a_store_writes_nothing_elsewhere(name: str, tmp_path: Path) -> None:
    target = tmp_path / "fetched" / "key"
    with pytest.raises(StoreError, match="outside of the artifact's folder"):
        store._copy_once(Bucket("manifest.json", name), "bucket/key", target, "s3://bucket/key")
    assert not target.exists()
    assert not list(tmp_path.rglob("escaped"))
    store._copy_once(Bucket("manifest.json", "rank_00/a"), "bucket/key", target, "s3://bucket/key")
    assert (target / "rank_00" / "a").is_file()


ESCAPES = (
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__cla' ~ 'ss__'] }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ messages|attr('__class__') }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '{0[0].__class__}'.format_map({'0': messages}) }}",
    "{{ ('%s' % messages.__class__) }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ joiner.__init__.__builtins__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ messages.append({}) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ messages.clear() }}",
    "{% include '/etc/hostname' %}",
    "{% import '/etc/hostname' as x %}",
    "{% extends '/etc/hostname' %}",
    "{{ open('/etc/hostname').read() }}",
    "{{ range(10 ** 7)|list }}",
)
CHAT = Chat.of([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_stays_in_its_sandbox(template: str) -> None:
    text = ""  # what is unsafe is refused, or undefined and becomes nothing
    with suppress(InputError):
        text = str(ChatTemplate(template, {}).render(CHAT))
    assert text in ("", "[Undefined]"), text
    assert CHAT.messages == ({"role": "user", "content": "Hi"},), "what it was given is as it was"


def test_templates_run_in_jinjas_immutable_sandbox(tmp_path: Path) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from tpray import chat

    assert isinstance(chat._compiled("{{ messages }}").environment, ImmutableSandboxedEnvironment)
    (tmp_path / "template").write_text("{% if %}")
    with pytest.raises(ConfigError, match="is not a jinja template"):
        check_template(tmp_path / "template")
