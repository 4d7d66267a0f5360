"""Patterns of many small operators as one call with fewer passes over memory: what decoders are made of.

On a CPU an elementwise operator costs what it reads and writes; in a decoder such operators take a third of the time
next to oneDNN's matrix products. Legend: T tokens, H hidden, D head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tpray.runtime.cpu.passes import argument_of, aten, calls, dtype_of, nodes_calling, only_user, substitute, tidy


def rms_norm(x: Tensor, eps: float, dtype: torch.dtype, weight: Tensor | None = None) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)`` over the last dimension, in float32, then as ``dtype``, then times ``weight``.

    ``[..., H]`` -> ``[..., H]``. Source: arXiv:1910.07467, as transformers' decoders compute it.
    """
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    scaled = (wide * scale if wide is x else wide.mul_(scale)).to(dtype)
    return scaled if weight is None else scaled.mul_(weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, halves of a head paired: ``x cos + (-x2, x1) sin``; x ``[1, N, T, D]``, the others spread.

    Source: arXiv:2104.09864, in the layout of GPT-NeoX.
    """
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def fuse_rms_norms(module: GraphModule) -> int:
    """``x * rsqrt(mean(x^2, -1) + eps)``, what widens x before it and narrows it behind, and the weight."""
    found = 0
    for root in nodes_calling(module, aten.rsqrt.default):
        scale, add = only_user(root, aten.mul.Tensor), root.args[0]
        mean = argument_of(add, aten.add.Tensor)
        square = argument_of(mean, aten.mean.dim)
        x = argument_of(square, aten.pow.Tensor_Scalar)
        if scale is None or x is None or square.args[1] != 2 or tuple(mean.args[1:]) != ([-1], True):
            continue
        alone = len(add.users) == len(mean.users) == 1 and isinstance(add.args[1], float)
        if not alone or set(scale.args) != {x, root} or dtype_of(x) is not torch.float32:
            continue
        source, last, dtype = x, scale, torch.float32
        narrow = only_user(scale, aten.to.dtype)
        if narrow is not None:
            last, dtype = narrow, narrow.args[1]
        if calls(x, aten.to.dtype) and len(x.args) == 2 and set(x.users) == {square, scale}:
            source = x.args[0]
        times = only_user(last, aten.mul.Tensor)
        weight = _other(times, last) if times is not None else None
        if (
            isinstance(weight, Node)
            and weight.op == "get_attr"
            and dtype_of(weight) is dtype
            and len(_shape(weight)) == 1
        ):
            last = times
        else:
            weight = None
        with module.graph.inserting_before(last):
            fused = module.graph.call_function(rms_norm, (source, add.args[1], dtype, weight))
        substitute(last, fused)
        found += 1
    tidy(module)
    return found


def fuse_rotations(module: GraphModule) -> int:
    """``x * cos + cat(-x2, x1) * sin``."""
    found = 0
    for cat in nodes_calling(module, aten.cat.default):
        turned = only_user(cat, aten.mul.Tensor)
        total = None if turned is None else only_user(turned, aten.add.Tensor)
        if total is None or total.kwargs or len(cat.args[0]) != 2 or tuple(cat.args[1:]) != (-1,):
            continue
        second, first = cat.args[0]
        second = argument_of(second, aten.neg.default)
        x = argument_of(first, aten.slice.Tensor)
        shape, straight = _shape(x), _other(total, turned)
        if x is None or argument_of(second, aten.slice.Tensor) is not x or len(shape) != 4:
            continue
        whole = calls(straight, aten.mul.Tensor) and x in straight.args and len(straight.users) == 1
        half = shape[-1] // 2 if isinstance(shape[-1], int) else 0
        if not whole or not _cuts(first, 0, half) or not _cuts(second, half, shape[-1]):
            continue
        angles = _other(straight, x), _other(turned, cat)
        if any(len(_shape(each)) != 4 or _shape(each)[-1] != shape[-1] for each in angles):
            continue
        if len({dtype_of(each) for each in (x, *angles)}) > 1:
            continue
        with module.graph.inserting_before(total):
            fused = module.graph.call_function(rotate, (x, *angles))
        substitute(total, fused)
        found += 1
    tidy(module)
    return found


def name_gelus(module: GraphModule) -> int:
    """GELU's approximation by tanh, written out as GPT-2 does, as the operator that has its name."""
    found = 0
    for tanh in nodes_calling(module, aten.tanh.default):
        plus_one = only_user(tanh, aten.add.Tensor)
        product = None if plus_one is None or plus_one.args[1:] != (1.0,) else only_user(plus_one, aten.mul.Tensor)
        inner = _scaled(tanh.args[0], math.sqrt(2 / math.pi))
        if product is None or not calls(inner, aten.add.Tensor) or inner.kwargs:
            continue
        x, cube = inner.args
        power = _scaled(cube, 0.044715)
        if argument_of(power, aten.pow.Tensor_Scalar) is not x or power.args[1] != 3.0:
            continue
        if _scaled(_other(product, plus_one), 0.5) is not x:
            continue
        with module.graph.inserting_before(product):
            gelu = module.graph.call_function(aten.gelu.default, (x,), {"approximate": "tanh"})
        substitute(product, gelu)
        found += 1
    tidy(module)
    return found


def name_attentions(module: GraphModule) -> int:
    """Attention that is written out, ``softmax(q k^T * scale + mask) v``, as the operator that has its name.

    With a soft cap of the scores, as Gemma 2 has, it is `capped_attention`.
    """
    found = 0
    for softmax in nodes_calling(module, aten.softmax.int):
        last = only_user(softmax, aten.to.dtype) or softmax
        out = only_user(last, aten.matmul.default)
        if out is None or out.args[0] is not last or softmax.args[1] not in (-1, 3):
            continue
        scores: Any = softmax.args[0]
        mask = None
        if calls(scores, aten.add.Tensor) and not scores.kwargs:
            mask = next((each for each in scores.args if not _is_score(each)), None)
            scores = _other(scores, mask)
        scores, cap = _capped(scores)
        product: Any = scores
        scale = 1.0
        for operator, sign in ((aten.mul.Tensor, 1), (aten.div.Tensor, -1)):
            if calls(scores, operator) and isinstance(scores.args[1], float):
                product, scale = scores.args[0], scores.args[1] ** sign
        turned: Any = product.args[1] if calls(product, aten.matmul.default) else None
        if not calls(turned, aten.transpose.int) or {d % 4 for d in turned.args[1:]} != {2, 3}:
            continue
        operands = product.args[0], turned.args[0], out.args[1]
        kinds = {dtype_of(each) for each in operands}
        between = _between(product, out)
        if len(kinds) > 1 or any(len(_shape(each)) != 4 for each in operands) or not between:
            continue
        if mask is not None and (len(_shape(mask)) != 4 or dtype_of(mask) not in (torch.bool, *kinds)):
            continue
        with module.graph.inserting_before(out):
            if cap is None:
                own: tuple[Any, ...] = operands if mask is None else (*operands, mask)
                attention = module.graph.call_function(aten.scaled_dot_product_attention.default, own, {"scale": scale})
            else:
                attention = module.graph.call_function(capped_attention, (*operands, mask, scale, cap))
        substitute(out, attention)
        found += 1
    tidy(module)
    return found


def capped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float) -> Tensor:
    """Attention whose scores are ``cap * tanh(q k^T * scale / cap)``, ``[C, N, L, D]``.

    mask: what is added to them, or bool. Source: arXiv:2408.00118, section 2.
    """
    scores = torch.matmul(q * (scale / cap), k.transpose(2, 3)).tanh_().mul_(cap)
    if mask is not None:
        scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    return torch.matmul(scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype), v)


def _is_score(node: Any) -> bool:
    """Whether it comes, through numbers alone, from a product of matrices."""
    while calls(node, aten.mul.Tensor) or calls(node, aten.div.Tensor) or calls(node, aten.tanh.default):
        node = node.args[0]
    return calls(node, aten.matmul.default)


def _capped(scores: Any) -> tuple[Any, float | None]:
    """Scores before their soft cap, and the cap."""
    tanh = argument_of(scores, aten.mul.Tensor)
    inner = argument_of(argument_of(tanh, aten.tanh.default), aten.div.Tensor)
    if inner is None or tanh.args[0].args[1] != scores.args[1] or not isinstance(scores.args[1], float):
        return scores, None
    return inner, scores.args[1]


def _between(first: Any, last: Any) -> bool:
    """Whether nothing but ``last`` sees what is computed from ``first`` on the way there."""
    node = first
    while node is not last:
        if len(node.users) != 1:
            return False
        node = next(iter(node.users))
    return True


def _other(node: Any, one: object) -> Any:
    """The operand of ``node``, which has two, that is not ``one``."""
    return next((each for each in node.args if each is not one), None)


def _is_vector(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "get_attr" and len(_shape(node)) == 1


def _scaled(node: Any, by: float) -> Any:
    """What ``node`` multiplies by the number ``by``; None if it does not."""
    if not calls(node, aten.mul.Tensor) or not isinstance(node.args[1], float) or not math.isclose(node.args[1], by):
        return None
    return node.args[0]


def _cuts(piece: Node, start: int, stop: int) -> bool:
    """Whether ``piece`` is ``x[..., start:stop]``, of x that has four dimensions and ends at ``stop`` or behind it."""
    if len(piece.args) != 4:
        return False
    dim, first, last = (each if isinstance(each, int) else None for each in piece.args[1:])
    ends = last == stop or (last is not None and last > stop and start > 0)
    return dim in (3, -1) and first == start and ends


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape) if isinstance(node, Node) and "val" in node.meta else ()
