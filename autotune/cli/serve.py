"""`autotune serve`: the bundled engine behind OpenAI's API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from autotune.cli.console import note
from autotune.cli.durations import parse_duration
from autotune.cli.knob_options import parse_bytes, with_knobs

_ACCESS = "Access"
_LIMITS = "Limits"
_REPLICAS = "Replicas"


@with_knobs(target="target")
def serve(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="ENGINE_YAML|RUN|MODEL",
            help="A run's deploy/engine.yaml, the run's folder, or a model; by default the "
            "embedded model.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; 0.0.0.0 to be reached from other machines.",
            rich_help_panel=_ACCESS,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(help="Port to listen on; 0 takes a free one.", rich_help_panel=_ACCESS),
    ] = 8000,
    uds: Annotated[
        Path | None,
        typer.Option(
            help="Unix socket to listen on instead.", show_default=False, rich_help_panel=_ACCESS
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="AUTOTUNE_API_KEY",
            help="Key that clients must show; may be given several times. A command line is seen "
            "by all users of a machine: better set the variable (keys separated by spaces).",
            metavar="KEY",
            show_default=False,
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="What requests may call the model; may be given several times, the first stands "
            "in answers. Default: the folder's name, and its path.",
            metavar="NAME",
            show_default=False,
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            help="Jinja file of the chat template, instead of the model's own.",
            metavar="FILE",
            show_default=False,
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    generation_defaults: Annotated[
        bool,
        typer.Option(
            help="Take sampling that a request leaves out from the model's generation_config.json.",
            rich_help_panel=_ACCESS,
        ),
    ] = True,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="Log requests.", rich_help_panel=_ACCESS)
    ] = False,
    max_waiting: Annotated[
        int,
        typer.Option(
            help="Requests that may wait for a seat; further ones get 429 with Retry-After. "
            "--max-num-queued-reqs is the same.",
            min=0,
            rich_help_panel=_LIMITS,
        ),
    ] = 1024,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(
            help="Longest prompt, below the model's own limit.",
            min=1,
            show_default=False,
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    max_output_tokens: Annotated[
        int | None,
        typer.Option(
            help="Longest output, below the model's own limit.",
            min=1,
            show_default=False,
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    max_body_bytes: Annotated[
        int | None,
        typer.Option(
            help="Longest body of a request; default 16MiB.",
            metavar="BYTES",
            parser=parse_bytes,
            show_default=False,
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    request_timeout: Annotated[
        str,
        typer.Option(
            help="Longest time of a request, waiting included; none for no limit.",
            rich_help_panel=_LIMITS,
        ),
    ] = "10m",
    read_timeout: Annotated[
        str,
        typer.Option(
            help="Time in which a client must have sent its headers, and then its body.",
            rich_help_panel=_LIMITS,
        ),
    ] = "30s",
    write_timeout: Annotated[
        str,
        typer.Option(
            help="Longest time that a client may leave what it is sent unread.",
            rich_help_panel=_LIMITS,
        ),
    ] = "60s",
    keep_alive: Annotated[
        str,
        typer.Option(help="Longest idle time of a connection.", rich_help_panel=_LIMITS),
    ] = "75s",
    stall: Annotated[
        str,
        typer.Option(
            help="Time without progress after which /health fails.", rich_help_panel=_LIMITS
        ),
    ] = "60s",
    replicas: Annotated[
        int,
        typer.Option(
            help="Engines to serve with, each with its share of this machine's cores or GPUs.",
            min=1,
            rich_help_panel=_REPLICAS,
        ),
    ] = 1,
    routing: Annotated[
        str,
        typer.Option(
            help="Who gets a request: prefix, the engine that has most of its prompt cached unless "
            "it has too much to do; least-loaded; round-robin.",
            metavar="prefix|least-loaded|round-robin",
            rich_help_panel=_REPLICAS,
        ),
    ] = "prefix",
    drain: Annotated[
        str,
        typer.Option(
            help="Time that running requests get at SIGTERM or Ctrl-C.", rich_help_panel=_LIMITS
        ),
    ] = "30s",
    *,
    knobs: dict[str, Any],
) -> None:
    """Serve a model over HTTP as OpenAI's API and vLLM's.

    /v1/completions, /v1/chat/completions, /v1/models, /tokenize, /detokenize, /health, /metrics.
    SIGTERM or Ctrl-C finishes what runs and ends with code 0; a second one ends at once.
    """
    del target  # has become knobs
    from autotune.errors import BadInput
    from autotune.model_info import model_name, with_default_model
    from autotune.simulation.fleet import check_router
    from engine.config import EngineConfig
    from engine.server.limits import ServerLimits
    from engine.server.settings import ServerSettings

    try:
        router = check_router(routing)
    except BadInput as error:
        choose = "choose prefix, least-loaded or round-robin"
        raise BadInput(f"--routing {routing!r}: {choose}") from error
    timeout = None
    if request_timeout != "none":
        timeout = parse_duration(request_timeout, "--request-timeout")
    limits = ServerLimits(
        max_waiting=max_waiting,
        max_prompt_tokens=max_prompt_tokens,
        max_output_tokens=max_output_tokens,
        max_body_bytes=(
            ServerLimits().max_body_bytes if max_body_bytes is None else max_body_bytes
        ),
        request_timeout_s=timeout,
        read_timeout_s=parse_duration(read_timeout, "--read-timeout"),
        write_timeout_s=parse_duration(write_timeout, "--write-timeout"),
        keep_alive_s=parse_duration(keep_alive, "--keep-alive"),
        stall_s=parse_duration(stall, "--stall"),
    )
    settings = ServerSettings(
        host=host,
        port=port,
        uds=None if uds is None else str(uds),
        api_keys=tuple(api_key or ()),
        access_log=access_log,
        limits=limits,
        drain_s=parse_duration(drain, "--drain"),
    )
    config = with_default_model(EngineConfig.from_mapping(knobs))
    if not settings.is_local:
        who = "anybody who reaches it may use it: set AUTOTUNE_API_KEY"
        if settings.api_keys:
            who = "keys and prompts travel in the clear: put a proxy with TLS before it"
        note(f"warning: {host} is reached from other machines, and {who}")
    # What a person wrote as a path may be asked for by that path too.
    names = served_model_name or [model_name(Path(config.model)), config.model]
    more: dict[str, Any] = {
        "names": list(dict.fromkeys(names)),
        "chat_template": chat_template,
        "generation_defaults": generation_defaults,
        "say": note,
    }
    if replicas > 1:
        from engine.server.run_router import run_router

        code = run_router(config, settings, replicas=replicas, router=router, **more)
    else:
        from engine.server.run_server import run_server

        code = run_server(config, settings, **more)
    if code:
        raise typer.Exit(code)
