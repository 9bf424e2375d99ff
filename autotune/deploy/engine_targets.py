"""The engines that a configuration can be exported to."""

from __future__ import annotations

from functools import partial

from autotune.deploy.beside import beside
from autotune.deploy.engine_launch import model_of
from autotune.deploy.engine_yaml import render_engine_yaml
from autotune.deploy.serving_engine import ServingEngine, load_serving_engine, serving_engines
from autotune.deploy.serving_yaml import render_serving_yaml
from autotune.deploy.start_script import render_start_script
from autotune.deploy.target import BUNDLED, Deployment, Exported, Target
from autotune.deploy.translate import translate
from autotune.deploy.translation import Translation
from autotune.deploy.translation_notes import warnings
from engine.config import EngineConfig


def engine_targets() -> list[Target]:
    """The bundled engine, then every engine that there is a table for."""
    others = (Target(name, partial(_serving, name)) for name in serving_engines())
    return [Target(BUNDLED, _bundled), *others]


def _bundled(deployment: Deployment) -> Exported:
    config = _config(deployment)
    scripts = beside(deployment, served_model=config.model, start="autotune serve engine.yaml")
    text = render_engine_yaml(config, deployment.evidence)
    return Exported({"engine.yaml": text, **scripts})


def _serving(name: str, deployment: Deployment) -> Exported:
    table = load_serving_engine(name)
    config, evidence, measured = _config(deployment), deployment.evidence, deployment.measured
    translation = translate(config, table, evidence.device, measured)
    files = {}
    if table.file is not None:
        files[table.file] = render_serving_yaml(table, config, evidence, measured)
    files[table.start_script] = render_start_script(table, translation, evidence)
    files |= beside(
        deployment,
        served_model=_served_model(table, translation),
        start=f"bash {table.start_script}",
        url=f"http://127.0.0.1:{table.port}",
        health=table.health,
        api=table.api,
    )
    return Exported(files, translation.lost, warnings(table, evidence))


def _config(deployment: Deployment) -> EngineConfig:
    """The measured configuration, with the model that is to be loaded there."""
    if deployment.model is None:
        return deployment.config
    return deployment.config.replace(model=deployment.model)


def _served_model(table: ServingEngine, translation: Translation) -> str:
    """The name under which the engine answers unless it is told another."""
    model = model_of(translation)
    return model.rstrip("/").rpartition("/")[2] if table.served_as == "folder" else model
