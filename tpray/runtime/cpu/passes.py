"""Graph passes: from the exported program of a shard to one that a CPU runs fast.

Each pass takes a `torch.fx.GraphModule`, rewrites one pattern in place and returns how many matches it found.
They know operators, not architectures, so that they hold for every row of the plan. Legend: B batch, S sequence,
T tokens, H hidden, I and O features of a linear layer.

The linear layers become oneDNN's, with weights prepacked into its blocked layout and what follows them fused in.
Source: torch's own use of the same operators, torch/_inductor/fx_passes/mkldnn_fusion.py.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tpray.parallel_layers import collective  # noqa: F401  # defines the operators tpray::*

aten: Any = torch.ops.aten
mkldnn: Any = torch.ops.mkldnn
tpray_ops: Any = torch.ops.tpray

_EVERYTHING = 2**63 - 1  # the end of a slice that has none
_ACTIVATIONS: dict[Any, str] = {aten.silu.default: "swish", aten.gelu.default: "gelu"}  # oneDNN's ReLU hides a NaN
_ONEDNN_DTYPES = (torch.float32, torch.bfloat16)


def calls(node: object, target: object) -> bool:
    """Whether ``node`` is a call of the operator ``target``."""
    return isinstance(node, Node) and node.op == "call_function" and node.target is target


def argument_of(node: Any, target: object) -> Any:
    """What ``node``, a call of ``target``, is computed from; None if it is no such call."""
    return node.args[0] if calls(node, target) else None


def nodes_calling(module: GraphModule, target: object) -> list[Any]:
    """Every call of the operator ``target``, in order."""
    return [node for node in module.graph.nodes if calls(node, target)]


def tensor_of(module: GraphModule, node: object) -> torch.Tensor | None:
    """The weight or buffer that ``node`` fetches; None if it fetches none."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    found: Any = module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found if isinstance(found, torch.Tensor) else None


def add_tensor(module: GraphModule, name: str, value: torch.Tensor) -> Node:
    """Give ``module`` a tensor of its own; the node that fetches it, inserted where the graph inserts now."""
    module.register_buffer(name, value, persistent=False)
    return module.graph.get_attr(name)


def substitute(node: Node, new: Node) -> None:
    """Put ``new`` in the place of ``node``, which goes; what was recorded of its value stays true."""
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def tidy(module: GraphModule) -> None:
    """Drop the nodes that nobody uses any more, and check the graph."""
    module.graph.eliminate_dead_code()
    module.graph.lint()


def remove_no_ops(module: GraphModule) -> int:
    """Drop what computes nothing at inference: dropout that is off, checks of dtypes, casts to the same dtype, views of
    the same shape, slices of everything, unused nodes."""
    found = 0
    nodes: list[Any] = list(module.graph.nodes)  # torch's types let a node's argument be anything
    for node in nodes:
        whole = calls(node, aten.slice.Tensor) and not node.args[2] and node.args[3:] == (_EVERYTHING,)
        same = calls(node, aten.to.dtype) and len(node.args) == 2 and dtype_of(node.args[0]) is node.args[1]
        viewed = calls(node, aten.view.default) or calls(node, aten.reshape.default)
        same = same or (viewed and _same_shape(node, node.args[0]))
        off = calls(node, aten.dropout.default) and node.args[2:] == (False,)
        if whole or same or off or calls(node, aten.alias.default):
            node.replace_all_uses_with(node.args[0])
        elif not calls(node, aten._assert_tensor_metadata.default):
            continue
        module.graph.erase_node(node)
        found += 1
    before = len(module.graph.nodes)
    module.graph.eliminate_dead_code()
    return found + before - len(module.graph.nodes)


def merge_sibling_linears(module: GraphModule) -> int:
    """q, k and v of the same x as one linear layer of ``[3 O, I]``; its output is cut into views."""
    siblings: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
    for node in nodes_calling(module, aten.linear.default):
        x, weight, *bias = node.args
        if tensor_of(module, weight) is not None and all(tensor_of(module, b) is not None for b in bias):
            siblings[x, bool(bias), node.meta.get("int8", False)].append(node)
    merged = 0
    names: dict[tuple[str, ...], str] = {}  # of what was merged -> of the whole: layers that share weights share it
    for (x, biased, _), group in siblings.items():
        if len(group) < 2:
            continue
        parts: list[list[Any]] = [[tensor_of(module, argument) for argument in node.args[1:]] for node in group]
        with module.graph.inserting_before(group[0]):
            arguments = []
            for place, kind in enumerate(("weight", "bias")[: 1 + biased]):
                own = tuple(str(node.args[1 + place].target) for node in group)
                if own in names:
                    arguments.append(module.graph.get_attr(names[own]))
                    continue
                names[own] = f"merged_{merged}_{kind}"
                arguments.append(add_tensor(module, names[own], torch.cat([part[place] for part in parts])))
            linear = module.graph.call_function(aten.linear.default, (x, *arguments))
            linear.meta["int8"] = group[0].meta.get("int8", False)
            sizes = [part[0].shape[0] for part in parts]
            pieces = module.graph.call_function(aten.split_with_sizes.default, (linear, sizes, -1))
            for index, node in enumerate(group):
                node.replace_all_uses_with(module.graph.call_function(operator.getitem, (pieces, index)))
        for node in group:
            module.graph.erase_node(node)
        merged += 1
    tidy(module)
    return merged


def add_before_reducing(module: GraphModule, rank: int) -> int:
    """``all_reduce(y) + bias + residual`` as ``all_reduce(y + bias + residual)``, added on rank 0 alone.

    Additions before the sum can be fused into the linear layer; those after it are passes over memory of their own.
    """
    found = 0
    for reduce in nodes_calling(module, tpray_ops.all_reduce.default):
        linear = reduce.args[0]
        if not calls(linear, aten.linear.default) or len(linear.args) != 2 or len(linear.users) != 1:
            continue
        bias_add = only_user(reduce, aten.add.Tensor)
        if bias_add is None or not _adds_bias(module, bias_add, reduce):
            continue
        last, residual = bias_add, None
        residual_add = only_user(bias_add, aten.add.Tensor)
        if residual_add is not None and not residual_add.kwargs:
            other = next((a for a in residual_add.args[:2] if a is not bias_add), None)
            # Used elsewhere too: else nobody would compute it on the other ranks. What it raises, all raise.
            if other is not None and _same_kind(other, bias_add) and len(other.users) > 1:
                last, residual = residual_add, other
        bias = bias_add.args[1]
        with module.graph.inserting_before(last):
            total = linear.args
            if rank == 0:
                again = _fetch(module, bias)
                total = module.graph.call_function(aten.linear.default, (*linear.args, again))
                if residual is not None:
                    total = module.graph.call_function(aten.add.Tensor, (total, residual))
            else:
                total = module.graph.call_function(aten.linear.default, linear.args)
            for made in [total, *total.all_input_nodes]:
                if calls(made, aten.linear.default) and made.args[:2] == linear.args[:2]:  # not what made x or residual
                    made.meta["int8"] = linear.meta.get("int8", False)
                made.meta.setdefault("val", reduce.meta.get("val"))
            new = module.graph.call_function(tpray_ops.all_reduce.default, (total,))
            new.meta = dict(reduce.meta)
        last.replace_all_uses_with(new)
        found += 1
    tidy(module)
    return found


def fold_biases(module: GraphModule) -> int:
    """``linear(x) + bias`` as the linear layer's own bias. A row-parallel layer adds it behind its all-reduce; with
    one rank there is none between them."""
    found = 0
    for linear in nodes_calling(module, aten.linear.default):
        add = only_user(linear, aten.add.Tensor)
        if len(linear.args) != 2 or add is None or not _adds_bias(module, add, linear):
            continue
        with module.graph.inserting_before(add):
            both = module.graph.call_function(aten.linear.default, (*linear.args, add.args[1]))
        int8 = linear.meta.get("int8", False)
        substitute(add, both)
        both.meta["int8"] = int8
        module.graph.erase_node(linear)
        found += 1
    tidy(module)
    return found


def use_onednn(module: GraphModule) -> int:
    """Linear layers as oneDNN's, whose weights are packed when they are loaded; those of dtypes that it multiplies."""
    found = 0
    for node in nodes_calling(module, aten.linear.default):
        x, weight, bias = (*node.args, None)[:3]
        matrix = tensor_of(module, weight)
        if matrix is None or matrix.dim() != 2 or matrix.dtype not in _ONEDNN_DTYPES:
            continue
        with module.graph.inserting_before(node):
            linear = module.graph.call_function(mkldnn._linear_pointwise.default, (x, weight, bias, "none", [], ""))
        substitute(node, linear)
        found += 1
    tidy(module)
    return found


def fuse_activations(module: GraphModule) -> int:
    """GELU (erf or tanh) or SiLU after a prepacked linear layer, computed while its output is in cache."""
    fused = 0
    for linear in nodes_calling(module, mkldnn._linear_pointwise.default):
        for target, name in _ACTIVATIONS.items():
            user = only_user(linear, target)
            if user is not None and linear.args[3] == "none":
                algorithm = user.kwargs.get("approximate", "none") if name == "gelu" else ""
                linear.args = (*linear.args[:3], name, [], algorithm)
                user.replace_all_uses_with(linear)
                module.graph.erase_node(user)
                fused += 1
    tidy(module)
    return fused


def fuse_residuals(module: GraphModule) -> int:
    """``linear(x) + residual`` of one shape as one call."""
    fused = 0
    for add in nodes_calling(module, aten.add.Tensor):
        if add.kwargs or not _same_kind(*add.args[:2]):
            continue
        for linear, residual in (add.args[:2], add.args[1::-1]):
            alone = calls(linear, mkldnn._linear_pointwise.default) and len(linear.users) == 1
            if not alone or linear.args[3] != "none" or linear is residual:
                continue
            with module.graph.inserting_before(add):
                x, weight, bias = linear.args[:3]
                both = module.graph.call_function(mkldnn._linear_pointwise.binary, (x, residual, weight, bias, "add"))
            substitute(add, both)
            module.graph.erase_node(linear)
            fused += 1
            break
    tidy(module)
    return fused


def convert_masks(module: GraphModule) -> int:
    """Boolean attention masks as additive ones in the queries' dtype, converted once and not in every layer."""
    converted: dict[Node, Node] = {}
    for attention in nodes_calling(module, aten.scaled_dot_product_attention.default):
        mask = attention.args[3] if len(attention.args) > 3 else None
        query = attention.args[0]
        if not isinstance(mask, Node) or not isinstance(query, Node) or dtype_of(mask) is not torch.bool:
            continue
        if mask not in converted:
            with module.graph.inserting_after(mask):
                converted[mask] = module.graph.call_function(additive_mask, (mask, query.meta["val"].dtype))
                converted[mask].meta["val"] = mask.meta["val"].to(query.meta["val"].dtype)
        attention.replace_input_with(mask, converted[mask])
    tidy(module)
    return len(converted)


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where the boolean ``mask`` allows attention, minus infinity elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)


def only_user(node: Any, target: object) -> Any:
    """The one node that uses ``node``, if it calls ``target``; else None."""
    users = list(node.users)
    return users[0] if len(users) == 1 and calls(users[0], target) else None


def _same_shape(one: object, other: object) -> bool:
    if not isinstance(one, Node) or not isinstance(other, Node) or "val" not in one.meta or "val" not in other.meta:
        return False
    return bool(one.meta["val"].shape == other.meta["val"].shape)


def _same_kind(one: Any, other: Any) -> bool:
    """Whether both are values of one shape and one dtype: neither is spread, nor widened, when they are added."""
    return _same_shape(one, other) and dtype_of(one) is dtype_of(other)


def _adds_bias(module: GraphModule, add: Any, to: Any) -> bool:
    """Whether ``add`` is ``to + bias``, with a bias that a linear layer could add itself."""
    bias = tensor_of(module, add.args[1])
    if bias is None or bias.dim() != 1 or add.args[0] is not to or add.kwargs:
        return False
    return _same_kind(add, to) and bias.dtype is dtype_of(to)


def dtype_of(node: Any) -> torch.dtype | None:
    """What ``node`` computes in, as the export recorded it."""
    return node.meta["val"].dtype if "val" in node.meta else None


def _fetch(module: GraphModule, node: Any) -> Node:
    again = module.graph.get_attr(str(node.target))
    again.meta = dict(node.meta)
    return again
