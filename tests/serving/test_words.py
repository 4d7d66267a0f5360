"""Rerankers that answer with a word: the scores of their model cards' recipes, from stock language models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.serving.test_chat import save
from tests.text_kinds import WORDS
from tpray import load
from tpray.artifacts.resolve import find_model
from tpray.config import BatchConfig, ModelConfig
from tpray.errors import CheckpointError, ConfigError, TprayError, UnsupportedModelError
from tpray.group.classifier import ClassifierGroup
from tpray.group.thread_executor import ThreadExecutor
from tpray.platforms.topology import Topology
from tpray.runtime import canary
from tpray.serving.engine import Engine
from tpray.serving.scores import OWN, RAW

TEMPLATES = Path(__file__).parents[2] / "deployments" / "templates"
QUERY = "where is the firm"
DOCUMENTS = [" ".join(WORDS[n : n + 2 + 3 * n]) for n in range(6)]
JUDGE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
ANSWER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
INSTRUCT = "Given a web search query, retrieve relevant passages that answer the query"
PROMPT = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)


def language_model(make: Callable[..., Path], target: Path, model_type: str, words: list[str], tied: bool) -> Any:
    """A small seeded language model whose tokenizer has ``words``; its tokenizer."""
    import json

    from transformers import AutoConfig, AutoModelForCausalLM

    special = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokenizer = save(make(model_type), target, None, special)
    tokenizer.add_tokens(words)
    tokenizer.save_pretrained(target)
    stored = json.loads((target / "config.json").read_text())
    for name in ("architectures", "id2label", "label2id", "pad_token_id"):
        stored.pop(name, None)
    stored |= {"vocab_size": len(tokenizer) + 3, "max_position_embeddings": 1200, "tie_word_embeddings": tied}
    (target / "config.json").write_text(json.dumps(stored))
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(target))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1 if parameter.dim() == 1 else 0.0, 0.3 if parameter.dim() == 1 else 0.15)
    (target / "model.safetensors").unlink()
    model.save_pretrained(target)
    return tokenizer


def next_word_logits(directory: Path, rows: list[list[int]], words: list[int]) -> np.ndarray:
    """The stock language model's, one row at a time."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.stack([model(torch.tensor([row])).logits[0, -1, words] for row in rows]).double().numpy()


def reranked(directory: Path, words: tuple[str, ...], template: Path | None, raw: bool) -> list[float]:
    async def run() -> list[float]:
        model = ModelConfig(source=str(directory), dtype="float32", classifier_from_token=words, chat_template=template)
        engine = Engine(ClassifierGroup(model, ThreadExecutor(2)), BatchConfig())
        await engine.start()
        try:
            ranking = await engine.rerank(QUERY, DOCUMENTS, RAW if raw else OWN)
            scores = {each.index: each.score for each in ranking.documents}
            return [scores[number] for number in range(len(DOCUMENTS))]
        finally:
            await engine.stop()

    return asyncio.run(run())


@pytest.mark.parametrize("tied", [True, False])
def test_qwen3_reranker_is_scored_by_its_recipe(
    tied: bool, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Source: the model card of Qwen/Qwen3-Reranker-0.6B: the softmax of no and yes, behind prefix, pair and suffix."""
    tokenizer = language_model(make_checkpoint, tmp_path / "m", "qwen3", ["yes", "no"], tied)

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    pairs = [f"<Instruct>: {INSTRUCT}\n<Query>: {QUERY}\n<Document>: {document}" for document in DOCUMENTS]
    rows = [ids(JUDGE) + ids(pair) + ids(ANSWER) for pair in pairs]
    words = [tokenizer.convert_tokens_to_ids(word) for word in ("no", "yes")]
    logits = next_word_logits(tmp_path / "m", rows, words)
    expected = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    found = reranked(tmp_path / "m", ("no", "yes"), TEMPLATES / "qwen3-reranker.jinja", raw=False)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_bge_reranker_gemma_is_scored_by_its_recipe(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Source: the model card of BAAI/bge-reranker-v2-gemma: the logit of Yes behind the pair and a prompt."""
    tokenizer = language_model(make_checkpoint, tmp_path / "m", "gemma", ["Yes"], True)
    rows = []
    for document in DOCUMENTS:
        parts = (f"A: {QUERY}", "\n", f"B: {document}", "\n", PROMPT)
        ids = [token for part in parts for token in tokenizer(part, add_special_tokens=False)["input_ids"]]
        rows.append([tokenizer.bos_token_id, *ids])
    (yes,) = tokenizer("Yes", add_special_tokens=False)["input_ids"]
    expected = next_word_logits(tmp_path / "m", rows, [yes])[:, 0]
    found = reranked(tmp_path / "m", ("Yes",), TEMPLATES / "bge-reranker-gemma.jinja", raw=True)
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1.0, np.abs(expected).max()), rtol=0)


def test_mxbai_rerank_v2_is_scored_by_its_recipe(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Source: mixedbread-ai/mxbai-rerank, mxbai_rerank_v2.py: by how much the logit of 1 is greater than that of 0.

    It tokenises the parts by themselves, which is the same where none ends in a mark that the tokenizer joins with the
    end of the line.
    """
    tokenizer = language_model(make_checkpoint, tmp_path / "m", "qwen2", [], True)

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    prefix = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
    task = (
        "You are a search relevance expert who evaluates how well documents match search queries. For each "
        "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
        "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:"
    )
    parts = [
        [prefix, f"query: {QUERY}", "\n", f"document: {document}", "\n", task, "<|im_end|>\n<|im_start|>assistant\n"]
        for document in DOCUMENTS
    ]
    rows = [[token for part in row for token in ids(part)] for row in parts]
    logits = next_word_logits(tmp_path / "m", rows, [ids("0")[0], ids("1")[0]])
    expected = logits[:, 1] - logits[:, 0]
    found = reranked(tmp_path / "m", ("0", "1"), TEMPLATES / "mxbai-rerank-v2.jinja", raw=True)
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1.0, np.abs(expected).max()), rtol=0)


def test_a_language_model_that_cross_encoder_saved_has_its_scores(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """With its module LogitScore, its activation, its own template and its prompt: so Qwen's and mixedbread's are."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules import LogitScore

    tokenizer = language_model(make_checkpoint, tmp_path / "base", "qwen3", ["yes", "no"], True)
    tokenizer.chat_template = (TEMPLATES / "qwen3-reranker.jinja").read_text()
    tokenizer.save_pretrained(tmp_path / "base")
    no, yes = (tokenizer.convert_tokens_to_ids(word) for word in ("no", "yes"))
    whole = Transformer(str(tmp_path / "base"), transformer_task="text-generation", model_kwargs={"dtype": "float32"})
    stock = CrossEncoder(
        modules=[whole, LogitScore(true_token_id=yes, false_token_id=no)], device="cpu",
        activation_fn=torch.nn.Identity(), prompts={"own": "find the firm"},
        default_prompt_name="own",
    )  # fmt: skip
    stock.save_pretrained(str(tmp_path / "m"))
    expected = stock.predict([(QUERY, document) for document in DOCUMENTS])
    found = reranked(tmp_path / "m", ("no", "yes"), None, raw=False)
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1.0, np.abs(expected).max()), rtol=0)


def test_labels_are_the_words_and_an_artifact_keeps_them(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read layer by layer too, where the head alone comes from the output embedding; behind the tokenizer's padding."""
    tokenizer = language_model(make_checkpoint, tmp_path / "m", "llama", ["yes", "no", "maybe"], False)
    monkeypatch.setattr(canary, "LARGE_BYTES", 0)
    texts = ["the firm", f"the firm {tokenizer.pad_token}"]
    rows: list[list[int]] = tokenizer(texts)["input_ids"]
    assert rows[1][-1] == tokenizer.pad_token_id
    words = ("maybe", "no", "yes")
    logits = next_word_logits(tmp_path / "m", rows, [tokenizer.convert_tokens_to_ids(word) for word in words])
    with load(tmp_path / "m", dtype="float32", executor=ThreadExecutor(2), classifier_from_token=words) as classifier:
        scored = classifier.classify(texts, raw_scores=True)
        found = [{each["label"]: each["score"] for each in scores} for scores in scored]
        kept = classifier.group.artifact.directory
    np.testing.assert_allclose([[scores[word] for word in words] for scores in found], logits, atol=1e-5)
    with pytest.raises(ConfigError, match="keeps its labels"):
        load(kept, executor=ThreadExecutor(2), classifier_from_token=words)


@pytest.mark.parametrize(
    ("words", "changes", "error", "message"),
    [
        ((), {}, CheckpointError, r"LlamaForCausalLM.*--classifier-from-token, for instance no,yes"),
        (("no", "perhaps not"), {}, ConfigError, "'perhaps not' is not one token of"),
        (("no", "no"), {}, ConfigError, "not different tokens"),
        (("no", "yes"), {"architectures": ["LlamaForSequenceClassification"]}, ConfigError, "leave .* out"),
        (("no", "yes"), {"final_logit_softcapping": 30.0}, UnsupportedModelError, "final_logit_softcapping"),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_starts(
    words: tuple[str, ...], changes: dict[str, Any], error: type[TprayError], message: str,
    make_checkpoint: Callable[..., Path], tmp_path: Path,
) -> None:  # fmt: skip
    import json

    language_model(make_checkpoint, tmp_path / "m", "llama", ["yes", "no"], False)
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(error, match=message):
        find_model(ModelConfig(source=str(tmp_path / "m"), classifier_from_token=words), Topology(2))


def test_an_encoder_has_no_next_word(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(make_checkpoint("bert"), tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["BertForMaskedLM"]}))
    with pytest.raises(UnsupportedModelError, match="is no decoder"):
        find_model(ModelConfig(source=str(tmp_path / "m"), classifier_from_token=("the", "firm")), Topology(2))


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("gpt_neox", {}, None),
        ("biogpt", {"tie_word_embeddings": False}, None),
        ("modernbert-decoder", {"decoder_bias": False}, r"layers before its output embedding \(lm_head.dense.weight"),
        ("gptj", {}, "adds a bias to its logits"),
    ],
)
def test_the_output_embedding_is_the_language_models_own(
    model_type: str, changes: dict[str, Any], message: str | None, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Whatever it is called, in the file or in the model; and a head of another kind is refused by name.

    Would catch rows of the input embedding in its place, which the canary finds, but has no true words for.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = tmp_path / "m"
    tokenizer: Any = save(make_checkpoint(model_type), directory, None, [])
    config = AutoConfig.from_pretrained(directory, architectures=None, **changes)
    (directory / "model.safetensors").unlink()
    torch.manual_seed(5)
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0.0, 0.3)
    model.save_pretrained(directory)
    words = [w for w in "abcdefgh" if len(tokenizer(w, add_special_tokens=False)["input_ids"]) == 1][:2]
    own = ModelConfig(source=str(directory), dtype="float32", classifier_from_token=tuple(words))
    if message is not None:
        with pytest.raises(TprayError, match=message):
            find_model(own, Topology(2))
        return
    ids: list[int] = tokenizer("the firm is in Paris")["input_ids"]
    rows = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
    expected = next_word_logits(directory, [ids], rows)[0]
    with load(directory, dtype="float32", executor=ThreadExecutor(2), classifier_from_token=words) as classifier:
        found = {each["label"]: each["score"] for each in classifier.classify("the firm is in Paris", raw_scores=True)}
    np.testing.assert_allclose([found[word] for word in words], expected, atol=1e-5)


def test_an_output_embedding_that_is_neither_stored_nor_tied_is_missed(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    language_model(make_checkpoint, tmp_path / "m", "llama", ["yes", "no"], False)
    file = tmp_path / "m" / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if name != "lm_head.weight"}, file)
    with pytest.raises(CheckpointError, match=r"lacks its output embedding, lm_head\.weight, which tie"):
        find_model(ModelConfig(source=str(tmp_path / "m"), classifier_from_token=("no", "yes")), Topology(2))
