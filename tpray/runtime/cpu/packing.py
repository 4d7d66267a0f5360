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

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from tpray.runtime.cpu.int8 import int8_linear
from tpray.runtime.cpu.passes import aten, calls, mkldnn, substitute, tensor_of, tpray_ops

_HIDDEN = -1e4  # what the mildest additive masks have where nothing is to be seen: exp(-1e4) is 0
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
        array = mask.numpy()  # whose small operations cost a tenth of torch's
        count, width = array.shape
        places = np.arange(width)
        if array.all():
            if not width:
                return None
            starts = np.arange(count) * width
            return cls(((0, count, width),), torch.from_numpy(starts), torch.from_numpy(np.tile(places, count)), None)
        lengths = (array != 0).sum(axis=1)
        kept = places < lengths[:, None]
        if not lengths.all() or not np.array_equal(kept, array != 0):
            return None
        sizes: list[int] = lengths.tolist()
        runs, first = [], 0
        for length, group in itertools.groupby(sizes):
            rows = len(list(group))
            runs.append((first, rows, length))
            first += rows * length
        return cls(
            runs=tuple(runs),
            starts=torch.from_numpy(np.cumsum(lengths) - lengths),
            positions=torch.from_numpy(np.broadcast_to(places, kept.shape)[kept]),
            kept=torch.from_numpy(kept.ravel().nonzero()[0]),
        )

    def pack(self, tokens: Tensor) -> Tensor:
        """``[B, S]`` without its padding, ``[1, T]``."""
        flat = tokens.reshape(1, -1)
        return flat if self.kept is None else flat.index_select(1, self.kept)


def attend_rows(qkv: Tensor, width: int, rows: PackedRows, scale: float | None = None) -> Tensor:
    """Self-attention within each row, of queries, keys and values as one linear layer made them.

    ``[1, T, 3 N D]`` with heads of ``width`` D -> ``[1, T, N D]``.
    """
    parts = []
    for first, count, length in rows.runs:
        own = qkv if len(rows.runs) == 1 else qkv.narrow(1, first, count * length)
        heads = own.view(count, length, -1, width).transpose(1, 2)
        q, k, v = heads.chunk(3, 1)
        out = _attend(q, k, v, scale)  # [count, N, length, D]
        parts.append(out.transpose(1, 2).reshape(1, count * length, -1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


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


def pack_rows(module: GraphModule, max_length: int) -> Graph | None:
    """A version of a lowered module's graph that also takes `PackedRows`, and ids and types ``[1, T]``.

    Returns None if the graph mixes tokens in a way that is not known here, or its masks hide more than padding in rows
    of up to ``max_length`` tokens.
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
    # Only now: a decoder's masks, which it has refused, take gigabytes at the lengths that decoders have.
    if not _hide_padding_alone(module, max_length):
        return None
    _attend_from_one_linear(graph)
    hoist_row_starts(graph)
    graph.eliminate_dead_code()
    graph.lint()
    return graph


def _hide_padding_alone(module: GraphModule, length: int) -> bool:
    """Whether every mask of attention lets a token see all of its row and no padding, in rows of ``length`` tokens.

    Windows and biases of positions travel as masks too; rows end to end would lose them.
    """
    masks = _masks_of(module)
    if masks is None:
        return False
    ids = torch.full((1, length), 2, dtype=torch.int64)
    for real in (length, length // 2 + 1):  # of its tokens; the others are padding
        given = (torch.arange(length) < real).to(torch.int64).unsqueeze(0)
        with torch.no_grad():
            found: Sequence[Tensor] = masks(ids, given, torch.zeros_like(ids))
        for mask in found:
            own = mask[..., :real, :] if mask.shape[-2] > 1 else mask
            seen, hidden = (own, ~own) if own.dtype is torch.bool else (own == 0, own <= _HIDDEN)
            if not (seen[..., :real].all() and hidden[..., real:].all()):
                return False
    return True


def _masks_of(module: GraphModule) -> GraphModule | None:
    """What computes the masks of attention alone; None if they depend on what the layers compute."""
    graph = plain_copy(module)
    attentions = [node for node in graph.nodes if calls(node, aten.scaled_dot_product_attention.default)]
    nodes = {node.args[3]: None for node in attentions if len(node.args) > 3 and isinstance(node.args[3], Node)}
    masks: list[Any] = list(nodes)
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (tuple(masks),)
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)  # collectives too, which torch keeps for what they do besides
    for reduce in [node for node in graph.nodes if calls(node, tpray_ops.all_reduce.default)]:
        if not all(calls(user, aten.sym_size.int) for user in reduce.users):
            return None
        substitute(reduce, reduce.args[0])  # a rank's own part has the same sizes
    return GraphModule(module, graph)


def plain_copy(module: GraphModule) -> Graph:
    """The graph without what an exported program does to its inputs and outputs: it takes and returns flat tuples."""
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
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


def _attend_from_one_linear(graph: Graph) -> None:
    """Attention that cuts its queries, keys and values out of one layer's output, and joins its heads again, as
    `attend_rows`: a view of all three for a dozen of each one's own."""
    nodes: list[Any] = list(graph.nodes)
    for attention in nodes:
        if attention.target is not packed_attention:
            continue
        *heads, rows, scale = attention.args
        pieces = [_argument(_argument(x, aten.transpose.int), aten.view.default) for x in heads]
        cuts = [_argument(piece, operator.getitem) for piece in pieces]
        one_linear = len(set(cuts)) == 1 and calls(cuts[0], aten.split_with_sizes.default)
        if not one_linear or [piece.args[1] for piece in pieces] != [0, 1, 2]:
            continue
        source, sizes = cuts[0].args[:2]
        width = heads[0].meta["val"].shape[-1] if "val" in heads[0].meta else None
        joined = _joined_heads(attention)
        if joined is not None and isinstance(width, int) and len(sizes) == 3 and len(set(sizes)) == 1:
            with graph.inserting_before(joined):
                joined.replace_all_uses_with(graph.call_function(attend_rows, (source, width, rows, scale)))


def _argument(node: Any, target: object) -> Any:
    """What ``node``, a call of ``target``, is computed from; None if it is no such call."""
    return node.args[0] if calls(node, target) else None


def _joined_heads(attention: Node) -> Any:
    """The node that makes ``[1, T, N D]`` of the result ``[1, N, T, D]``; None where anything else uses that too."""
    node: Any = attention
    for target in (aten.transpose.int, aten.contiguous.default):
        users = list(node.users)
        if len(users) == 1 and calls(users[0], target):
            node = users[0]
        elif target is aten.transpose.int:
            return None
    users = list(node.users)
    joins = len(users) == 1 and (calls(users[0], aten.reshape.default) or calls(users[0], aten.view.default))
    return users[0] if joins and len(users[0].args[1]) == 3 else None


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
