"""Settings: frozen, validated where they are built; derive a variant with ``model_copy(update=...)``.

This is the only module that reads or changes the environment. Flags of the command line have ``TPRAY_<FLAG>``
variables that its parser reads; what has no flag is read here:

==================  =====================================================================
``TPRAY_CACHE``     where artifacts live (default ``$XDG_CACHE_HOME/tpray``)
``TPRAY_LOG``       logging level of every tpray process (default ``WARNING``)
``TPRAY_API_KEY``   a key: a replica asks for it, and a client of a server shows it
``OTEL_...``        where spans go, and which (`tpray.serving.telemetry`); OpenTelemetry's SDK reads them itself
==================  =====================================================================
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tpray.errors import ConfigError

DtypeName = Literal["auto", "float32", "bfloat16", "int8"]
InstanceFamily = Literal["inf2", "trn1", "trn2"]
ProcessLayout = Literal["process-per-rank", "single-process"]
NeuronLayout = Literal["auto", "process-per-rank", "single-process"]
Goal = Literal["latency", "throughput"]
OpenRoute = Literal["health", "page", "metrics"]
LogFormat = Literal["text", "json"]

AUTO: Final = "auto"
"""The runtime, dtype, degree or number of groups that suits this machine; `tpray.platforms` names the runtimes."""

DRAIN_S: Final = 25.0
"""How long the end of a server waits for requests that are under way; Kubernetes kills after 30 s."""

SPARE_CPUS: Final = 4
"""CPUs that a Ray of tpray's own hands out beside those of groups: a task or an actor of Ray Data's wants one."""
SPARE_CPUS_LABEL: Final = "tpray/spare-cpus"
"""The label of a node that has such, and how many."""

DEMO_DIR = Path(__file__).parent / "demo" / "model"
"""The embedded demo checkpoint, used where no MODEL is named."""


class Frozen(BaseModel):
    """A model that cannot be changed and takes no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelConfig(Frozen):
    """Which classifier: a Hub id, a checkpoint directory, an artifact directory or its URL; None is the demo."""

    source: str | None = None
    revision: str | None = Field(None, description="branch, tag or commit of a Hub id")
    plan: Path | dict[str, Any] | None = Field(None, description="how to shard it: a plan file, or what it holds")
    classifier_from_token: tuple[str, ...] = Field(
        (), description="words of a language model whose logits are the labels': no and yes of a reranker"
    )
    chat_template: Path | None = Field(
        None, description="jinja file that writes conversations, for a tokenizer without"
    )
    dtype: DtypeName = AUTO
    buckets: tuple[tuple[int, int], ...] = Field((), description="[batch, length] to trace for; none: any shape")
    store: str | None = Field(None, description="URL of a folder: what one machine traced, the others fetch there")
    verify_key: Path | None = Field(
        None, description="public key in PEM: only an artifact that is signed with its private one is served"
    )


class ParallelConfig(Frozen):
    """How one group is laid out: ``tp`` ranks, each on ``cores_per_rank`` cores."""

    tp: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        AUTO, description="tensor-parallel degree: the number of ranks of a group; auto: what suits the goal"
    )
    cores_per_rank: int | None = Field(None, ge=1, description="None: one NeuronCore; of CPU cores an even share")
    runtime: str = Field(AUTO, description="the kind of core: auto, or a name that `tpray.platforms` lists")
    instance_family: InstanceFamily | None = Field(None, description="of the NeuronCores; None: this machine's")
    neuron_layout: NeuronLayout = Field(
        AUTO, description="how ranks and processes go together; auto: a process for each rank, or one if that fails"
    )
    lnc: Literal[1, 2] | None = Field(None, description="physical NeuronCores in a logical one; None: the default")


class BatchConfig(Frozen):
    """Limits of admission and of a step. The names and defaults of the first four are TEI's."""

    max_batch_tokens: int = Field(16384, ge=1, description="tokens taken from the queue at a time")
    max_concurrent_requests: int = Field(512, ge=1, description="texts queued or running; more get a 429")
    max_client_batch_size: int = Field(32, ge=1, description="items in one request")
    payload_limit_bytes: int = Field(2_000_000, ge=1024, description="bytes in one request body")
    max_step_tokens: int = Field(512, ge=1, description="tokens in one step of the group, padding included")
    max_padding: float = Field(0.1, ge=0, lt=1, description="share of a step that may be padding, if it costs")
    steps_in_flight: int = Field(2, ge=1, le=8)
    max_queue_s: float = Field(
        10.0, ge=0, description="how long a text may be expected to wait for its step; more get a 429; 0: no limit"
    )
    request_timeout_s: float = Field(60.0, gt=0, description="a client may ask for less: x-request-timeout-seconds")
    step_timeout_s: float = Field(
        60.0, gt=0, description="the most; once steps were measured, their limit is far below"
    )
    auto_truncate: bool = Field(
        True,
        description="cut texts that are too long where a request does not say: TEI's, Hugging Face's and the Open "
        "Inference Protocol's",
    )
    canary_interval_s: float = Field(60.0, ge=0, description="how often an idle group checks its answers; 0: never")

    def cuts(self, asked: bool | None) -> bool:
        """Whether a request that says ``truncate``, or nothing, has texts that are too long cut."""
        return self.auto_truncate if asked is None else asked


class AutoscalingConfig(Frozen):
    """How many groups there are, by the tokens that wait for a step.

    By default a group may have eight steps' tokens waiting (``max_step_tokens`` 512): some tenths of a second of work.
    A new one takes its start, seconds from an artifact and minutes without, so that it comes after half a minute of
    such a backlog and goes after ten minutes without.
    """

    min_replicas: int = Field(1, ge=0, description="0: the last one goes too when nobody asks")
    max_replicas: int = Field(2, ge=1)
    backlog_tokens: int = Field(4096, ge=1, description="tokens that may wait at each group")
    upscale_delay_s: float = Field(30.0, ge=0)
    downscale_delay_s: float = Field(600.0, ge=0)
    look_back_period_s: float = Field(30.0, gt=0, description="what the backlog is averaged over")

    @model_validator(mode="after")
    def _ordered(self) -> AutoscalingConfig:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        return self


OPEN_BY_DEFAULT: tuple[OpenRoute, ...] = ("health", "page")


class AccessConfig(Frozen):
    """Who may ask over HTTP and gRPC: everybody, unless there is a key here or in ``TPRAY_API_KEY``."""

    keys_file: Path | None = Field(None, description="a line for each key; see `tpray.serving.keys`")
    keys: tuple[str, ...] = Field((), description="such lines; where others read this, with sha256 digests")
    open_routes: tuple[OpenRoute, ...] = Field(OPEN_BY_DEFAULT, description="what is answered without a key")
    cors_origins: tuple[str, ...] = Field((), description="whose pages may ask from a browser; *: everybody's")
    insecure_no_key: bool = Field(False, description="let others on the network ask without a key")

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s,A-Z]+", origin):
                raise ValueError(f"{origin!r} is no origin: give scheme, host and port only, as https://example.com")
        return origins


class TlsConfig(Frozen):
    """The files of a server's certificate, in PEM: the certificate with those between it and its CA, and its key."""

    cert: Path
    key: Path


class TelemetryConfig(Frozen):
    """What is told of requests, and in which form."""

    otlp_endpoint: str | None = Field(
        None, description="base URL of a collector that takes OTLP over HTTP; None: as OTEL_EXPORTER_OTLP_ENDPOINT says"
    )
    log_format: LogFormat | None = Field(None, description="None: as TPRAY_LOG_FORMAT says, or text")
    log_requests: bool = Field(False, description="a line for each request")
    log_inputs: bool = Field(False, description="what a request sent, in its line and its trace")

    @field_validator("otlp_endpoint")
    @classmethod
    def _url(cls, url: str | None) -> str | None:
        if url is not None and not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", url):
            raise ValueError(f"{url!r} is no URL of a collector: give one such as http://localhost:4318")
        return url


class ServeConfig(Frozen):
    """One Serve application: the ``args`` of ``tpray.serving.app:build`` in a Serve config file."""

    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    batch: BatchConfig = BatchConfig()
    goal: Goal = Field("latency", description="what an auto degree and number of groups are to be fastest for")
    replicas: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        AUTO, description="groups, each with its own copy of the model; auto: one, or for throughput what fits"
    )
    autoscaling: AutoscalingConfig | None = Field(None, description="instead of a fixed number of replicas")
    served_model_name: tuple[str, ...] = Field(
        (), description="what requests may call the model; answers carry the first; none: any name, and its own"
    )
    access: AccessConfig = AccessConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    node_labels: dict[str, str] = Field({}, description="of the nodes that groups may lie on, as Ray's label selectors")
    upgrade: Literal["side-by-side", "stop-first"] = Field(
        "side-by-side", description="a new version's groups start beside the old ones, or these stop first"
    )
    release: str | None = Field(
        None, description="your name for this version; another one is a new version, even where nothing else differs"
    )

    @field_validator("served_model_name")
    @classmethod
    def _not_empty(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if any(not name.strip() for name in names):
            raise ValueError("there is an empty name among them: leave it out")
        return names

    @field_validator("node_labels")
    @classmethod
    def _without_spaces(cls, labels: dict[str, str]) -> dict[str, str]:
        """Ray 2.60 accepts ``in(a, b)``, and then takes the space for a part of the label."""
        return {key: value.replace(", ", ",") for key, value in labels.items()}

    @model_validator(mode="after")
    def _either(self) -> ServeConfig:
        if self.autoscaling is not None and self.replicas not in (AUTO, 1):
            raise ValueError("replicas is a fixed number and autoscaling a range: give one of them")
        return self


class ModelsConfig(Frozen):
    """Several models in one Serve application: the ``args`` of ``tpray.serving.models:build`` in a config file."""

    models: dict[str, ServeConfig] = Field(min_length=1, description="by the names that requests say")
    default: str | None = Field(None, description="the model of requests that name none; None: these are refused")
    access: AccessConfig = AccessConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @model_validator(mode="after")
    def _known(self) -> ModelsConfig:
        if self.default is not None and self.default not in self.models:
            raise ValueError(f"default is {self.default!r}, and the models are {', '.join(self.models)}")
        if kept := [name for name, model in self.models.items() if model.access != AccessConfig()]:
            raise ValueError(f"{kept[0]}: access is said once for all models, beside `models`")
        if told := [name for name, model in self.models.items() if model.telemetry != TelemetryConfig()]:
            raise ValueError(f"{told[0]}: telemetry is said once for all models, beside `models`")
        if named := [name for name, model in self.models.items() if model.served_model_name]:
            raise ValueError(f"{named[0]}: served_model_name is what the model is called in `models`: leave it out")
        return self


def local_directory(source: str | None) -> Path:
    """Where a model would lie on this machine: ``source``, or the embedded demo."""
    return DEMO_DIR if source is None else Path(source).expanduser()


def cache_dir() -> Path:
    """The folder of artifacts; created with mode 0700 when missing.

    Raises:
        ConfigError: it cannot be made, or nothing can be written to it.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(os.environ.get("TPRAY_CACHE") or Path(base) / "tpray")
    try:
        path = path.expanduser()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "nothing can be written to it")
    except (OSError, RuntimeError) as e:  # RuntimeError: nobody knows a home folder
        reason = e.strerror if isinstance(e, OSError) else e
        raise ConfigError(f"{path} cannot hold traced models ({reason}): set TPRAY_CACHE to another folder") from e
    return path


LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def log_level() -> str:
    """The level named by ``TPRAY_LOG``, upper case.

    Raises:
        ConfigError: there is no such level.
    """
    given = os.environ.get("TPRAY_LOG", "WARNING")
    if given.upper() not in LOG_LEVELS:
        raise ConfigError(f"TPRAY_LOG={given} is not a level: use one of {', '.join(LOG_LEVELS)}")
    return given.upper()


LOG_FORMAT = "TPRAY_LOG_FORMAT"
LOG_ADDRESS = "TPRAY_LOG_ADDRESS"  # set by `tpray serve` for what it starts


def log_format() -> LogFormat:
    """The form named by ``TPRAY_LOG_FORMAT``; `ConfigError` if there is none such."""
    given = os.environ.get(LOG_FORMAT) or "text"
    if given not in get_args(LogFormat):
        raise ConfigError(f"{LOG_FORMAT}={given} is no form of logs: use one of {', '.join(get_args(LogFormat))}")
    return "json" if given == "json" else "text"


def log_address() -> str:
    """Where this process's lines are printed; "": nowhere but here."""
    return os.environ.get(LOG_ADDRESS, "")


def otlp_variable() -> str | None:
    """Which variable of OpenTelemetry's asks for spans to be sent; None: none does."""
    wanted = os.environ.get("OTEL_TRACES_EXPORTER", "otlp") == "otlp"
    if not wanted or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    names = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"
    return next((name for name in names if os.environ.get(name)), None)


def otlp_protocol() -> str:
    """The protocol that OpenTelemetry's variables name."""
    names = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"
    return next((os.environ[name] for name in names if os.environ.get(name)), "http/protobuf")


API_KEY = "TPRAY_API_KEY"


def api_key() -> str | None:
    """The key that ``TPRAY_API_KEY`` holds."""
    return os.environ.get(API_KEY) or None


def ray_address() -> str | None:
    """The running Ray that ``RAY_ADDRESS`` names, Ray's own variable."""
    return os.environ.get("RAY_ADDRESS")


def environment() -> dict[str, str]:
    """A copy of this process's environment."""
    return dict(os.environ)


def set_variables(variables: Mapping[str, str | None]) -> None:
    """Set variables of this process and of those that it starts from now on; None removes one."""
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def set_default_variables(variables: Mapping[str, str]) -> None:
    """Set those of ``variables`` that the user has not set."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


@contextmanager
def variable_set(name: str, value: str) -> Iterator[None]:
    """Have a variable set within the block, for the processes that are started there; what it was comes back."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        set_variables({name: before})


def compiler_cache() -> Path:
    """Where Neuron's compilers of this machine keep what they made: ``NEURON_COMPILE_CACHE_URL``, set for each rank."""
    return Path(os.environ["NEURON_COMPILE_CACHE_URL"])


def neff_cache() -> Path:
    """Where TorchNeuron keeps what it compiles for this group: ``TORCH_NEURONX_NEFF_CACHE_DIR``, set for each rank."""
    return Path(os.environ["TORCH_NEURONX_NEFF_CACHE_DIR"])


def stay_quiet(environ: MutableMapping[str, str] | None = None) -> None:
    """Switch off what phones home unasked, and what libraries print unasked; a user's own setting is kept.

    Ray's usage report and the Hub client's telemetry are opt-out upstream. Call it before any of them is
    imported; processes that Ray starts inherit the result.
    """
    target = os.environ if environ is None else environ
    for name, value in (
        ("RAY_USAGE_STATS_ENABLED", "0"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("GRPC_VERBOSITY", "ERROR"),  # of forks that do no harm
        ("TOKENIZERS_PARALLELISM", "false"),  # its thread pool would fight the ranks for their cores
    ):
        target.setdefault(name, value)
