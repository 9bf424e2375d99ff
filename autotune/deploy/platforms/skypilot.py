"""SkyPilot: a service on clouds, with the measured requests per second of a replica."""

from __future__ import annotations

import shlex
from typing import Any

from autotune.deploy.beside import beside
from autotune.deploy.platforms.accelerators import accelerator
from autotune.deploy.platforms.carried import PORT, Carried, carry
from autotune.deploy.platforms.container import CONFIG, MODELS
from autotune.deploy.platforms.head import head
from autotune.deploy.target import Deployment, Exported, Target
from autotune.deploy.yaml_document import document, noted
from autotune.errors import BadInput

CARRIES = ("vllm", "sglang")
FILE = "service.yaml"
# SkyPilot's names: `sky show-gpus`
_ACCELERATORS = {
    name: name
    for name in ("V100", "T4", "L4", "L40S", "A10G", "A10", "A100", "H100", "H200", "B200", "B300")
}


def skypilot_target() -> Target:
    """The target `skypilot`."""
    return Target("skypilot", "SkyPilot", export_skypilot, CARRIES)


def export_skypilot(deployment: Deployment) -> Exported:
    """`service.yaml`, as `sky serve up` reads it, with the engine's file beside it.

    Raises:
        BadInput: it was measured on a GPU for which SkyPilot has no name.
    """
    carried = carry(deployment, CARRIES, folder=MODELS)
    start = f"sky serve up {FILE} -n {carried.slug}"
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
        device = accelerator(deployment, _ACCELERATORS)
        if device is None:
            name = (deployment.run.get("hardware") or {}).get("name")
            raise BadInput(f"SkyPilot has no name for the GPU that was measured, {name}")
        resources["accelerators"] = noted({device: carried.gpus}, "the GPU that it was measured on")
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
    if carried.from_hub:
        content["secrets"] = noted(
            {"HF_TOKEN": None}, "given by: sky serve up --secret HF_TOKEN; no secret is in here"
        )
    if carried.environment:
        content["envs"] = {
            name: noted(value, *notes) for name, (value, notes) in carried.environment.items()
        }
    config = f"{CONFIG}/{carried.file}"
    models = {there: here for here, there in carried.folders.items()}
    content["file_mounts"] = {config: f"./{carried.file}", **models}
    content["run"] = shlex.join(carried.command(config))
    return content
