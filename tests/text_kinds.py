"""Small tokenizers of each architecture's own kind, trained on a few lines."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

LINES = [
    "the firm is in the city of Paris and not in London",
    "a train to Berlin leaves at nine, and comes back at ten",
    "Ça n'est pas vrai: naïve É",
    "hello hello, good morning; the weather is fine today",
] * 4
WORDS = sorted({word for line in LINES for word in re.findall(r"\w+", line.lower())})
LETTERS = [chr(code) for code in range(97, 123)]
RESIDUES = "LAGVSERTIDPKQNFYMHWCXBUZO.-"


def letters(*special: str) -> dict[str, int]:
    """A WordPiece vocabulary that can spell every lower-case word."""
    return {word: i for i, word in enumerate([*special, *LETTERS, *(f"##{c}" for c in LETTERS)])}


def byte_pairs(*special: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level BPE's vocabulary and merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(LINES, trainer)
    return _model_of(tokenizer)


def spaced_pairs(*special: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A BPE with ▁ for a space, and bytes for what it does not know, as Gemma and Llama have: vocabulary and merges."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=360, special_tokens=tokens))
    return _model_of(tokenizer)


def _model_of(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    import json

    stored = json.loads(tokenizer.to_str())["model"]
    return stored["vocab"], [tuple(pair) for pair in stored["merges"]]


def pieces(*special: str, unknown: str) -> list[tuple[str, float]]:
    """A unigram (sentencepiece) vocabulary with its scores."""
    import json

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=110, special_tokens=list(special), unk_token=unknown)
    tokenizer.train_from_iterator(LINES, trainer)
    return [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]


def _bert(**own: Any) -> Callable[[Path], Any]:
    def make(directory: Path) -> Any:
        from transformers import BertTokenizer

        return BertTokenizer(vocab=letters("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), **own)

    return make


def _from(name: str, make: Callable[[], dict[str, Any]], **own: Any) -> Callable[[Path], Any]:
    def build(directory: Path) -> Any:
        import transformers

        return getattr(transformers, name)(**make(), **own)

    return build


def _pairs(*special: str) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        vocabulary, merges = byte_pairs(*special)
        return {"vocab": vocabulary, "merges": merges}

    return make


def _spaced(*special: str) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        vocabulary, merges = spaced_pairs(*special)
        return {"vocab": vocabulary, "merges": merges}

    return make


def _pieces(*special: str, unknown: str = "<unk>") -> Callable[[], dict[str, Any]]:
    return lambda: {"vocab": pieces(*special, unknown=unknown)}


def _esm(directory: Path) -> Any:
    from transformers import EsmTokenizer

    file = directory / "vocab.txt"
    file.write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", *RESIDUES, "<mask>"]))
    return EsmTokenizer(str(file))


def _pairs_of_words(name: str, *special: str) -> Callable[[Path], Any]:
    """Those of the first GPT, BioGPT and CTRL: pairs of letters, where a word's last has a mark of its own."""

    def make(directory: Path) -> Any:
        import json

        import transformers

        inner, last = ("@@", "") if name == "CTRLTokenizer" else ("", "</w>")
        tokens = [*special, *(f"{c}{last}" for c in LETTERS), *(f"{c}{inner}" for c in LETTERS)]
        tokens += [f"th{inner}", f"the{last}"]
        vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
        files = directory / "vocab.json", directory / "merges.txt"
        files[0].write_text(json.dumps(vocabulary))
        counts = " 9" if name == "BioGptTokenizer" else ""
        files[1].write_text(f"#version: 0.2\nt h{counts}\nth e</w>{counts}\n")
        if name == "OpenAIGPTTokenizer":
            return transformers.OpenAIGPTTokenizer(vocab=vocabulary, merges=[("t", "h"), ("th", "e</w>")])
        return getattr(transformers, name)(*map(str, files))

    return make


def _moses(name: str) -> Callable[[Path], Any]:
    """XLM's and FlauBERT's: written in Python, with files of their own."""

    def make(directory: Path) -> Any:
        import json

        import transformers

        special = ["<s>", "</s>", "<pad>", "<unk>", *(f"<special{i}>" for i in range(10))]
        tokens = [*special, *(f"{c}</w>" for c in LETTERS), *LETTERS, "t h", "th", "the</w>"]
        vocabulary, merges = directory / "vocab.json", directory / "merges.txt"
        vocabulary.write_text(json.dumps({token: i for i, token in enumerate(dict.fromkeys(tokens))}))
        merges.write_text("#version: 0.2\nt h 9\nth e</w> 8\n")
        return getattr(transformers, name)(str(vocabulary), str(merges))

    return make


def _plbart(directory: Path) -> Any:
    """PLBART's: sentencepiece's own, with the code of a language behind each text."""
    import sentencepiece
    from transformers import PLBartTokenizer

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_prefix=str(directory / "sentencepiece.bpe"), vocab_size=100,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return PLBartTokenizer(str(directory / "sentencepiece.bpe.model"), src_lang="java")


_ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
_XLM_ROBERTA = _from("XLMRobertaTokenizer", _pieces("<s>", "<pad>", "</s>", "<unk>", "<mask>"))
_T5 = _from("T5Tokenizer", _pieces("<pad>", "</s>", "<unk>"), extra_ids=10)
_DEBERTA = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")
_LLAMA = _from("LlamaTokenizer", _spaced("<unk>", "<s>", "</s>"), pad_token="<unk>")
_GEMMA = _from("GemmaTokenizer", _spaced("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"))
_GPT2 = _from("GPT2Tokenizer", _pairs("<|endoftext|>"))
_QWEN = _from("Qwen2Tokenizer", _pairs("<|endoftext|>"))
_NEOX = _from("GPTNeoXTokenizer", _pairs("<|endoftext|>", "<|padding|>"))
_COHERE_TOKENS = (
    "<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK_TOKEN>", "<BOS_TOKEN>", "<EOS_TOKEN>", "<|END_OF_TURN_TOKEN|>",
)  # fmt: skip
_MODERNBERT = _from(
    "GPT2Tokenizer", _pairs("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"), pad_token="[PAD]", unk_token="[UNK]",
    bos_token="[CLS]", eos_token="[SEP]",
)  # fmt: skip
_BYTES = _from("RobertaTokenizer", _pairs(*_ROBERTA))
_ALBERT = _from("AlbertTokenizer", _pieces("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"))
MAKERS: dict[str, Callable[[Path], Any]] = {
    "roberta": _BYTES,
    "xlm-roberta": _XLM_ROBERTA,
    "camembert": _from(
        "CamembertTokenizer", _pieces("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<s>", "</s>", "<mask>"),
    ),
    "albert": _ALBERT,
    "distilbert": _bert(model_input_names=["input_ids", "attention_mask"]),
    "mpnet": _from("MPNetTokenizer", lambda: {"vocab": letters("<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>")}),
    "deberta": _from("DebertaTokenizer", _pairs(*_DEBERTA)),
    "deberta-v2": _from("DebertaV2Tokenizer", _pieces("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", unknown="[UNK]")),
    "modernbert": _MODERNBERT,
    "roformer": _from(
        "RoFormerTokenizer", lambda: {"vocab": letters("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")},
    ),
    "nystromformer": _ALBERT,
    "esm": _esm,
    "xlm": _moses("XLMTokenizer"),
    "flaubert": _moses("FlaubertTokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _GEMMA),
    **dict.fromkeys(("qwen2", "qwen3", "smollm3", "hunyuan_v1_dense", "seed_oss"), _QWEN),
    **dict.fromkeys(("gpt2", "phi", "starcoder2", "bloom", "opt", "gpt_neo", "gptj", "gpt_bigcode", "gpt-sw3"), _GPT2),
    **dict.fromkeys(("gpt_neox", "olmo", "olmo2", "olmo3", "mpt", "stablelm", "falcon", "glm", "glm4"), _NEOX),
    **dict.fromkeys(("llama", "mistral", "ministral", "ministral3", "phi3", "helium", "arcee", "nemotron"), _LLAMA),
    **dict.fromkeys(("doge", "persimmon", "minicpm3", "diffllama", "exaone4"), _LLAMA),
    **dict.fromkeys(("eurobert", "ultrabert", "modernbert-decoder"), _MODERNBERT),
    "cohere_compass_text": _from("CohereTokenizer", _pairs(*_COHERE_TOKENS)),
    "esmc": _from("EsmcTokenizer", dict),
    "biogpt": _pairs_of_words("BioGptTokenizer", "<s>", "<pad>", "</s>", "<unk>"),
    "openai-gpt": _pairs_of_words("OpenAIGPTTokenizer", "<unk>"),
    "ctrl": _pairs_of_words("CTRLTokenizer", "<unk>"),
} | {
    "xlm-roberta-xl": _XLM_ROBERTA,
    "roberta-prelayernorm": _BYTES,
    "data2vec-text": _BYTES,
    "rembert": _from("RemBertTokenizer", _pieces("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")),
    "xmod": _XLM_ROBERTA,
    "luke": _from("LukeTokenizer", _pairs(*_ROBERTA), entity_vocab={"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, "[MASK2]": 3}),
    "gte": _XLM_ROBERTA,
    "jina_embeddings_v3": _XLM_ROBERTA,
    "big_bird": _from("BigBirdTokenizer", _pieces("<pad>", "</s>", "<s>", "<unk>", "[SEP]", "[MASK]", "[CLS]")),
    "lilt": _BYTES,
    "bart": _BYTES,
    "mbart": _from("MBartTokenizer", _pieces("<s>", "<pad>", "</s>", "<unk>"), src_lang="en_XX"),
    "plbart": _plbart,
    "mvp": _from("MvpTokenizer", _pairs(*_ROBERTA)),
    "t5": _T5,
    "mt5": _T5,
    "umt5": _T5,
    "bigbird_pegasus": _from("PegasusTokenizer", _pieces("<pad>", "</s>", "<unk>", "<mask_1>", "<mask_2>")),
}  # fmt: skip
"""What has a kind of its own; all others have BERT's WordPiece."""

DISTINCT = ["bert", *{maker: name for name, maker in reversed(MAKERS.items())}.values()]
"""One architecture for each kind."""


def save_tokenizer(directory: Path, model_type: str) -> Any:
    """Make the tokenizer of an architecture and save it in ``directory``."""
    tokenizer = MAKERS.get(model_type, _bert())(directory)
    tokenizer.save_pretrained(directory)
    return tokenizer
