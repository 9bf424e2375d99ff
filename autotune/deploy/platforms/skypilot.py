"""SkyPilot: a service on clouds, with the measured requests per second of a replica."""

from __future__ import annotations

import shlex
from typing import Any

from autotune.deploy.beside import beside
from autotune.deploy.platforms.accelerators import accelerator
from autotune.deploy.platforms.carried import PORT, Carried, carry
from autotune.deploy.platforms.container import CONFIG, MODELS
from autotune.deploy.platforms.head import head
from autotune.deploy.platforms.pod import GIB
from autotune.deploy.target import Deployment, Exported, Target
from autotune.deploy.yaml_document import document, noted
from autotune.errors import BadInput

CARRIES = ("vllm", "sglang")
FILE = "service.yaml"
# SkyPilot's names: `sky show-gpus`. Those with more memory have names of their own.
_ACCELERATORS = {
    name: name
    for name in ("V100", "T4", "L4", "L40S", "A10G", "A10", "A100", "H100", "H200", "B200", "B300")
}
_LARGER = {"A100": (60 * GIB, "A100-80GB"), "V100": (24 * GIB, "V100-32GB")}
# SGLang takes no key from its environment, but by a flag.
_KEY_FLAG = {"sglang": ("SGLANG_API_KEY", "--api-key")}


def skypilot_target() -> Target:
    """The target `skypilot`."""
    return Target("skypilot", export_skypilot, CARRIES)


def export_skypilot(deployment: Deployment) -> Exported:
    """`service.yaml`, as `sky serve up` reads it, with the engine's file beside it.

    Raises:
        BadInput: it was measured on a GPU for which SkyPilot has no name.
    """
    carried = carry(deployment, CARRIES, folder=MODELS)
    given = " ".join(f"--secret {name}" for name in _secrets(carried))
    start = f"sky serve up {FILE} -n {carried.slug} {given}"
    text = document(
        _content(carried, deployment),
        head=head(
            "skypilot",
            "SkyPilot service",
            carried,
            deployment.evidence,
            use=start,
            evidence_in=carried.file,
        ),
    )
    reached = f"{start}; URL=http://$(sky serve status --endpoint {carried.slug})"
    return Exported(
        {
            FILE: text,
            carried.file: carried.text,
            **beside(deployment, served_model=carried.name, start=reached),
        },
        carried.lost,
        carried.warnings,
    )


def _content(carried: Carried, deployment: Deployment) -> dict[str, Any]:
    resources: dict[str, Any] = {}
    if carried.gpus:
        resources["accelerators"] = noted(
            {_accelerator(deployment): carried.gpus}, "the GPU that it was measured on"
        )
    elif carried.cores:
        resources["cpus"] = noted(f"{carried.cores}", "the cores that it was measured with")
    resources["image_id"] = f"docker:{carried.image}"
    resources["ports"] = PORT
    service: dict[str, Any] = {
        "readiness_probe": {"path": "/health", "initial_delay_seconds": 1800},
    }
    if carried.capacity is not None:
        service["replica_policy"] = {
            "min_replicas": 1,
            "max_replicas": deployment.max_replicas,
            "target_qps_per_replica": noted(
                float(f"{carried.capacity.requests_per_s:.4g}"), carried.capacity.basis
            ),
            "upscale_delay_seconds": 60,
            "downscale_delay_seconds": 600,
        }
    else:
        service["replicas"] = 1
    content: dict[str, Any] = {"name": carried.slug, "service": service, "resources": resources}
    content["secrets"] = noted(
        dict.fromkeys(_secrets(carried)),
        "taken from the shell by --secret; no secret is in here. The service is open to the "
        "internet: requests need the API key",
    )
    if carried.environment:
        content["envs"] = {
            name: noted(value, *notes) for name, (value, notes) in carried.environment.items()
        }
    config = f"{CONFIG}/{carried.file}"
    models = {there: here for here, there in carried.folders.items()}
    content["file_mounts"] = {config: f"./{carried.file}", **models}
    content["run"] = shlex.join(carried.command(config))
    if carried.engine in _KEY_FLAG:
        variable, flag = _KEY_FLAG[carried.engine]
        content["run"] += f' {flag} "${variable}"'
    return content


def _accelerator(deployment: Deployment) -> str:
    """SkyPilot's name of the GPU that was measured.

    Raises:
        BadInput: it has none.
    """
    hardware = deployment.run.get("hardware") or {}
    name = accelerator(deployment, _ACCELERATORS)
    if name is None:
        raise BadInput(
            f"SkyPilot has no name for the GPU that was measured, {hardware.get('name')}"
        )
    least, larger = _LARGER.get(name, (0, name))
    return larger if (hardware.get("memory_bytes") or 0) >= least else name


def _secrets(carried: Carried) -> list[str]:
    """The variables that a person has to give: the hub's token, and a key of the service."""
    key = _KEY_FLAG[carried.engine][0] if carried.engine in _KEY_FLAG else carried.key_variable
    return [name for name in ("HF_TOKEN" if carried.from_hub else None, key) if name]
