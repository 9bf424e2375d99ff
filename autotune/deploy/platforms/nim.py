"""NVIDIA NIM: the model-free container by its environment, for Docker and for the NIM operator."""

from __future__ import annotations

import re
import shlex
from typing import Any

from autotune.deploy.beside import beside
from autotune.deploy.platforms.carried import PORT, Carried, carry
from autotune.deploy.platforms.container import SHARED_MEMORY
from autotune.deploy.platforms.head import head
from autotune.deploy.platforms.pod import model_files, models_claim
from autotune.deploy.platforms.scaling import behavior, pods_metric
from autotune.deploy.platforms.versions import platform
from autotune.deploy.target import Deployment, Exported, Target
from autotune.deploy.yaml_document import document, noted
from autotune.deploy.yaml_text import comment
from autotune.errors import BadInput

CARRIES = ("vllm", "sglang")
FILE = "nimservice.yaml"
_ENVIRONMENT = "nim.env"
# Where the operator mounts the volume.
_MODELS = "/model-store"
_HEALTH = "/v1/health/ready"


def nim_target() -> Target:
    """The target `nim`."""
    return Target("nim", export_nim, CARRIES)


def export_nim(deployment: Deployment) -> Exported:
    """A NIMService for the operator, and `nim.env` with a script for Docker.

    Raises:
        BadInput: it was measured on a CPU; NIM's containers need a GPU.
    """
    if deployment.evidence.device != "cuda":
        raise BadInput("NIM's containers need a GPU, and this was measured on a CPU")
    known = platform("nim")
    carried = carry(deployment, CARRIES, images=known.images, folder=_MODELS)
    own = f"{known.release} brings its own release of the engine, not {carried.title}"
    more = (f"{own}: check the flags against it (docker run ... --dry-run)",)

    def top(title: str, use: str) -> list[str]:
        return head("nim", title, carried, deployment.evidence, use=use, more=more)

    use = f"kubectl apply -f {FILE}"
    files = {
        FILE: document(_service(carried, deployment), head=top("NIMService", use)),
        _ENVIRONMENT: _env_file(carried, top("Environment of a NIM container", "sh run_nim.sh")),
        "run_nim.sh": _run_script(carried),
    }
    start = f"sh run_nim.sh, or {use}"
    return Exported(
        {**files, **beside(deployment, served_model=carried.name, start=start, health=_HEALTH)},
        carried.lost,
        (*carried.warnings, *more),
    )


def _variables(carried: Carried) -> dict[str, tuple[str, tuple[str, ...]]]:
    """NIM's variables; what it has no variable for is passed through to the engine."""
    path = f"hf://{carried.model}" if carried.from_hub else carried.model
    notes = tuple(f"--{flag.key}: {note}" for flag in carried.flags for note in flag.notes)
    return {
        "NIM_MODEL_PATH": (path, ()),
        "NIM_SERVED_MODEL_NAME": (carried.name, ()),
        "NIM_SERVER_PORT": (str(PORT), ()),
        "NIM_PASSTHROUGH_ARGS": (shlex.join(carried.arguments()), notes),
        **carried.environment,
    }


def _env_file(carried: Carried, top: list[str]) -> str:
    lines = [line for text in top for line in (comment(text, indent="  ") if text else [""])]
    for name, (value, notes) in _variables(carried).items():
        lines += [line for note in notes for line in comment(note, indent="  ")]
        lines.append(f"{name}={value}")
    return "\n".join(lines) + "\n"


def _run_script(carried: Carried) -> str:
    mounts = [
        f'  --volume "${{MODEL_DIR{"" if n == 0 else f"_{n + 1}"}:-{_inside(here)}}}"'
        f":{shlex.quote(there)}:ro \\"
        for n, (here, there) in enumerate(carried.folders.items())
    ]
    lines = [
        "#!/bin/sh",
        *comment(
            "Runs the container. NGC_API_KEY and HF_TOKEN are taken from the environment, where "
            "they are set; the address is this machine's alone unless BIND says otherwise."
        ),
        "set -eu",
        'cd "$(dirname "$0")"',
        f'exec docker run --rm --gpus "${{GPUS:-all}}" --shm-size {SHARED_MEMORY} \\',
        f'  --publish "${{BIND:-127.0.0.1}}:${{HTTP_PORT:-{PORT}}}:{PORT}" \\',
        f"  --env-file {_ENVIRONMENT} --env NGC_API_KEY --env HF_TOKEN \\",
        "  --volume nim-cache:/opt/nim/.cache \\",
        *mounts,
        f"  {carried.image}",
    ]
    return "\n".join(lines) + "\n"


def _inside(text: str) -> str:
    """Text between double quotes of a shell."""
    return re.sub(r'([$`"\\])', r"\\\1", text)


def _service(carried: Carried, deployment: Deployment) -> dict[str, Any]:
    repository, _, tag = carried.image.rpartition(":")
    spec: dict[str, Any] = {
        "image": {
            "repository": repository,
            "tag": tag,
            "pullPolicy": "IfNotPresent",
            "pullSecrets": ["ngc-secret"],
        },
        "authSecret": noted(
            "ngc-api-secret",
            "a secret with the key NGC_API_KEY, and HF_TOKEN where the model is gated",
        ),
        "env": [
            noted({"name": name, "value": value}, *notes)
            for name, (value, notes) in _variables(carried).items()
        ],
        "resources": {"limits": {"nvidia.com/gpu": carried.gpus}},
        "expose": {"service": {"type": "ClusterIP", "port": PORT}},
    }
    if carried.folders:
        spec["storage"] = noted(
            {"pvc": {"name": models_claim(carried), "create": False}},
            f"a claim that has to hold, at {_MODELS}: {model_files(carried)}",
        )
    else:
        pvc = {"create": True, "size": "200Gi", "volumeAccessMode": "ReadWriteOnce"}
        spec["storage"] = noted({"pvc": pvc}, "downloaded there; twice the model's size is enough")
    if carried.capacity is None:
        spec["replicas"] = 1
    else:
        gauges = " and ".join(carried.in_flight_metrics())
        metric = pods_metric(
            carried.capacity,
            f"prometheus-adapter has to serve it: the sum of the gauges {gauges} by pod",
        )
        spec["metrics"] = {"enabled": True, "serviceMonitor": {}}
        spec["scale"] = {
            "enabled": True,
            "hpa": {
                "minReplicas": 1,
                "maxReplicas": deployment.max_replicas,
                "metrics": [metric],
                "behavior": behavior(),
            },
        }
    return {
        "apiVersion": "apps.nvidia.com/v1alpha1",
        "kind": "NIMService",
        "metadata": {"name": carried.slug},
        "spec": spec,
    }
