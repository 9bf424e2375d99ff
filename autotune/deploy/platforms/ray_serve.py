"""Ray Serve: an application of `ray.serve.llm` with the tuned engine arguments."""

from __future__ import annotations

import json
import math
from typing import Any

from autotune.deploy.beside import beside
from autotune.deploy.platforms.accelerators import accelerator
from autotune.deploy.platforms.carried import PORT, Carried, carry
from autotune.deploy.platforms.head import head
from autotune.deploy.platforms.scaling import target_in_flight, target_note
from autotune.deploy.target import Deployment, Exported, Target
from autotune.deploy.yaml_document import document, noted

CARRIES = ("vllm",)
FILE = "serve.yaml"
# Ray's names: ray.util.accelerators
_ACCELERATORS = {
    name: name
    for name in ("V100", "T4", "L4", "L40S", "A100", "H100", "H200", "H20", "B200", "P100")
} | {"A10": "A10G", "A10G": "A10G"}
# Requests that a replica may hold beyond its batch before Ray sends them elsewhere or lets them
# wait: half a batch keeps the engine's own queue short and never empty.
_BEYOND_BATCH = 1.5


def ray_serve_target() -> Target:
    """The target `ray-serve`."""
    return Target("ray-serve", export_ray_serve, CARRIES)


def export_ray_serve(deployment: Deployment) -> Exported:
    """`serve.yaml`, as `serve deploy` and KubeRay's `serveConfigV2` read it."""
    carried = carry(deployment, CARRIES, contained=False)
    start = f"serve run {FILE}"
    more: tuple[str, ...] = ()
    if not carried.from_hub:
        more += (
            f"every node of the cluster must have the model at {carried.model}; a name of the hub "
            "(--model) is downloaded by each",
        )
    top = head("ray-serve", "Ray Serve config", carried, deployment.evidence, use=start, more=more)
    text = document(_content(carried, deployment), head=top)
    return Exported(
        {
            FILE: text,
            **beside(deployment, served_model=carried.name, start=start, health="/-/healthz"),
        },
        carried.lost,
        (*carried.warnings, *more),
    )


def _content(carried: Carried, deployment: Deployment) -> dict[str, Any]:
    seqs = deployment.config.max_num_seqs
    replicas: dict[str, Any] = {}
    if carried.capacity is not None:
        replicas["autoscaling_config"] = {
            "min_replicas": 1,
            "max_replicas": deployment.max_replicas,
            "target_ongoing_requests": noted(
                target_in_flight(carried.capacity), target_note(carried.capacity)
            ),
            "upscale_delay_s": 15,
            "downscale_delay_s": 360,
        }
    else:
        replicas["num_replicas"] = 1
    replicas["max_ongoing_requests"] = noted(
        math.ceil(_BEYOND_BATCH * seqs), f"one and a half of max_num_seqs, {seqs}"
    )
    replicas["health_check_period_s"] = 10
    replicas["graceful_shutdown_timeout_s"] = 120
    config: dict[str, Any] = {
        "model_loading_config": {"model_id": carried.name, "model_source": carried.model}
    }
    device = accelerator(deployment, _ACCELERATORS)
    if carried.gpus and device is not None:
        config["accelerator_type"] = noted(device, "the GPU that it was measured on")
    if not carried.gpus and carried.cores:
        config["placement_group_config"] = noted(
            {"bundles": [{"CPU": carried.cores}]}, "no GPU: the cores that it was measured with"
        )
    if variables := {name: noted(v, *notes) for name, (v, notes) in carried.environment.items()}:
        config["runtime_env"] = {"env_vars": variables}
    config["engine_kwargs"] = {
        _keyword(flag.key): noted(_value(flag.key, flag.value), *flag.notes)
        for flag in carried.flags
    }
    config["deployment_config"] = replicas
    application = {
        "name": carried.slug,
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [config]},
    }
    host = noted("127.0.0.1", "reached from this machine alone; 0.0.0.0 opens it to the network")
    return {
        "http_options": {"host": host, "port": PORT},
        "applications": [application],
    }


def _keyword(key: str) -> str:
    """A flag of vLLM's as the keyword of its arguments' class."""
    return key.removeprefix("no-").replace("-", "_")


def _value(key: str, value: Any) -> Any:
    """A flag's value as that keyword's: `no-x: true` is `x: false`, JSON is a mapping."""
    if key.startswith("no-"):
        return not value
    if isinstance(value, str) and value.startswith("{"):
        return json.loads(value)
    return value
