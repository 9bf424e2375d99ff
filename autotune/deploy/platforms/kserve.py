"""KServe: an LLMInferenceService for vLLM, an InferenceService with any engine's container."""

from __future__ import annotations

import shlex
from typing import Any

from autotune.deploy.beside import beside
from autotune.deploy.platforms.carried import Carried, carry
from autotune.deploy.platforms.container import MODELS, dockerfile
from autotune.deploy.platforms.head import head
from autotune.deploy.platforms.pod import (
    DRAIN_S,
    config_map,
    environment,
    model_files,
    models_claim,
    models_mount,
    models_volume,
    pod,
    resources,
    secrets,
)
from autotune.deploy.platforms.scaling import (
    PROMETHEUS,
    keda,
    target_in_flight,
    target_note,
)
from autotune.deploy.target import BUNDLED, Deployment, Exported, Target
from autotune.deploy.yaml_document import document, noted
from autotune.errors import BadInput

CARRIES = ("vllm", "sglang", BUNDLED)
_TENSOR_PARALLEL = "tensor-parallel-size"


def kserve_target() -> Target:
    """The target `kserve`."""
    return Target("kserve", export_kserve, CARRIES)


def export_kserve(deployment: Deployment) -> Exported:
    """The custom resource, the kustomization that adds the engine's file, and the scripts."""
    carried = carry(deployment, CARRIES, folder=MODELS)
    kind, file = (
        ("LLMInferenceService", "llminferenceservice.yaml")
        if carried.engine == "vllm"
        else ("InferenceService", "inferenceservice.yaml")
    )
    use = f"kubectl apply -f {file}" if carried.engine == "vllm" else "kubectl apply -k ."

    def render(title: str, content: dict[str, Any], evidence_in: str) -> str:
        top = head("kserve", title, carried, deployment.evidence, use=use, evidence_in=evidence_in)
        return document(content, head=top)

    if carried.engine == "vllm":
        files = {file: render(kind, _llm_service(carried, deployment), "")}
    else:
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [file],
            "configMapGenerator": [{"name": config_map(carried), "files": [carried.file]}],
            "generatorOptions": noted(
                {"disableNameSuffixHash": True},
                "kustomize does not know the fields of KServe's resource that name it",
            ),
        }
        files = {
            file: render(kind, _service(carried, deployment), carried.file),
            "kustomization.yaml": document(kustomization),
            carried.file: carried.text,
        }
    start = f"{use}; URL is status.url of the resource"
    return Exported(
        {
            **files,
            **dockerfile(carried, deployment.run),
            **beside(deployment, served_model=carried.name, start=start),
        },
        carried.lost,
        carried.warnings,
    )


def _uri(carried: Carried) -> Any:
    """Where KServe gets the model: the hub, another URI, or a volume claim that has to be filled.

    Raises:
        BadInput: it is to be a path, of which KServe does not know the volume.
    """
    if carried.from_hub:
        return f"hf://{carried.model}"
    if carried.model.startswith(f"{MODELS}/"):
        claim, path = models_claim(carried), carried.model.removeprefix(f"{MODELS}/")
        held = f"a claim with {MODELS} as its root, which has to hold: {model_files(carried)}"
        return noted(f"pvc://{claim}/{path}", held)
    if "://" in carried.model:
        return carried.model
    raise BadInput(
        f"KServe loads a model by its URI, not by the path {carried.model}: give --model "
        "pvc://CLAIM/PATH, s3://BUCKET/PATH or a name of the hub"
    )


def _llm_service(carried: Carried, deployment: Deployment) -> dict[str, Any]:
    """KServe starts vLLM by its own command, with certificates of its own; we add the flags."""
    flags = [flag for flag in carried.flags if flag.key != _TENSOR_PARALLEL]
    notes = [f"--{flag.key}: {note}" for flag in flags for note in flag.notes]
    words = [word for flag in flags for word in flag.words]
    added = noted({"name": "VLLM_ADDITIONAL_ARGS", "value": shlex.join(words)}, *notes)
    container: dict[str, Any] = {
        "name": "main",
        "image": carried.image,
        "env": [added, *environment(carried), *secrets(carried)],
    }
    if wanted := resources(carried):
        container["resources"] = wanted
    container["securityContext"] = noted(
        {"runAsUser": 2000, "runAsGroup": 0}, "KServe refuses root; the image allows this user"
    )
    spec: dict[str, Any] = {
        "model": {"uri": _uri(carried), "name": carried.name},
        "router": noted(
            {"scheduler": {}, "route": {}, "gateway": {}},
            "KServe's scheduler sends requests where their prefix is cached",
        ),
    }
    if carried.gpus > 1:
        spec["parallelism"] = {"tensor": carried.gpus}
    if carried.capacity is None:
        spec["replicas"] = 1
    else:
        bounds = keda(carried, carried.capacity, deployment.max_replicas)
        spec["scaling"] = {
            "minReplicas": bounds.pop("minReplicaCount"),
            "maxReplicas": bounds.pop("maxReplicaCount"),
            "keda": bounds,
        }
    spec["template"] = {
        "terminationGracePeriodSeconds": noted(DRAIN_S, "running requests are finished first"),
        "containers": [container],
    }
    if any(not carried.model.startswith(there) for there in carried.folders.values()):
        # KServe mounts the model alone, not what the flags name beside it.
        container["volumeMounts"] = [models_mount()]
        spec["template"]["volumes"] = [models_volume(carried)]
    return {
        "apiVersion": "serving.kserve.io/v1alpha2",
        "kind": "LLMInferenceService",
        "metadata": {"name": carried.slug},
        "spec": spec,
    }


def _service(carried: Carried, deployment: Deployment) -> dict[str, Any]:
    content = pod(carried, container_name="kserve-container")
    predictor: dict[str, Any] = {"minReplicas": 1}
    annotations: dict[str, Any] = {
        "serving.kserve.io/deploymentMode": noted(
            "Standard", "a Deployment; without Knative, which would cut long streams"
        )
    }
    if carried.capacity is not None:
        annotations["serving.kserve.io/autoscalerClass"] = "keda"
        value = noted(f"{target_in_flight(carried.capacity):g}", target_note(carried.capacity))
        metric = {
            "backend": "prometheus",
            "serverAddress": noted(PROMETHEUS, "where this cluster's Prometheus answers"),
            "query": carried.in_flight_query(),
        }
        external = {"metric": metric, "target": {"type": "AverageValue", "averageValue": value}}
        predictor["maxReplicas"] = deployment.max_replicas
        predictor["autoScaling"] = {"metrics": [{"type": "External", "external": external}]}
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": carried.slug, "annotations": annotations},
        "spec": {"predictor": {**predictor, **content}},
    }
