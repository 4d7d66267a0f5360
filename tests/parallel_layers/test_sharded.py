"""Checkpoints of tensor-parallel training: both layouts, other degrees, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tpray.errors import CheckpointError
from tpray.modules.qkv_linear import GQAQKVColumnParallelLinear
from tpray.parallel_layers import load, merge, parallel_state, save
from tpray.parallel_layers.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear, partition_of
from tpray.parallel_layers.sharded import find_parts


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = ParallelEmbedding(12, 8)
        self.wide = ParallelEmbedding(5, 12, shard_across_embedding=True)
        self.qkv = ColumnParallelLinear(8, 36, gather_output=False, stride=3)
        self.gathered = ColumnParallelLinear(8, 12, gather_output=True)
        self.down = RowParallelLinear(12, 8)
        self.norm = nn.LayerNorm(8)


def make(rank: int, size: int) -> Model:
    with parallel_state.use(rank, size):
        return Model()


@pytest.fixture
def whole() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn_like(value) for name, value in make(0, 1).state_dict().items()}


@pytest.fixture
def file(whole: dict[str, Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "whole.pt"
    torch.save({"model": whole, "step": 7}, path)
    return path


def save_sharded(file: Path, directory: Path, tp: int, xser: bool = False) -> None:
    for rank in range(tp):
        model = make(rank, tp)
        with parallel_state.use(rank, tp):
            load(file, model, sharded=False)
            save({"model": model.state_dict(), "step": 7}, directory, save_xser=xser)


@pytest.mark.parametrize("xser", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_round_trips_at_every_degree(tp: int, xser: bool, file: Path, whole: dict[str, Tensor], tmp_path: Path) -> None:
    """Whole -> sharded -> each other degree -> whole again: the same bits."""
    save_sharded(file, tmp_path / "sharded", tp, xser)
    layout = tmp_path / "sharded" / "tp_rank_00_pp_rank_00"
    assert layout.is_file() if xser else (layout / "checkpoint.pt").is_file()
    for other in (1, 2, 3):
        for rank in range(other):
            expected, found = make(rank, other), make(rank, other)
            with parallel_state.use(rank, other):
                load(file, expected, sharded=False)
                saved = load(tmp_path / "sharded", found, load_xser=xser)
            assert other != tp or saved["step"] == 7
            for name, value in expected.state_dict().items():
                assert torch.equal(found.state_dict()[name], value), name
    merge(tmp_path / "sharded", tmp_path / "again.pt", make(0, tp))
    again = load(tmp_path / "again.pt", sharded=False)["model"]
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_upstreams_own_xser_reference_is_understood(tmp_path: Path) -> None:
    """The class by which torch_xla refers to a tensor, written without tpray."""
    (tmp_path / "tp_rank_00_pp_rank_00.tensors").mkdir()
    torch.save(torch.arange(3), tmp_path / "tp_rank_00_pp_rank_00.tensors" / "tensor_0.pt")
    save_dir = tmp_path / "made"
    with parallel_state.use(0, 1):
        save({"x": torch.arange(3)}, save_dir, save_xser=True)
        raw = (save_dir / "tp_rank_00_pp_rank_00").read_bytes()
        assert b"torch_xla.utils.serialization" in raw
        assert torch.equal(load(save_dir, model_key=None)["x"], torch.arange(3))
    assert raw.startswith(b"PK"), "torch's zip archive, which is read with weights_only"


def test_dp_suffix_and_gaps(file: Path, tmp_path: Path) -> None:
    directory = tmp_path / "sharded"
    save_sharded(file, directory, 2)
    for path in list(directory.iterdir()):
        path.rename(directory / f"{path.name}_dp_rank_00")
    assert len(find_parts(directory)) == 2
    (directory / "tp_rank_00_pp_rank_00_dp_rank_00").rename(directory / "tp_rank_03_pp_rank_00_dp_rank_00")
    with pytest.raises(CheckpointError, match="lacks the parts of the ranks 0, 2"):
        find_parts(directory)
    (directory / "tp_rank_00_pp_rank_01").mkdir()
    with pytest.raises(CheckpointError, match="pipeline-parallel"):
        find_parts(directory)


def test_what_does_not_fit_is_named_from_both_sides(file: Path, whole: dict[str, Tensor], tmp_path: Path) -> None:
    changed = dict(whole)
    changed["norm.gamma"] = changed.pop("norm.weight")
    torch.save({"model": changed}, tmp_path / "renamed.pt")
    torch.save({"model": whole | {"down.bias": torch.zeros(9)}}, tmp_path / "reshaped.pt")
    with parallel_state.use(1, 2):
        model = make(1, 2)
        with pytest.raises(CheckpointError, match=r"lacks norm\.weight; it has norm\.gamma"):
            load(tmp_path / "renamed.pt", model, sharded=False)
        load(tmp_path / "renamed.pt", model, sharded=False, strict=False)
        with pytest.raises(CheckpointError, match=r"down\.bias is \[9\] there and \[8\] in the model"):
            load(tmp_path / "reshaped.pt", model, sharded=False)
        with pytest.raises(CheckpointError, match="no 'state' with the tensors"):
            load(file, model, model_key="state", sharded=False)
        with pytest.raises(CheckpointError, match="sharded=False"):
            load(tmp_path, model)
        with pytest.raises(CheckpointError, match="there is no checkpoint"):
            load(tmp_path / "none.pt", model, sharded=False)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with parallel_state.use(0, 1):
        with pytest.raises(CheckpointError, match="more than tensors"):
            load(tmp_path / "evil.pt", sharded=False)
        with pytest.raises(CheckpointError, match="weights_only"):
            load(tmp_path / "evil.pt", sharded=False, weights_only=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("fused", [True, False])
def test_parts_that_ranks_share_load_where_they_were_saved_and_nowhere_else(fused: bool, tmp_path: Path) -> None:
    """Two ranks hold each key/value head: put together, the parts would be twice the whole."""

    def make() -> GQAQKVColumnParallelLinear:
        return GQAQKVColumnParallelLinear(3, [8, 4], False, False, kv_size_multiplier=2, fuse_qkv=fused)

    for rank in range(4):
        with parallel_state.use(rank, 4):
            layer = make()
            for parameter in layer.parameters():
                parameter.data.fill_(rank + 1)
            save({"model": layer.state_dict()}, tmp_path)
    for rank in range(4):
        with parallel_state.use(rank, 4):
            layer = make()
            load(tmp_path, layer)
            assert all((parameter == rank + 1).all() for parameter in layer.parameters())
    with parallel_state.use(0, 2), pytest.raises(CheckpointError, match=r"overlap or differ in size"):
        load(tmp_path, make())


def test_parts_in_another_order_are_put_together_in_the_usual_one(tmp_path: Path) -> None:
    order, whole = [1, 2, 0], torch.arange(12.0).view(6, 2)
    for rank in range(3):
        with parallel_state.use(rank, 3):
            layer = ColumnParallelLinear(2, 6, bias=False, gather_output=False, rank_ordering=order)
            part = partition_of(layer.weight)
            assert part is not None
            layer.weight.data.copy_(part.cut(whole))
            save({"model": layer.state_dict()}, tmp_path)
    with parallel_state.use(0, 3):
        merge(
            tmp_path, tmp_path / "whole.pt", ColumnParallelLinear(2, 6, False, gather_output=False, rank_ordering=order)
        )
    assert torch.equal(torch.load(tmp_path / "whole.pt")["model"]["weight"], whole)
