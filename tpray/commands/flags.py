"""The flags that several commands share; each has an environment variable, ``TPRAY_<FLAG>``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer
from pydantic import ValidationError

from tpray.config import (
    AUTO,
    OPEN_BY_DEFAULT,
    AccessConfig,
    DtypeName,
    Goal,
    InstanceFamily,
    NeuronLayout,
    OpenRoute,
    TlsConfig,
)
from tpray.errors import ConfigError
from tpray.platforms import PLATFORMS, platform_for

if TYPE_CHECKING:
    from tpray.serving.chunks import Chunks

_MODEL: dict[str, Any] = {
    "envvar": "TPRAY_MODEL",
    "help": "Hub id, checkpoint directory, or a traced artifact's directory or URL.",
    "show_default": "the embedded demo",
}
Model = Annotated[str | None, typer.Argument(**_MODEL)]
ModelFlag = Annotated[str | None, typer.Option("--model", **_MODEL)]
Revision = Annotated[
    str | None,
    typer.Option("--revision", envvar="TPRAY_REVISION", help="Branch, tag or commit of a Hub id.", show_default="main"),
]


def _count(value: str) -> int | Literal["auto"]:
    """A number from 1, or auto."""
    if value == AUTO:
        return AUTO
    if not value.isdecimal() or int(value) < 1:
        raise typer.BadParameter(f"{value!r} is neither a number from 1 nor {AUTO}")
    return int(value)


def _runtime(value: str) -> str:
    """A runtime that there is, or auto."""
    if value != AUTO:
        _parsed(platform_for, value)
    return value


def _buckets(value: str) -> str:
    """Shapes, as `tpray.runtime.buckets.parse` reads them."""
    from tpray.runtime.buckets import parse

    _parsed(parse, value)
    return value


def _parsed(read: Callable[[str], object], value: str) -> None:
    """Have the sentence of a setting's own parser name the flag or the variable."""
    try:
        read(value)
    except ConfigError as e:
        raise typer.BadParameter(str(e)) from e


Count = int | Literal["auto"]
Tp = Annotated[
    Any,  # a Count, which typer cannot read by itself
    typer.Option(
        envvar="TPRAY_TP",
        parser=_count,
        metavar="N|auto",
        help="Tensor-parallel degree: ranks that share one model.",
    ),
]
Replicas = Annotated[
    Any,
    typer.Option(
        envvar="TPRAY_REPLICAS",
        parser=_count,
        metavar="N|auto",
        help="Groups, each with the whole model. auto: one, or for throughput what fits.",
    ),
]
For = Annotated[Goal, typer.Option("--for", envvar="TPRAY_FOR", help="What auto is to be fastest for.")]
Dtype = Annotated[DtypeName, typer.Option(envvar="TPRAY_DTYPE", help="What the shards compute in.")]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        envvar="TPRAY_PLAN",
        help="JSON file that says how to shard the model.",
        show_default="tpray's table",
    ),
]
ChatTemplateFile = Annotated[
    Path | None,
    typer.Option(
        "--chat-template",
        envvar="TPRAY_CHAT_TEMPLATE",
        help="Jinja file that makes a text of a conversation.",
        show_default="the tokenizer's own",
    ),
]
FromToken = Annotated[
    str | None,
    typer.Option(
        "--classifier-from-token",
        envvar="TPRAY_CLASSIFIER_FROM_TOKEN",
        help="Words of a language model that become the labels: no,yes of a reranker that answers so.",
        show_default="the checkpoint's own head",
    ),
]
ServedNames = Annotated[
    str | None,
    typer.Option(
        "--served-model-name",
        envvar="TPRAY_SERVED_MODEL_NAME",
        metavar="NAME[,NAME...]",
        help="What requests may call the model; one that names another gets a 404. Answers carry the first.",
        show_default="any name",
    ),
]
InputFile = Annotated[
    str | None,
    typer.Option(
        "--in",
        help="File or URL to read: JSON lines, CSV (.csv, .tsv) or Parquet; - is standard input, JSON lines. To "
        "classify, also a folder, or a pattern with *, of many.",
        show_default="none",
    ),
]
TextColumn = Annotated[
    str, typer.Option("--text-column", help="What the text is called: a key of JSON lines, or a table's column.")
]
InChunks = Annotated[
    bool, typer.Option("--chunks", help="Read texts that are too long in overlapping chunks, not as an error.")
]
Stride = Annotated[
    int | None,
    typer.Option("--stride", help="Tokens that chunks share.", show_default="an eighth of what a chunk holds"),
]
Aggregate = Annotated[
    Literal["max", "mean"] | None, typer.Option("--aggregate", help="Of the chunks' scores.", show_default="max")
]
MaxChunks = Annotated[
    int | None, typer.Option("--max-chunks", help="A text of more chunks is too long.", show_default="16")
]
Buckets = Annotated[
    Any,
    typer.Option(
        "--buckets",
        parser=_buckets,
        metavar="TEXT",
        envvar="TPRAY_BUCKETS",
        help="Shapes to trace one program each for, BATCHxLENGTH: 1x128,8x32,8x128.",
        show_default="any shape, in one program",
    ),
]
Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="TPRAY_STORE",
        help="URL of a folder that machines share, s3://, gs:// or file://: what one traced, the others fetch.",
        show_default="none",
    ),
]
VerifyKey = Annotated[
    Path | None,
    typer.Option(
        "--verify-key",
        envvar="TPRAY_VERIFY_KEY",
        resolve_path=True,
        help="PEM file of a public key: take no model but an artifact that was signed with its private one.",
        show_default="none",
    ),
]
SignKey = Annotated[
    Path | None,
    typer.Option(
        "--sign-key",
        envvar="TPRAY_SIGN_KEY",
        help="PEM file of an Ed25519 private key that the artifact is signed with.",
        show_default="none",
    ),
]
Runtime = Annotated[
    Any,
    typer.Option(
        envvar="TPRAY_RUNTIME",
        parser=_runtime,
        help="The kind of core.",
        metavar=f"[{'|'.join([AUTO, *sorted(PLATFORMS)])}]",
    ),
]
CoresPerRank = Annotated[
    int | None,
    typer.Option(
        min=1,
        envvar="TPRAY_CORES_PER_RANK",
        help="Cores of each rank.",
        show_default="one NeuronCore; CPU cores shared out evenly",
    ),
]
Family = Annotated[
    InstanceFamily | None,
    typer.Option(
        "--instance-family", envvar="TPRAY_INSTANCE_FAMILY", help="Of NeuronCores.", show_default="this one's"
    ),
]
LogicalCores = Annotated[
    Literal["1", "2"] | None,
    typer.Option("--lnc", envvar="TPRAY_LNC", help="Physical NeuronCores in a logical one.", show_default="Neuron's"),
]
Layout = Annotated[
    NeuronLayout,
    typer.Option(
        "--neuron-layout",
        envvar="TPRAY_NEURON_LAYOUT",
        help="On NeuronCores: a process for each rank, or one for all. auto: the first; on neuron-xla the second where "
        "that fails, or hangs: loading for 300 s, or a step for 60 s.",
    ),
]

ApiKeys = Annotated[
    Path | None,
    typer.Option(
        "--api-keys",
        envvar="TPRAY_API_KEYS",
        help="File of the keys that may ask, `name: key` a line; read again when it changes.",
        show_default="everybody may",
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="TPRAY_API_KEY",
        help="A key that may ask. Other users of the machine see it among the processes (ps): set TPRAY_API_KEY, or "
        "give a file.",
        show_default="none",
    ),
]
ClientKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="TPRAY_API_KEY",
        help="The key to ask with. Other users of the machine see it among the processes (ps): set TPRAY_API_KEY.",
        show_default="none",
    ),
]
OPEN_ROUTES = ",".join(OPEN_BY_DEFAULT)
OpenRoutes = Annotated[
    str,
    typer.Option(
        "--open-routes",
        envvar="TPRAY_OPEN_ROUTES",
        help="What is answered without a key: some of health, page and metrics with commas between, or none.",
    ),
]
CorsOrigin = Annotated[
    list[str] | None,
    typer.Option(
        "--cors-origin",
        envvar="TPRAY_CORS_ORIGIN",
        help="Origin whose pages may ask from a browser, https://example.com, or * for all; again for another.",
        show_default="none",
    ),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(
        "--tls-cert",
        envvar="TPRAY_TLS_CERT",
        help="PEM file of the server's certificate and those between it and its CA; used again when it changes.",
        show_default="no TLS",
    ),
]
TlsKey = Annotated[
    Path | None,
    typer.Option("--tls-key", envvar="TPRAY_TLS_KEY", help="PEM file of its key.", show_default="no TLS"),
]
InsecureNoKey = Annotated[
    bool,
    typer.Option(
        "--insecure-no-key",
        envvar="TPRAY_INSECURE_NO_KEY",
        help="Let others on the network ask without a key, where --host lets them in.",
    ),
]


def access_of(
    file: Path | None, key: str | None, open_routes: str, origins: list[str] | None, insecure: bool
) -> AccessConfig:
    """Who may ask, as flags say it.

    Raises:
        ConfigError: one of them cannot be.
    """
    from tpray.serving.keys import DEFAULT, hidden

    routes = tuple(name.strip() for name in open_routes.split(",") if name.strip() not in ("", "none"))
    unknown = [name for name in routes if name not in get_args(OpenRoute)]
    if unknown:
        known = ", ".join(get_args(OpenRoute))
        raise ConfigError(f"--open-routes {open_routes}: there is no {unknown[0]!r}: name some of {known}, or none")
    try:
        return AccessConfig(
            keys_file=None if file is None else file.expanduser().absolute(),  # whatever the folder of a replica
            keys=() if key is None else (hidden(DEFAULT, key),),
            open_routes=routes,
            cors_origins=tuple(origins or ()),
            insecure_no_key=insecure,
        )
    except ValidationError as e:
        raise ConfigError(f"--cors-origin: {e.errors()[0]['msg'].removeprefix('Value error, ')}") from e


def tls_of(cert: Path | None, key: Path | None) -> TlsConfig | None:
    """The files of a certificate, as flags name them.

    Raises:
        ConfigError: one is missing.
    """
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise ConfigError("--tls-cert and --tls-key go together: give both")
    return TlsConfig(cert=cert, key=key)


def names_of(text: str | None) -> tuple[str, ...]:
    """The names that ``--served-model-name`` gives.

    Raises:
        ConfigError: there is an empty one among them.
    """
    names = () if text is None else tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise ConfigError(f"--served-model-name {text!r} has an empty name: give names with commas between, mine,yours")
    return names


def words_of(text: str | None) -> tuple[str, ...]:
    """The words that ``--classifier-from-token`` names.

    Raises:
        ConfigError: there is an empty one among them.
    """
    words = () if text is None else tuple(text.split(","))
    if any(not word.strip() for word in words):
        raise ConfigError(f"--classifier-from-token {text!r} has an empty word: name them with commas between, no,yes")
    return words


def lnc_number(lnc: Literal["1", "2"] | None) -> Literal[1, 2] | None:
    """Typer takes words to choose from, the configuration numbers."""
    return None if lnc is None else 1 if lnc == "1" else 2


def chunks_of(on: bool, stride: int | None, aggregate: str | None, max_chunks: int | None) -> Chunks | None:
    """What ``--chunks`` and its settings say.

    Raises:
        ConfigError: the settings are there without it. InputError: one is out of range.
    """
    from tpray.serving.chunks import Chunks

    given = {"stride": stride, "aggregate": aggregate, "max_chunks": max_chunks}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not on:
        raise ConfigError(f"--{'/--'.join(given).replace('_', '-')} is a setting of --chunks: give that too")
    return Chunks.of(given if on else None)
