"""Find a checkpoint, and what can be said of it without reading a weight.

A source is a Hub id or a local directory in transformers' layout: ``config.json``, the tokenizer's files,
and ``model.safetensors`` or ``pytorch_model.bin``, whole or with an index of parts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tpray.chat import FILE as TEMPLATE_FILE
from tpray.chat import check_template
from tpray.errors import CheckpointError, ModelNotFoundError, TprayError, UnsupportedModelError
from tpray.parallel_layers.architectures import plan_for
from tpray.parallel_layers.files import WEIGHTS, file_digest, read_json
from tpray.parallel_layers.plan import Plan
from tpray.parallel_layers.tasks import TOKEN, classifiers, task_of
from tpray.parallel_layers.weights import open_weights
from tpray.parallel_layers.words import check_language_model, describe_head, word_ids
from tpray.tokenizer import check_vocabulary, load_tokenizer, tokenizer_files

WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Checkpoint:
    """A classifier's files on this machine.

    source: what the user named. directory: where the files are. revision: the Hub's commit, if any. own_plan: how to
    shard it, if the user says so. own_template: a file with a chat template that stands for the tokenizer's own.
    words: of a language model, whose logits are those of a classifier; see `words`.
    """

    source: str
    directory: Path
    revision: str | None = None
    own_plan: Plan | None = None
    own_template: Path | None = None
    words: tuple[str, ...] = ()

    @cached_property
    def plan(self) -> Plan:
        """How it is sharded: the user's plan, the table's, or one derived from transformers' own.

        Raises:
            UnsupportedModelError: there is none for its architecture.
        """
        return self.own_plan or plan_for(self.config)

    @cached_property
    def config(self) -> Any:
        """transformers' configuration of the model.

        Raises:
            CheckpointError: ``config.json`` is not a transformers configuration.
            UnsupportedModelError: transformers does not know the architecture.
        """
        from transformers import AutoConfig

        stored = self.stored_config()
        try:
            config = AutoConfig.from_pretrained(self.directory, local_files_only=True, trust_remote_code=False)
            # Neither changes a logit, and a program cannot be traced with them.
            if not config.return_dict:
                config.return_dict = True
            if getattr(config, "chunk_size_feed_forward", 0):
                config.chunk_size_feed_forward = 0
            # X-MOD has an adapter for each of 81 languages: those that a text is not given to are not loaded.
            if getattr(config, "default_language", None) in (getattr(config, "languages", None) or ()):
                config.languages = [config.default_language]
            if self.words:
                describe_head(config, load_tokenizer(self.directory, self.source), self.words)
            return config
        except TprayError:
            raise
        except Exception as e:  # transformers raises what it likes, and says what it means in the last line
            known = stored.get("model_type")
            if "auto_map" in stored and "custom code" in str(e):
                raise UnsupportedModelError(
                    f"{self.source} is an architecture in code of its own (auto_map in config.json), which tpray does "
                    f"not run: {known!r} would have to be part of transformers"
                ) from e
            if not isinstance(known, str) or "model type" in str(e):
                raise UnsupportedModelError(
                    f"{self.source}: the installed transformers does not know the architecture {known!r}"
                ) from e
            said = str(e).strip().splitlines() or [type(e).__name__]
            raise CheckpointError(
                f"{self.directory}/config.json is not a transformers configuration: {said[-1].strip()}"
            ) from e

    def stored_config(self) -> dict[str, Any]:
        """config.json as it is, without what transformers adds.

        Raises:
            CheckpointError: it cannot be read.
        """
        path = self.directory / "config.json"
        try:
            stored = read_json(path)
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{path} is not a transformers configuration: {e}") from e
        if not isinstance(stored, dict):
            raise CheckpointError(f"{path} is not a transformers configuration: it is not a JSON object")
        return stored

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of the model.

        Raises:
            CheckpointError: there is none, or it cannot be this model's; see `tpray.tokenizer`.
        """
        tokenizer = load_tokenizer(self.directory, self.source)
        check_vocabulary(tokenizer, self.config.vocab_size, self.source)
        return tokenizer

    def __getstate__(self) -> dict[str, Any]:
        """Without what is transformers' own: a process that needs it loads it, and others need no transformers."""
        return {name: value for name, value in self.__dict__.items() if name not in ("config", "tokenizer")}

    @property
    def model_files(self) -> dict[str, Path]:
        """What a server reads of the model besides its weights, by the names that it reads them under.

        The configuration, the tokenizer's files, and what says how sentence-transformers scores with it.
        """
        names = ("config.json", "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
        own = [path for name in names if (path := self.directory / name).is_file()]
        found = {path.name: path for path in (*own, *tokenizer_files(self.tokenizer, self.directory))}
        return found if self.own_template is None else found | {TEMPLATE_FILE: self.own_template}

    @cached_property
    def word_ids(self) -> tuple[int, ...]:
        """The tokens of `words`.

        Raises:
            ConfigError: one of them is no token.
        """
        return word_ids(self.tokenizer, self.words, self.source)

    @property
    def labels(self) -> tuple[str, ...]:
        """What each logit stands for.

        Raises:
            CheckpointError: ``id2label`` does not name them.
        """
        named = self.config.id2label
        if sorted(named) != list(range(self.config.num_labels)):
            raise CheckpointError(
                f"{self.source}: id2label in config.json has the keys {', '.join(map(str, sorted(named)))}, and labels "
                f"are numbered from 0 to {self.config.num_labels - 1}: correct it"
            )
        return tuple(str(named[i]) for i in range(self.config.num_labels))

    @property
    def pad_id(self) -> int:
        """The id that the model takes for padding: what its head reads, or any that the embedding has if it reads none.

        The tokenizer's own pad id does not matter: padding is masked, and only a head can see it.

        Raises:
            CheckpointError: the head finds the last token by it, and config.json names none that the embedding has.
        """
        named = self.config.pad_token_id
        if isinstance(named, int) and 0 <= named < self.config.vocab_size:
            return named
        reads_a_token = self.plan.reads_last_token or self.config.is_encoder_decoder
        if reads_a_token and task_of(self.config) != TOKEN:
            said = "names no pad_token_id" if named is None else f"has the pad_token_id {named!r}"
            raise CheckpointError(
                f"{self.source}: config.json {said}, and a {self.config.model_type} classifier finds the last token of "
                f"a row by it: give it the id of the tokenizer's pad token, below {self.config.vocab_size}"
            )
        return 0

    @cached_property
    def weight_files(self) -> dict[str, Path]:
        """Where each tensor is: its name in the model -> the file that holds it."""
        files = self._files()
        index = next((f for f in files if f.name.endswith(".index.json")), None)
        try:
            if index is not None:
                found = {name: self.directory / file for name, file in self._weight_map(index).items()}
            else:
                found = dict.fromkeys(open_weights(files[0]).names(), files[0])
        except (OSError, ValueError, RuntimeError) as e:
            raise CheckpointError(f"{index or files[0]} cannot be read as weights: {e}") from e
        missing = sorted({str(path) for path in found.values() if not path.is_file()})
        if missing:
            raise CheckpointError(f"{self.source}: the index names files that are missing: {', '.join(missing)}")
        return found

    def _weight_map(self, index: Path) -> dict[str, str]:
        """Which tensor is in which file beside it; transformers reads ``metadata`` there too.

        Raises:
            CheckpointError: the index has another form.
        """
        stored = read_json(index)
        known: dict[str, Any] = stored if isinstance(stored, dict) else {}
        files_of: Any = known.get("weight_map")
        named = isinstance(files_of, dict) and files_of and all(isinstance(file, str) for file in files_of.values())
        if not named or not isinstance(known.get("metadata"), dict):
            raise CheckpointError(
                f'{index} is no index of weights: the form is {{"metadata": {{...}}, "weight_map": {{tensor: file}}}}'
            )
        outside = [file for file in files_of.values() if Path(file).is_absolute() or ".." in Path(file).parts]
        if outside:
            raise CheckpointError(f"{index} names {outside[0]!r}: files of weights lie beside their index, or below it")
        return dict(files_of)

    @property
    def files(self) -> list[Path]:
        """The files of weights; one that holds all is not opened, which would import torch."""
        files = self._files()
        return sorted(set(self.weight_files.values())) if files[0].name.endswith(".index.json") else files

    @property
    def size_bytes(self) -> int:
        """How large the weights are on disk."""
        return sum(path.stat().st_size for path in self.files)

    def _files(self) -> list[Path]:
        for name in WEIGHT_NAMES:
            for candidate in (self.directory / name, self.directory / f"{name}.index.json"):
                if candidate.is_file():
                    return [candidate]
        raise CheckpointError(f"{self.directory} has no weights: neither {' nor '.join(WEIGHT_NAMES)}")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the files that a server reads, and of the weights: what the model *is*."""
        weights = {*self._files(), *self.weight_files.values()}
        parts = sorted([*self.model_files.items(), *((path.name, path) for path in weights)])
        total = hashlib.sha256()
        for name, path in parts:
            total.update(f"{name}:{file_digest(path)}\n".encode())
        total.update(json.dumps(self.words).encode() if self.words else b"")
        return total.hexdigest()

    def _rope_types(self) -> set[str]:
        """Of the rotary embeddings, those of single kinds of layers among them."""
        stored = getattr(self.config, "rope_parameters", None) or getattr(self.config, "rope_scaling", None) or {}
        kinds = [stored, *(each for each in stored.values() if isinstance(each, dict))]
        return {str(each.get("rope_type", each.get("type", "default"))) for each in kinds}

    @property
    def mixes_lengths(self) -> bool:
        """Whether a row's logits depend on the longest row of its step: longrope chooses its factors by that."""
        return "longrope" in self._rope_types()

    def _check_supported(self) -> None:
        stored = self.stored_config()
        if stored.get("quantization_config"):
            raise UnsupportedModelError(
                f"{self.source} is quantised (quantization_config in config.json): give the checkpoint in float32, "
                "float16 or bfloat16, and --dtype int8 if wanted"
            )
        unknown = self._rope_types() - {"default"}
        if unknown:
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            unknown -= set(ROPE_INIT_FUNCTIONS)
        if unknown:
            raise UnsupportedModelError(
                f"{self.source} has rotary embeddings of the type {min(unknown)} (rope_type in config.json), and "
                f"transformers has default, {', '.join(sorted(ROPE_INIT_FUNCTIONS))}: correct it"
            )
        if "dynamic" in self._rope_types():
            raise UnsupportedModelError(
                f"{self.source} has rotary embeddings of the type dynamic, which depend on the length of the step: set "
                "rope_type to default, which is the same up to max_position_embeddings"
            )
        if self.plan.reads_last_token and getattr(self.config, "use_bidirectional_attention", None):
            raise UnsupportedModelError(
                f"{self.source} has use_bidirectional_attention in config.json, and tpray computes a "
                f"{self.config.model_type} whose tokens see what is before them: serve a checkpoint without it"
            )
        if getattr(self.config, "languages", None) and self.config.languages != [self.config.default_language]:
            raise UnsupportedModelError(
                f"{self.source} has adapters for the languages {', '.join(self.config.languages)}, and its default is "
                f"{self.config.default_language!r}: set default_language in config.json to that of the texts"
            )
        if (self.directory / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{self.source} has an adapter beside its weights (adapter_config.json): merge it into them, with "
                "peft's merge_and_unload, or remove it"
            )

    def check_classifier(self) -> None:
        """Raise `UnsupportedModelError` unless transformers has a classifier of this type, of texts or of tokens."""
        known, of_tokens = classifiers(self.config), task_of(self.config) == TOKEN
        if type(self.config) not in known:
            raise UnsupportedModelError(
                f"{self.source}: transformers has no {'token' if of_tokens else 'sequence'} classifier of the type "
                f"{self.config.model_type!r}"
            )
        self._check_supported()
        import transformers

        named = list(self.config.architectures or ())
        fits = bool(self.words) or of_tokens or any(name.endswith("ForSequenceClassification") for name in named)
        # Asked of transformers last: it imports the model's code to answer.
        if named and not fits and hasattr(transformers, named[0]):
            raise CheckpointError(
                f"{self.source} is a {named[0]}, and tpray serves sequence and token classifiers: train it with "
                f"{known[type(self.config)].__name__}, or correct architectures in config.json{_or_words(named)}"
            )
        if self.words:
            check_language_model(self.config, self.plan, self.source)
            _ = self.word_ids  # which raises
        _ = self.plan, self.labels, self.pad_id, self.tokenizer  # which raise
        if self.own_template is not None:
            check_template(self.own_template)
        self._check_inputs()

    def _check_inputs(self) -> None:
        """Refuse a model that reads of a text what tpray does not give it, or that its tokenizer does not."""
        made = self.tokenizer("a text", verbose=False)
        others = sorted(set(made) - {"input_ids", "attention_mask", "token_type_ids"})
        if others:
            raise UnsupportedModelError(
                f"{self.source}: its tokenizer ({type(self.tokenizer).__name__}) gives the model {', '.join(others)} "
                "besides a text's ids, mask and types, which tpray does not carry"
            )
        end = getattr(self.config, "eos_token_id", None)
        reads_end = self.config.is_encoder_decoder and task_of(self.config) != TOKEN
        if reads_end and (not isinstance(end, int) or end not in made["input_ids"]):
            raise CheckpointError(
                f"{self.source}: a {self.config.model_type} classifier reads the label from the last end of sequence, "
                f"and its tokenizer puts none of the eos_token_id {end!r} of config.json into a text: correct either"
            )


def _or_words(named: Sequence[str]) -> str:
    if not named[0].endswith("ForCausalLM"):
        return ""
    return "; a reranker that answers with a word is served with --classifier-from-token, for instance no,yes"


def find_checkpoint(source: str | Path, revision: str | None = None) -> Checkpoint:
    """Find the checkpoint that ``source`` names; a Hub id is downloaded unless it is cached already.

    Raises:
        ModelNotFoundError: there is no such directory or Hub id, or no network to fetch it.
        CheckpointError: the directory is not a checkpoint.
    """
    directory = Path(source).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise CheckpointError(f"{directory} is not a checkpoint: it has no config.json")
        return Checkpoint(str(source), directory.resolve())
    if directory.exists():
        raise CheckpointError(f"{directory} is a file; name the directory that holds the checkpoint")
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)) and not str(source).startswith("."):
        return _from_hub(str(source), revision)
    raise ModelNotFoundError(f"there is no directory {source}, and it is not a Hub id (name or owner/name)")


def _from_hub(repo: str, revision: str | None) -> Checkpoint:
    from huggingface_hub import errors, snapshot_download

    try:
        # All that lies beside config.json but weights, then these in one format: safetensors where there are any.
        path = Path(snapshot_download(repo, revision=revision, ignore_patterns=["*/*", *WEIGHTS]))
        for weights in ("model*.safetensors", "pytorch_model*.bin"):
            path = Path(snapshot_download(repo, revision=revision, allow_patterns=[weights]))
            if list(path.glob(weights)):
                break
    except errors.GatedRepoError as e:
        raise ModelNotFoundError(f"{repo} is gated: accept its terms on the Hub and run `hf auth login`") from e
    except errors.RevisionNotFoundError as e:
        raise ModelNotFoundError(f"{repo} has no revision {revision!r}") from e
    except errors.RepositoryNotFoundError as e:
        raise ModelNotFoundError(
            f"{repo} is neither a directory here nor a model on the Hub (a private one needs `hf auth login`)"
        ) from e
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as e:
        raise ModelNotFoundError(
            f"{repo} is not a directory here, is not in the local Hub cache, and the Hub cannot be reached: check "
            "the network, or name a local directory"
        ) from e
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{repo} on the Hub has no config.json: it is not a transformers checkpoint")
    return Checkpoint(repo, path, revision=path.name)
