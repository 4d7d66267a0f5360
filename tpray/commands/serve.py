"""``tpray serve``."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Annotated

import typer

from tpray import logs
from tpray.commands.console import ROUTES, print_ready, say, show_phase, show_progress, spinner
from tpray.commands.flags import (
    OPEN_ROUTES,
    ApiKey,
    ApiKeys,
    Buckets,
    ChatTemplateFile,
    CoresPerRank,
    CorsOrigin,
    Dtype,
    Family,
    For,
    FromToken,
    InsecureNoKey,
    Layout,
    LogicalCores,
    Model,
    OpenRoutes,
    PlanFile,
    Replicas,
    Revision,
    Runtime,
    ServedNames,
    Store,
    TlsCert,
    TlsKey,
    Tp,
    VerifyKey,
    access_of,
    lnc_number,
    names_of,
    tls_of,
    words_of,
)
from tpray.commands.telemetry_flags import LogFormatFlag, LogInputs, LogRequests, OtlpEndpoint, telemetry_of
from tpray.commands.try_it import curl, present
from tpray.config import AUTO, DRAIN_S, BatchConfig, ModelConfig, ParallelConfig, ServeConfig
from tpray.errors import ConfigError
from tpray.group.phases import PhaseReport, process_started


def serve(
    model: Model = None,
    revision: Revision = None,
    tp: Tp = AUTO,
    replicas: Replicas = AUTO,
    goal: For = "latency",
    dtype: Dtype = AUTO,
    runtime: Runtime = AUTO,
    plan: PlanFile = None,
    chat_template: ChatTemplateFile = None,
    classifier_from_token: FromToken = None,
    served_model_name: ServedNames = None,
    buckets: Buckets = None,
    store: Store = None,
    verify_key: VerifyKey = None,
    cores_per_rank: CoresPerRank = None,
    instance_family: Family = None,
    neuron_layout: Layout = AUTO,
    lnc: LogicalCores = None,
    host: Annotated[str, typer.Option(envvar="TPRAY_HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, envvar="TPRAY_PORT", help="Port to listen on.")] = 8000,
    grpc_port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            envvar="TPRAY_GRPC_PORT",
            help="Port for gRPC, the Open Inference Protocol's.",
            show_default="none",
        ),
    ] = None,
    api_keys: ApiKeys = None,
    api_key: ApiKey = None,
    open_routes: OpenRoutes = OPEN_ROUTES,
    insecure_no_key: InsecureNoKey = False,
    cors_origin: CorsOrigin = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    otlp_endpoint: OtlpEndpoint = None,
    log_format: LogFormatFlag = "text",
    log_requests: LogRequests = False,
    log_inputs: LogInputs = False,
    max_batch_tokens: Annotated[
        int, typer.Option(min=1, envvar="TPRAY_MAX_BATCH_TOKENS", help="Tokens taken from the queue at a time.")
    ] = BatchConfig().max_batch_tokens,
    max_concurrent_requests: Annotated[
        int,
        typer.Option(min=1, envvar="TPRAY_MAX_CONCURRENT_REQUESTS", help="Texts queued or running; more get a 429."),
    ] = BatchConfig().max_concurrent_requests,
    max_client_batch_size: Annotated[
        int, typer.Option(min=1, envvar="TPRAY_MAX_CLIENT_BATCH_SIZE", help="Items in one request.")
    ] = BatchConfig().max_client_batch_size,
    max_queue_s: Annotated[
        float,
        typer.Option(
            min=0,
            envvar="TPRAY_MAX_QUEUE_S",
            help="Seconds that a text may be expected to wait for its step; more get a 429. 0: no limit.",
        ),
    ] = BatchConfig().max_queue_s,
    payload_limit: Annotated[
        int, typer.Option(min=1024, envvar="TPRAY_PAYLOAD_LIMIT", help="Bytes in one request body.")
    ] = BatchConfig().payload_limit_bytes,
    auto_truncate: Annotated[
        bool,
        typer.Option(
            "--auto-truncate/--no-auto-truncate",
            envvar="TPRAY_AUTO_TRUNCATE",
            help="Cut texts that are too long where a request does not say; else they are an error.",
        ),
    ] = BatchConfig().auto_truncate,
    drain_timeout: Annotated[
        float,
        typer.Option(min=0, envvar="TPRAY_DRAIN_TIMEOUT", help="Seconds that the end waits for requests under way."),
    ] = DRAIN_S,
) -> None:
    """Serve a classifier over HTTP until Ctrl-C."""
    from tpray.runtime.buckets import parse

    logs.set_up(replace(logs.LogSettings.of_environment(), form=log_format))
    if grpc_port == port:
        raise ConfigError(f"--grpc-port and --port are both {port}: choose another --grpc-port")
    config = ServeConfig(
        model=ModelConfig(
            source=model,
            revision=revision,
            dtype=dtype,
            plan=plan,
            chat_template=chat_template,
            classifier_from_token=words_of(classifier_from_token),
            buckets=parse(buckets) if buckets else (),
            store=store,
            verify_key=verify_key,
        ),
        parallel=ParallelConfig(
            tp=tp,
            cores_per_rank=cores_per_rank,
            runtime=runtime,
            instance_family=instance_family,
            neuron_layout=neuron_layout,
            lnc=lnc_number(lnc),
        ),
        batch=BatchConfig(
            max_batch_tokens=max_batch_tokens,
            max_concurrent_requests=max_concurrent_requests,
            max_client_batch_size=max_client_batch_size,
            payload_limit_bytes=payload_limit,
            max_queue_s=max_queue_s,
            auto_truncate=auto_truncate,
        ),
        goal=goal,
        replicas=replicas,
        served_model_name=names_of(served_model_name),
        access=access_of(api_keys, api_key, open_routes, cors_origin, insecure_no_key),
        telemetry=telemetry_of(otlp_endpoint, log_format, log_requests, log_inputs),
    )
    tls = tls_of(tls_cert, tls_key)
    from tpray.serving import launch
    from tpray.serving.signals import stopping_on_signals

    named = model or "the embedded demo"
    with stopping_on_signals(), spinner(f"Starting {named}") as status:

        def show(report: PhaseReport) -> None:
            if report.done:
                show_phase(report)
            show_progress(status, f"Starting {named}", report)

        with launch.Server(config, host, port, show, drain_timeout, process_started(), tls, grpc_port) as server:
            status.stop()
            at = server.entrance
            example = curl(at.url, server.info, keyed=bool(at.key_names))
            routes = present(at, ROUTES)
            with suppress(KeyboardInterrupt):  # as soon as it is ready
                print_ready(at.url, named, server.config, example, routes, at.key_names)
                server.wait()
            say("Stopping: what is under way is answered first; Ctrl-C again ends at once")
    say("Stopped")
