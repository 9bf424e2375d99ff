"""The pod of a serving engine: container, probes, volumes, secrets by reference."""

from __future__ import annotations

import math
from typing import Any

from autotune.deploy.platforms.carried import PORT, Carried
from autotune.deploy.platforms.container import CONFIG, HUB_CACHE, MODELS
from autotune.deploy.target import BUNDLED
from autotune.deploy.yaml_document import Noted, noted

# Weights of hundreds of gigabytes take their time: 120 times 15 s.
_START_PERIODS, _PERIOD_S = 120, 15
_HEALTH_SAYS = {BUNDLED: "/health fails when the engine makes no progress"}
DRAIN_S = 120
GIB = 1 << 30
# Beside weights and cache: the interpreter, PyTorch, activations.
_PROCESS_BYTES = 4 * GIB


def models_claim(carried: Carried) -> str:
    """The name of the volume claim that holds the models."""
    return f"{carried.slug}-models"


def model_files(carried: Carried) -> str:
    """Which files of the measured machine the claim has to hold, and where they are looked for."""
    return "; ".join(f"{here} as {there}" for here, there in carried.folders.items())


def models_volume(carried: Carried) -> Noted:
    """The volume of the models, with what its claim has to hold."""
    claim = {"claimName": models_claim(carried), "readOnly": True}
    return noted(
        {"name": "models", "persistentVolumeClaim": claim},
        f"a claim that has to hold, under {MODELS}: {model_files(carried)}",
    )


def models_mount() -> dict[str, Any]:
    """Where the container finds that volume."""
    return {"name": "models", "mountPath": MODELS, "readOnly": True}


def config_map(carried: Carried) -> str:
    """The name of the ConfigMap that holds the engine's file."""
    return f"{carried.slug}-config"


def environment(carried: Carried) -> list[Any]:
    """Variables that the engine is to be started with."""
    return [
        noted({"name": name, "value": value}, *notes)
        for name, (value, notes) in carried.environment.items()
    ]


def secrets(carried: Carried) -> list[Any]:
    """Environment variables whose values stand in the cluster's secrets, never in a file."""
    found = []
    if carried.from_hub:
        found.append(_secret("HF_TOKEN", "hf-token", "token"))
    if carried.key_variable:
        found.append(_secret(carried.key_variable, f"{carried.slug}-api-key", "api-key"))
    return found


def resources(carried: Carried) -> dict[str, Any]:
    """What one replica asks for: what it was measured with, as far as it is known."""
    if carried.gpus:
        return {"limits": {"nvidia.com/gpu": str(carried.gpus)}}
    requests: dict[str, Any] = {}
    if carried.cores:
        requests["cpu"] = noted(str(carried.cores), "the cores that it was measured with")
    if carried.memory_bytes is not None:
        gib = math.ceil((carried.memory_bytes + _PROCESS_BYTES) / GIB)
        requests["memory"] = noted(
            f"{gib}Gi",
            f"weights and KV cache took {carried.memory_bytes / GIB:.3g} GiB; the rest is for the "
            "process",
        )
    return {"requests": requests, "limits": dict(requests)} if requests else {}


def container(carried: Carried, *, name: str) -> dict[str, Any]:
    """The container; its configuration file is mounted from the volume `config`."""
    config = f"{CONFIG}/{carried.file}"
    mounts: list[Any] = [{"name": "config", "mountPath": CONFIG, "readOnly": True}]
    if carried.folders:
        mounts.append(models_mount())
    if carried.from_hub:
        mounts.append({"name": "hub-cache", "mountPath": HUB_CACHE})
    mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})  # noqa: S108
    content: dict[str, Any] = {
        "name": name,
        "image": carried.image,
        "imagePullPolicy": "IfNotPresent",
        "command": carried.command(config),
        "ports": [{"name": "http", "containerPort": PORT}],
    }
    if variables := environment(carried) + secrets(carried):
        content["env"] = variables
    if wanted := resources(carried):
        content["resources"] = wanted
    return {
        **content,
        **probes(carried),
        "securityContext": {"allowPrivilegeEscalation": False},
        "volumeMounts": mounts,
    }


def probes(carried: Carried) -> dict[str, Any]:
    """When a replica is started, ready, and alive."""
    return {
        "startupProbe": noted(
            _probe(_PERIOD_S, _START_PERIODS), "loading weights may take half an hour"
        ),
        "readinessProbe": _probe(5, 3),
        "livenessProbe": noted(_probe(20, 6), _HEALTH_SAYS.get(carried.engine)),
    }


def pod(carried: Carried, *, container_name: str) -> dict[str, Any]:
    """A pod's `spec`."""
    volumes: list[Any] = [{"name": "config", "configMap": {"name": config_map(carried)}}]
    if carried.folders:
        volumes.append(models_volume(carried))
    if carried.from_hub:
        volumes.append(
            noted(
                {"name": "hub-cache", "emptyDir": {}},
                "every replica downloads the model when it starts; a claim would keep it",
            )
        )
    memory = {"medium": "Memory", "sizeLimit": "2Gi"}
    volumes.append({"name": "shared-memory", "emptyDir": memory})
    return {
        "enableServiceLinks": noted(
            False, "a Service's variables, such as VLLM_PORT, would be read as the engine's own"
        ),
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": noted(DRAIN_S, "running requests are finished first"),
        "containers": [container(carried, name=container_name)],
        "volumes": volumes,
    }


def _secret(variable: str, secret: str, key: str) -> Any:
    return noted(
        {
            "name": variable,
            "valueFrom": {"secretKeyRef": {"name": secret, "key": key, "optional": True}},
        },
        f"kubectl create secret generic {secret} --from-file={key}=FILE",
    )


def _probe(period_s: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": "/health", "port": "http"},
        "periodSeconds": period_s,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }
