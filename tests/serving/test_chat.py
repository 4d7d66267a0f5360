"""Conversations: the ids that transformers' `apply_chat_template` gives, and what a template refuses."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from tpray import chat, load
from tpray.artifacts.manifest import ModelRecord
from tpray.artifacts.resolve import find_model
from tpray.chat import Chat
from tpray.config import BatchConfig, ModelConfig
from tpray.errors import ConfigError, DeadlineError, EmptyInputError, InputError, InputTooLongError
from tpray.group.classifier import ClassifierGroup
from tpray.group.thread_executor import ThreadExecutor
from tpray.parallel_layers.checkpoint import find_checkpoint
from tpray.platforms.topology import Topology
from tpray.serving.codec import Direction, TextCodec
from tpray.serving.engine import Engine
from tpray.serving.http import make_app

LLAMA = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nbe kind<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
)
TULU = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n{% endfor %}"
)
KINDS = {
    "llama": (LLAMA, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "qwen2": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"]),
    "gpt2": (TULU, []),
}
TALK = [
    {"role": "user", "content": "  the firm is in Paris — “naïve” É 42 "},
    {"role": "assistant", "content": "hello hello\n\ngood morning"},
    {"role": "user", "content": "a train to Berlin </s> <|im_end|>"},
]
SHORT = [{"role": "user", "content": "the firm"}]


def save(checkpoint: Path, target: Path, template: str | dict[str, str] | None, special: list[str]) -> Any:
    """A copy with a chat template and its tokens; transformers' tokenizer of it."""
    from transformers import AutoTokenizer

    shutil.copytree(checkpoint, target)
    tokenizer: Any = AutoTokenizer.from_pretrained(target)
    tokenizer.add_special_tokens({"extra_special_tokens": special})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(target)
    return AutoTokenizer.from_pretrained(target)


def codec_of(directory: Path, model_type: str = "bert", max_length: int = 400) -> TextCodec:
    return TextCodec(directory, record(model_type, max_length))


def record(model_type: str, max_length: int) -> ModelRecord:
    return ModelRecord(
        source="m", revision=None, digest="", model_type=model_type, max_length=max_length, labels=("a",), pad_id=0,
        problem_type=None, vocab_size=10_000, token_types=2, plan={"rules": []},
    )  # fmt: skip


def stock_ids(tokenizer: Any, messages: list[dict[str, Any]], **cut: Any) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(messages, **cut)["input_ids"]
    return ids


@pytest.mark.parametrize("model_type", KINDS)
def test_a_conversation_has_the_ids_that_transformers_gives_it(
    model_type: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """No special token twice; whole, cut at either end, and from the facts of another codec."""
    tokenizer = save(make_checkpoint(model_type), tmp_path / "m", *KINDS[model_type])
    first = codec_of(tmp_path / "m", model_type)
    assert first.compiled
    for codec in (first, TextCodec(tmp_path / "m", first.record, first.facts)):
        for messages in (TALK, SHORT, TALK + TALK[1:] * 20):
            expected = stock_ids(tokenizer, messages)
            assert (
                len(expected) < 3 or codec.encode(["plain", Chat.of(messages)], truncate=True)[1].ids == expected[:400]
            )
    bos = tokenizer.bos_token_id
    if bos is not None and model_type in ("llama", "gemma"):
        assert first.encode([Chat.of(SHORT)])[0].ids.count(bos) == 1
    short = codec_of(tmp_path / "m", model_type, 12)
    with pytest.raises(InputTooLongError, match=r"item 1 has \d+ tokens and this model takes 12"):
        short.encode(["a", Chat.of(TALK)])
    sides: tuple[Direction, ...] = ("Left", "Right")
    for side in sides:
        tokenizer.truncation_side = side.lower()
        cut = stock_ids(tokenizer, TALK, truncation=True, max_length=12)
        assert short.encode([Chat.of(TALK)], True, side)[0].ids == cut


def test_a_tokenizer_in_python_and_a_very_long_conversation_are_no_exceptions(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    for model_type in ("xlm", "bert"):
        tokenizer = save(make_checkpoint(model_type), tmp_path / model_type, TULU.replace("eos_token", "'[SEP]'"), [])
        long = [{"role": "user", "content": "the firm is in Paris, " * 1000}]
        ids = (
            codec_of(tmp_path / model_type, model_type).encode([Chat.of(long)], truncate=True, direction="Right")[0].ids
        )
        assert ids == stock_ids(tokenizer, long)[:400]


def test_what_a_template_refuses_is_its_items_error_in_its_own_words(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    cases: list[tuple[str, Any, str]] = [
        (
            "gemma",
            {"role": "system", "content": "x"},
            "item 1 is refused by the model's chat template: System role not s",
        ),
        ("gemma", {"role": "assistant", "content": "x"}, "Conversation roles must alternate user/assistant"),
        ("gemma", {"role": "user", "content": "a\0"}, "item 1 has a NUL character"),
        ("qwen2", {"role": "user"}, "'dict object' has no attribute 'content'"),
        ("qwen2", {"role": "user", "content": None}, "'dict object' has no attribute 'content'"),
        ("qwen2", {"role": "user", "content": ["a"]}, "TypeError: can only concatenate str"),
    ]
    codecs = {}
    for kind in ("gemma", "qwen2"):
        save(make_checkpoint(kind), tmp_path / kind, *KINDS[kind])
        codecs[kind] = codec_of(tmp_path / kind, kind)
    for kind, message, words in cases:
        with pytest.raises(InputError, match=words) as caught:
            codecs[kind].encode(["fine", Chat.of([message])])
        assert caught.value.item == 1
    with pytest.raises(EmptyInputError, match="item 3 is a conversation without messages"):
        Chat.of([], 3)
    for wrong in (["a"], [{"content": "a"}], [{"role": 1}]):
        with pytest.raises(InputError, match="has a message 0 without a role"):
            Chat.of(wrong)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 0.3 s"),
        ("{% for a in range(99999) %}{{ messages[0].content * 1000 }}{% endfor %}", "more than 8000000 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for a in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{% for %}", "Expected"),
        (" ", "is empty"),
    ],
)
def test_a_template_that_is_broken_harms_nobody_else(
    template: str, words: str, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends in time, and texts are tokenised as before."""
    monkeypatch.setattr(chat, "RENDER_S", 0.3)
    save(make_checkpoint("bert"), tmp_path / "m", template, [])
    codec = codec_of(tmp_path / "m")
    before, started = codec.encode(["the firm"]), time.monotonic()
    with pytest.raises(InputError, match=words):
        codec.encode([Chat.of(SHORT)])
    assert time.monotonic() - started < 60
    assert codec.encode(["the firm"]) == before
    if "more than 0.3" in words:
        with pytest.raises(DeadlineError):
            codec.encode([Chat.of(SHORT)], deadline=time.monotonic() + 0.1)


def test_a_file_stands_for_the_tokenizers_template_and_goes_with_the_artifact(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Other text, another artifact; the default one of several is taken; scores are the stock model's."""
    from transformers import AutoModelForSequenceClassification

    directory, file = tmp_path / "m", tmp_path / "own.txt"
    tokenizer = save(
        make_checkpoint("llama", num_labels=1, vocab_size=400, max_position_embeddings=400, num_hidden_layers=1),
        directory,
        {"default": LLAMA, "rag": "{{ 1 }}"}, [],
    )  # fmt: skip
    model: Any = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()

    def expected(template: str) -> float:
        ids = torch.tensor([tokenizer.apply_chat_template(TALK, chat_template=template)["input_ids"]])
        with torch.no_grad():
            return float(model(input_ids=ids).logits)

    keys = set()
    for text in (None, TULU):
        if text is not None:
            file.write_text(text)
        with load(
            directory, dtype="float32", executor=ThreadExecutor(2), chat_template=None if text is None else file
        ) as model_here:
            scores = model_here.classify([TALK, {"messages": TALK}, "a text"], raw_scores=True)
            kept = model_here.group.artifact
        assert (kept.model_directory / chat.FILE).read_text() == (text or LLAMA)
        bound = pytest.approx(expected(text or LLAMA), abs=1e-5)
        assert [scores[0][0]["score"], scores[1][0]["score"]] == [bound, bound]
        keys.add(kept.directory)
        with load(kept.directory, dtype="float32", executor=ThreadExecutor(2)) as again:
            assert again.classify(TALK, raw_scores=True)[0]["score"] == bound
    assert len(keys) == 2
    with pytest.raises(ConfigError, match="traced already, and keeps its chat template"):
        load(kept.directory, executor=ThreadExecutor(2), chat_template=file)
    for text, words in (
        ("{% for %}", "is not a jinja template: .*Expected"),
        ("", "is empty"),
        (None, "cannot be read"),
    ):
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        with pytest.raises(ConfigError, match=words):
            find_model(ModelConfig(source=str(directory), chat_template=file), Topology(2))


def test_conversations_over_http(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """One or a batch, beside texts and pairs; what is wrong with one is said with its number, and is never a 500."""
    save(make_checkpoint("bert", vocab_size=120), tmp_path / "m", GEMMA.replace("bos_token", "'[CLS]'"), [])

    async def run(source: Path, ask: Callable[[httpx.AsyncClient], Any]) -> None:
        engine = Engine(
            ClassifierGroup(ModelConfig(source=str(source), dtype="float32"), ThreadExecutor(2)), BatchConfig()
        )
        await engine.start()
        try:
            transport = httpx.ASGITransport(make_app(engine))
            async with httpx.AsyncClient(transport=transport, base_url="http://tpray") as http:
                await ask(http)
        finally:
            await engine.stop()

    async def ask(http: httpx.AsyncClient) -> None:
        async def post(inputs: Any) -> tuple[int, Any]:
            answer = await http.post("/predict", json={"inputs": inputs, "truncate": True})
            return answer.status_code, answer.json()

        status, single = await post(SHORT)
        assert (status, await post({"messages": SHORT})) == (200, (200, single))
        assert await post([SHORT, {"messages": SHORT}]) == (200, [single, single])
        status, mixed = await post([["a"], SHORT, ["a", "b"]])
        assert (status, len(mixed)) == (200, 3)
        np.testing.assert_allclose([s["score"] for s in mixed[1]], [s["score"] for s in single], atol=1e-6)
        assert (await post([TALK * 20]))[0] == 422, "roles that do not alternate"
        talk = [{"role": ("user", "assistant")[i % 2], "content": "a"} for i in range(200)]
        assert (await post([talk] * 20))[0] == 200, "many messages are no large body"
        for inputs, words in (
            (
                [["a"], [{"role": "system", "content": "x"}]],
                "`inputs`: item 1 is refused by the model's chat template: Sy",
            ),
            ([{"text": "a"}], "`inputs`: item 0 has a message 0 without a role"),
            ({"message": SHORT}, "item 0 is an object: a conversation is"),
            ({"messages": []}, "item 0 is a conversation without messages"),
            (["a", SHORT[0]], "`inputs` has the wrong type"),
            ([[SHORT[0], "a"]], "`inputs` has the wrong type"),
        ):
            status, said = await post(inputs)
            assert status in (400, 422)
            assert words in said["error"]

    asyncio.run(run(tmp_path / "m", ask))

    async def without(http: httpx.AsyncClient) -> None:
        answer = await http.post("/predict", json={"inputs": SHORT})
        assert (answer.status_code, answer.json()["error_type"]) == (422, "Validation")
        assert "has no chat template: give the server one with --chat-template FILE" in answer.json()["error"]

    asyncio.run(run(make_checkpoint("bert"), without))


def test_jsonl_lines_may_be_conversations(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from rich.console import Console

    from tpray.commands.classify_file import How, classify_file

    save(make_checkpoint("bert"), tmp_path / "m", *KINDS["gemma"])
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines: list[dict[str, Any]] = [
        {"messages": SHORT, "id": 1},
        {"text": "a"},
        {"messages": [{"role": "system", "content": "b"}]},
        {"messages": 1},
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = tmp_path / "t.jinja"
    file.write_text(GEMMA.replace("bos_token", "'[CLS]'"))
    with load(tmp_path / "m", dtype="float32", executor=ThreadExecutor(2), chat_template=file) as classifier:
        counts = classify_file(classifier, str(source), str(target), Console(quiet=True), How(truncate=True))
    made = [json.loads(line) for line in target.read_text().splitlines()]
    assert (counts.classified, counts.refused) == (2, [3, 4])
    assert made[0] | {"label": 0, "score": 0, "scores": 0} == lines[0] | {"label": 0, "score": 0, "scores": 0}
    assert "line 3 is refused by the model's chat template: System role not supported" in made[2]["error"]
    assert "line 4 has messages that are no list" in made[3]["error"]


def test_the_template_is_in_the_digest(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    save(make_checkpoint("bert"), tmp_path / "m", TULU, [])
    before = find_checkpoint(tmp_path / "m")
    assert chat.FILE in before.model_files
    digest = before.digest
    (tmp_path / "m" / chat.FILE).write_text(LLAMA)
    assert find_checkpoint(tmp_path / "m").digest != digest
