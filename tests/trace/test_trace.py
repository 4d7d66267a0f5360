"""The tutorial's calls: its script as it stands, state that stays on the ranks, buckets, and what is refused."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tpray
from tpray.artifacts.folder import UserModelArtifact
from tpray.config import DEMO_DIR
from tpray.errors import ArtifactError, ConfigError, TraceError
from tpray.group.thread_executor import ThreadExecutor
from tpray.group.user_model import UserModelGroup
from tpray.parallel_layers import parallel_state
from tpray.parallel_layers.layers import ColumnParallelLinear, RowParallelLinear, partition_of
from tpray.platforms.topology import Topology
from tpray.trace import ParallelModel, parallel_model_load, parallel_model_save, parallel_model_trace

README = Path(tpray.__file__).parents[1] / "README.md"
REPLACED = re.compile(r"^\| `([^`]+)` \| (?:`([^`]+)`|nothing) \|", re.MULTILINE)


def replacements() -> list[tuple[str, str]]:
    """What the README's table says must be replaced in the tutorial's script."""
    _, _, rest = README.read_text().partition("| in the script | becomes |")
    return REPLACED.findall(rest.partition("\n\n")[0])


@pytest.mark.ray
def test_the_tutorials_script(tmp_path: Path) -> None:
    """AWS's text with the README's replacements, run as a user runs it, on the model that is here."""
    text = Path(__file__).with_name("tutorial.txt").read_text()
    assert len(replacements()) == 4
    for old, new in [*replacements(), ("bert-base-cased-finetuned-mrpc", str(DEMO_DIR))]:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "script.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, "the end of the script is as quiet as its run"
    check_saved_tutorial(tmp_path / "tp_models")


def check_saved_tutorial(folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    whole = AutoModelForSequenceClassification.from_pretrained(DEMO_DIR)
    ids = torch.randint(5, 1000, (1, 128), generator=torch.Generator().manual_seed(0))
    inputs = ids, (torch.arange(128) < 99).long()[None], torch.zeros_like(ids)
    with parallel_model_load(folder, executor=ThreadExecutor) as model, torch.no_grad():
        found = model(*inputs)
        expected = whole(*inputs)
    assert type(found) is type(expected)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert found[0] is found.logits


def trace(make: Any, examples: Any, tp: int = 2) -> ParallelModel:
    return parallel_model_trace(make, examples, tp_degree=tp, executor=ThreadExecutor)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        whole, back = torch.randn(32, 16), torch.randn(16, 32)
        self.up = ColumnParallelLinear(16, 32, gather_output=False)
        self.down = RowParallelLinear(32, 16, input_is_parallel=True)
        for layer, value in ((self.up, whole), (self.down, back)):
            part = partition_of(layer.weight)
            assert part is not None
            layer.weight.data.copy_(part.cut(value))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.down(torch.relu(self.up(x))), "sum": x.sum()}


def expected_mlp(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    whole, back = torch.randn(32, 16), torch.randn(16, 32)
    return torch.relu(x @ whole.T) @ back.T


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_model_with_parallel_layers_equals_the_whole_one(tp: int, tmp_path: Path) -> None:
    x = torch.randn(3, 16)
    with trace(Mlp, (torch.zeros(3, 16),), tp) as model:
        found = model(x)
        torch.testing.assert_close(found, {"y": expected_mlp(x), "sum": x.sum()})
        parallel_model_save(model, tmp_path / "saved")
    parallel_model_save(model, tmp_path / "saved")  # again, over itself
    with parallel_model_load(tmp_path / "saved", executor=ThreadExecutor) as loaded:
        torch.testing.assert_close(loaded(x), found, rtol=0, atol=0)


def test_the_right_program_is_chosen_for_each_shape() -> None:
    examples = [(torch.zeros(n, 16),) for n in (1, 4, 9)]
    with trace(Mlp, examples) as model:
        for n in (4, 1, 9, 4):
            x = torch.randn(n, 16)
            torch.testing.assert_close(model(x)["y"], expected_mlp(x))
        with pytest.raises(ConfigError, match=r"float32 \[5, 16\]; traced were \(float32 \[1, 16\]\) and"):
            model(torch.randn(5, 16))
        with pytest.raises(ConfigError, match=r"int64 \[4, 16\]"):
            model(torch.zeros(4, 16, dtype=torch.int64))


class RunningMean(nn.Module):
    mean: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = self.count + len(x)
        mean = self.mean + (x - self.mean).sum(0) / count
        return mean * 2, mean, count


def make_running_mean() -> tuple[nn.Module, dict[Tensor, int]]:
    model = RunningMean()
    return model, {model.mean: 1, model.count: 2}


def test_a_running_statistic_stays_on_the_rank_for_every_bucket() -> None:
    with trace(make_running_mean, [(torch.zeros(n, 3),) for n in (1, 2)]) as model:
        seen = torch.empty(0, 3)
        for n in (1, 2, 2, 1):
            x = torch.randn(n, 3)
            seen = torch.cat([seen, x])
            outputs = model(x)
            assert len(outputs) == 1, "an aliased output stays on the rank"
            torch.testing.assert_close(outputs[0], seen.mean(0) * 2)


class Decoder(nn.Module):
    """One attention layer with a key/value cache, its heads shared out: a token in, attention over all so far."""

    heads, width, length = 4, 8, 6
    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        own = self.heads // parallel_state.get_tensor_model_parallel_size()
        hidden = self.heads * self.width
        self.qkv = ColumnParallelLinear(hidden, 3 * hidden, bias=False, gather_output=False, stride=3)
        self.out = RowParallelLinear(hidden, hidden, bias=False, input_is_parallel=True)
        torch.manual_seed(1)
        for layer, whole in ((self.qkv, torch.randn(3 * hidden, hidden)), (self.out, torch.randn(hidden, hidden))):
            part = partition_of(layer.weight)
            assert part is not None
            layer.weight.data.copy_(part.cut(whole))
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, own, self.length, self.width))

    def forward(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part.view(1, 1, -1, self.width).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        here = torch.arange(self.length) == position
        keys = torch.where(here[:, None], k, self.keys)
        values = torch.where(here[:, None], v, self.values)
        seen = torch.arange(self.length) <= position
        mixed = nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=seen[None, None, None, :])
        return self.out(mixed.transpose(1, 2).reshape(1, 1, -1)), keys, values


def make_decoder() -> tuple[nn.Module, dict[Tensor, int]]:
    model = Decoder()
    return model, {model.keys: 1, model.values: 2}


def test_a_key_value_cache_stays_on_its_rank() -> None:
    torch.manual_seed(2)
    tokens = torch.randn(Decoder.length, 1, 1, 32)
    position = torch.zeros((), dtype=torch.int64)
    with parallel_state.use(0, 1):
        whole = Decoder().eval()
    with trace(make_decoder, (tokens[0], position)) as model:
        for i, token in enumerate(tokens):
            with torch.no_grad():
                expected, whole.keys, whole.values = whole(token, torch.tensor(i))
            (found,) = model(token, torch.tensor(i))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_goes_in_and_comes_out() -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    x = torch.randn(4).bfloat16()
    with trace(Double, (x,), 1) as model:
        assert torch.equal(model(x), x * 2)
        assert model(x).dtype is torch.bfloat16


def broken() -> nn.Module:
    raise ValueError("the weights are on another planet")


class ByValue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


def test_a_function_that_raises_is_shown_once_with_its_line() -> None:
    with pytest.raises(
        TraceError, match=r"(?s)rank 0: broken raised: ValueError.*another planet.*test_trace"
    ) as caught:
        trace(broken, (torch.zeros(1),), 4)
    assert str(caught.value).count("another planet") == 2, "the message, and the line of code that says it"


def test_an_untraceable_model_is_shown_with_its_line_and_what_to_change() -> None:
    with pytest.raises(TraceError, match=r"(?s)ByValue cannot be traced.*torch\.where.*x\.sum\(\) > 0"):
        trace(ByValue, (torch.zeros(1),))


@pytest.mark.parametrize("examples", [(), [], [(1, 2)], "text", (None,), [{}, "x"], ({1.5: torch.zeros(1)},)])
def test_examples_that_are_none_are_refused(examples: Any) -> None:
    with pytest.raises(ConfigError, match="example_inputs"):
        trace(Mlp, examples)


def test_aliases_that_do_not_fit_are_refused() -> None:
    def stranger() -> Any:
        return RunningMean(), {torch.zeros(3): 1}

    def beyond() -> Any:
        model = RunningMean()
        return model, {model.mean: 7}

    def other() -> Any:
        model = RunningMean()
        return model, {model.mean: 2}

    for make, message in ((stranger, "register_buffer"), (beyond, "output 7 of 3"), (other, r"float32 \[3\].*int64")):
        with pytest.raises(ConfigError, match=message):
            trace(make, (torch.zeros(1, 3),))


class Shift(nn.Module):
    """Keeps its last two inputs: returns the one before the last, and gives it up."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.before = (nn.Parameter(torch.zeros(3), requires_grad=False) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.before, x, self.last


def test_a_state_that_is_returned_or_passed_on_is_what_it_was_before_the_step() -> None:
    def make() -> Any:
        model = Shift()
        return model, {model.last: 1, model.before: 2}

    with trace(make, (torch.zeros(3),)) as model:
        returned = [model(torch.full((3,), float(number)))[0][0].item() for number in range(1, 6)]
    assert returned == [0, 0, 1, 2, 3]


def test_a_state_that_shares_its_memory_is_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(3, 3), nn.Linear(3, 3, bias=False)
            self.head.weight = self.table.weight
            self.register_buffer("row", self.table.weight.detach()[0])

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.head(x), self.table.weight + 1

    def tied() -> Any:
        model = Tied()
        return model, {model.table.weight: 1}

    with pytest.raises(ConfigError, match=r"the state table\.weight shares its memory with head\.weight"):
        trace(tied, (torch.zeros(1, 3),))

    def viewed() -> Any:
        model = Tied()
        return model, {model.row: 0}

    with pytest.raises(ConfigError, match=r"the state row shares its memory with table\.weight"):
        trace(viewed, (torch.zeros(1, 3),))


def test_a_damaged_or_foreign_folder_is_refused(tmp_path: Path) -> None:
    model = trace(Mlp, (torch.zeros(3, 16),))
    parallel_model_save(model, tmp_path / "saved")
    weights = tmp_path / "saved" / "rank_01" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"wxyz")
    with pytest.raises(ArtifactError, match=r"rank_01/weights\.safetensors is damaged"):
        parallel_model_load(tmp_path / "saved", executor=ThreadExecutor)
    with pytest.raises(ArtifactError, match=r"is not a manifest"):
        parallel_model_load(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="another folder"):
        parallel_model_save(model, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_a_model_for_another_family_of_cores_is_refused(tmp_path: Path) -> None:
    with trace(Mlp, (torch.zeros(1, 16),)) as model:
        parallel_model_save(model, tmp_path / "saved")
    artifact = UserModelArtifact.open(tmp_path / "saved")
    other = artifact.manifest.model_copy(update={"runtime": "neuron-xla", "instance_family": "inf2"})
    executor = ThreadExecutor(Topology(2, "neuron-xla", instance_family="trn1"))
    group = UserModelGroup(UserModelArtifact(artifact.directory, other), executor)
    with pytest.raises(ConfigError, match=r"for the instance family inf2, and this is trn1: trace the model again"):
        asyncio.run(group.start())
