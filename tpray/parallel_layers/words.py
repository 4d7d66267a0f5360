"""A classifier's head out of a language model's: the logits of a few words, such as "no" and "yes".

Rerankers of this kind (Qwen3-Reranker, bge-reranker-v2-gemma, mxbai-rerank-v2) are trained to answer with a word behind
the pair. The next token's logits of these words are what a linear layer gives whose rows are theirs of the output
embedding: one matrix product of [L, H] where the language model has one of [V, H]. Source: the model cards' recipes;
the name is vLLM's ``classifier_from_token``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tpray.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from tpray.parallel_layers.plan import Plan

HEAD = "score.weight"
"""What transformers calls the head of a decoder's classifier."""


def word_ids(tokenizer: Any, words: Sequence[str], source: str) -> tuple[int, ...]:
    """The token that each word is.

    Raises:
        ConfigError: one is no single token, or two are the same.
    """
    found = []
    for word in words:
        ids = tokenizer(word, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            pieces = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(ids)))
            raise ConfigError(
                f"--classifier-from-token: {word!r} is not one token of {source}, but {pieces or 'none'}: name words "
                "that its tokenizer has whole"
            )
        found.append(int(ids[0]))
    if len(set(found)) < len(found):
        raise ConfigError(f"--classifier-from-token: {', '.join(words)} are not different tokens of {source}")
    return tuple(found)


def describe_head(config: Any, tokenizer: Any, words: Sequence[str]) -> None:
    """Have a language model's ``config`` describe a classifier whose labels are ``words``."""
    config.num_labels = len(words)
    config.id2label = dict(enumerate(words))
    config.label2id = {word: number for number, word in enumerate(words)}
    # The head finds the last token by it, and a language model's answer stands behind any token: best is one that no
    # text has, of those that fill a vocabulary up to a round number.
    if max(tokenizer.get_vocab().values()) < config.vocab_size - 1:
        config.pad_token_id = config.vocab_size - 1
    elif config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id


def check_language_model(config: Any, plan: Plan, source: str) -> None:
    """Refuse what is no language model whose next token's logits are rows of its output embedding.

    Raises:
        ConfigError: it has a classifier's head. UnsupportedModelError: it makes its logits otherwise.
    """
    named = list(config.architectures or ())
    if any(name.endswith(("ForSequenceClassification", "ForTokenClassification")) for name in named):
        raise ConfigError(f"{source} is a {named[0]}, which has a head of its own: leave --classifier-from-token out")
    if not plan.reads_last_token or config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{source} is no decoder ({config.model_type}): --classifier-from-token takes a language model that "
            "answers behind the text"
        )
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise UnsupportedModelError(
                f"{source} changes its logits ({name} in config.json), which a classifier's head does not: "
                "--classifier-from-token cannot give its scores"
            )


def output_embedding(config: Any, source: str) -> tuple[Any, str]:
    """The language model that ``config`` describes, on the meta device, and what it calls its output embedding.

    Raises:
        UnsupportedModelError: there is none; or its logits are not the products of that with what the model gives.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModelError(
            f"{source}: transformers has no language model of the type {config.model_type!r}, as "
            "--classifier-from-token needs"
        )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    output = model.get_output_embeddings()
    path = next(path for path, module in model.named_modules() if module is output)
    if output.bias is not None:
        raise UnsupportedModelError(f"{source} adds a bias to its logits, which a classifier's head does not")
    own = (f"{model.base_model_prefix}.", f"{path}.")
    between = [name for name, _ in model.named_parameters() if not name.startswith(own)]
    if between:
        raise UnsupportedModelError(
            f"{source} has layers before its output embedding ({', '.join(between[:2])}), which a classifier's head "
            "has not: --classifier-from-token cannot give its scores"
        )
    return model, f"{path}.weight"
