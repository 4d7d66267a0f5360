"""Lowered graphs on disk: what is loaded computes what was traced, and a file can make nothing else happen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.helpers import rows
from tpray.errors import ArtifactError, ConfigError
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.checkpoint import find_checkpoint
from tpray.parallel_layers.plan import Plan
from tpray.parallel_layers.shard import build_shard
from tpray.platforms.memory import available_bytes
from tpray.platforms.topology import Topology
from tpray.runtime.base import SavedShard
from tpray.runtime.cpu.bands import plain_copy
from tpray.runtime.cpu.huge_pages import PAGE_BYTES, use_huge_pages
from tpray.runtime.cpu.lowered import _PREPARED, PARTS, LoadedGraph, _stops, graph_file, load_graphs, save_graphs
from tpray.runtime.cpu.rows import PackedRows, attend_rows, packed_attention
from tpray.runtime.cpu.runtime import CpuRuntime, lower


class Kinds(nn.Module):
    """Everything that an argument can be: sizes, dtypes, devices, infinity, lists, a shared weight, a buffer."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.linear = nn.Linear(8, 11, bias=False)
        self.linear.weight = self.table.weight
        self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(ids)
        rows, columns = ids.shape
        mask = torch.ones(columns, columns, dtype=torch.bool, device=ids.device).triu(1)
        scores = (x @ x.transpose(1, 2)).masked_fill(mask, float("-inf")).softmax(-1)
        mixed = torch.cat([scores @ x, x], dim=-1)[..., 4:12].reshape(rows * columns, 8)
        self.seen += columns
        return self.linear(F.gelu(mixed)).to(torch.float64), self.seen + 0


def lowered(module: nn.Module, folder: Path, *examples: Tensor, dynamic: Any = None) -> Any:
    """What `load_graphs` makes of an exported and lowered module."""
    with torch.no_grad():
        program = torch.export.export(module.eval(), examples, dynamic_shapes=dynamic, strict=False)
    graph_module = program.module(check_guards=False)
    lower(graph_module, 0)
    save_graphs([(graph_module, plain_copy(graph_module))], folder)
    return load_graphs(folder)[0][0].run


def test_a_loaded_graph_computes_what_was_traced(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Kinds()
    sizes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("columns")}
    function = lowered(module, tmp_path, torch.ones(2, 5, dtype=torch.int64), dynamic=(sizes,))
    seen = 0
    with torch.inference_mode():
        for rows, columns in ((2, 5), (3, 1), (1, 7)):
            ids = torch.randint(0, 11, (rows, columns))
            expected, _ = module(ids)
            logits, count = function(ids)
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
            seen += columns
            assert count.item() == seen, "a buffer that steps change is changed for the next"


def test_a_file_holds_a_tensor_once_and_what_is_not_used_not_at_all(tmp_path: Path) -> None:
    module = Kinds()
    lowered(module, tmp_path, torch.ones(2, 5, dtype=torch.int64))
    stored = json.loads((tmp_path / graph_file(0)).read_text())
    text = json.dumps(stored)
    assert "mkldnn._linear_pointwise.default" in text
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size < 2 * module.table.weight.nbytes + 2000


CHANGES: list[tuple[str, Any]] = [
    ("unknown operator", lambda s: s["calls"][0].__setitem__(0, "aten.no_such.default")),
    ("another namespace", lambda s: s["calls"][0].__setitem__(0, "prims.add.default")),
    ("an attribute of a module", lambda s: s["calls"][0].__setitem__(0, "operator.attrgetter")),
    ("a value of the future", lambda s: s["calls"][0].__setitem__(1, [{"value": 99}])),
    ("a value that is code", lambda s: s["calls"][0].__setitem__(1, [{"value": "0); import os; ("}])),
    ("a tensor that is not there", lambda s: s["calls"][0].__setitem__(1, [{"tensor": "nothing"}])),
    ("a keyword that is code", lambda s: s["calls"][0].__setitem__(2, {"a=1, b": 2})),
    ("a reserved keyword", lambda s: s["calls"][0].__setitem__(2, {"lambda": 2})),
    ("a kind of value that there is not", lambda s: s["calls"][0].__setitem__(1, [{"object": "os"}])),
    ("something of torch's that is no dtype", lambda s: s["calls"][0].__setitem__(1, [{"dtype": "load"}])),
    ("no output", lambda s: s.pop("output")),
    ("an output of the future", lambda s: s.__setitem__("output", {"value": 10_000})),
    ("calls that are none", lambda s: s.__setitem__("calls", [[1]])),
]


@pytest.mark.parametrize("change", [c for _, c in CHANGES], ids=[name for name, _ in CHANGES])
def test_a_changed_file_is_refused_when_it_is_loaded(change: Any, tmp_path: Path) -> None:
    lowered(Kinds(), tmp_path, torch.ones(2, 5, dtype=torch.int64))
    path = tmp_path / graph_file(0)
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))
    with pytest.raises(ArtifactError, match=r"graph_0\.json|weights\.safetensors"):
        load_graphs(tmp_path)


def test_a_machine_that_cannot_load_a_file_does_not_call_it_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the artifact would be thrown away, and traced again with more memory than it takes to load."""

    def fails(weight: Tensor) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    lowered(nn.Linear(8, 8), tmp_path, torch.ones(2, 8))
    monkeypatch.setitem(_PREPARED, "mkldnn._linear_pointwise.default", (1, fails))
    with pytest.raises(RuntimeError, match="allocate memory"):
        load_graphs(tmp_path)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40) | st.sampled_from(["__import__('os')", "v0", "b0", "\n", "'", '"""', "{}"]))
def test_text_in_a_file_stays_text(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("graph")
    lowered(nn.Identity(), folder, torch.ones(2))
    (folder / graph_file(0)).write_text(json.dumps({"inputs": 1, "calls": [], "output": [text, {"value": 0}, 1.5]}))
    (function,), _ = load_graphs(folder)
    given_back = function.run(7)
    assert given_back == [text, 7, 1.5]


def test_what_cannot_be_stored_is_refused_when_it_is_traced(tmp_path: Path) -> None:
    module = torch.fx.symbolic_trace(nn.Sequential())
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(sorted, (x,)))
    with pytest.raises(ConfigError, match="calls sorted"):
        save_graphs([(module, graph)], tmp_path)
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (x, slice(1))))
    with pytest.raises(ConfigError, match="slice"):
        save_graphs([(module, graph)], tmp_path)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), heads=st.integers(1, 3), seed=st.integers(0, 99))
def test_attention_of_rows_end_to_end_is_each_rows_own(lengths: list[int], heads: int, seed: int) -> None:
    torch.manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    packed = PackedRows.of(mask)
    assert packed is not None
    qkv = torch.randn(1, sum(lengths), 3 * heads * 4)
    found = attend_rows(qkv, 4, packed, 0.5)
    q, k, v = (part.unflatten(2, (heads, 4)).transpose(1, 2) for part in qkv.chunk(3, 2))
    by_parts = packed_attention(q, k, v, packed, 0.5).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, by_parts, rtol=1e-5, atol=1e-6)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    for length, end in zip(lengths, ends, strict=True):
        own = slice(end - length, end)
        alone = F.scaled_dot_product_attention(q[:, :, own], k[:, :, own], v[:, :, own], scale=0.5)
        torch.testing.assert_close(found[:, own], alone.transpose(1, 2).flatten(2), rtol=1e-5, atol=1e-6)
    assert packed.starts.tolist() == [end - length for length, end in zip(lengths, ends, strict=True)]
    assert packed.positions.tolist() == [place for length in lengths for place in range(length)]
    padded = torch.arange(mask.numel()).view(mask.shape)
    assert packed.pack(padded)[0].tolist() == padded[mask.bool()].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("before", "after"), [(None, 0), (0, None), (4, 4), (300, 0), (0, 0), (None, None), (700, 700)]
)
def test_a_band_is_what_its_mask_is(before: int | None, after: int | None, dtype: torch.dtype) -> None:
    """Rows that are shorter than a block of queries, and longer than two; bfloat16 takes other ways."""
    torch.manual_seed(1)
    lengths = [3, 600, 600, 256, 257, 1, 90]
    packed = PackedRows.of((torch.arange(600) < torch.tensor(lengths)[:, None]).long())
    assert packed is not None
    q, k, v = torch.randn(3, 1, 2, sum(lengths), 8).to(dtype).unbind(0)
    found = packed_attention(q, k, v, packed, None, before, after)
    start = 0
    for length in lengths:
        places = torch.arange(length)
        ahead = places[None, :] - places[:, None]
        seen = (ahead <= (length if after is None else after)) & (-ahead <= (length if before is None else before))
        own = slice(start, start + length)
        own_q, own_k, own_v = (x[:, :, own].float() for x in (q, k, v))
        expected = F.scaled_dot_product_attention(own_q, own_k, own_v, seen)
        bound = 1e-5 if dtype is torch.float32 else 3e-2
        torch.testing.assert_close(found[:, :, own].float(), expected, atol=bound, rtol=bound)
        start += length


@pytest.mark.parametrize("mask", [[[0, 1]], [[1, 0, 1]], [[1, 1], [0, 0]], [[]]])
def test_masks_that_are_not_rows_with_padding_behind_them_are_not_packed(mask: list[list[int]]) -> None:
    assert PackedRows.of(torch.tensor(mask, dtype=torch.int64)) is None


def _in_huge_pages(address: int) -> int:
    """Bytes of the mapping around ``address`` that lie in huge pages. Source: proc(5), smaps."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and not line.split()[0].endswith(":"):
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            inside = begin <= address < end
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    return 0


class Attends(nn.Module):
    """Tokens that attend to one another as ``mask``, of the attention mask ``[B, S]``, lets them."""

    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.mask = nn.Embedding(11, 8), mask

    def forward(self, ids: Tensor, attention_mask: Tensor, types: Tensor) -> Tensor:
        x = self.table(ids + types).view(*ids.shape, 2, 4).transpose(1, 2)
        mixed: Tensor = F.scaled_dot_product_attention(x, x, x, self.mask(attention_mask))
        return mixed.transpose(1, 2).reshape(*ids.shape, 8)[:, 0]


class ReadsTheLast(Attends):
    """The same, but what it gives is the last token's, as decoders find it: the last that is not token 0."""

    def forward(self, ids: Tensor, attention_mask: Tensor, types: Tensor) -> Tensor:
        x = self.table(ids + types).view(*ids.shape, 2, 4).transpose(1, 2)
        mixed: Tensor = F.scaled_dot_product_attention(x, x, x, self.mask(attention_mask))
        places = torch.arange(ids.shape[1], dtype=torch.int32)
        last = (places * (ids != 0).to(torch.int32)).argmax(-1)
        return mixed.transpose(1, 2).reshape(*ids.shape, 8)[torch.arange(ids.shape[0]), last]


def padding(mask: Tensor) -> Tensor:
    return (mask != 0)[:, None, None, :]


def distances(mask: Tensor) -> Tensor:
    places = torch.arange(mask.shape[1])
    return (places[:, None] - places[None, :]).abs()


def causal(mask: Tensor) -> Tensor:
    places = torch.arange(mask.shape[1])
    return padding(mask) & (places[None, :] <= places[:, None])


def chunks(mask: Tensor) -> Tensor:
    places = torch.arange(mask.shape[1]) // 16
    return padding(mask) & (places[None, :] == places[:, None])


def sees_padding(mask: Tensor) -> Tensor:
    return torch.ones_like(padding(mask))


@pytest.mark.parametrize(
    ("mask", "packs"),
    [
        (padding, True),
        (lambda mask: padding(mask).expand(-1, 1, mask.shape[1], -1), True),
        (lambda mask: (1.0 - padding(mask).float()) * torch.finfo(torch.float32).min, True),
        (lambda mask: padding(mask) & (distances(mask) <= 40), True),  # a window, which short rows do not fill
        (lambda mask: padding(mask) & (distances(mask) < 63), True),  # and one that hides a single pair
        (causal, True),
        (lambda mask: causal(mask) & (distances(mask) < 9), True),
        (chunks, False),
        (
            lambda mask: causal(mask) & ((distances(mask) < 9) | (torch.arange(mask.shape[1]) == 0)),
            False,
        ),  # and the first
        (lambda mask: padding(mask).float().log() - 0.1 * distances(mask), False),  # a bias of positions
        (sees_padding, False),
    ],
)
@pytest.mark.parametrize("kind", [Attends, ReadsTheLast])
def test_rows_are_packed_where_masks_are_bands(
    kind: type[Attends], mask: Callable[[Tensor], Tensor], packs: bool, tmp_path: Path
) -> None:
    """And a packed row gives what it gives alone, whatever rows it lies between."""
    model = kind(mask).eval()
    with parallel_state.use(0, 1):
        CpuRuntime(Topology(1)).trace(model, 64, tmp_path, ())
    assert (tmp_path / graph_file(1)).exists() == packs
    if mask is sees_padding:
        return
    program = CpuRuntime(Topology(1)).load(SavedShard(tmp_path, 0, 1, "float32", (), Plan(())))
    ids, given, types = rows([1, 64, 64, 9, 63, 2], 0)
    batch = [torch.from_numpy(x) for x in (ids % 9, given, types * 0)]
    with torch.no_grad():
        alone = [model(*(x[i : i + 1, :length] for x in batch)) for i, length in enumerate(given.sum(1))]
    torch.testing.assert_close(program(*batch)[0], torch.cat(alone), atol=1e-6, rtol=0)


@pytest.mark.parametrize("model_type", ["albert", "llama"])
def test_a_trace_takes_little_more_than_the_weights(
    model_type: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Layers that share weights store them once; masks of the longest row, of 17 GB, are not made to look at them."""
    checkpoint = find_checkpoint(make_checkpoint(model_type, num_hidden_layers=6, max_position_embeddings=131072))
    with parallel_state.use(0, 1):
        shard = build_shard(checkpoint, torch.float32, "sdpa", True)
        CpuRuntime(Topology(1)).trace(shard, 131072, tmp_path, ())
    weights = sum(tensor.nbytes for tensor in (*shard.parameters(), *shard.buffers()))
    assert (tmp_path / "weights.safetensors").stat().st_size < 1.05 * weights + 20_000


def test_packed_weights_lie_in_huge_pages_where_the_system_has_them() -> None:
    allowed = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not allowed.exists() or "[never]" in allowed.read_text() or available_bytes() < 1 << 30:
        pytest.skip("this system gives no huge pages")
    weight = torch.ops.mkldnn._reorder_linear_weight(torch.randn(4096, 2048), 256)
    before = torch.ops.mkldnn._linear_pointwise(torch.ones(1, 2048), weight, None, "none", [], "")
    tried = use_huge_pages([weight, torch.ones(3)])
    assert tried >= weight.numel() * 4 - 2 * PAGE_BYTES
    if _in_huge_pages(torch.ops.mkldnn.data_ptr(weight) + tried // 2) == 0:
        pytest.skip("this kernel gave none at once")
    assert _in_huge_pages(torch.ops.mkldnn.data_ptr(weight) + tried // 2) >= tried // 2
    after = torch.ops.mkldnn._linear_pointwise(torch.ones(1, 2048), weight, None, "none", [], "")
    assert torch.equal(before, after)


def run_in_parts(graph: LoadedGraph, *inputs: Any) -> tuple[int, Any]:
    """How often the graph stopped, and its output."""
    parts, stops = graph.in_parts(*inputs), 0
    while True:
        try:
            next(parts)
        except StopIteration as e:
            return stops, e.value
        stops += 1


def test_a_graph_in_parts_computes_the_same_whatever_runs_between_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8))))
    lowered(module, tmp_path, torch.randn(3, 8))
    (graph,), _ = load_graphs(tmp_path)
    assert graph.parts == PARTS
    with torch.inference_mode():
        x, y = torch.randn(3, 8), torch.randn(3, 8)
        assert run_in_parts(graph, x)[0] == PARTS - 1
        assert torch.equal(run_in_parts(graph, x)[1][0], graph.run(x)[0])
        first, second = graph.in_parts(x), graph.in_parts(y)
        for _ in range(PARTS - 1):
            next(first), next(second)
        with pytest.raises(StopIteration) as one:
            next(first)
        with pytest.raises(StopIteration) as other:
            next(second)
        assert torch.equal(one.value.value[0], graph.run(x)[0])
        assert torch.equal(other.value.value[0], graph.run(y)[0])


@pytest.mark.parametrize("model_type", ["bert", "deberta-v2", "gpt2", "albert"])
def test_all_ranks_stop_behind_the_same_collectives(
    model_type: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = find_checkpoint(str(make_checkpoint(model_type)))
    found = []
    for rank in range(2):
        folder = tmp_path / str(rank)
        folder.mkdir()
        with parallel_state.use(rank, 2):
            CpuRuntime(Topology(2)).trace(build_shard(checkpoint, torch.float32), 64, folder, ())
        for path in sorted(folder.glob("graph_*.json")):
            titles = [title for title, *_ in json.loads(path.read_text())["calls"]]
            collectives = [number for number, title in enumerate(titles) if title.startswith("tpray.")]
            stops = sorted(_stops(titles))
            assert set(stops) <= set(collectives)
            found.append([collectives.index(stop) for stop in stops])
    assert len(found[0]) >= 3
    assert all(each == found[0] for each in found), "and padded ones as packed ones"
