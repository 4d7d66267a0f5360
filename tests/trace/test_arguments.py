"""What parallel_model_trace takes and refuses, and what a traced model takes and returns."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import ModelOutput

from tpray.errors import ConfigError, TraceError
from tpray.group.thread_executor import ThreadExecutor
from tpray.parallel_layers.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from tpray.runtime.cpu.runtime import CpuRuntime
from tpray.runtime.structure import Output, Structure, take_apart
from tpray.trace import ParallelModel, parallel_model_load, parallel_model_save, parallel_model_trace


def trace(make: Any, examples: Any, tp: int = 1, **options: Any) -> ParallelModel:
    return parallel_model_trace(make, examples, tp_degree=tp, executor=ThreadExecutor, **options)


class Pair(NamedTuple):
    left: Any
    right: Any


class Returns(nn.Module):
    """Returns its input's double and triple, held by what ``hold`` makes of them."""

    def __init__(self, hold: Any) -> None:
        super().__init__()
        self.hold = hold

    def forward(self, x: Tensor) -> Any:
        return self.hold(x * 2, x * 3)


def held(two: Tensor, three: Tensor) -> list[Any]:
    return [
        two,
        (two,),
        [two, (three, [two])],
        {"a": two, 3: {"b": three}},
        OrderedDict(b=two, a=three),
        Pair(two, (three,)),
        (two, None, "text", 1.5, True),
        SequenceClassifierOutput(logits=two, hidden_states=(three, two)),
        {},
    ]


@pytest.mark.parametrize("number", range(8))
def test_a_model_returns_what_it_returned_before(number: int, tmp_path: Path) -> None:
    x = torch.tensor([1.0, 2.0])
    with trace(lambda: Returns(lambda two, three: held(two, three)[number]), (x,)) as model:
        found, expected = model(x), held(x * 2, x * 3)[number]
        parallel_model_save(model, tmp_path / "saved")
    with parallel_model_load(tmp_path / "saved", executor=ThreadExecutor) as model:
        loaded = model(x)
    for one in (found, loaded):
        wanted = {OrderedDict: "dict"}.get(type(expected), type(expected).__name__)
        assert type(one).__name__ == wanted
        assert str(take_apart(one, "it")[1]) == str(take_apart(expected, "it")[1])
        assert all(map(torch.equal, take_apart(one, "it")[0], take_apart(expected, "it")[0]))


def test_an_output_of_transformers_is_read_by_name_attribute_and_number() -> None:
    x = torch.tensor([1.0])
    with trace(
        lambda: Returns(lambda two, three: SequenceClassifierOutput(logits=two, attentions=(three,))), x
    ) as model:
        found = model(x)
    assert isinstance(found, SequenceClassifierOutput)
    assert found.loss is None
    assert found[0] is found.logits is found["logits"]
    assert torch.equal(found.attentions[0], x * 3)


def test_an_output_class_that_is_nobodys_here_is_read_as_well() -> None:
    made = Structure(kind="output", name="FluxOutput", keys=("sample", "rest"), parts=(Structure(kind="tensor"),) * 2)
    found = made.build(iter([torch.ones(1), torch.zeros(1)]))
    assert type(found) is Output
    assert found[0] is found.sample is found["sample"]
    assert found[-1] is found.to_tuple()[1] is found.rest
    with pytest.raises(AttributeError, match="the output has sample, rest and no logits"):
        found.logits  # noqa: B018


@pytest.mark.parametrize("name", ["logging", "dataclass", "__builtins__", "os.system"])
def test_a_manifest_names_no_other_class(name: str) -> None:
    """Only transformers' output classes are looked up by name."""
    tensor = Structure(kind="tensor")
    assert type(Structure(kind="output", name=name, keys=("y",), parts=(tensor,)).build(iter([1]))) is Output
    assert not issubclass(Output, ModelOutput)


def test_what_is_kept_on_the_rank_leaves_no_hole() -> None:
    tensor = Structure(kind="tensor")
    pair = Structure(kind="tuple", parts=(tensor, tensor))
    output = Structure(kind="dict", keys=("y", "cache", "z"), parts=(tensor, pair, tensor))
    named = Structure(kind="namedtuple", name="Pair", keys=("left", "right"), parts=(tensor, tensor))
    assert str(output.without({1, 2})) == "{y: tensor, z: tensor}"
    assert str(output.without({1})) == "{y: tensor, cache: (tensor), z: tensor}"
    assert str(named.without({0})) == "(tensor)"
    assert str(named.without(set())) == "{left: tensor, right: tensor}"
    assert str(tensor.without({0})) == "()"


def test_a_structure_is_plain_json() -> None:
    _, structure = take_apart({"a": (torch.ones(1), None, True, 1)}, "it")
    assert Structure.model_validate(json.loads(structure.model_dump_json())) == structure
    again: tuple[Any, ...] = structure.build(iter([7]))["a"]
    assert again == (7, None, True, 1)
    assert type(again[2]) is bool


class Nested(nn.Module):
    def forward(self, x: Tensor, others: Any, named: Any) -> Tensor:
        total = x + others[0] * others[1][0]
        y: Tensor = total - named["a"] * named["b"]["c"]
        return y


def test_inputs_may_be_nested() -> None:
    def inputs(n: int, start: float) -> tuple[Any, ...]:
        a, b, c, d, e = (torch.arange(n) + start + i for i in range(5))
        return a, [b, (c,)], {"a": d, "b": {"c": e}}

    examples = [inputs(2, 0.0), inputs(3, 0.0)]
    with trace(Nested, examples, 2) as model:
        for n in (3, 2, 3):
            given = inputs(n, 5.0)
            torch.testing.assert_close(model(*given), Nested()(*given))
        a, b, c = examples[0]
        with pytest.raises(
            ConfigError, match=r"traced for inputs \(tensor, \[tensor, \(tensor\)\], .* these are \(tensor"
        ):
            model(a, tuple(b), c)
        with pytest.raises(ConfigError, match=r"inputs\[1\] is a NoneType"):
            model(a, None, c)
        with pytest.raises(ConfigError, match=r"no program was traced for"):
            model(*inputs(4, 0.0))


class OfADict(nn.Module):
    def forward(self, named: dict[str, Tensor]) -> Tensor:
        total: Tensor = named["x"] + named["y"]
        return total


def test_a_bare_tensor_or_dict_is_the_one_input() -> None:
    x = torch.ones(2)
    with trace(lambda: Returns(lambda two, three: two), x) as model:
        assert torch.equal(model(x), x * 2)
    with trace(OfADict, {"x": x, "y": x}) as model:
        assert torch.equal(model({"x": x, "y": x * 2}), x * 3)


def test_a_tensor_that_is_given_twice_as_an_example_is_two_inputs() -> None:
    x = torch.ones(2)
    with trace(OfADict, {"x": x, "y": x}) as model:
        assert torch.equal(model({"x": x * 5, "y": x}), x * 6)


def test_a_list_of_tensors_is_one_example() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    with trace(Sum, [torch.ones(2), torch.ones(2)]) as model:
        assert torch.equal(model(torch.ones(2), torch.ones(2)), torch.full((2,), 2.0))


def test_examples_that_are_held_differently_are_refused() -> None:
    x = torch.ones(1)
    with pytest.raises(ConfigError, match=r"differ in more than shapes: \(tensor\) and \(tensor, tensor\)"):
        trace(Nested, [(x,), (x, x)])


def test_an_output_that_is_no_tensor_is_named() -> None:
    with pytest.raises(ConfigError, match=r"what the model returns\[1\]\['cache'\] is a set"):
        trace(lambda: Returns(lambda two, three: (two, {"cache": {1}})), torch.ones(1))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"states": {"x": torch.ones(1)}}, "io_aliases"),
    ({"bucket_config": object()}, "list of example tuples"),
    ({"spmd_mode": True}, "checkpoint_loader_callable"),
    ({"checkpoint_loader_callable": dict}, "spmd_mode=True"),
    ({"serialization_path": "folder"}, "spmd_mode=True"),
    ({"compiler_args": [1]}, "list of strings"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=[next(iter(options)) for options, _ in REFUSED])
def test_arguments_that_are_not_done_are_refused_before_ranks_start(options: dict[str, Any], words: str) -> None:
    def start(tp: int) -> Any:
        raise AssertionError("no rank may start")

    with pytest.raises(ConfigError, match=words):
        parallel_model_trace(Nested, torch.ones(1), executor=start, **options)


@pytest.mark.parametrize("given", ["-O1 --model-type='unet inference'", ["-O1", "--model-type=unet inference"]])
def test_compiler_args_and_aliases_reach_the_runtime(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    own = CpuRuntime.trace_user_model

    def trace_user_model(self: Any, module: Any, examples: Any, directory: Any, arguments: Any, aliases: Any) -> Any:
        seen.append((arguments, aliases))
        return own(self, module, examples, directory, arguments, aliases)

    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, self.get_buffer("total") + x

    def make() -> Any:
        model = Counter()
        return model, {model.total: 1}

    monkeypatch.setattr(CpuRuntime, "trace_user_model", trace_user_model)
    ignored = {"compiler_workdir": "folder", "inline_weights_to_neff": False, "max_parallel_compilations": 1}
    trace(make, torch.ones(2), 2, compiler_args=given, **ignored)
    assert seen == [(("-O1", "--model-type=unet inference"), {"model.total": 1})] * 2


def whole_checkpoint() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = {"0.weight": (9, 6), "1.weight": (7, 6), "1.bias": (7,), "2.weight": (4, 7), "2.bias": (4,), "rest": (1,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def unfilled() -> nn.Module:
    column = ColumnParallelLinear(6, 7, gather_output=False, pad=True)
    return nn.Sequential(
        ParallelEmbedding(9, 6, pad=True), column, RowParallelLinear(7, 4, input_is_parallel=True, pad=True)
    )


def test_spmd_mode_fills_the_model_from_a_whole_checkpoint(tmp_path: Path) -> None:
    ids = torch.tensor([[1, 8, 4]])
    saved = tmp_path / "saved"
    options: dict[str, Any] = {"spmd_mode": True, "checkpoint_loader_callable": whole_checkpoint}
    with trace(unfilled, ids, 2, **options, serialization_path=str(saved)) as model:
        found = model(ids)
    w = whole_checkpoint()
    hidden = w["0.weight"][ids] @ w["1.weight"].T + w["1.bias"]
    torch.testing.assert_close(found, hidden @ w["2.weight"].T + w["2.bias"])
    with parallel_model_load(saved, executor=ThreadExecutor) as loaded:
        assert torch.equal(loaded(ids), found)


def test_a_checkpoint_that_lacks_weights_is_refused() -> None:
    def lacking() -> dict[str, Tensor]:
        return {name: tensor for name, tensor in whole_checkpoint().items() if not name.startswith("1")}

    with pytest.raises(TraceError, match=r"lacks 2 tensors of a Sequential, among them 1\.weight, 1\.bias"):
        trace(unfilled, torch.tensor([[1]]), 2, spmd_mode=True, checkpoint_loader_callable=lacking)


def test_examples_of_different_dtypes_are_refused() -> None:
    examples = [(torch.zeros(2, dtype=torch.int64),), (torch.zeros(3),)]
    with pytest.raises(ConfigError, match="all example tuples have the same dtypes"):
        parallel_model_trace(torch.nn.Identity, examples, executor=ThreadExecutor)
