"""What enters the linear layers is seen as the model's own forward pass has it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.observed_rows import TOKENS, observe_rows
from engine.probe_operations import RandomRows, own_layers, random_layers
from tests.engine.tiny_models import TinyModel, make_tiny

THRESHOLD = 2.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"))


def test_rows_are_those_of_the_median_layer_in_transformers(tiny: TinyModel) -> None:
    decoder = tiny.decoder()
    decoder.set_max_position(64)
    seen = observe_rows(decoder, THRESHOLD, seed=3)
    assert set(seen) == {"qkv", "output", "gate_up", "down"}

    model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)
    inputs: dict[str, list[torch.Tensor]] = {}
    modules = {"qkv": "self_attn.q_proj", "output": "self_attn.o_proj"}
    modules |= {"gate_up": "mlp.up_proj", "down": "mlp.down_proj"}
    for name, path in modules.items():
        for layer in model.model.layers:
            layer.get_submodule(path).register_forward_pre_hook(
                lambda _, args, name=name: inputs.setdefault(name, []).append(args[0][0])
            )
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(decoder.spec.vocab_size, (64,), generator=generator)
    with torch.inference_mode():
        model(tokens[None])
    for name, layers in inputs.items():
        counts = [int((rows.abs() >= THRESHOLD).any(dim=0).sum()) for rows in layers]
        middle = sorted(counts)[len(counts) // 2]
        closest = min(layers, key=lambda rows: float((rows - seen[name]).abs().max()))
        torch.testing.assert_close(seen[name], closest, rtol=1e-3, atol=1e-3)
        assert int((seen[name].abs() >= THRESHOLD).any(dim=0).sum()) == middle


def test_kernels_that_split_outliers_are_timed_on_what_was_seen(tiny: TinyModel) -> None:
    decoder = tiny.decoder()
    assert own_layers(decoder, "none").outlier_threshold == 0.0
    assert random_layers(decoder, "int8").outlier_threshold == 0.0
    assert random_layers(decoder, "llm_int8").outlier_threshold > 0.0
    seen = torch.arange(6.0).view(3, 2)
    inputs = RandomRows(decoder, 5).with_observed({"qkv": seen})
    assert inputs.entering("qkv", 2).tolist() == [*seen.tolist(), *seen[:2].tolist()]
    assert inputs.entering("output", 2).shape == (5, 2)


def test_no_more_tokens_are_sent_than_the_model_has_positions(tiny: TinyModel) -> None:
    decoder = tiny.decoder()
    decoder.set_max_position(8)
    assert {len(rows) for rows in observe_rows(decoder, THRESHOLD).values()} == {8}
    assert TOKENS > 8
