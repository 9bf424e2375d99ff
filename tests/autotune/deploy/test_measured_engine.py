"""Runs that tuned vLLM itself go to platforms with the flags that were measured."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from autotune.deploy.targets import find_target
from autotune.deploy.write import ExportOptions, export_config, winner_of
from autotune.errors import BadInput
from tests.autotune.deploy.platforms.exported_runs import RUNS


def tuned(**engine: Any) -> dict[str, Any]:
    run = copy.deepcopy(RUNS["gpus"])
    run["engine"] = {
        "name": "vllm",
        "title": "vLLM",
        "version": "0.32.0",
        "device": "cuda",
        "model": "org/name",
        "served_name": "mine",
        "fixed": {"max_model_len": 4096},
        "extra_arguments": [],
        **engine,
    }
    run["result"]["winner_config"] = {
        "max_num_seqs": 64,
        "enable_prefix_caching": False,
        "block_size": None,
    }
    run["result"]["changes"] = {"max_num_seqs": [256, 64]}
    return run


def export(run: dict[str, Any], target: str, **options: Any) -> Any:
    config = winner_of(run, Path("run"))
    return export_config(find_target(target), config, run, ExportOptions(**options))


def test_the_measured_flags_and_release_arrive() -> None:
    exported = export(tuned(), "kubernetes")
    keys = yaml.safe_load(exported.files["vllm.yaml"])
    assert keys == {
        "model": "org/name",
        "max-model-len": 4096,
        "max-num-seqs": 64,
        "no-enable-prefix-caching": True,
    }
    pod = yaml.safe_load(exported.files["deployment.yaml"])["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"].endswith(":v0.32.0")
    assert pod["containers"][0]["command"][-2:] == ["--served-model-name", "mine"]
    assert not any("not with vLLM" in warning for warning in exported.warnings)
    assert "tuned: default 256" in exported.files["vllm.yaml"]
    keda = yaml.safe_load(exported.files["keda.yaml"])["spec"]["triggers"][0]["metadata"]
    assert float(keda["threshold"]) == 25.0


def test_a_platform_runs_the_engine_that_was_measured_unasked() -> None:
    run = tuned(name="sglang", title="SGLang", version="0.5.23", fixed={})
    run["result"]["winner_config"] = {}
    for target in ("dynamo", "nim"):
        files = export(run, target).files
        assert "/sglang-" in next(iter(files.values()))
        assert "/vllm-" not in "".join(files.values())
    worker = yaml.safe_load(export(run, "dynamo").files["dynamo.yaml"])["spec"]["components"][1]
    container = worker["podTemplate"]["spec"]["containers"][0]
    assert container["command"][-1] == "dynamo.sglang"
    assert container["args"][:2] == ["--model-path", "org/name"]
    assert "inferenceservice.yaml" in export(run, "kserve").files


def test_arguments_of_the_person_are_told() -> None:
    exported = export(tuned(extra_arguments=["--api-server-count", "2"]), "ray-serve")
    assert any("--api-server-count 2" in warning for warning in exported.warnings)
    config = yaml.safe_load(exported.files["serve.yaml"])["applications"][0]["args"]
    arguments = config["llm_configs"][0]["engine_kwargs"]
    assert arguments == {
        "max_model_len": 4096,
        "max_num_seqs": 64,
        "enable_prefix_caching": False,
    }


@pytest.mark.parametrize(
    ("engine", "target", "options", "message"),
    [
        ({}, "sglang", {}, "only runs of the bundled engine"),
        ({}, "compose", {"engine": "sglang"}, "measured on vLLM itself"),
        ({"name": "llamacpp"}, "compose", {}, "the platform can run vllm"),
        ({"model": ""}, "compose", {}, "give --model"),
    ],
)
def test_what_was_measured_on_one_engine_goes_to_no_other(
    engine: dict[str, Any], target: str, options: dict[str, Any], message: str
) -> None:
    run = tuned(**engine)
    if engine.get("name"):
        run["result"]["winner_config"] = {}
        run["engine"]["fixed"] = {}
    with pytest.raises(BadInput, match=message):
        export(run, target, **options)
