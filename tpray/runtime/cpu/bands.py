"""What each attention of a graph lets a token see, found from its masks without building them.

A mask of S tokens has S x S values, gigabytes at the lengths that decoders take. Most say no more than how far a token
sees back and ahead. That is asked of the graph that makes the mask, at a few positions among which each distance up to
S occurs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from tpray.runtime.cpu.fusions import capped_attention
from tpray.runtime.cpu.passes import additive_mask, aten, calls, substitute, tpray_ops
from tpray.runtime.cpu.token_axis import MAKERS, TAKES_SIZES, is_pointwise, is_size

_HIDDEN = -1e4  # what the mildest additive masks have where nothing is to be seen: exp(-1e4) is 0

ALL_POSITIONS = 1024
"""Of how many tokens each position is asked for."""


@dataclass(frozen=True)
class Band:
    """How many tokens before itself, and after, a token sees in its row; None: all."""

    before: int | None = None
    after: int | None = None


def is_attention(node: object) -> bool:
    """Whether ``node`` is attention, whose fourth argument is a mask."""
    return calls(node, aten.scaled_dot_product_attention.default) or calls(node, capped_attention)


def plain_copy(module: GraphModule) -> Graph:
    """The graph without what an exported program does to its inputs and outputs: it takes and returns flat tuples."""
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return graph


def find_bands(module: GraphModule, max_length: int) -> list[Band] | None:
    """The band of each attention, in the graph's order, for rows of up to ``max_length`` tokens.

    Returns None if a mask hides anything else but padding and what is beyond the band, or adds a bias.
    """
    found = _mask_maker(module)
    if found is None:
        return None
    maker, numbers = found
    masks = []
    positions = _positions(max_length)
    for real in (max_length, max_length // 2 + 1):  # of its tokens; the others are padding
        made = _masks_at(maker, positions, real, max_length)
        if made is None:
            return None
        masks.append([_band_of(mask, positions, real) for mask in made])
    first, second = masks
    bands = []
    for whole, part in zip(first, second, strict=True):
        if whole is None or part is None:
            return None
        longest = max_length // 2  # of the distances that the second one has
        agree = all(
            one == other or (other is None and one is not None and one >= longest)
            for one, other in ((whole.before, part.before), (whole.after, part.after))
        )
        if not agree:
            return None
        bands.append(whole)
    return [Band() if number is None else bands[number] for number in numbers]


def _positions(length: int) -> Tensor:
    """All of ``length`` positions, or some with every distance among them: about twice the root of it."""
    if length <= ALL_POSITIONS:
        return torch.arange(length)
    step = math.isqrt(length - 1) + 1
    return torch.tensor(sorted({*range(min(step, length)), *range(0, length, step), length - 1}))


def _mask_maker(module: GraphModule) -> tuple[GraphModule, list[int | None]] | None:
    """What computes the masks alone, and which of them each attention takes; None if they depend on the layers.

    What it takes: positions int64 ``[P]``, their number, and an attention mask.
    """
    graph = plain_copy(module)
    attentions = [node for node in graph.nodes if is_attention(node)]
    taken = [node.args[3] if len(node.args) > 3 and isinstance(node.args[3], Node) else None for node in attentions]
    masks: list[Any] = list(dict.fromkeys(mask for mask in taken if mask is not None))
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (tuple(masks),)
    _remove_unused(graph)
    for reduce in [node for node in graph.nodes if calls(node, tpray_ops.all_reduce.default)]:
        if not all(calls(user, aten.sym_size.int) for user in reduce.users):
            return None
        substitute(reduce, reduce.args[0])  # a rank's own part has the same sizes
    ids, _, types = [node for node in graph.nodes if node.op == "placeholder"]
    length = str(ids.meta["val"].shape[1])
    with graph.inserting_after(types):
        count = graph.placeholder("count")
        positions = graph.placeholder("positions")
    for node in list(graph.nodes):
        if node.op != "call_function" or str(node.meta.get("val")) != length:
            if calls(node, aten.arange.default) and tuple(node.args) == (count,):
                with graph.inserting_before(node):
                    node.replace_all_uses_with(graph.call_function(_as, (positions, node.kwargs.get("dtype"))))
            continue
        node.replace_all_uses_with(count)
    _remove_unused(graph)
    if not _asks_for_positions(graph, {ids, types}, count, masks):
        return None
    numbers = [None if mask is None else masks.index(mask) for mask in taken]
    return GraphModule(module, graph), numbers


def _asks_for_positions(graph: Graph, tokens: set[Node], count: Node, masks: Sequence[Node]) -> bool:
    """Whether masks are made of positions and the attention mask alone, each value of its own two.

    Only then does a mask of some positions say what the mask of all is.
    """
    if any(user.target not in TAKES_SIZES for user in count.users):
        return False
    of_tokens = set(tokens)  # what has more of them than their sizes
    for node in graph.nodes:
        if node.op != "call_function" or node.target is aten.sym_size.int or node.target in MAKERS:
            continue
        if of_tokens.intersection(node.all_input_nodes):
            of_tokens.add(node)
            continue
        if not (is_pointwise(node.target) or is_size(node) or node.target in _OF_EACH):
            return False
    return not of_tokens.intersection(masks)


def _as(positions: Tensor, dtype: torch.dtype | None) -> Tensor:
    return positions if dtype is None else positions.to(dtype)


_OF_EACH = MAKERS | {
    _as, additive_mask, aten.expand.default, aten.unsqueeze.default, aten.index.Tensor, aten.arange.default,
}  # fmt: skip
"""Operators of a mask whose values are each of their own positions."""


def _remove_unused(graph: Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)  # collectives too, which torch keeps for what they do besides


def _masks_at(maker: GraphModule, positions: Tensor, real: int, length: int) -> Sequence[Tensor] | None:
    """The masks ``[1, heads, P, P]`` for these positions of a row of ``length`` tokens, of which ``real`` are some.

    A graph reads the attention mask either by positions, of all tokens, or as it is, of these.
    """
    for given in (torch.arange(length), positions):
        mask = (given < real).to(torch.int64).unsqueeze(0)
        ids = torch.full_like(mask, 2)
        try:
            with torch.no_grad():
                made: Sequence[Tensor] = maker(ids, mask, torch.zeros_like(ids), positions, len(positions))
        except (RuntimeError, IndexError, ValueError):  # sizes that do not go together: it is the other way
            continue
        if all(m.shape[-1] == len(positions) and m.shape[-2] in (1, len(positions)) for m in made):
            return made
    return None


def _band_of(mask: Tensor, positions: Tensor, real: int) -> Band | None:
    """The band that a mask ``[1, heads, P, P]`` or ``[1, heads, 1, P]`` is; None if it is none."""
    seen = mask if mask.dtype is torch.bool else mask == 0
    if mask.dtype is not torch.bool and not bool((seen | (mask <= _HIDDEN)).all()):
        return None
    count = len(positions)
    seen = seen.expand(*seen.shape[:-2], count, count).reshape(-1, count, count)
    if not bool((seen == seen[:1]).all()):
        return None
    tokens = positions < real
    own = seen[0][tokens]  # what padding sees does not matter
    if bool(own[:, ~tokens].any()):
        return None
    own = own[:, tokens]
    distances = positions[tokens].unsqueeze(1) - positions[tokens].unsqueeze(0)
    reach = []
    for way in (distances, -distances):
        visible = way[own & (way >= 0)]
        furthest = int(visible.max()) if len(visible) else -1
        if furthest < 0:
            return None
        reach.append(None if furthest >= int(way.max()) else furthest)
    before, after = reach
    limit = int(distances.max())
    inside = (distances <= (limit if before is None else before)) & (-distances <= (limit if after is None else after))
    return Band(before, after) if bool((inside == own).all()) else None
