"""What must hold of every platform's files, whatever run they are made of."""

import json
import re
import shlex
from typing import Any

import pytest
import yaml

from autotune.deploy.serving_engine import load_serving_engine
from autotune.deploy.targets import all_targets
from autotune.deploy.translate import translate
from autotune.errors import BadInput
from engine.config import EngineConfig
from tests.autotune.deploy.platforms.exported_runs import (
    LATE,
    RUNS,
    changed,
    combinations,
    exported,
    exported_of,
)

EVERY = list(combinations())


def documents(files: dict[str, str]) -> list[Any]:
    return [
        document
        for name, text in files.items()
        if name.endswith(".yaml")
        for document in yaml.safe_load_all(text)
    ]


def walk(node: Any) -> Any:
    yield node
    if isinstance(node, dict):
        for value in node.values():
            yield from walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from walk(value)


def said(text: str) -> str:
    """A file's comments and values as running text, however they were broken into lines."""
    return " ".join(line.strip().lstrip("# ") for line in text.splitlines())


def test_every_platform_is_there() -> None:
    platforms = [name for name, target in all_targets().items() if target.carries]
    assert platforms == [
        *("compose", "kubernetes", "kserve", "helm", "ray-serve"),
        *("dynamo", "nim", "skypilot", "systemd"),
    ]


@pytest.mark.parametrize(("run", "target", "engine"), EVERY)
def test_nothing_is_lost_in_silence_and_every_setting_arrives(
    run: str, target: str, engine: str
) -> None:
    files = exported(run, target, engine)
    everything = said("\n".join(files.files.values()))
    for warning in files.warnings:
        assert warning in everything
    if engine == "engine":
        assert "engine.yaml" in files.files
        assert not files.lost
        return
    config = EngineConfig.from_mapping(RUNS[run]["result"]["winner_config"])
    measured = {"device_memory_bytes": RUNS[run]["hardware"].get("memory_bytes")}
    known = {name: value for name, value in measured.items() if value}
    device = RUNS[run]["hardware"]["device"]
    translation = translate(config, load_serving_engine(engine), device, known)
    assert files.lost == translation.lost
    for left in translation.lost:
        assert " ".join(left.reason.split()) in everything
    camels = re.sub(r"([a-z])([A-Z])", r"\1-\2", everything)
    spelled = everything.lower() + camels.replace("_", "-").replace('"', "").lower()
    for key, value in translation.flags().items():
        if key not in ("model", "model-path"):
            words = [key.removeprefix("no-")] if value is True else [str(value).lower()]
            if str(value).startswith("{"):
                words = [str(member).lower() for member in json.loads(value).values()]
            assert all(word in spelled for word in words), key
    assert f"not with {load_serving_engine(engine).title}" in everything


@pytest.mark.parametrize(("run", "target", "engine"), EVERY)
def test_no_secret_is_written_and_images_are_pinned(run: str, target: str, engine: str) -> None:
    files = dict(exported(run, target, engine).files)
    for node in walk(documents(files)):
        if isinstance(node, dict):
            image = node.get("image")
            if isinstance(image, str):
                assert re.search(r":[v\d][\w.-]*\d[\w.-]*$", image) or image == "autotune:latest"
            if node.get("name") in ("HF_TOKEN", "VLLM_API_KEY", "AUTOTUNE_API_KEY"):
                assert set(node) == {"name", "valueFrom"}
                assert node["valueFrom"]["secretKeyRef"]["optional"] is True
            for name in ("HF_TOKEN", "NGC_API_KEY"):
                assert node.get(name) is None
    for text in files.values():
        assert not re.search(r"(TOKEN|API_KEY)=(?!FILE)[^$}\s]", text)


@pytest.mark.parametrize(("run", "target", "engine"), EVERY)
def test_comments_fit_a_screen_and_yaml_repeats_no_key(run: str, target: str, engine: str) -> None:
    for name, text in exported(run, target, engine).files.items():
        if name.endswith(".yaml"):
            for line in text.splitlines():
                assert not line.lstrip().startswith("#") or len(line) <= 100
        assert text.endswith("\n")
        assert not text.endswith("\n\n")


@pytest.mark.parametrize(("run", "target", "engine"), EVERY)
def test_kubernetes_objects_refer_to_what_is_there(run: str, target: str, engine: str) -> None:
    files = dict(exported(run, target, engine).files)
    found = {d["kind"]: d for d in documents(files) if isinstance(d, dict) and "kind" in d}
    for node in walk(list(found.values())):
        if isinstance(node, dict) and "containers" in node:
            volumes = {volume["name"] for volume in node.get("volumes", [])}
            for container in node["containers"]:
                mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
                assert mounts <= volumes
                ports = {port["name"] for port in container.get("ports", [])}
                for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                    if probe in container:
                        assert container[probe]["httpGet"]["port"] in ports
    if "Kustomization" in found:
        assert set(found["Kustomization"]["resources"]) <= set(files)
        generated = found["Kustomization"]["configMapGenerator"][0]
        assert set(generated["files"]) <= set(files)
        maps = [
            n["configMap"]["name"]
            for n in walk(found)
            if isinstance(n, dict) and n.get("configMap")
        ]
        assert maps == [generated["name"]]
    if target == "kubernetes":
        spec = found["Deployment"]["spec"]
        labels = spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"] == labels == found["Service"]["spec"]["selector"]
        claims = [n["claimName"] for n in walk(spec) if isinstance(n, dict) and "claimName" in n]
        assert claims == (
            [found["PersistentVolumeClaim"]["metadata"]["name"]] if run != "gpus" else []
        )
        for kind in ("ScaledObject", "HorizontalPodAutoscaler"):
            assert (kind in found) == (run != "bare")
            if kind in found:
                scaled = found[kind]["spec"]["scaleTargetRef"]["name"]
                assert scaled == found["Deployment"]["metadata"]["name"]
                assert "replicas" not in spec


# Little's law by hand: 4.0 requests/s of 1.5 s each; 12.5 requests/s of 2.0 s each.
IN_FLIGHT = {"cpu": 6.0, "gpus": 25.0}
RATE = {"cpu": 4.0, "gpus": 12.5}


@pytest.mark.parametrize("run", ["cpu", "gpus"])
def test_replicas_are_scaled_by_what_one_bore(run: str) -> None:
    def only(target: str, name: str, engine: str | None = None) -> Any:
        return yaml.safe_load(exported(run, target, engine, max_replicas=7).files[name])

    keda = only("kubernetes", "keda.yaml")["spec"]
    assert float(keda["triggers"][0]["metadata"]["threshold"]) == IN_FLIGHT[run]
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (1, 7)
    hpa = only("kubernetes", "hpa.yaml")["spec"]
    value = hpa["metrics"][0]["pods"]["target"]["averageValue"]
    assert float(value.removesuffix("m")) / 1000 == IN_FLIGHT[run]
    assert hpa["maxReplicas"] == 7
    scaling = only("kserve", "llminferenceservice.yaml")["spec"]["scaling"]
    assert scaling["maxReplicas"] == 7
    assert float(scaling["keda"]["triggers"][0]["metadata"]["threshold"]) == IN_FLIGHT[run]
    chart = only("helm", "values.yaml")
    scaler = chart["extraObjects"][0]["spec"]
    assert float(scaler["triggers"][0]["metadata"]["threshold"]) == IN_FLIGHT[run]
    assert chart["servingEngineSpec"]["modelSpec"][0]["name"] in scaler["scaleTargetRef"]["name"]
    application = only("ray-serve", "serve.yaml")["applications"][0]
    scaled = application["args"]["llm_configs"][0]["deployment_config"]["autoscaling_config"]
    assert scaled["target_ongoing_requests"] == IN_FLIGHT[run]
    assert scaled["max_replicas"] == 7
    policy = only("skypilot", "service.yaml")["service"]["replica_policy"]
    assert policy["target_qps_per_replica"] == RATE[run]
    routing = chart["routerSpec"]["routingLogic"]
    assert routing == ("prefixaware" if run == "gpus" else "roundrobin")


def test_without_a_measured_load_nothing_scales_by_itself() -> None:
    for name, target in all_targets().items():
        if not target.carries:
            continue
        files = exported("bare", name, target.carries[0])
        assert any("how much one replica bears" in warning for warning in files.warnings)
        text = "\n".join(files.files.values())
        for word in (
            "ScaledObject",
            "HorizontalPod",
            "autoscaling_config",
            "replica_policy",
            "hpa:",
        ):
            assert word not in text, (name, word)


def test_an_unkept_promise_is_said() -> None:
    files = exported("late", "kubernetes")
    run = {
        "result": {**LATE["result"], "winner": {**LATE["result"]["winner"], "offered_rate": 7.6}}
    }
    (warning,) = (w for w in exported_of(LATE | run, "kubernetes").warnings if "the SLO" in w)
    assert (
        "did not meet the SLO when 7.6 requests/s arrived; 3.9 requests/s were answered" in warning
    )
    keda = yaml.safe_load(files.files["keda.yaml"])["spec"]["triggers"][0]["metadata"]
    # Little's law, of those that were answered in time.
    assert float(keda["threshold"]) == pytest.approx(3.9 * 1.5, abs=0.06)
    assert "5.85 of these were in flight" in said(files.files["keda.yaml"])
    assert "WARNING" in files.files["deployment.yaml"]


def test_flags_reach_each_platform_in_its_own_spelling() -> None:
    ray = yaml.safe_load(exported("cpu", "ray-serve").files["serve.yaml"])
    arguments = ray["applications"][0]["args"]["llm_configs"][0]["engine_kwargs"]
    assert arguments["enable_prefix_caching"] is False
    assert arguments["max_num_seqs"] == 32
    assert "model" not in arguments
    chart = yaml.safe_load(exported("cpu", "helm").files["values.yaml"])
    model = chart["servingEngineSpec"]["modelSpec"][0]
    assert model["vllmConfig"]["enablePrefixCaching"] is False
    assert model["vllmConfig"]["maxNumSeqs"] == 32
    extra = model["vllmConfig"]["extraArgs"]
    assert not {"--max-num-seqs", "--no-enable-prefix-caching"} & set(extra)
    assert all(isinstance(word, str) for word in extra)
    assert extra[extra.index("--kv-cache-memory-bytes") + 1] == str(4 << 30)
    ray = yaml.safe_load(exported("gpus", "ray-serve").files["serve.yaml"])
    config = ray["applications"][0]["args"]["llm_configs"][0]
    assert config["accelerator_type"] == "H100"
    drafting = config["engine_kwargs"]["speculative_config"]
    assert (drafting["method"], drafting["num_speculative_tokens"]) == ("ngram", 4)
    passed = next(
        line
        for line in exported("gpus", "nim").files["nim.env"].splitlines()
        if line.startswith("NIM_PASSTHROUGH_ARGS=")
    )
    words = shlex.split(passed.removeprefix("NIM_PASSTHROUGH_ARGS="))
    assert words[words.index("--max-num-seqs") + 1] == "128"
    assert "--enable-prefix-caching" in words


def test_paths_that_a_shell_or_compose_would_read_stay_what_they_are() -> None:
    files = exported("bare", "compose").files
    volumes = yaml.safe_load(files["compose.yaml"])["services"]["vllm"]["volumes"]
    assert volumes[1]["source"] == "/srv/models/a$$b c"
    script = exported("bare", "nim").files["run_nim.sh"]
    assert "\"${MODEL_DIR:-/srv/models/a\\$b c}\":'/model-store/a$b c':ro" in script
    unit = next(t for n, t in exported("bare", "systemd").files.items() if n.endswith(".service"))
    assert "--served-model-name 'a$$b c'" in unit


def test_systemd_reads_nothing_into_a_name() -> None:
    run = changed("cpu", model="/srv/a%h")
    run["model"] = {"name": "50% $HOME a\\b"}
    files = exported_of(run, "systemd", "vllm").files
    unit = next(text for name, text in files.items() if name.endswith(".service"))
    assert "Description=vLLM 0.33.0 serving 50%% $HOME a\\b\n" in unit
    assert "--served-model-name '50%% $$HOME a\\\\b'" in unit
    # A dollar means nothing in a variable's value.
    assert 'Environment="VLLM_CPU_OMP_THREADS_BIND=0-7"' in unit


def test_a_snapshot_of_the_hub_s_cache_is_mounted_with_what_its_links_lead_to() -> None:
    cache = "/root/.cache/huggingface/hub/models--org--name"
    run = changed("cpu", model=f"{cache}/snapshots/abc123")
    compose = yaml.safe_load(exported_of(run, "compose", "vllm").files["compose.yaml"])
    mount = compose["services"]["vllm"]["volumes"][1]
    assert mount["source"] == f"${{MODEL_DIR:-{cache}}}"
    assert mount["target"] == "/models/models--org--name"
    own = yaml.safe_load(exported_of(run, "compose", "vllm").files["vllm.yaml"])
    assert own["model"] == "/models/models--org--name/snapshots/abc123"


def test_kserve_mounts_what_the_flags_name_beside_the_model() -> None:
    run = changed("gpus", speculative_method="draft_model", speculative_model="/srv/draft")
    text = exported_of(run, "kserve").files["llminferenceservice.yaml"]
    template = yaml.safe_load(text)["spec"]["template"]
    (container,) = template["containers"]
    added = next(v["value"] for v in container["env"] if v["name"] == "VLLM_ADDITIONAL_ARGS")
    assert '"model": "/models/draft"' in added
    assert container["volumeMounts"][0]["mountPath"] == "/models"
    assert template["volumes"][0]["name"] == container["volumeMounts"][0]["name"]
    assert "/srv/draft as /models/draft" in said(text)
    plain = yaml.safe_load(exported("cpu", "kserve").files["llminferenceservice.yaml"])
    assert "volumes" not in plain["spec"]["template"]


@pytest.mark.parametrize("draft", [None, "/srv/draft"])
def test_kserve_takes_a_model_by_its_uri(draft: str | None) -> None:
    knobs = {"speculative_method": "draft_model", "speculative_model": draft} if draft else {}
    run = changed("cpu", **knobs)
    files = exported_of(run, "kserve", model="s3://bucket/name").files
    model = yaml.safe_load(files["llminferenceservice.yaml"])["spec"]["model"]
    assert model == {"uri": "s3://bucket/name", "name": "name"}
    with pytest.raises(BadInput, match="not by the path /srv/there: give --model pvc://"):
        exported_of(run, "kserve", model="/srv/there")


@pytest.mark.parametrize(
    ("gpu", "gib", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", 40, "A100"),
        ("NVIDIA A100-SXM4-80GB", 80, "A100-80GB"),
        ("Tesla V100-SXM2-16GB", 16, "V100"),
        ("Tesla V100-SXM2-32GB", 32, "V100-32GB"),
        ("NVIDIA H100 80GB HBM3", 80, "H100"),
        ("NVIDIA L40S", 45, "L40S"),
    ],
)
def test_skypilot_asks_for_the_gpu_with_the_memory_that_was_measured(
    gpu: str, gib: int, name: str
) -> None:
    run = changed("gpus")
    run["hardware"] |= {"name": gpu, "memory_bytes": gib << 30}
    content = yaml.safe_load(exported_of(run, "skypilot").files["service.yaml"])
    assert content["resources"]["accelerators"] == {name: 2}
    run["hardware"]["name"] = "NVIDIA GeForce RTX 5090"
    with pytest.raises(BadInput, match="no name for the GPU that was measured, NVIDIA GeForce"):
        exported_of(run, "skypilot")


@pytest.mark.parametrize(
    ("engine", "key"), [("vllm", "VLLM_API_KEY"), ("sglang", "SGLANG_API_KEY")]
)
def test_a_service_that_is_open_to_the_internet_asks_for_a_key(engine: str, key: str) -> None:
    files = exported("gpus", "skypilot", engine).files
    content = yaml.safe_load(files["service.yaml"])
    assert content["secrets"] == {"HF_TOKEN": None, key: None}
    assert f"--secret HF_TOKEN --secret {key}" in said(files["service.yaml"])
    assert (f'--api-key "${key}"' in content["run"]) == (engine == "sglang")


def test_another_model_takes_the_place_of_the_folder() -> None:
    files = exported("cpu", "kubernetes", model="org/name").files
    assert "models.yaml" not in files
    assert yaml.safe_load(files["vllm.yaml"])["model"] == "org/name"
    command = yaml.safe_load(files["deployment.yaml"])["spec"]["template"]["spec"]["containers"][0]
    assert command["command"][-1] == "org/name"
    assert "HF_TOKEN" in [variable["name"] for variable in command["env"]]


@pytest.mark.parametrize(
    ("run", "target", "engine", "message"),
    [
        ("cpu", "dynamo", None, "need a GPU"),
        ("cpu", "nim", None, "need a GPU"),
        ("cpu", "compose", "sglang", "no container image for the CPU"),
        ("gpus", "compose", "engine", "loads a folder"),
        ("cpu", "helm", "sglang", "it can run vllm"),
        ("cpu", "vllm", "vllm", "it is an engine"),
        ("cpu", "swarm", None, "known are engine"),
    ],
)
def test_what_cannot_be_is_refused(run: str, target: str, engine: str | None, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        exported(run, target, engine)
