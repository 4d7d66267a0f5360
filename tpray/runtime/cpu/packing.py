"""Run rows of different lengths end to end as one long row: no padding is computed, attention needs no mask.

Legend: R rows, T tokens of all rows together, N heads, D head width, H hidden.

Between the embeddings and the token that the label is read from a transformer mixes tokens in attention only. So its
graph, traced for ``[B, S]``, also computes ``[1, T]`` when four things know where a row starts: positions, attention,
running sums, and the choice of each row's token. `pack_rows` rewrites those, and refuses a graph that mixes tokens in
any other way.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from tpray.runtime.cpu.bands import Band, find_bands, is_attention, plain_copy
from tpray.runtime.cpu.fusions import capped_attention, rms_norm
from tpray.runtime.cpu.int8 import int8_linear
from tpray.runtime.cpu.passes import argument_of, aten, calls, mkldnn, tensor_of, tpray_ops
from tpray.runtime.cpu.rows import (
    attend_rows,
    packed_attention,
    row_argmax,
    row_choice,
    row_cumsum,
    row_padded,
    row_positions,
    row_range,
    row_starts,
    row_sum,
)
from tpray.runtime.cpu.token_axis import ROWS, MixedError, TokenAxes, Tokens, Value

log = logging.getLogger(__name__)

_ROW_WISE = {
    aten.layer_norm.default, aten.gelu.default, aten.silu.default, aten.linear.default,
    mkldnn._linear_pointwise.default, mkldnn._linear_pointwise.binary, int8_linear, rms_norm, aten.add.Tensor,
    aten.mul.Tensor, aten.tanh.default, tpray_ops.all_reduce.default,
}  # fmt: skip
"""Operators that `hoist_row_choices` can pass: they compute each token ``[1, T, H]`` alone."""


def pack_rows(module: GraphModule, max_length: int) -> Graph | None:
    """A version of a lowered module's graph that also takes `PackedRows`, and ids and types ``[1, T]``.

    Returns None if the graph mixes tokens in a way that is not known here, in rows of up to ``max_length`` tokens.
    """
    bands = find_bands(module, max_length)
    if bands is None:
        log.info("rows are padded: a mask of attention is more than a band")
        return None
    graph = plain_copy(module)
    ids, mask, types = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(types):
        rows = graph.placeholder("rows")
    length = ids.meta["val"].shape[1]
    places = _rewrite(module, graph, rows, str(length), bands)
    graph.eliminate_dead_code()
    if mask.users:  # packed, it is all ones
        with graph.inserting_after(rows):
            mask.replace_all_uses_with(graph.call_function(aten.ones_like.default, (ids,)))
    _attend_from_one_linear(graph)
    graph.eliminate_dead_code()
    try:
        axes = TokenAxes(module, graph, places | {ids: Tokens(2, 1), types: Tokens(2, 1)}, length)
        _check_places(graph, axes)
    except MixedError as e:
        log.info("rows are padded: %s", e)
        return None
    for chosen in [node for node in graph.nodes if node.target is row_argmax]:
        _move_up(chosen, rows)
    hoist_row_choices(graph, axes)
    _pad_tokens(graph, axes, rows)
    graph.eliminate_dead_code()
    graph.lint()
    return graph


def _check_places(graph: Graph, axes: TokenAxes) -> None:
    """What was put in finds tokens where it looks for them, and what it gives is not taken for something else.

    Raises:
        MixedError: it does not.
    """
    for node in graph.nodes:
        values = [axes.of(each) for each in node.all_input_nodes]
        right = True
        if node.target is packed_attention:
            right = [axes.of(each) for each in node.args[:3]] == [Tokens(4, 2)] * 3
        elif node.target in (row_cumsum, row_argmax):
            right = values[0] == Tokens(2, 1)
        elif node.target in (row_starts, row_choice, row_sum):
            right = isinstance(values[0], Tokens) and values[0].axis == 1
        elif node.op == "output":
            right = all(value in (ROWS, Tokens(3, 1)) for value in values)
        if node.target is row_argmax:  # the packed one is a place among all tokens
            right = right and all(user.target is row_choice for user in node.users)
        if not right:
            raise MixedError(f"{node.target} takes other things than tokens")


def _pad_tokens(graph: Graph, axes: TokenAxes, rows: Node) -> None:
    """Give each row's tokens back as rows, where the output is of tokens: ``[1, T, L]`` -> ``[B, S, L]``."""
    output = graph.output_node()
    for node in output.all_input_nodes:
        if isinstance(axes.of(node), Tokens):
            with graph.inserting_before(output):
                output.replace_input_with(node, graph.call_function(row_padded, (node, rows)))


def hoist_row_choices(graph: Graph, axes: TokenAxes) -> int:
    """Choose the rows' tokens before what computes each token alone: after the last attention nobody asks for the
    other tokens. Returns how many operators were passed."""
    passed = 0
    nodes: list[Any] = list(graph.nodes)
    for source in reversed(nodes):
        choices = [user for user in source.users if user.target in (row_starts, row_choice) and user.args[0] is source]
        if not choices or len(choices) < len(source.users):
            continue
        if len({choice.args[1] for choice in choices}) > 1 or source.target not in _ROW_WISE:
            continue
        choose, where = choices[0].target, choices[0].args[1]
        tokens = [node for node in source.all_input_nodes if isinstance(axes.of(node), Tokens)]
        others = [node for node in source.all_input_nodes if node not in tokens]
        spread = source.target in (aten.add.Tensor, aten.mul.Tensor)
        if any(axes.of(node) != Tokens(3, 1) for node in tokens):
            continue
        if spread and any(len(axes.shape_of(node) or ()) > 1 for node in others):
            continue  # [1, 1, H] would make three dimensions of the two that rows have
        with graph.inserting_before(source):
            chosen = {node: graph.call_function(choose, (node, where)) for node in tokens}
            moved = graph.node_copy(source, _replacing(chosen))
        for choice in choices:
            choice.replace_all_uses_with(moved)
            graph.erase_node(choice)
        graph.erase_node(source)
        passed += 1
    return passed


def _move_up(node: Node, behind: Node) -> None:
    """Compute ``node``, and what it is computed from, right behind the inputs."""
    needed = {node}
    for each in reversed(list(node.graph.nodes)):
        if any(user in needed for user in each.users):
            needed.add(each)
    for each in [n for n in reversed(list(node.graph.nodes)) if n in needed and n.op != "placeholder"]:
        behind.append(each)


def _attend_from_one_linear(graph: Graph) -> None:
    """Attention that cuts its queries, keys and values out of one layer's output, and joins its heads again, as
    `attend_rows`: a view of all three for a dozen of each one's own."""
    nodes: list[Any] = list(graph.nodes)
    for attention in nodes:
        if attention.target is not packed_attention:
            continue
        *heads, rows, scale, before, after = attention.args[:7]
        pieces = [argument_of(argument_of(x, aten.transpose.int), aten.view.default) for x in heads]
        cuts = [argument_of(piece, operator.getitem) for piece in pieces]
        one_linear = len(set(cuts)) == 1 and calls(cuts[0], aten.split_with_sizes.default)
        seen_whole = before is None and after is None and len(attention.args) == 7
        if not one_linear or not seen_whole or [piece.args[1] for piece in pieces] != [0, 1, 2]:
            continue
        source, sizes = cuts[0].args[:2]
        width = heads[0].meta["val"].shape[-1] if "val" in heads[0].meta else None
        joined = _joined_heads(attention)
        if joined is not None and isinstance(width, int) and len(sizes) == 3 and len(set(sizes)) == 1:
            with graph.inserting_before(joined):
                joined.replace_all_uses_with(graph.call_function(attend_rows, (source, width, rows, scale)))


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


def _rewrite(module: GraphModule, graph: Graph, rows: Node, length: str, bands: list[Band]) -> dict[Node, Value]:
    """Make what mixes tokens aware of rows; what was put in, and where its tokens are."""
    places: dict[Node, Value] = {}
    masks = iter(bands)
    nodes: list[Any] = list(graph.nodes)
    for node in nodes:
        new = _attention(node, rows, next(masks)) if is_attention(node) else _aware(module, node, rows, length)
        if new is not None:
            function, arguments, place = new
            with graph.inserting_before(node):
                call = graph.call_function(function, arguments)
            node.replace_all_uses_with(call)
            graph.erase_node(node)
            places[call] = place
    return places


_Call = tuple[Callable[..., Tensor], tuple[Any, ...], Value]
"""A function, its arguments, and where the tokens of what it gives are."""


def _attention(node: Any, rows: Node, band: Band) -> _Call | None:
    if calls(node, capped_attention):
        q, k, v, _, scale, cap = node.args
        return packed_attention, (q, k, v, rows, scale, band.before, band.after, cap), Tokens(4, 2)
    if len(node.args) > 4 or not set(node.kwargs) <= {"scale"}:  # dropout, or causal
        return None
    scale = node.kwargs.get("scale")
    return packed_attention, (*node.args[:3], rows, scale, band.before, band.after), Tokens(4, 2)


def _aware(module: GraphModule, node: Any, rows: Node, length: str) -> _Call | None:
    """What takes the place of an operator that counts or chooses the tokens of a row."""
    rule = _COUNTING.get(node.target) if node.op == "call_function" and node.args else None
    if rule is not None:
        return rule(module, node, rows, length)
    rule = _ALONG_TOKENS.get(node.target) if node.op == "call_function" else None
    return rule(module, node, rows, length) if rule is not None and _counts_tokens(node.args[0], length) else None


def _range(module: GraphModule, node: Any, rows: Node, length: str) -> _Call | None:
    if len(node.args) > 1 or _size(node.args[0]) != length:
        return None
    return row_range, (rows, node.kwargs.get("dtype") or torch.int64), Tokens(1, 0)


def _slice(module: GraphModule, node: Any, rows: Node, length: str) -> _Call | None:
    table = node.args[0]
    if not _is_position_table(tensor_of(module, table)) or node.args[1] != 1 or node.args[2]:
        return None
    return row_positions, (table, rows), Tokens(2, 1)


def _index(module: GraphModule, node: Any, rows: Node, length: str) -> _Call | None:
    """``x[arange(B), tokens]``, where the tokens are chosen for each row."""
    where: Any = node.args[1]
    if len(where) != 2 or not calls(where[0], aten.arange.default) or where[1].target is not row_argmax:
        return None
    return row_choice, (node.args[0], where[1]), ROWS


def _cumsum(module: GraphModule, node: Any, rows: Node, length: str) -> _Call | None:
    whole = _is_whole(node.args[0]) and node.args[1] in (1, -1) and not node.kwargs
    return (row_cumsum, (node.args[0], rows), Tokens(2, 1)) if whole else None


def _argmax(module: GraphModule, node: Any, rows: Node, length: str) -> _Call | None:
    whole = _is_whole(node.args[0]) and tuple(node.args[1:]) in ((-1,), (1,))
    return (row_argmax, (node.args[0], rows), ROWS) if whole else None


def _sum(module: GraphModule, node: Any, rows: Node, length: str) -> _Call | None:
    return (row_sum, (node.args[0], rows, *node.args[2:]), ROWS) if node.args[1] == [1] and not node.kwargs else None


def _select(module: GraphModule, node: Any, rows: Node, length: str) -> _Call | None:
    return (row_starts, (node.args[0], rows), ROWS) if tuple(node.args[1:]) == (1, 0) else None


_Rule = Callable[[GraphModule, Any, Node, str], _Call | None]
_COUNTING: dict[Any, _Rule] = {
    aten.arange.default: _range,
    aten.slice.Tensor: _slice,
    aten.index.Tensor: _index,
}
_ALONG_TOKENS: dict[Any, _Rule] = {
    aten.cumsum.default: _cumsum,
    aten.argmax.default: _argmax,
    aten.sum.dim_IntList: _sum,
    aten.select.int: _select,
}
"""Those whose first argument has tokens along dimension 1."""


def _is_whole(node: Any) -> bool:
    """Whether a value is ``[B, S]`` of integers: what is not finite in one row would reach others."""
    value = node.meta["val"]
    return value.dim() == 2 and not value.dtype.is_floating_point and value.dtype is not torch.bool


def _size(node: object) -> str:
    """The size that a node of sizes is, as the export names it."""
    return str(node.meta.get("val")) if isinstance(node, Node) else ""


def _counts_tokens(node: object, length: str) -> bool:
    """Whether dimension 1 of a value counts the tokens of a row."""
    shape = list(node.meta["val"].shape) if isinstance(node, Node) and "val" in node.meta else []
    return len(shape) > 1 and str(shape[1]) == length


def _is_position_table(table: Tensor | None) -> bool:
    return table is not None and table.dim() == 2 and table.shape[0] == 1 and not table.is_floating_point()
