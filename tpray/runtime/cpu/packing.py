"""Run rows of different lengths end to end as one long row: no padding is computed, attention needs no mask.

Legend: R rows, T tokens of all rows together, N heads, D head width, H hidden.

Between the embeddings and the pooled first token an encoder mixes tokens in attention only. So its graph, traced
for ``[B, S]``, also computes ``[1, T]`` when three things know where a row starts: positions, attention, and the
choice of each row's first token. `pack_rows` rewrites those, and refuses a graph that mixes tokens in any other way.

Source: the "unpadding" of MosaicBERT (arXiv:2312.17482) and variable-length attention of FlashAttention.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from tpray.runtime.cpu.int8 import int8_linear
from tpray.runtime.cpu.passes import aten, calls, mkldnn, tensor_of, tpray_ops

_SCORES_IN_CACHE = 4_000_000  # elements: 8 MB


@dataclass(frozen=True)
class PackedRows:
    """Where the rows of one batch lie among its T tokens.

    runs: (first token, rows, length of each) of neighbouring rows of one length. starts: int64 ``[R]``, each row's
    first token. positions: int64 ``[T]``, each token's place in its row. kept: int64 ``[T]``, where the tokens stood
    in the padded ``[B * S]``; None when nothing was padded.
    """

    runs: tuple[tuple[int, int, int], ...]
    starts: Tensor
    positions: Tensor
    kept: Tensor | None

    @classmethod
    def of(cls, mask: Tensor) -> PackedRows | None:
        """The rows of an attention mask int64 ``[B, S]``; None if padding comes before a token, or a row is empty."""
        width = mask.shape[1]
        lengths = mask.sum(dim=1)
        places = torch.arange(width)
        kept = places < lengths[:, None]
        if not torch.equal(kept, mask != 0) or int(lengths.min()) < 1:
            return None
        sizes: list[int] = lengths.tolist()
        starts, runs = list(itertools.accumulate(sizes, initial=0))[:-1], []
        first = 0
        for length, group in itertools.groupby(sizes):
            count = len(list(group))
            runs.append((first, count, length))
            first += count * length
        padded = first < mask.numel()
        return cls(
            runs=tuple(runs),
            starts=torch.tensor(starts),
            positions=places.expand_as(kept)[kept],
            kept=kept.flatten().nonzero().squeeze(1) if padded else None,
        )

    def pack(self, tokens: Tensor) -> Tensor:
        """``[B, S]`` without its padding, ``[1, T]``."""
        flat = tokens.reshape(1, -1)
        return flat if self.kept is None else flat.index_select(1, self.kept)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, rows: PackedRows, scale: float | None = None) -> Tensor:
    """Attention within each row: q, k, v and result ``[1, N, T, D]``."""
    parts = []
    for first, count, length in rows.runs:
        own_q, own_k, own_v = (
            x[0].narrow(1, first, count * length).unflatten(1, (count, length)).transpose(0, 1) for x in (q, k, v)
        )
        out = _attend(own_q, own_k, own_v, scale)  # [count, N, length, D]
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Attention without a mask, ``[C, N, L, D]``.

    torch's flash attention multiplies bfloat16 blocks slowly; from about 100 tokens on oneDNN's matrix products on
    either side of a softmax take half the time, as long as the scores fit the cache.
    """
    count, heads, length, width = q.shape
    if q.dtype is torch.bfloat16 and length >= 96 and count * heads * length * length <= _SCORES_IN_CACHE:
        scores = torch.matmul(q * (scale or width**-0.5), k.transpose(2, 3))
        return torch.matmul(scores.softmax(dim=-1), v)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def row_cumsum(x: Tensor, rows: PackedRows) -> Tensor:
    """The running sum ``[1, T]`` of x within each row."""
    total = x.cumsum(1)
    before = (total - x).index_select(1, rows.starts)  # what the rows before had summed up to
    lengths = torch.tensor([length for _, count, length in rows.runs for _ in range(count)])
    return total - before.repeat_interleave(lengths, dim=1)


def row_positions(table: Tensor, rows: PackedRows) -> Tensor:
    """``table[:, :S]`` for every row: ``[1, P]`` -> ``[1, T]``."""
    return table.index_select(1, rows.positions)


def row_starts(x: Tensor, rows: PackedRows) -> Tensor:
    """The first token of every row: ``[1, T, H]`` -> ``[R, H]``."""
    return x[0].index_select(0, rows.starts)


_TOKEN_WISE = {
    aten.embedding.default, aten.linear.default, aten.layer_norm.default, aten.gelu.default, aten.relu.default,
    aten.silu.default, aten.tanh.default, aten.sigmoid.default, aten.dropout.default, aten.add.Tensor, aten.sub.Tensor,
    aten.mul.Tensor, aten.div.Tensor, aten.ne.Scalar, aten.eq.Scalar, aten.lt.Scalar, aten.ge.Scalar,
    aten.__or__.Tensor, aten.masked_fill.Scalar, aten.zeros.default, aten.to.dtype, aten.to.dtype_layout,
    aten.to.device, aten.type_as.default, aten.view.default, aten.reshape.default, aten.contiguous.default,
    aten.sym_size.int, aten.split_with_sizes.default, mkldnn._linear_pointwise.default,
    mkldnn._linear_pointwise.binary, int8_linear, tpray_ops.all_reduce.default, operator.getitem,
}  # fmt: skip
"""Operators that compute each token from itself, whatever B and S are."""


_ROW_WISE = {
    aten.layer_norm.default, aten.gelu.default, aten.linear.default, mkldnn._linear_pointwise.default,
    mkldnn._linear_pointwise.binary, int8_linear, aten.add.Tensor, tpray_ops.all_reduce.default,
}  # fmt: skip
"""Those whose tensor arguments are all tokens ``[1, T, H]`` or weights."""


def pack_rows(module: GraphModule) -> GraphModule | None:
    """A version of a lowered ``module`` that also takes `PackedRows`, and ids and types ``[1, T]``; weights are shared.

    Returns None if the graph mixes tokens in a way that is not known here, or needs the mask for anything else.
    """
    graph = plain_copy(module)
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    mask = next((node for node in graph.nodes if node.op == "placeholder" and node.name == "attention_mask"), None)
    with graph.inserting_after(last):
        rows = graph.placeholder("rows")
    _rewrite(module, graph, rows)
    graph.eliminate_dead_code()
    if mask is None or mask.users or not _mixes_nothing_else(graph):
        return None
    hoist_row_starts(graph)
    graph.lint()
    return GraphModule(module, graph)


def plain_copy(module: GraphModule) -> Graph:
    """The graph without the exported program's packing of its result: it returns a tensor, not a tuple of one.

    A new `GraphModule` of it holds the tensors that it uses and no others.
    """
    graph = Graph()
    output = graph.graph_copy(module.graph, {})
    graph.output(output[0] if isinstance(output, tuple) else output)
    return graph


def hoist_row_starts(graph: Graph) -> int:
    """Choose the rows' first tokens before what computes each token alone: after the last attention nobody asks for
    the other tokens. Returns how many operators were passed."""
    passed = 0
    nodes: list[Any] = list(graph.nodes)
    for source in reversed(nodes):
        choices = [user for user in source.users if user.target is row_starts]
        if not choices or len(choices) < len(source.users) or source.target not in _ROW_WISE:
            continue
        rows = choices[0].args[1]
        with graph.inserting_before(source):
            tokens = [node for node in source.all_input_nodes if node.op != "get_attr"]
            chosen = {node: graph.call_function(row_starts, (node, rows)) for node in tokens}
            moved = graph.node_copy(source, _replacing(chosen))
        for choice in choices:
            choice.replace_all_uses_with(moved)
            graph.erase_node(choice)
        graph.erase_node(source)
        passed += 1
    return passed


def _replacing(others: dict[Node, Node]) -> Callable[[Node], Node]:
    return lambda node: others.get(node, node)


def _rewrite(module: GraphModule, graph: Graph, rows: Node) -> None:
    nodes: list[Any] = list(graph.nodes)
    for node in nodes:
        new: tuple[Any, tuple[Any, ...]] | None = None
        if calls(node, aten.scaled_dot_product_attention.default):
            if len(node.args) <= 4 and set(node.kwargs) <= {"scale"}:  # neither dropout nor causal
                new = packed_attention, (*node.args[:3], rows, node.kwargs.get("scale"))
        elif calls(node, aten.slice.Tensor) and _is_position_table(tensor_of(module, node.args[0])):
            if node.args[1] == 1 and not node.args[2]:
                new = row_positions, (node.args[0], rows)
        elif calls(node, aten.cumsum.default) and node.args[1] == 1:
            new = row_cumsum, (node.args[0], rows)
        elif calls(node, aten.select.int) and tuple(node.args[1:]) == (1, 0):
            new = row_starts, (node.args[0], rows)
        if new is not None:
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_function(*new))
            graph.erase_node(node)


def _is_position_table(table: Tensor | None) -> bool:
    return table is not None and table.dim() == 2 and table.shape[0] == 1 and not table.is_floating_point()


def _mixes_nothing_else(graph: Graph) -> bool:
    """Whether every node is token-wise, aware of rows, or works on what does not depend on tokens."""
    aware = {packed_attention, row_cumsum, row_positions}
    tokens = {node for node in graph.nodes if node.op == "placeholder"}  # these, and what is computed from them
    for node in graph.nodes:
        if node.op != "call_function" or tokens.isdisjoint(node.all_input_nodes):
            continue
        if node.target is row_starts:
            continue  # [R, H]: from here on a row is a row
        swaps_heads = calls(node, aten.transpose.int) and set(node.args[1:]) == {1, 2}
        one_feature = calls(node, aten.select.int) and node.args[1] == 2
        one_more = calls(node, aten.unsqueeze.default) and node.args[1] == -1
        spreads = calls(node, aten.expand.default) or (calls(node, aten.gather.default) and node.args[1] == 1)
        if node.target not in _TOKEN_WISE | aware and not (swaps_heads or one_feature or one_more or spreads):
            return False
        tokens.add(node)
    return True


def run_packed(program: GraphModule, rows: PackedRows, inputs: Sequence[Tensor]) -> Tensor:
    """Logits ``[R, L]`` of a packed program for padded ``input_ids``, ``attention_mask``, ``token_type_ids``."""
    ids, mask, types = inputs
    result: Tensor = program(rows.pack(ids), mask, rows.pack(types), rows)
    return result
