"""Among how many GPUs a search divides a model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from autotune.errors import BadInput
from autotune.search.methods_offered import Offer
from autotune.search.sizes_offered import sizes_offered
from autotune.search.space import load_space
from engine.models.spec import DecoderSpec, RopeSpec

LLAMA = DecoderSpec(
    "LlamaForCausalLM", 4096, 14336, 32, 32, 8, 128, 128256, 8192, 1e-5, RopeSpec(1e4), False,
    "bfloat16", (0,) * 32,
)  # fmt: skip


def machine(count: int, device: str = "cuda") -> dict[str, Any]:
    return {"device": device, "gpus": [{}] * count}


@pytest.fixture(autouse=True)
def _all_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_sizes_follow_the_gpus_and_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizes_offered(machine(1), LLAMA) == (1,)
    assert sizes_offered(machine(8), LLAMA) == (1, 2, 4, 8)
    assert sizes_offered(machine(3), LLAMA) == (1, 2)
    assert sizes_offered(machine(8), dataclasses.replace(LLAMA, num_heads=20)) == (1, 2, 4)
    # 8 ranks are no multiple of 3 key/value heads
    odd = dataclasses.replace(LLAMA, num_heads=24, num_kv_heads=3)
    assert sizes_offered(machine(8), odd) == (1,)
    assert sizes_offered(machine(0, "cpu"), LLAMA) == (1,)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    assert sizes_offered(machine(8), LLAMA) == (1, 2)


def test_the_space_is_narrowed_to_them() -> None:
    def values(sizes: tuple[int, ...]) -> tuple[Any, ...] | None:
        offer = Offer({"tensor_parallel_size": sizes})
        return load_space("cuda", {}, None, offer).values.get("tensor_parallel_size")

    assert values((1, 2, 4)) == (1, 2, 4)
    assert values((1,)) is None  # nothing to choose
    offer = Offer({"tensor_parallel_size": (1, 2)})
    with pytest.raises(BadInput, match=r"tensor_parallel_size=4 is not offered.*1, 2"):
        load_space("cuda", {"tensor_parallel_size": [2, 4]}, None, offer)
