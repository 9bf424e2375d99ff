"""The search offers what the device runs fast, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autotune.errors import BadInput
from autotune.search.methods_offered import Offer, device_abilities, heirs, offer_for, seed_methods
from autotune.search.space import load_space
from engine.config import KNOBS, EngineConfig
from engine.quantize.method_table import METHODS

AMX = {"device": "cpu", "cpu": {"features": ["avx512", "amx_int8", "amx_bf16", "avx512_vnni"]}}
OLD = {"device": "cpu", "cpu": {"features": ["avx2"]}}


def gpu(capability: str | None) -> dict[str, Any]:
    return {
        "device": "cuda",
        "cpu": AMX["cpu"],
        "gpus": [{"compute_capability": capability}],
    }


@pytest.mark.parametrize("hardware", [AMX, OLD, gpu("8.0"), gpu("10.3"), gpu(None)])
def test_exactly_the_methods_that_the_table_calls_fast(hardware: dict[str, Any]) -> None:
    features, capability = device_abilities(hardware)
    offered = offer_for(hardware, quantized=False).values["quantization"]
    assert set(offered) == {n for n, m in METHODS.items() if m.is_fast(features, capability)}
    assert offered[0] == "none"


def test_a_gpu_is_judged_by_its_capability_and_not_by_its_host() -> None:
    assert device_abilities(gpu("9.0"))[1] == (9, 0)
    assert device_abilities(gpu(None))[1] == (0, 0)
    assert offer_for(gpu(None), quantized=False).values["quantization"] == ("none",)
    assert offer_for(OLD, quantized=False).values["quantization"] == ("none",)


def on_gpu(capability: str) -> set[str]:
    return set(offer_for(gpu(capability), quantized=False).values["quantization"])


def test_a_gpu_is_offered_what_it_has_kernels_and_units_for() -> None:
    int8 = {"int8", "llm_int8", "smoothquant"}
    four = {"int4", "nf4", "gptq", "awq"}
    assert on_gpu("7.5") == {"none"}
    assert on_gpu("8.0") == on_gpu("8.6") == {"none"} | int8 | four
    assert on_gpu("8.9") == on_gpu("9.0") == on_gpu("12.0") == {"none", "fp8"} | int8 | four
    # B300 has all but no integer units.
    assert on_gpu("10.3") == {"none", "fp8"} | four
    assert offer_for(gpu("7.5"), quantized=False).values["kv_cache_dtype"] == ("auto",)
    assert offer_for(gpu("8.6"), quantized=False).values["kv_cache_dtype"] == ("auto", "int8")


def test_a_gpu_without_triton_is_offered_no_quantization() -> None:
    bare = {**gpu("9.0"), "gpu_kernels": {"available": False, "reason": "Triton is not installed"}}
    assert offer_for(bare, quantized=False).values["quantization"] == ("none",)
    assert offer_for(bare, quantized=False).values["kv_cache_dtype"] == ("auto",)
    able = {**gpu("9.0"), "gpu_kernels": {"available": True, "reason": ""}}
    assert "fp8" in offer_for(able, quantized=False).values["quantization"]


def test_weights_that_are_quantized_stay_as_they_are() -> None:
    offer = offer_for(AMX, quantized=True)
    assert offer.values["quantization"] == ("none",)
    assert "quantization" not in load_space("cpu", {}, None, offer).values
    with pytest.raises(BadInput, match="quantized already"):
        load_space("cpu", {"quantization": ["none", "int8"]}, None, offer)


def test_the_shipped_space_is_narrowed_silently(tmp_path: Path) -> None:
    offer = Offer({"quantization": ("none", "int8")})
    assert load_space("cpu", {}, None, offer).values["quantization"] == ("none", "int8")
    space = tmp_path / "space.yaml"
    space.write_text("quantization: [none, int8, nf4]\n")
    with pytest.raises(BadInput, match=r"space\.yaml: quantization=nf4 is not offered"):
        load_space("cpu", {}, space, offer)
    with pytest.raises(BadInput, match="the command line: quantization=int4 is not offered"):
        load_space("cpu", {"quantization": ["none", "int4"]}, None, offer)


def test_a_method_that_was_asked_for_is_measured_with_a_note() -> None:
    offer = offer_for(gpu("8.0"), quantized=False)
    asked = EngineConfig(model="m", quantization="fp8")
    (note,) = offer.notes_on(asked)
    assert "quantization=fp8 was asked for" in note
    space = load_space("cuda", {}, None, offer).nearest(asked)
    assert "fp8" in space.values["quantization"]
    assert offer.notes_on(EngineConfig(model="m")) == []


def test_every_method_of_the_table_is_in_the_shipped_spaces() -> None:
    # What is missing there could never be offered, on whatever device.
    fast = {n: m for n, m in METHODS.items() if n != "none"}
    on_cpu = {n for n, m in fast.items() if m.cpu_features is not None}
    on_cuda = {n for n, m in fast.items() if m.cuda_capability is not None}
    assert on_cpu <= set(load_space("cpu", {}).values["quantization"])
    assert on_cuda <= set(load_space("cuda", {}).values["quantization"])
    assert set(METHODS) == set(KNOBS["quantization"].choices or ())


def test_one_seed_for_each_speed_and_the_plain_one_of_it() -> None:
    every = list(METHODS)
    assert seed_methods(["none", "int8", "smoothquant", "int4", "gptq", "awq"], "none") == [
        "int8",
        "int4",
    ]
    assert seed_methods(["none", "awq", "gptq"], "none") == ["awq"]
    assert seed_methods(["none", "int8", "smoothquant"], "smoothquant") == ["none"]
    assert "fp8" in seed_methods(every, "none")


def test_heirs_are_calibrated_and_as_fast() -> None:
    assert heirs("int4", list(METHODS)) == ["gptq", "awq"]
    assert heirs("int8", list(METHODS)) == ["smoothquant"]
    assert heirs("int4", ["none", "int4", "smoothquant"]) == []
    assert heirs("none", list(METHODS)) == []
