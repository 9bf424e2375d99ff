"""The platforms that a configuration can be exported to."""

from __future__ import annotations

from autotune.deploy.platforms.compose import compose_target
from autotune.deploy.platforms.dynamo import dynamo_target
from autotune.deploy.platforms.helm import helm_target
from autotune.deploy.platforms.kserve import kserve_target
from autotune.deploy.platforms.kubernetes import kubernetes_target
from autotune.deploy.platforms.nim import nim_target
from autotune.deploy.platforms.ray_serve import ray_serve_target
from autotune.deploy.platforms.skypilot import skypilot_target
from autotune.deploy.platforms.systemd import systemd_target
from autotune.deploy.target import Target


def platform_targets() -> list[Target]:
    """Every platform, each with the engines that it can run."""
    return [
        compose_target(),
        kubernetes_target(),
        kserve_target(),
        helm_target(),
        ray_serve_target(),
        dynamo_target(),
        nim_target(),
        skypilot_target(),
        systemd_target(),
    ]
