"""Kubernetes: Deployment, Service, volume claim, and an autoscaler at the measured capacity."""

from __future__ import annotations

import math
from typing import Any

from autotune.deploy.beside import beside
from autotune.deploy.platforms.carried import PORT, Carried, carry
from autotune.deploy.platforms.container import MODELS, dockerfile
from autotune.deploy.platforms.head import head
from autotune.deploy.platforms.pod import GIB, config_map, model_files, models_claim, pod
from autotune.deploy.platforms.scaling import PER_POD, behavior, pods_metric, scaled_object
from autotune.deploy.replica_capacity import ReplicaCapacity
from autotune.deploy.target import BUNDLED, Deployment, Exported, Target
from autotune.deploy.yaml_document import document, noted

CARRIES = ("vllm", "sglang", BUNDLED)
_USE = "kubectl apply -k ."


def kubernetes_target() -> Target:
    """The target `kubernetes`."""
    return Target("kubernetes", export_kubernetes, CARRIES)


def export_kubernetes(deployment: Deployment) -> Exported:
    """A kustomization of Deployment, Service, claim, and KEDA's or Kubernetes' own autoscaler."""
    carried = carry(deployment, CARRIES, folder=MODELS)
    capacity = carried.capacity

    def render(title: str, content: dict[str, Any]) -> str:
        top = head(
            "kubernetes",
            title,
            carried,
            deployment.evidence,
            use=_USE,
            evidence_in=carried.file,
        )
        return document(content, head=top)

    resources: list[Any] = ["deployment.yaml", "service.yaml"]
    files = {
        "deployment.yaml": render("Kubernetes Deployment", _deployment(carried)),
        "service.yaml": document(_service(carried), head=["Where the replicas are reached."]),
    }
    if carried.folders:
        files["models.yaml"] = document(_claim(carried), head=[_claim_head(carried)])
        resources.append("models.yaml")
    if capacity is not None:
        most = deployment.max_replicas
        files["keda.yaml"] = render("KEDA autoscaler", _scaled_object(carried, capacity, most))
        files["hpa.yaml"] = render(
            "Kubernetes autoscaler (instead of keda.yaml; needs prometheus-adapter with "
            "prometheus-adapter-values.yaml)",
            _autoscaler(carried, capacity, most),
        )
        files["prometheus-adapter-values.yaml"] = document(
            _adapter(carried),
            head=["Values of the chart prometheus-adapter: the metric that hpa.yaml reads."],
        )
        resources.append(noted("keda.yaml", "or hpa.yaml where there is no KEDA; never both"))
    start = f"{_USE}; kubectl port-forward service/{carried.slug} {PORT}:{PORT}"
    return Exported(
        {
            "kustomization.yaml": render(
                "Kubernetes manifests", _kustomization(carried, resources)
            ),
            carried.file: carried.text,
            **files,
            **dockerfile(carried, deployment.run),
            **beside(deployment, served_model=carried.name, start=start),
        },
        carried.lost,
        carried.warnings,
    )


def labels(carried: Carried) -> dict[str, str]:
    """The labels that select the replicas."""
    return {"app.kubernetes.io/name": carried.slug}


def _kustomization(carried: Carried, resources: list[Any]) -> dict[str, Any]:
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": resources,
        "configMapGenerator": noted(
            [{"name": config_map(carried), "files": [carried.file]}],
            "its name ends in a hash of the content, so that a changed file restarts the replicas",
        ),
    }


def _deployment(carried: Carried) -> dict[str, Any]:
    annotations = {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(PORT),
        "prometheus.io/path": "/metrics",
    }
    spec: dict[str, Any] = {}
    if carried.capacity is None:
        spec["replicas"] = 1
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": carried.slug, "labels": labels(carried)},
        "spec": {
            **spec,
            "progressDeadlineSeconds": 2400,
            "selector": {"matchLabels": labels(carried)},
            "template": {
                "metadata": {"labels": labels(carried), "annotations": annotations},
                "spec": pod(carried, container_name=carried.engine),
            },
        },
    }


def _service(carried: Carried) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": carried.slug, "labels": labels(carried)},
        "spec": {
            "type": "ClusterIP",
            "selector": labels(carried),
            "ports": [{"name": "http", "port": PORT, "targetPort": "http"}],
        },
    }


def _claim_head(carried: Carried) -> str:
    filled = "Volume of the model's files, to be filled before the first start."
    return f"{filled} It holds, under {MODELS}: {model_files(carried)}."


def _claim(carried: Carried) -> dict[str, Any]:
    size = max(1, math.ceil(1.2 * carried.stored_bytes / GIB)) if carried.stored_bytes else 100
    note = "the files and a fifth more" if carried.stored_bytes else "their size was not known"
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": models_claim(carried), "labels": labels(carried)},
        "spec": {
            "accessModes": noted(["ReadWriteMany"], "replicas on several machines read it"),
            "resources": {"requests": {"storage": noted(f"{size}Gi", note)}},
        },
    }


def _scaled_object(carried: Carried, capacity: ReplicaCapacity, most: int) -> dict[str, Any]:
    metadata = {"name": carried.slug, "labels": labels(carried)}
    target = {"name": carried.slug}
    return scaled_object(carried, capacity, most, metadata=metadata, target=target)


def _autoscaler(carried: Carried, capacity: ReplicaCapacity, most: int) -> dict[str, Any]:
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": carried.slug}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": carried.slug, "labels": labels(carried)},
        "spec": {
            "scaleTargetRef": target,
            "minReplicas": 1,
            "maxReplicas": most,
            "metrics": [pods_metric(capacity)],
            "behavior": behavior(),
        },
    }


def _adapter(carried: Carried) -> dict[str, Any]:
    running, waiting = carried.in_flight_metrics()
    query = (
        f"sum(<<.Series>>{{<<.LabelMatchers>>}} + {waiting}{{<<.LabelMatchers>>}}) "
        "by (<<.GroupBy>>)"
    )
    overrides = {"namespace": {"resource": "namespace"}, "pod": {"resource": "pod"}}
    rule = {
        "seriesQuery": f'{running}{{namespace!="",pod!=""}}',
        "resources": {"overrides": overrides},
        "name": {"matches": "^.*$", "as": PER_POD},
        "metricsQuery": query,
    }
    return {"rules": {"custom": [rule]}}
