"""Where the tokens are in each value of a graph, and whether anything mixes them.

A graph that was traced for ids ``[B, S]`` holds for ``[1, T]``, rows end to end, if each operator computes a token from
itself. That is followed from the inputs on: each value has an axis of tokens, or none; an operator may do anything
along the others.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from tpray.runtime.cpu.fusions import rms_norm, rotate
from tpray.runtime.cpu.int8 import int8_linear
from tpray.runtime.cpu.passes import aten, mkldnn, tensor_of, tpray_ops
from tpray.runtime.cpu.rows import attend_rows


@dataclass(frozen=True)
class Tokens:
    """A tensor of ``dims`` dimensions, of which number ``axis`` counts tokens; or several such tensors."""

    dims: int
    axis: int

    @property
    def from_end(self) -> int:
        """How many dimensions come after the tokens'."""
        return self.dims - 1 - self.axis


ROWS = "rows"
"""A value of each row and no longer of each token: what is computed from it is no concern of this module."""

Value = Tokens | str | None
"""None: the same whatever the tokens."""


class MixedError(Exception):
    """An operator that computes a token from others, or is not known here."""


class TokenAxes:
    """The axis of tokens of every value in a graph.

    Args:
        module: has the tensors that the graph fetches.
        tokens: the inputs ``[1, T]``, or what else is known -> where its tokens are.
    """

    def __init__(self, module: GraphModule, graph: Graph, tokens: Mapping[Node, Value], length: Any) -> None:
        self._module, self._length = module, str(length)
        self._values: dict[Node, Value] = dict(tokens)
        for node in graph.nodes:
            if node.op == "call_function" and node not in self._values:
                self._values[node] = self._follow(node)

    def of(self, node: Any) -> Value:
        """The axis of ``node``."""
        return self._values.get(node) if isinstance(node, Node) else None

    def _follow(self, node: Node) -> Value:
        inputs = [self.of(each) for each in node.all_input_nodes]
        target: Any = node.target
        if target is aten.sym_size.int or is_size(node):
            return None
        if any(map(is_size, node.all_input_nodes)):
            fills = target is aten.full.default and is_size(node.args[1])
            if target not in TAKES_SIZES or ROWS in inputs or fills:
                raise MixedError(f"{target} computes with sizes")
        if target in MAKERS:
            return self._axis_of(node)
        tokens = [each for each in inputs if isinstance(each, Tokens)]
        if not tokens:
            return ROWS if ROWS in inputs else self._alike(node)
        if ROWS in inputs:
            raise MixedError(f"{target} has rows and tokens")
        if target is operator.getitem:
            return tokens[0]
        if is_pointwise(target):
            return self._together(node)
        rule = _RULES.get(target)
        if rule is None:
            raise MixedError(f"{target} is not known")
        return rule(self, node)

    def _alike(self, node: Node) -> Value:
        """What depends on no token may be spread over all of them; else it has no axis of their number.

        Raises:
            MixedError: it has one: its values are the places' own.
        """
        if node.target in (aten.expand.default, aten.repeat.default):
            return self._axis_of(node)
        if any(re.search(rf"\b{self._length}\b", str(size)) for size in _shape(node) or ()):
            raise MixedError(f"{node.target} makes values for places")
        return None

    def _axis_of(self, node: Node) -> Value:
        shape = _shape(node)
        if shape is None:
            raise MixedError(f"{node.target} has no known shape")
        places = [i for i, size in enumerate(shape) if str(size) == self._length]
        if len(places) > 1:
            raise MixedError(f"{node.target} makes {len(places)} axes of tokens")
        return Tokens(len(shape), places[0]) if places else None

    def _together(self, node: Node) -> Tokens:
        """Operands that are spread to one shape: their tokens must lie on one another."""
        found = [each for each in map(self.of, node.all_input_nodes) if isinstance(each, Tokens)]
        place = found[0].from_end
        dims = max(each.dims for each in found)
        for each in node.all_input_nodes:
            value = self.of(each)
            if isinstance(value, Tokens):
                if value.from_end != place:
                    raise MixedError(f"{node.target} lays tokens on something else")
                continue
            shape = self.shape_of(each)
            if shape is None:
                raise MixedError(f"{node.target} takes {each}, whose shape is not known")
            if len(shape) > place and str(shape[len(shape) - 1 - place]) != "1":
                raise MixedError(f"{node.target} treats tokens by their place")
            dims = max(dims, len(shape))
        return Tokens(dims, dims - 1 - place)

    def shape_of(self, node: Node) -> tuple[Any, ...] | None:
        """The sizes of a value, as far as they are known."""
        tensor = tensor_of(self._module, node)
        return _shape(node) if tensor is None else tuple(tensor.shape)

    def first(self, node: Node) -> Tokens:
        """The axis of the first argument.

        Raises:
            MixedError: it has none, and another one has.
        """
        value = self.of(node.args[0])
        if not isinstance(value, Tokens):
            raise MixedError(f"{node.target} looks up tokens")
        return value


def _shape(node: Node) -> tuple[Any, ...] | None:
    value = node.meta.get("val")
    if isinstance(value, (int, torch.SymInt)):
        return ()
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def is_size(node: object) -> bool:
    """Whether ``node`` is a number that is computed from sizes."""
    if not isinstance(node, Node):
        return False
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))


def is_pointwise(target: object) -> bool:
    """Whether an operator computes each value from those in the same place."""
    return target in POINTWISE or (isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags)


def _keeps(axes: TokenAxes, node: Node) -> Tokens:
    """Works along the last dimension."""
    value = axes.first(node)
    others = [axes.of(each) for each in node.all_input_nodes]
    if value.from_end == 0 or any(isinstance(each, Tokens) and each != value for each in others):
        raise MixedError(f"{node.target} works along the tokens")
    return value


def _along(place: int, removes: bool = False, default: Any = None) -> Callable[[TokenAxes, Node], Tokens]:
    """Works along the dimension, or dimensions, that an argument names. place: of the argument."""

    def rule(axes: TokenAxes, node: Node) -> Tokens:
        named = node.args[place] if len(node.args) > place else node.kwargs.get("dim", default)
        source = node.args[0]
        values = [axes.of(each) for each in (source if isinstance(source, (list, tuple)) else [source])]
        value = values[0]
        if not isinstance(value, Tokens) or any(each != value for each in values):
            raise MixedError(f"{node.target} joins different things")
        if any(isinstance(axes.of(each), Tokens) and axes.of(each) != value for each in node.all_input_nodes):
            raise MixedError(f"{node.target} looks up tokens")
        if named is None:
            raise MixedError(f"{node.target} works along everything")
        along = [_from_start(d, value.dims) for d in (named if isinstance(named, (list, tuple)) else [named])]
        if value.axis in along:
            raise MixedError(f"{node.target} works along the tokens")
        kept = removes and not (node.kwargs.get("keepdim") or (len(node.args) > 2 and node.args[2] is True))
        gone = along if kept else []
        return Tokens(value.dims - len(gone), value.axis - sum(d < value.axis for d in gone))

    return rule


def _from_start(dim: Any, dims: int) -> int:
    if not isinstance(dim, int):
        raise MixedError("a dimension that is computed")
    return dim % dims


def _rotate(axes: TokenAxes, node: Node) -> Tokens:
    """Each token by its own angles."""
    value = axes._together(node)
    if value.from_end == 0:
        raise MixedError(f"{node.target} works along the tokens")
    return value


def _embedding(axes: TokenAxes, node: Node) -> Tokens:
    value = axes.of(node.args[1])
    if not isinstance(value, Tokens) or isinstance(axes.of(node.args[0]), Tokens):
        raise MixedError(f"{node.target} looks up tokens")
    return Tokens(value.dims + 1, value.axis)


def _gather(axes: TokenAxes, node: Node) -> Tokens:
    value = axes.of(node.args[2])
    if not isinstance(value, Tokens) or axes.of(node.args[0]) is not None:
        raise MixedError(f"{node.target} looks up tokens")
    return value


def _unsqueeze(axes: TokenAxes, node: Node) -> Tokens:
    value = axes.first(node)
    at = _from_start(node.args[1], value.dims + 1)
    return Tokens(value.dims + 1, value.axis + (at <= value.axis))


def _squeeze(axes: TokenAxes, node: Node) -> Tokens:
    value = axes.first(node)
    at = _from_start(node.args[1], value.dims)
    shape = axes.shape_of(node)
    if at == value.axis or shape is None or len(shape) == value.dims:
        raise MixedError(f"{node.target} removes what may be no single one")
    return Tokens(value.dims - 1, value.axis - (at < value.axis))


def _transpose(axes: TokenAxes, node: Node) -> Tokens:
    value = axes.first(node)
    one, other = (_from_start(d, value.dims) for d in node.args[1:3])
    return Tokens(value.dims, {one: other, other: one}.get(value.axis, value.axis))


def _permute(axes: TokenAxes, node: Node) -> Tokens:
    value = axes.first(node)
    order: Any = node.args[1]
    return Tokens(value.dims, [_from_start(d, value.dims) for d in order].index(value.axis))


def _expand(axes: TokenAxes, node: Node) -> Tokens:
    value = axes.first(node)
    sizes: Any = node.args[1]
    more = len(sizes) - value.dims
    return Tokens(value.dims + more, value.axis + more)


def _repeat(axes: TokenAxes, node: Node) -> Tokens:
    """Of other dimensions."""
    value = _expand(axes, node)
    times: Any = node.args[1]
    if times[value.axis] != 1:
        raise MixedError(f"{node.target} repeats tokens")
    return value


def _stack(axes: TokenAxes, node: Node) -> Tokens:
    pieces: Any = node.args[0]
    values = [axes.of(each) for each in pieces]
    value = values[0]
    if not isinstance(value, Tokens) or any(each != value for each in values):
        raise MixedError(f"{node.target} joins different things")
    at = _from_start(node.args[1] if len(node.args) > 1 else 0, value.dims + 1)
    return Tokens(value.dims + 1, value.axis + (at <= value.axis))


def _flatten(axes: TokenAxes, node: Node) -> Tokens:
    value = axes.first(node)
    named = *node.args[1:], *(0, -1)[len(node.args) - 1 :]
    start, end = (_from_start(d, value.dims) for d in named)
    if start <= value.axis <= end:
        raise MixedError(f"{node.target} joins tokens with something else")
    return Tokens(value.dims - (end - start), value.axis - (end - start if end < value.axis else 0))


def _view(axes: TokenAxes, node: Node) -> Tokens:
    """Other dimensions before and after the tokens, which must hold as much as they did."""
    value = axes.first(node)
    made = axes._axis_of(node)
    if not isinstance(made, Tokens):
        raise MixedError(f"{node.target} joins tokens with something else")
    after, before = _shape(node), axes.shape_of(_node(node.args[0]))
    if made.axis == value.axis == 1:  # [B, T, ...] either way
        return made
    if after is None or before is None or not _same_size(before[1 : value.axis], after[1 : made.axis]):
        raise MixedError(f"{node.target} moves tokens")
    return made


def _same_size(one: Iterable[Any], other: Iterable[Any]) -> bool:
    sizes = [*one, *other]
    return all(isinstance(size, int) for size in sizes) and math.prod(one) == math.prod(other)


def _node(argument: Any) -> Node:
    if not isinstance(argument, Node):
        raise MixedError("an argument is no tensor")
    return argument


def _matmul(axes: TokenAxes, node: Node) -> Tokens:
    """Tokens on one side, and not along what is summed over."""
    one, other = (axes.of(each) for each in node.args[:2])
    if isinstance(one, Tokens) and other is None and one.from_end > 0:
        shape = axes.shape_of(_node(node.args[1]))
        if shape is not None and len(shape) == 2:
            return one
        if shape is not None and 2 <= len(shape) <= one.dims and one.from_end == 1:
            return one
    if isinstance(other, Tokens) and one is None and other.from_end == 0:
        shape = axes.shape_of(_node(node.args[0]))
        if shape is not None and 2 <= len(shape) <= other.dims:
            return other
    raise MixedError(f"{node.target} sums over tokens")


MAKERS = {
    aten.zeros.default, aten.ones.default, aten.full.default, aten.new_zeros.default, aten.new_ones.default,
}  # fmt: skip
"""They make a constant of a shape."""
TAKES_SIZES = MAKERS | {
    aten.expand.default, aten.repeat.default, aten.view.default, aten.reshape.default, aten.arange.default,
    aten.slice.Tensor,
}  # fmt: skip
"""Those that take sizes for what they are."""
POINTWISE = {
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default, aten.contiguous.default,
    aten.dropout.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
    aten.detach.default, aten.__and__.Tensor, aten.__or__.Tensor,
    aten.where.ScalarOther, aten.where.ScalarSelf, tpray_ops.all_reduce.default,
}  # fmt: skip
"""Those that torch does not tag as such."""

_RULES: dict[Any, Callable[[TokenAxes, Node], Tokens]] = {
    **dict.fromkeys(
        (
            aten.linear.default, mkldnn._linear_pointwise.default, mkldnn._linear_pointwise.binary, int8_linear,
            rms_norm, attend_rows,
        ),
        _keeps,
    ),
    aten.embedding.default: _embedding,
    rotate: _rotate,
    aten.gather.default: _gather,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.expand.default: _expand,
    aten.view.default: _view,
    aten.reshape.default: _view,
    aten.reshape_as.default: _view,
    aten.matmul.default: _matmul,
    aten.select.int: _along(1, removes=True),
    aten.unbind.int: _along(1, removes=True, default=0),
    aten.mean.dim: _along(1, removes=True),
    aten.sum.dim_IntList: _along(1, removes=True),
    aten.slice.Tensor: _along(1, default=0),
    aten.repeat_interleave.self_int: _along(2),
    aten.repeat.default: _repeat,
    aten.stack.default: _stack,
    aten.flatten.using_ints: _flatten,
    aten.softmax.int: _along(1),
    aten.cumsum.default: _along(1),
    aten.cat.default: _along(1, default=0),
    aten.split_with_sizes.default: _along(2, default=0),
    aten.split.Tensor: _along(2, default=0),
    aten.chunk.default: _along(2, default=0),
}  # fmt: skip


def _layer_norm(axes: TokenAxes, node: Node) -> Tokens:
    value, shape = axes.first(node), node.args[1]
    if not isinstance(shape, (list, tuple)) or value.from_end < len(shape):
        raise MixedError(f"{node.target} works along the tokens")
    return value


_RULES[aten.layer_norm.default] = _layer_norm
_RULES[aten.rms_norm.default] = _layer_norm
