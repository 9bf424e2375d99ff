"""NVIDIA Dynamo: a graph of frontend and workers, scaled through its adapter."""

from __future__ import annotations

from typing import Any

from autotune.deploy.beside import beside
from autotune.deploy.platforms.carried import Carried, carry
from autotune.deploy.platforms.container import MODELS
from autotune.deploy.platforms.head import head
from autotune.deploy.platforms.pod import environment, models_mount, models_volume
from autotune.deploy.platforms.scaling import scaled_object
from autotune.deploy.platforms.versions import platform
from autotune.deploy.replica_capacity import ReplicaCapacity
from autotune.deploy.serving_engine import load_serving_engine
from autotune.deploy.target import Deployment, Exported, Target
from autotune.deploy.yaml_document import document, noted
from autotune.errors import BadInput

CARRIES = ("vllm", "sglang")
FILE = "dynamo.yaml"
_WORKER = "Worker"


def dynamo_target() -> Target:
    """The target `dynamo`."""
    return Target("dynamo", export_dynamo, CARRIES)


def export_dynamo(deployment: Deployment) -> Exported:
    """`dynamo.yaml`, a DynamoGraphDeployment, and KEDA's autoscaler for its workers.

    Raises:
        BadInput: it was measured on a CPU; Dynamo's images need a GPU.
    """
    if deployment.evidence.device != "cuda":
        raise BadInput("Dynamo's containers need a GPU, and this was measured on a CPU")
    known = platform("dynamo")
    carried = carry(deployment, CARRIES, images=known.images, folder=MODELS)
    own = f"{known.release} brings its own release of the engine, not {carried.title}"
    warnings = (
        *carried.warnings,
        f"{own}: check the flags against it, with --help of the worker",
    )
    start = f"kubectl apply -f {FILE}"

    def render(title: str, content: dict[str, Any], evidence_in: str = "") -> str:
        top = head(
            "dynamo",
            title,
            carried,
            deployment.evidence,
            use=start,
            evidence_in=evidence_in,
            more=warnings[len(carried.warnings) :],
        )
        return document(content, head=top)

    files = {FILE: render("DynamoGraphDeployment", _graph(carried))}
    if carried.capacity is not None:
        scaler = _scaler(carried, carried.capacity, deployment.max_replicas)
        files["keda.yaml"] = render("KEDA autoscaler of the workers", scaler, FILE)
    forward = f"kubectl port-forward service/{carried.slug}-frontend 8000:8000"
    return Exported(
        {**files, **beside(deployment, served_model=carried.name, start=f"{start}; {forward}")},
        carried.lost,
        warnings,
    )


def _graph(carried: Carried) -> dict[str, Any]:
    # Dynamo's workers speak through its frontend and take no address of their own.
    worker: dict[str, Any] = {
        "name": "main",
        "image": carried.image,
        "command": ["python3", "-m", f"dynamo.{carried.engine}"],
        "args": [
            f"--{load_serving_engine(carried.engine).model_key}",
            carried.model,
            "--served-model-name",
            carried.name,
            *(
                word
                for flag in carried.flags
                if flag.words
                for word in (noted(flag.words[0], *flag.notes), *flag.words[1:])
            ),
        ],
        "resources": {"limits": {"nvidia.com/gpu": str(carried.gpus)}},
    }
    if variables := environment(carried):
        worker["env"] = variables
    front: dict[str, Any] = {"name": "main", "image": carried.image}
    if carried.from_hub:
        secret = noted(
            {"secretRef": {"name": "hf-token-secret", "optional": True}},
            "kubectl create secret generic hf-token-secret --from-file=HF_TOKEN=FILE",
        )
        worker["envFrom"] = front["envFrom"] = [secret]
    pods: dict[str, dict[str, Any]] = {
        "Frontend": {"containers": [front]},
        _WORKER: {"containers": [worker]},
    }
    if carried.folders:
        for spec in pods.values():
            # The frontend reads the tokenizer from the model's folder.
            spec["volumes"] = [models_volume(carried)]
            spec["containers"][0]["volumeMounts"] = [models_mount()]
    worker_component: dict[str, Any] = {"name": _WORKER, "type": "worker", "replicas": 1}
    if carried.capacity is not None:
        worker_component["scalingAdapter"] = noted({}, "keda.yaml scales these replicas")
    worker_component["podTemplate"] = {"spec": pods[_WORKER]}
    frontend = {
        "name": "Frontend",
        "type": "frontend",
        "replicas": 1,
        "podTemplate": {"spec": pods["Frontend"]},
    }
    return {
        "apiVersion": "nvidia.com/v1beta1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": carried.slug},
        "spec": {"components": [frontend, worker_component]},
    }


def _scaler(carried: Carried, capacity: ReplicaCapacity, most: int) -> dict[str, Any]:
    target = {
        "apiVersion": "nvidia.com/v1beta1",
        "kind": "DynamoGraphDeploymentScalingAdapter",
        "name": f"{carried.slug}-{_WORKER.lower()}",
    }
    return scaled_object(carried, capacity, most, metadata={"name": carried.slug}, target=target)
