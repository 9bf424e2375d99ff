"""The engines that a configuration can be exported to."""

from __future__ import annotations

from functools import partial

from autotune.deploy.engine_yaml import render_engine_yaml
from autotune.deploy.serving_engine import load_serving_engine, serving_engines
from autotune.deploy.serving_yaml import render_serving_yaml
from autotune.deploy.target import Deployment, Exported, Target
from autotune.deploy.translate import translate

BUNDLED = "engine"


def engine_targets() -> list[Target]:
    """The bundled engine, then every engine that there is a table for."""
    bundled = Target(BUNDLED, "the bundled engine", _bundled)
    return [bundled, *(Target(name, name, partial(_serving, name)) for name in serving_engines())]


def _bundled(deployment: Deployment) -> Exported:
    return Exported({"engine.yaml": render_engine_yaml(deployment.config, deployment.evidence)})


def _serving(name: str, deployment: Deployment) -> Exported:
    table = load_serving_engine(name)
    config, evidence, measured = deployment.config, deployment.evidence, deployment.measured
    lost = translate(config, table, evidence.device, measured).lost
    return Exported({table.file: render_serving_yaml(table, config, evidence, measured)}, lost)
