"""Lowered graphs on disk, and as functions: what is left to do when a rank loads is to pack its weights.

A file holds the calls of one graph in their order, as JSON; the tensors lie beside it as safetensors. Loading writes
one straight Python function from the calls, over operators and tensors that are bound to its names. So neither
``torch.export`` nor a graph has to be made again, no call looks anything up, and a value is let go after its last use.

Nothing is unpickled, and no text of a file becomes code: names are numbered here, operators are looked up among
those that a lowered graph may call, and values are numbers, strings, lists, and a few kinds of torch's.

::

    {"inputs": 3, "calls": [["aten.add.Tensor", [{"value": 0}, {"tensor": "bias"}], {}], ...], "output": {"value": 9}}

A value's number counts the inputs first, then the calls.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from tpray.errors import ArtifactError, CheckpointError, ConfigError
from tpray.parallel_layers.weights import SafetensorsFile
from tpray.runtime.cpu import fusions, rows
from tpray.runtime.cpu.huge_pages import use_huge_pages
from tpray.runtime.cpu.int8 import Int8Weight, int8_linear
from tpray.runtime.cpu.passes import additive_mask, mkldnn, tensor_of
from tpray.runtime.exported import ARITHMETIC, REFUSED, WEIGHTS_FILE

Function = Callable[..., Any]

_OWN: dict[str, Function] = {
    f.__name__: f
    for f in (
        rows.attend_rows, rows.packed_attention, rows.row_argmax, rows.row_choice, rows.row_cumsum, rows.row_positions,
        rows.row_padded, rows.row_range, rows.row_starts, rows.row_sum, additive_mask, int8_linear, fusions.rms_norm,
        fusions.rotate, fusions.capped_attention,
    )
}  # fmt: skip
_NAMESPACES = ("aten", "mkldnn", "tpray")
_KINDS = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}

# torch's own bindings of an operator cost a third of what its general entry does; their arguments are the same.
_BINDINGS: dict[str, Function] = {
    "aten.add.Tensor": torch.add, "aten.sub.Tensor": torch.sub, "aten.mul.Tensor": torch.mul,
    "aten.div.Tensor": torch.div, "aten.layer_norm.default": torch.layer_norm, "aten.tanh.default": torch.tanh,
    "aten.transpose.int": torch.transpose, "aten.unsqueeze.default": torch.unsqueeze, "aten.select.int": torch.select,
    "aten.reshape.default": torch.reshape, "aten.split_with_sizes.default": torch.split_with_sizes,
    "aten.matmul.default": torch.matmul, "aten.softmax.int": torch.softmax, "aten.relu.default": torch.relu,
    "aten.view.default": Tensor.view, "aten.expand.default": Tensor.expand, "aten.cat.default": torch.cat,
}  # fmt: skip


def graph_file(number: int) -> str:
    """What the file of graph ``number``, from 0, is called."""
    return f"graph_{number}.json"


def save_graphs(lowered: Sequence[tuple[GraphModule, Graph]], directory: Path, also: Iterable[str] = ()) -> None:
    """Write graphs, each with the module that holds its tensors. Tensors of one name and the same values are one.

    also: names of tensors of the first module to keep, whether a graph reads them or not.

    Raises:
        ConfigError: a graph calls what no lowered graph does, or holds a value that has no place in a file.
    """
    tensors: dict[str, Tensor] = {}
    for name in also:
        tensors[name] = lowered[0][0].state_dict()[name].detach()
    for number, (module, graph) in enumerate(lowered):
        names: dict[str, str] = {}
        for node in graph.nodes:
            value = tensor_of(module, node)
            if value is not None and node.target not in names:
                names[str(node.target)] = _name_of(str(node.target), value.detach(), tensors)
        (directory / graph_file(number)).write_text(json.dumps(_describe(graph, names)))
    save_file(_apart(tensors), directory / WEIGHTS_FILE)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which none shares memory, as safetensors wants them; only those that do are copied."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        shares = place in seen or not tensor.is_contiguous()  # with itself, as an expanded buffer does
        apart[name] = tensor.clone(memory_format=torch.contiguous_format) if shares else tensor
        seen.add(place)
    return apart


def _name_of(name: str, value: Tensor, tensors: dict[str, Tensor]) -> str:
    """What a file calls ``value``: its name, with a number where another tensor of that name came before."""
    for tried in (name, *(f"{name}#{i}" for i in range(1, len(tensors) + 2))):
        known = tensors.setdefault(tried, value)
        same = known.shape == value.shape and known.dtype == value.dtype
        if same and (known.data_ptr() == value.data_ptr() or torch.equal(known, value)):
            return tried
    raise AssertionError("there are more names than tensors")


def _describe(graph: Graph, names: Mapping[str, str]) -> dict[str, Any]:
    numbers: dict[Node, int] = {}

    def write(value: Any) -> Any:
        if isinstance(value, Node):
            return {"tensor": names[str(value.target)]} if value.op == "get_attr" else {"value": numbers[value]}
        if isinstance(value, (list, tuple)):
            return [write(each) for each in value]
        if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
            return {type(value).__name__: str(value)}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, torch.device):
            return {"device": str(value)}
        for kind, of in _KINDS.items():
            if isinstance(value, of):
                return {kind: str(value).removeprefix("torch.")}
        raise ConfigError(f"a traced program holds {value!r}, a {type(value).__name__}, which cannot be stored")

    nodes: list[Any] = list(graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    calls, output = [], None
    numbers.update({node: i for i, node in enumerate(inputs)})
    for node in nodes:
        if node.op == "call_function":
            kwargs = {name: write(value) for name, value in node.kwargs.items()}
            calls.append([_title(node.target), write(list(node.args)), kwargs])
            numbers[node] = len(inputs) + len(calls) - 1
        elif node.op == "output":
            output = write(node.args[0])
        elif node.op not in ("placeholder", "get_attr"):
            raise ConfigError(f"a traced program calls {node.target}, which cannot be stored")
    return {"inputs": len(inputs), "calls": calls, "output": output}


def _title(target: Any) -> str:
    """What a file calls an operator.

    Raises:
        ConfigError: no lowered graph calls it.
    """
    if isinstance(target, torch._ops.OpOverload):
        title = str(target)
    else:
        title = next(
            (known for known, f in (_OWN | ARITHMETIC).items() if f is target), getattr(target, "__name__", "")
        )
    if _operator(title) is None:
        raise ConfigError(f"a traced program calls {title}, which the runtime cpu does not know")
    return title


def _operator(title: str) -> Function | None:
    """What ``title`` stands for; None: nothing that a lowered graph may call."""
    found: Any = _BINDINGS.get(title) or _OWN.get(title) or ARITHMETIC.get(title)
    if found is not None:
        return found  # type: ignore[no-any-return]
    space, _, name = title.partition(".")
    if title.startswith(REFUSED) or space not in _NAMESPACES or name.count(".") != 1:
        return None
    packet, _, overload = name.partition(".")
    found = getattr(getattr(getattr(torch.ops, space), packet, None), overload, None)
    return found if isinstance(found, torch._ops.OpOverload) else None


def pack(weight: Tensor) -> Tensor:
    """A weight ``[O, I]`` in oneDNN's blocked layout."""
    # The batch size only steers the choice of a blocked layout; that of many rows serves few as well.
    packed: Tensor = mkldnn._reorder_linear_weight(weight.clone(), 256)
    return packed


_PREPARED: dict[str, tuple[int, Callable[[Tensor], Any]]] = {
    "mkldnn._linear_pointwise.default": (1, pack),
    "mkldnn._linear_pointwise.binary": (2, pack),
    "int8_linear": (1, Int8Weight.of),
}
"""Operators that take a weight in a form of its own: which argument it is, and what makes that form."""


PARTS = 8
"""Into how many parts a graph is cut, if it has places for so many cuts."""


@dataclass(frozen=True)
class LoadedGraph:
    """A graph as a function.

    in_parts: the same as a generator. It stops ``parts`` - 1 times on the way; what it returns is the output. Graphs of
    all ranks stop behind the same collectives, so that other steps can run there.
    """

    run: Function
    in_parts: Callable[..., Generator[None, None, Any]]
    parts: int


def load_graphs(directory: Path, count: int = 1) -> tuple[list[LoadedGraph], Callable[[str], Tensor]]:
    """What `save_graphs` wrote: a function for each graph, and what finds a tensor that they share by its name.

    Each weight is packed once, and its plain form is let go before the next is read; all others stay memory-mapped.

    Raises:
        ArtifactError: the files are damaged, or a graph calls what no lowered graph does.
    """
    store = _Store(directory / WEIGHTS_FILE)
    functions = []
    for number in range(count):
        path = directory / graph_file(number)
        try:
            functions.append(_function(json.loads(path.read_bytes(), parse_constant=_no_constant), store, path))
        except ArtifactError:
            raise
        except (FileNotFoundError, LookupError, TypeError, ValueError, AttributeError, SyntaxError) as e:
            raise ArtifactError(f"{path} is not a traced program of this version: {e}") from e
    use_huge_pages(store.packed)
    return functions, store.tensor


class _Store:
    """The tensors of a file, plain or prepared, each once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._plain: dict[str, Tensor] = {}
        self._prepared: dict[tuple[str, Callable[[Tensor], Any]], Any] = {}

    def _read(self, name: str) -> Tensor:
        """Through a mapping of its own: pages that were read count as this process's until that ends."""
        try:
            return SafetensorsFile(self._path).whole(name)
        except CheckpointError as e:
            raise ArtifactError(f"{self._path} cannot be read: {e}") from e

    def tensor(self, name: str) -> Tensor:
        """As it is in the file."""
        if name not in self._plain:
            self._plain[name] = self._read(name)
        return self._plain[name]

    @property
    def packed(self) -> list[Tensor]:
        """Those that were prepared."""
        values = (value if isinstance(value, tuple) else (value,) for value in self._prepared.values())
        return [tensor for value in values for tensor in value]

    def prepared(self, name: str, prepare: Callable[[Tensor], Any]) -> Any:
        """As ``prepare`` makes it of the file's."""
        key = name, prepare
        if key not in self._prepared:
            self._prepared[key] = prepare(self._read(name))
        return self._prepared[key]


def _function(stored: Mapping[str, Any], store: _Store, path: Path) -> LoadedGraph:
    """The function that makes the stored calls. It names its values v0, v1, ...; ``bound`` is everything else."""
    bound: dict[str, Any] = {}
    names: dict[int, str] = {}  # of what is bound, by its identity
    known = int(stored["inputs"])
    inputs = [f"v{i}" for i in range(known)]

    def bind(value: Any) -> str:
        if id(value) not in names:
            names[id(value)] = f"b{len(bound)}"
            bound[names[id(value)]] = value
        return names[id(value)]

    def read(value: Any) -> str:
        if isinstance(value, list):
            return f"[{', '.join(map(read, value))}]"
        if not isinstance(value, dict):
            return repr(value)
        ((kind, content),) = value.items()
        if kind == "value":
            if not (isinstance(content, int) and 0 <= content < known):
                raise ValueError(f"a call takes the value {content!r}, which none before it has made")
            return f"v{content}"
        return bind(store.tensor(content) if kind == "tensor" else _constant(kind, content))

    lines: list[str] = []
    stops = _stops([title for title, *_ in stored["calls"]])
    last_uses = _last_uses(stored)
    for title, arguments, keywords in stored["calls"]:
        function = _operator(title)
        if function is None:
            raise ArtifactError(f"{path} calls {title}, which no program that tpray traces does; refused")
        texts = list(map(read, arguments))
        if title in _PREPARED:
            place, prepare = _PREPARED[title]
            texts[place] = bind(store.prepared(arguments[place]["tensor"], prepare))
        if not all(name.isidentifier() and not iskeyword(name) for name in keywords):
            raise ValueError(f"{title} is called with {', '.join(keywords)}")
        texts += [f"{name}={read(value)}" for name, value in keywords.items()]
        lines.append(f"v{known} = {bind(function)}({', '.join(texts)})")
        known += 1
        done = last_uses.get(known - 1 - len(inputs), ())
        if done:
            lines.append(f"del {', '.join(f'v{i}' for i in done)}")
        if known - 1 - len(inputs) in stops:
            lines.append("yield")
    lines.append(f"return {read(stored['output'])}")
    source = ""
    for name, leaves_out in (("run", "yield"), ("in_parts", "")):
        body = "".join(f"    {line}\n" for line in lines if line != leaves_out)
        source += f"def {name}({', '.join(inputs)}):\n{body}"
    exec(compile(source, str(path), "exec"), bound)  # the text is this function's own, see above
    return LoadedGraph(bound["run"], bound["in_parts"], len(stops) + 1)


def _stops(titles: Sequence[str]) -> set[int]:
    """After which calls a graph stops: collectives at about equal distances; linear layers where there are none."""
    for names in (("tpray.",), ("mkldnn._linear_pointwise", "int8_linear", "aten.linear")):
        places = [number for number, title in enumerate(titles) if title.startswith(names)]
        if places:
            parts = min(PARTS, len(places))
            return {places[len(places) * part // parts - 1] for part in range(1, parts)}
    return set()


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is written as a kind of value")


def _constant(kind: str, content: str) -> Any:
    """The value that JSON has no form for."""
    if kind in ("float", "complex"):
        return {"float": float, "complex": complex}[kind](content)
    if kind == "device":
        try:
            return torch.device(content)
        except RuntimeError as e:
            raise ValueError(f"{content!r} is no device") from e
    found = getattr(torch, content)
    if not isinstance(found, _KINDS[kind]):
        raise ValueError(f"{content!r} is not a {kind}")
    return found


def _last_uses(stored: Mapping[str, Any]) -> dict[int, list[int]]:
    """Call number -> the values that no later call takes; what nothing takes goes at once."""
    last: dict[int, int] = {}
    calls = stored["calls"]
    for number, (_, arguments, keywords) in enumerate(calls):
        last[int(stored["inputs"]) + number] = number
        for value in _values_in([arguments, list(keywords.values())]):
            last[value] = number
    for value in _values_in(stored["output"]):
        last.pop(value, None)
    found: dict[int, list[int]] = {}
    for value, number in last.items():
        found.setdefault(number, []).append(value)
    return found


def _values_in(part: Any) -> Iterable[int]:
    if isinstance(part, list):
        for each in part:
            yield from _values_in(each)
    elif isinstance(part, dict) and "value" in part:
        yield part["value"]
