"""How many replicas: what one bore when it was measured, as autoscalers' targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autotune.deploy.platforms.carried import Carried
from autotune.deploy.replica_capacity import ReplicaCapacity
from autotune.deploy.yaml_document import noted

# What a Prometheus operator's stack is called by default; every cluster may differ.
PROMETHEUS = "http://prometheus-operated.monitoring.svc:9090"
# The name under which prometheus-adapter serves the requests inside a pod.
PER_POD = "llm_requests_in_flight"
_POLL_S, _COOL_DOWN_S = 15, 360


def target_in_flight(capacity: ReplicaCapacity) -> float:
    """Requests inside one replica, on average, above which another is started.

    At least 1: below it a single request would start a second replica.
    """
    return max(1.0, round(capacity.in_flight, 1))


def target_note(capacity: ReplicaCapacity) -> str:
    """The comment that goes with the target."""
    return (
        f"requests inside a replica, running or waiting, at what it bore: {capacity.basis}. Lower "
        "it if load grows faster than a replica starts"
    )


def keda_trigger(carried: Carried, capacity: ReplicaCapacity) -> dict[str, Any]:
    """One Prometheus trigger: replicas = requests inside all of them / target."""
    return {
        "type": "prometheus",
        "metricType": "AverageValue",
        "metadata": {
            "serverAddress": noted(PROMETHEUS, "where this cluster's Prometheus answers"),
            "query": carried.in_flight_query(),
            "threshold": noted(f"{target_in_flight(capacity):g}", target_note(capacity)),
        },
    }


def keda(carried: Carried, capacity: ReplicaCapacity, max_replicas: int) -> dict[str, Any]:
    """KEDA's bounds and trigger, as a ScaledObject and several charts spell them."""
    return {
        "minReplicaCount": 1,
        "maxReplicaCount": max_replicas,
        "pollingInterval": _POLL_S,
        "cooldownPeriod": _COOL_DOWN_S,
        "triggers": [keda_trigger(carried, capacity)],
    }


def scaled_object(
    carried: Carried,
    capacity: ReplicaCapacity,
    max_replicas: int,
    *,
    metadata: Mapping[str, Any],
    target: Mapping[str, str],
) -> dict[str, Any]:
    """KEDA's autoscaler as an object of its own; `target` names what has the replicas."""
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": metadata,
        "spec": {
            "scaleTargetRef": target,
            **keda(carried, capacity, max_replicas),
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": behavior()}},
        },
    }


def pods_metric(capacity: ReplicaCapacity, *notes: str) -> dict[str, Any]:
    """The metric by which Kubernetes' own autoscaler scales; `notes` are comments on its name."""
    value = noted(f"{round(1000 * target_in_flight(capacity))}m", target_note(capacity))
    return {
        "type": "Pods",
        "pods": {
            "metric": noted({"name": PER_POD}, *notes),
            "target": {"type": "AverageValue", "averageValue": value},
        },
    }


def behavior() -> dict[str, Any]:
    """Scale up at once; down only after five quiet minutes, since starting a replica is slow."""
    return {
        "scaleUp": {"stabilizationWindowSeconds": 0},
        "scaleDown": {
            "stabilizationWindowSeconds": 300,
            "policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}],
        },
    }
