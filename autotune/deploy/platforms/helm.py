"""vLLM's production stack: values of its Helm chart, with a router before the replicas."""

from __future__ import annotations

from typing import Any

from autotune.deploy.beside import beside
from autotune.deploy.platforms.carried import Carried, Flag, carry
from autotune.deploy.platforms.container import MODELS
from autotune.deploy.platforms.head import head
from autotune.deploy.platforms.pod import environment, models_mount, models_volume, resources
from autotune.deploy.platforms.scaling import scaled_object
from autotune.deploy.platforms.versions import platform
from autotune.deploy.replica_capacity import ReplicaCapacity
from autotune.deploy.target import Deployment, Exported, Target
from autotune.deploy.yaml_document import Noted, document, noted

CARRIES = ("vllm",)
FILE = "values.yaml"
_RELEASE = "vllm"
_REPOSITORY = "https://vllm-project.github.io/production-stack"
# The chart's own names for flags; the others go as extraArgs.
_NAMED = {
    "enable-chunked-prefill": "enableChunkedPrefill",
    "enable-prefix-caching": "enablePrefixCaching",
    "max-model-len": "maxModelLen",
    "dtype": "dtype",
    "tensor-parallel-size": "tensorParallelSize",
    "max-num-seqs": "maxNumSeqs",
    "gpu-memory-utilization": "gpuMemoryUtilization",
}


def helm_target() -> Target:
    """The target `helm`."""
    return Target("helm", export_helm, CARRIES)


def export_helm(deployment: Deployment) -> Exported:
    """`values.yaml` of the chart vllm-stack."""
    carried = carry(deployment, CARRIES, folder=MODELS)
    start = (
        f"helm install {_RELEASE} vllm-stack --repo {_REPOSITORY} --version {_chart_release()} "
        f"-f {FILE}"
    )
    text = document(
        _content(carried, deployment),
        head=head("helm", "Values of the chart", carried, deployment.evidence, use=start),
    )
    forward = f"kubectl port-forward service/{_RELEASE}-router-service 8000:80"
    return Exported(
        {FILE: text, **beside(deployment, served_model=carried.name, start=f"{start}; {forward}")},
        carried.lost,
        carried.warnings,
    )


def _chart_release() -> str:
    """The last word of the platform's release: "... chart vllm-stack 0.1.12"."""
    return platform("helm").release.rpartition(" ")[2]


def _content(carried: Carried, deployment: Deployment) -> dict[str, Any]:
    repository, _, tag = carried.image.rpartition(":")
    model: dict[str, Any] = {
        "name": carried.slug,
        "repository": repository,
        "tag": tag,
        "modelURL": carried.model,
        "replicaCount": 1,
    }
    if wanted := resources(carried):
        model["resources"] = wanted
    config: dict[str, Any] = {}
    extra: list[Any] = ["--served-model-name", carried.name]
    for flag in carried.flags:
        _place(flag, config, extra)
    model["vllmConfig"] = {**config, "extraArgs": extra}
    if carried.from_hub:
        model["hf_token"] = noted(
            {"secretName": "hf-token", "secretKey": "token"},
            "kubectl create secret generic hf-token --from-file=token=FILE",
        )
    else:
        model["extraVolumes"] = [models_volume(carried)]
        model["extraVolumeMounts"] = [models_mount()]
    if variables := environment(carried):
        model["env"] = variables
    if carried.gpus > 1:
        model["shmSize"] = noted("8Gi", "the ranks exchange data there")
    values: dict[str, Any] = {
        "servingEngineSpec": {
            "runtimeClassName": noted("", "the cluster's default; nvidia where it has that class"),
            "modelSpec": [model],
        },
        "routerSpec": {
            "enableRouter": True,
            "repository": "lmcache/lmstack-router",
            "tag": noted(f"v{_chart_release()}", "the chart's own release"),
            "routingLogic": _routing(deployment),
        },
    }
    if carried.capacity is not None:
        scaler = _scaler(carried, carried.capacity, deployment.max_replicas)
        values["extraObjects"] = noted(
            [scaler],
            "KEDA's autoscaler as an object of its own: the chart's schema wants keda.triggers as "
            "a mapping, which KEDA refuses",
        )
    return values


def _scaler(carried: Carried, capacity: ReplicaCapacity, most: int) -> dict[str, Any]:
    name = f"{{{{ .Release.Name }}}}-{carried.slug}"
    target = {"name": f"{name}-deployment-vllm"}
    return scaled_object(carried, capacity, most, metadata={"name": name}, target=target)


def _place(flag: Flag, config: dict[str, Any], extra: list[Any]) -> None:
    """A flag under the chart's name, or among the extra arguments."""
    negated = flag.key.startswith("no-")
    name = _NAMED.get(flag.key.removeprefix("no-"))
    if name is None:
        if flag.words:
            extra += [noted(flag.words[0], *flag.notes), *flag.words[1:]]
        return
    value = flag.value
    if negated:
        value = not value
    config[name] = Noted(value, flag.notes)


def _routing(deployment: Deployment) -> Any:
    share = ((deployment.evidence.bench.get("engine") or {}).get("prefix_hit_rate")) or 0.0
    if deployment.config.enable_prefix_caching and share >= 0.05:
        return noted(
            "prefixaware", f"{share:.0%} of the prompts' tokens were found in the prefix cache"
        )
    return noted("roundrobin", "hardly any prompt's beginning was found in the prefix cache")
