"""How tensors are held: the tuples, lists, dicts and outputs of transformers around them, without the tensors.

A model's inputs and outputs are taken apart into flat tensors, which is what is traced, and put together again. What
held them is written down in the manifest as JSON; nothing of it is code.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from tpray.config import Frozen
from tpray.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["tensor", "constant", "tuple", "list", "dict", "namedtuple", "output"]


class Structure(Frozen):
    """One tensor, or what holds several.

    name: of a namedtuple's class or an output's. keys: of a dict, a namedtuple or an output. value: of a constant.
    """

    kind: Kind
    name: str = ""
    keys: tuple[str | int, ...] = ()
    parts: tuple[Structure, ...] = ()
    value: bool | int | float | str | None = None

    def build(self, tensors: Iterator[Any]) -> Any:
        """Put together what was taken apart; takes as many of ``tensors`` as it has."""
        if self.kind == "tensor":
            return next(tensors)
        if self.kind == "constant":
            return self.value
        parts = [part.build(tensors) for part in self.parts]
        if self.kind in ("tuple", "list"):
            return tuple(parts) if self.kind == "tuple" else parts
        fields = dict(zip(self.keys, parts, strict=True))
        if self.kind == "namedtuple":
            return namedtuple(self.name, [str(key) for key in self.keys])(*parts)
        return fields if self.kind == "dict" else _output(self.name, fields)

    def without(self, numbers: set[int]) -> Structure:
        """The same without the tensors of these numbers, and without what held nothing but them."""
        kept = self._kept(numbers, iter(range(self.count())))
        return kept or Structure(kind="tuple")

    def count(self) -> int:
        """How many tensors there are."""
        return int(self.kind == "tensor") + sum(part.count() for part in self.parts)

    def __str__(self) -> str:
        if self.kind in ("tensor", "constant"):
            return "tensor" if self.kind == "tensor" else repr(self.value)
        parts = [str(part) for part in self.parts]
        if self.keys:
            parts = [f"{key}: {part}" for key, part in zip(self.keys, parts, strict=True)]
        brackets = {"tuple": "()", "list": "[]"}.get(self.kind, "{}")
        return brackets[0] + ", ".join(parts) + brackets[1]

    def _kept(self, numbers: set[int], counter: Iterator[int]) -> Structure | None:
        if self.kind == "tensor":
            return None if next(counter) in numbers else self
        parts = [part._kept(numbers, counter) for part in self.parts]
        if self.parts and not any(parts):
            return None
        left = [i for i, part in enumerate(parts) if part is not None]
        # A namedtuple must keep its fields: it becomes a tuple.
        kind = "tuple" if self.kind == "namedtuple" and len(left) < len(parts) else self.kind
        keys = tuple(self.keys[i] for i in left) if self.keys and kind != "tuple" else ()
        return Structure(
            kind=kind, name=self.name, keys=keys, parts=tuple(p for p in parts if p is not None), value=self.value
        )


def take_apart(value: Any, what: str, constants: bool = True) -> tuple[list[Tensor], Structure]:
    """The tensors of ``value`` in order, and what holds them.

    Args:
        what: the name of ``value`` in an error.
        constants: whether None, numbers and strings may be among the tensors.

    Raises:
        ConfigError: there is something else in it; it is named.
    """
    from torch import Tensor

    tensors: list[Tensor] = []

    def visit(value: Any, path: str) -> Structure:
        if isinstance(value, Tensor):
            tensors.append(value)
            return Structure(kind="tensor")
        if constants and (value is None or type(value) in (bool, int, float, str)):
            return Structure(kind="constant", value=value)
        name = type(value).__name__
        if isinstance(value, dict):
            keys = tuple(value)
            if not all(type(key) in (str, int) for key in keys):
                raise ConfigError(
                    f"{path} is a dict whose keys are not all strings or integers: name its tensors by such"
                )
            kind: Kind = "output" if dataclasses.is_dataclass(value) else "dict"
            parts = tuple(visit(value[key], f"{path}[{key!r}]") for key in keys)
            return Structure(kind=kind, name=name if kind == "output" else "", keys=keys, parts=parts)
        if isinstance(value, (tuple, list)):
            parts = tuple(visit(part, f"{path}[{i}]") for i, part in enumerate(value))
            fields = getattr(value, "_fields", None)
            if fields is not None:
                return Structure(kind="namedtuple", name=name, keys=tuple(fields), parts=parts)
            return Structure(kind="tuple" if isinstance(value, tuple) else "list", parts=parts)
        raise ConfigError(f"{path} is a {name}, and must be a tensor, or tuples, lists and dicts of tensors")

    return tensors, visit(value, what)


class Output(OrderedDict[str, Any]):
    """What a model returned as an output class that is not known here: by name, by attribute and by number."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getitem__(name)
        except KeyError:
            raise AttributeError(f"the output has {', '.join(self)} and no {name}") from None

    def to_tuple(self) -> tuple[Any, ...]:
        """Its values in order."""
        return tuple(super(Output, self).__getitem__(key) for key in self)


def _output(name: str, fields: dict[Any, Any]) -> Any:
    """transformers' class of this name, from its module of output classes and nowhere else; or an `Output`."""
    try:
        from transformers import modeling_outputs
        from transformers.utils import ModelOutput
    except ImportError:
        return Output(fields)
    known = vars(modeling_outputs).get(name)
    if isinstance(known, type) and issubclass(known, ModelOutput):
        return known(**fields)
    return Output(fields)


def same_structure(structures: Sequence[Structure]) -> Structure:
    """The structure that all of them are.

    Raises:
        ConfigError: they differ; two are shown.
    """
    other = next((one for one in structures if one != structures[0]), None)
    if other is not None:
        raise ConfigError(f"the examples differ in more than shapes: {structures[0]} and {other}")
    return structures[0]
