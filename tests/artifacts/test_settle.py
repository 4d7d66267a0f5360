"""What a configuration leaves open is settled before anything starts: by a measurement, the model and the machine."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.artifacts.test_artifact import start
from tpray.artifacts import settle as settling
from tpray.artifacts.resolve import find_model
from tpray.artifacts.settle import cheapest_degree, settle
from tpray.artifacts.sizes import bytes_in
from tpray.config import DtypeName, ModelConfig, ParallelConfig, ServeConfig, cache_dir
from tpray.errors import CheckpointError, ConfigError, DegreeError
from tpray.parallel_layers.checkpoint import find_checkpoint
from tpray.platforms import choose as choosing
from tpray.platforms import cpu, measured
from tpray.platforms.choose import Asked, Layout, ModelFacts, candidates
from tpray.platforms.cores import core_count
from tpray.platforms.cpu import CpuPlatform, native_dtypes
from tpray.platforms.topology import Topology

CORES = core_count()
EVERYWHERE = ModelFacts("m", 1 << 20, "float32", 128, 384, 4, 4)


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[list[Layout]]:
    """What was asked to be measured; each layout takes as long as it has processes."""
    asked: list[list[Layout]] = []

    def answer(model: ModelFacts, layouts: list[Layout], rows: int) -> dict[Layout, float]:
        asked.append(layouts)
        return dict.fromkeys(layouts, 0.01)

    monkeypatch.setattr(settling, "step_seconds", answer)
    return asked


def test_explicit_values_are_kept_and_nothing_is_read_or_measured(measurements: list[list[Layout]]) -> None:
    config = ServeConfig(model=ModelConfig(source="/nowhere"), parallel=ParallelConfig(tp=2, cores_per_rank=1))
    settled = settle(config)
    assert (settled.topology.tp, settled.replicas, settled.why) == (2, 1, "")
    assert measurements == []


@pytest.mark.skipif(CORES < 2, reason="on one core there is nothing to choose")
def test_layers_too_small_to_share_are_not_measured(measurements: list[list[Layout]]) -> None:
    settled = settle(ServeConfig())
    assert measurements == []
    assert settled.topology.tp == 1
    assert "layers of 0.2 M weights are not worth sharing" in settled.why


@pytest.mark.skipif(CORES < 2, reason="on one core there is nothing to choose")
def test_an_open_degree_is_measured_and_the_reason_goes_with_the_topology(
    measurements: list[list[Layout]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "SMALL_WEIGHTS", 0)
    settled = settle(ServeConfig())
    assert settled.config.parallel.tp == settled.topology.tp == 1
    assert settled.config.replicas == settled.replicas == 1
    assert measurements[0][0] == Layout(1, 1, CORES)
    assert settled.topology.why == settled.why
    assert "for latency" in settled.why
    assert settle(settled.config).topology == settled.topology


@pytest.mark.skipif(CORES < 2, reason="on one core there is nothing to choose")
def test_for_throughput_there_are_several_groups(measurements: list[list[Layout]]) -> None:
    settled = settle(ServeConfig(goal="throughput"))
    assert settled.replicas > 1
    assert settled.config.replicas == settled.replicas
    assert settled.topology.cores_per_rank == CORES // settled.replicas
    assert settle(ServeConfig(goal="throughput", replicas=1)).replicas == 1


def test_autoscaling_chooses_for_one_group(measurements: list[list[Layout]]) -> None:
    config = ServeConfig.model_validate({"goal": "throughput", "autoscaling": {"max_replicas": 3}})
    assert settle(config).replicas == 1


def test_other_names_of_the_sizes_are_transformers(make_checkpoint: Callable[..., Path]) -> None:
    for model_type in ("gpt2", "distilbert", "xlm"):
        facts, _ = settling._facts(ModelConfig(source=str(make_checkpoint(model_type))), CpuPlatform())
        assert (facts.hidden, facts.heads, facts.layers) == (64, 4, 2)


@pytest.mark.parametrize("tp", [3, 5])
def test_more_ranks_than_cores_are_a_warning_with_both_figures(
    tp: int, make_checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    tp += CORES
    model = ModelConfig(source=str(make_checkpoint(num_attention_heads=2 * tp, hidden_size=4 * tp)))
    with caplog.at_level(logging.WARNING):
        settle(ServeConfig(model=model, parallel=ParallelConfig(tp=tp)))
    assert f"{tp} ranks want {tp} CPU cores and {CORES} can be used here: they share them" in caplog.text
    with pytest.raises(DegreeError, match="for throughput use --tp"):
        settle(ServeConfig(model=model, parallel=ParallelConfig(tp=tp), goal="throughput", replicas=1))


def test_more_ranks_than_heads_are_refused_before_anything_starts(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DegreeError, match="tp 64 is more than the 4 attention heads of this bert"):
        settle(ServeConfig(parallel=ParallelConfig(tp=64)))
    assert not caplog.records, "a warning of a start that does not come"


@pytest.mark.usefixtures("measurements")
def test_a_model_whose_sizes_are_not_known_is_served_by_one_rank(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(make_checkpoint(), tmp_path / "copy")
    (copy / "config.json").write_text('{"model_type": "fnet"}')  # it has no attention, and no heads
    settled = settle(ServeConfig(model=ModelConfig(source=str(copy))))
    assert settled.topology.tp == settled.replicas == 1
    assert "does not say how large its layers are" in settled.why


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_damaged_configuration_is_named(text: str, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    copy = shutil.copytree(make_checkpoint(), tmp_path / "copy")
    (copy / "config.json").write_text(text)
    for tp in ("auto", 1, 2):
        config = ServeConfig.model_validate({"model": {"source": str(copy)}, "parallel": {"tp": tp}})
        with pytest.raises(CheckpointError, match=r"config\.json is not a transformers configuration"):
            find_model(config.model, settle(config).topology)


def test_a_dtype_that_the_cores_emulate_is_refused_with_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset({"avx2"}))
    with pytest.raises(ConfigError, match=r"does not multiply bfloat16 itself .* takes [\d.]+ times as long as in flo"):
        find_model(ModelConfig(dtype="bfloat16"), Topology(1))
    with pytest.raises(ConfigError, match="without which sums of int8 products overflow: use --dtype float32 or auto"):
        find_model(ModelConfig(dtype="int8"), Topology(1))
    assert CpuPlatform().choose_dtype("auto") == "float32"


@pytest.mark.usefixtures("own_cache")
def test_real_layers_are_measured_once() -> None:
    """On a machine that others use there may be no answer, and then there is none in the cache either."""
    layouts = candidates(EVERYWHERE, CpuPlatform().facts(ParallelConfig()), "throughput", Asked())
    figures = measured.step_seconds(EVERYWHERE, layouts, 8)
    kept = list((cache_dir() / "measured").glob("*.json"))
    assert len(kept) == bool(figures)
    assert set(figures) in (set(), set(layouts))
    assert all(0 < step_s < 10 for step_s in figures.values())
    if figures:
        kept[0].write_text('{"answer": [' + ", ".join(["1.5"] * len(layouts)) + "]}")
        assert measured.step_seconds(EVERYWHERE, layouts, 8) == dict.fromkeys(layouts, 1.5 * EVERYWHERE.layers)
        kept[0].write_text("{")
        assert set(measured.step_seconds(EVERYWHERE, layouts, 8)) in (set(), set(layouts))


def test_a_measurement_that_fails_leaves_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "MEASURE", "tpray.nothing")
    monkeypatch.setattr(measured, "TOKENS", 63)  # no answer is in the cache
    assert settle(ServeConfig()).topology.tp == 1


@pytest.mark.usefixtures("own_cache")
@pytest.mark.skipif("int8" not in native_dtypes(), reason="this CPU has neither VNNI nor AMX")
@pytest.mark.parametrize(
    ("dtype", "says"), [("int8", "sums of int8 products overflow"), ("bfloat16", "does not multiply bfloat16 itself")]
)
def test_an_artifact_in_a_dtype_that_the_cores_do_not_multiply_is_refused(
    dtype: DtypeName, says: str, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype not in native_dtypes():
        pytest.skip(f"this CPU does not multiply {dtype}")
    traced = str(start(ModelConfig(source=str(make_checkpoint()), dtype=dtype)).artifact.directory)
    monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset({"avx2"}))
    for asked in ("auto", dtype):
        config = ServeConfig(model=ModelConfig(source=traced, dtype=asked))
        for refuses in (settle, lambda c: find_model(c.model, Topology(2))):
            with pytest.raises(ConfigError, match=f"was traced in {dtype}: .*{says}.*, and trace the model again"):
                refuses(config)


@pytest.mark.usefixtures("own_cache")
def test_a_traced_model_keeps_its_degree_and_is_told_how_it_can_have_another(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = start(ModelConfig(source=str(make_checkpoint()), dtype="float32")).artifact
    traced = ModelConfig(source=str(artifact.directory))
    assert cheapest_degree(traced.source) == settle(ServeConfig(model=traced)).topology.tp == 2
    assert cheapest_degree(None) == 1
    with monkeypatch.context() as one_core, caplog.at_level(logging.WARNING):
        one_core.setattr(cpu, "core_count", lambda: 1)
        settle(ServeConfig(model=traced))
    assert "to be faster, trace the model again with --tp 1, and use --replicas 1" in caplog.text


def test_a_model_is_as_large_as_its_dtype_makes_it(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = find_checkpoint(make_checkpoint())
    assert bytes_in(checkpoint, "float32") == checkpoint.size_bytes
    assert bytes_in(checkpoint, "bfloat16") == checkpoint.size_bytes // 2


def test_the_files_say_what_weights_are_stored_in(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Whatever config.json says: tools that convert weights leave it as it was."""
    copy = shutil.copytree(make_checkpoint(), tmp_path / "copy")
    stored = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(stored | {"dtype": "float16", "torch_dtype": "float16"}))
    checkpoint = find_checkpoint(str(copy))
    assert bytes_in(checkpoint, "float32") == checkpoint.size_bytes
    weights = {name: tensor.half() for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert bytes_in(checkpoint, "float32") == 2 * checkpoint.size_bytes
    (copy / "model.safetensors").write_bytes(b"\xff" * 64)
    assert bytes_in(checkpoint, "float32") == 128, "as config.json says, until somebody reads the file"


def test_what_runs_on_other_machines_is_not_judged_by_this_one() -> None:
    parallel = ParallelConfig(tp=2, cores_per_rank=CORES + 1)
    for goal in ("latency", "throughput"):
        config = ServeConfig.model_validate(
            {"model": {"source": "/only/on/the/workers"}, "parallel": parallel, "replicas": 64, "goal": goal}
        )
        settled = settle(config, runs_here=False)
        assert (settled.topology.tp, settled.replicas, settled.why) == (2, 64, "")


@pytest.mark.skipif(CORES < 2, reason="on one core there is nothing to choose")
def test_who_has_said_both_is_told_no_reason() -> None:
    config = ServeConfig(parallel=ParallelConfig(tp=2), replicas=2)
    assert settle(config).why == ""


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_measurement_that_is_killed_leaves_no_process() -> None:
    layouts = [[1, 1, 1], [1, 2, 1]] if CORES > 1 else [[1, 1, 1]]
    shape = {"hidden": 512, "intermediate": 2048, "heads": 8, "layers": 2, "dtype": "float32", "rows": 8, "length": 64}
    with subprocess.Popen([sys.executable, "-m", measured.MEASURE], stdin=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps({"shape": shape, "layouts": layouts}))
        process.stdin.close()
        give_up = time.monotonic() + 60
        while not (ranks := _children(process.pid)):
            assert time.monotonic() < give_up
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < give_up, "a rank has outlived the measurement"
        time.sleep(0.05)
