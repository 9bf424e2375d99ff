"""Docker Compose: one service on one machine."""

from __future__ import annotations

from typing import Any

from autotune.deploy.beside import beside
from autotune.deploy.platforms.carried import PORT, Carried, carry
from autotune.deploy.platforms.container import (
    CONFIG,
    HUB_CACHE,
    MODELS,
    SHARED_MEMORY,
    dockerfile,
    health_check,
)
from autotune.deploy.platforms.head import head
from autotune.deploy.target import BUNDLED, Deployment, Exported, Target
from autotune.deploy.yaml_document import document, noted

CARRIES = ("vllm", "sglang", BUNDLED)
FILE = "compose.yaml"
_HUB_VOLUME = "hub-cache"


def compose_target() -> Target:
    """The target `compose`."""
    return Target("compose", export_compose, CARRIES)


def export_compose(deployment: Deployment) -> Exported:
    """`compose.yaml` with the engine's file beside it."""
    carried = carry(deployment, CARRIES, folder=MODELS)
    start = "docker compose up -d"
    text = document(
        _content(carried),
        head=head(
            "compose",
            "Docker Compose service",
            carried,
            deployment.evidence,
            use=start,
            evidence_in=carried.file,
        ),
    )
    return Exported(
        {
            FILE: text,
            carried.file: carried.text,
            **dockerfile(carried, deployment.run),
            **beside(deployment, served_model=carried.name, start=start),
        },
        carried.lost,
        carried.warnings,
    )


def _content(carried: Carried) -> dict[str, Any]:
    service: dict[str, Any] = {}
    if carried.engine == BUNDLED:
        service["build"] = noted(
            {"context": "${AUTOTUNE_SOURCE:-.}", "dockerfile": "${PWD}/Dockerfile"},
            "AUTOTUNE_SOURCE: a checkout of the release that was measured",
        )
    service["image"] = carried.image
    config = f"{CONFIG}/{carried.file}"
    command = [_literal(word) for word in carried.command(config)]
    service["entrypoint"] = command[:1]
    service["command"] = command[1:]
    service["ports"] = [
        noted(
            f"${{BIND:-127.0.0.1}}:${{HTTP_PORT:-{PORT}}}:{PORT}",
            "open to this machine alone unless BIND says otherwise",
        )
    ]
    mounts: list[Any] = [f"./{carried.file}:{config}:ro"]
    for number, (here, there) in enumerate(carried.folders.items()):
        variable = "MODEL_DIR" if number == 0 else f"MODEL_DIR_{number + 1}"
        mounts.append(
            {
                "type": "bind",
                "source": _source(variable, here),
                "target": _literal(there),
                "read_only": True,
            }
        )
    variables: list[Any] = [
        noted(f"{name}={_literal(value)}", *notes)
        for name, (value, notes) in carried.environment.items()
    ]
    if carried.from_hub:
        mounts.append(f"{_HUB_VOLUME}:{HUB_CACHE}")
        variables.append("HF_TOKEN")
    if carried.key_variable:
        variables.append(carried.key_variable)
    service["volumes"] = mounts
    if variables:
        service["environment"] = noted(
            variables, "taken from the shell or from .env, where they are set; no secret is in here"
        )
    service["shm_size"] = SHARED_MEMORY
    if carried.gpus:
        device = {"driver": "nvidia", "count": carried.gpus, "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    elif carried.cores:
        service["cpus"] = noted(carried.cores, "the cores that it was measured with")
    service["healthcheck"] = {
        "test": ["CMD", *health_check()],
        "interval": "10s",
        "timeout": "10s",
        "retries": 3,
        "start_period": "900s",
    }
    service["restart"] = "unless-stopped"
    service["stop_grace_period"] = noted("120s", "running requests are finished first")
    content: dict[str, Any] = {"name": carried.slug, "services": {carried.engine: service}}
    if carried.from_hub:
        content["volumes"] = {_HUB_VOLUME: {}}
    return content


def _source(variable: str, here: str) -> str:
    """A path that a variable may replace; inside a default Compose knows no escapes."""
    if "$" in here or "}" in here:
        return _literal(here)
    return f"${{{variable}:-{here}}}"


def _literal(text: str) -> str:
    """Text in which Compose is to replace nothing."""
    return text.replace("$", "$$")
