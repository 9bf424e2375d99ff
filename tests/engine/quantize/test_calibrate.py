"""The calibration walk: what it gathers, what it yields, and that it can be taken up anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.checkpoints.model_folder import open_model_folder
from engine.checkpoints.open_source import open_source
from engine.errors import ConfigError, ModelError
from engine.models.load_decoder import load_decoder
from engine.models.registry import decoder_spec
from engine.quantize.calibrate import QuantizedLayer, cut_windows, quantize_layers
from engine.quantize.forms import DenseForm, Int8ChannelForm, IntGroupForm, LinearForm, dequantize
from engine.quantize.gptq import GptqOptions, quantize_gptq
from engine.quantize.overlay import Overlay
from engine.quantize.quantize_layer import Recipe
from engine.quantize.statistics import InputStatistics
from tests.engine.tiny_models import make_tiny, paged_logits

CPU = torch.device("cpu")
F32 = torch.float32


def windows(vocabulary: int = 128, count: int = 12, length: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, vocabulary, (count, length), generator=generator)


def walk(folder: Path, recipe: Recipe, **options: object) -> list[QuantizedLayer]:
    found = open_model_folder(folder)
    source, spec = open_source(found), decoder_spec(found)
    return list(quantize_layers(source, spec, windows(), recipe, F32, CPU, **options))  # type: ignore[arg-type]


def overlaid(folder: Path, layers: list[QuantizedLayer]) -> Overlay:
    forms: dict[str, LinearForm] = {}
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        forms |= layer.forms
        tensors |= layer.tensors
    return Overlay(open_source(open_model_folder(folder)), forms, tensors)


def test_statistics_by_definition() -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)).double()
    statistics = InputStatistics(8, CPU)
    statistics.add(x[:20].float())
    statistics.add(x[20:20].float())
    statistics.add(x[20:].float())
    assert statistics.rows == 50
    assert statistics.gram is not None
    torch.testing.assert_close(statistics.gram.double(), x.T @ x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics.mean_abs.double(), x.abs().mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(statistics.largest.double(), x.abs().amax(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics.norms.double(), x.norm(dim=0), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="NaN"):
        statistics.add(torch.full((2, 8), float("nan")))


def test_the_first_layer_is_quantized_for_the_inputs_that_transformers_gives_it(
    tmp_path: Path,
) -> None:
    tiny = make_tiny("llama", tmp_path)
    inputs: list[torch.Tensor] = []
    down = tiny.model.model.layers[0].mlp.down_proj
    handle = down.register_forward_hook(lambda _m, args, _out: inputs.append(args[0]))
    with torch.inference_mode():
        tiny.model(windows())
    handle.remove()
    rows = inputs[0].reshape(-1, down.in_features)
    expected = quantize_gptq(down.weight.data, rows.T @ rows, GptqOptions(group_size=32))
    layer = walk(tmp_path, Recipe("gptq", group_size=32))[0]
    form = layer.forms["model.layers.0.mlp.down_proj"]
    assert isinstance(form, IntGroupForm)
    assert float((form.q == expected.q).float().mean()) > 0.98


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant"])
@pytest.mark.parametrize("case", ["llama", "qwen2", "phi3", "gemma3", "mixtral", "qwen3_moe"])
def test_no_family_is_further_off_than_by_rounding_to_nearest(
    method: str, case: str, tmp_path: Path
) -> None:
    tiny = make_tiny(case, tmp_path)
    spec = decoder_spec(open_model_folder(tmp_path))
    errors = []
    nearest = "int8" if method == "smoothquant" else "int4"
    for name in (method, nearest):
        # 8 bits: with 4 a random model is so far off that one error hides another.
        layers = walk(tmp_path, Recipe(name, bits=8, group_size=16))
        assert [layer.index for layer in layers] == list(range(spec.num_layers))
        kind = Int8ChannelForm if nearest == "int8" else IntGroupForm
        assert all(isinstance(f, kind) for layer in layers for f in layer.forms.values())
        decoder = load_decoder(overlaid(tmp_path, layers), spec, F32, CPU, "none")
        decoder.set_max_position(64)
        kl = []
        for ids in windows()[:3].tolist():
            expected = tiny.logits(ids).log_softmax(-1)
            found = paged_logits(decoder, ids, [len(ids)]).log_softmax(-1)
            kl.append((expected.exp() * (expected - found)).sum(-1))
        # The median: a token that a router sends elsewhere is far off by any method.
        errors.append(float(torch.cat(kl).median()))
    # Random weights have none of the outliers that AWQ and SmoothQuant are for, and experts see few
    # tokens: these must do no harm.
    assert errors[0] < errors[1] * {"gptq": 1.0, "awq": 1.3, "smoothquant": 2.0}[method]


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_an_interrupted_walk_goes_on_to_the_same_end(method: str, tmp_path: Path) -> None:
    make_tiny("qwen2", tmp_path)
    recipe = Recipe(method, group_size=32)
    whole = walk(tmp_path, recipe)
    resumed = walk(tmp_path, recipe, first_layer=2, written=overlaid(tmp_path, whole[:2]))
    assert [layer.index for layer in resumed] == [2]
    for prefix, form in resumed[0].forms.items():
        assert torch.equal(dequantize(form), dequantize(whole[2].forms[prefix]))
    assert resumed[0].tensors.keys() == whole[2].tensors.keys()
    for name, tensor in resumed[0].tensors.items():
        assert torch.equal(tensor, whole[2].tensors[name])


@pytest.mark.parametrize("method", ["none", "gptq", "awq", "int8"])
def test_pruned_weights_are_2_of_4_after_every_method(method: str, tmp_path: Path) -> None:
    make_tiny("llama", tmp_path)
    for layer in walk(tmp_path, Recipe(method, sparsity="2:4", group_size=32)):
        for form in layer.forms.values():
            weight = dequantize(form)
            zeros = (weight.reshape(len(weight), -1, 4) == 0).sum(-1)
            assert bool((zeros >= 2).all())
            assert isinstance(form, DenseForm) == (method == "none")


def test_methods_without_calibration_run_no_block(tmp_path: Path) -> None:
    make_tiny("llama", tmp_path)
    found = open_model_folder(tmp_path)
    empty = torch.zeros((0, 0), dtype=torch.int64)
    layers = list(
        quantize_layers(open_source(found), decoder_spec(found), empty, Recipe("nf4"), F32, CPU)
    )
    assert len(layers) == 3
    assert layers[0].tensors == {}


def test_experts_that_no_token_reached_are_named(tmp_path: Path) -> None:
    make_tiny("mixtral", tmp_path)
    found = open_model_folder(tmp_path)
    one = torch.tensor([[3, 4]])
    recipe = Recipe("gptq", group_size=16)
    layer = next(
        iter(quantize_layers(open_source(found), decoder_spec(found), one, recipe, F32, CPU))
    )
    assert any("no calibration token reached experts." in note for note in layer.notes)
    assert len(layer.forms) == 4 + 3 * 5


def test_nan_is_refused_with_the_tensor_named(tmp_path: Path) -> None:
    tiny = make_tiny("llama", tmp_path)
    tiny.model.model.layers[1].mlp.up_proj.weight.data[2, 3] = float("nan")
    tiny.model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"safetensors: .*layers\.1\.mlp\.up_proj.*NaN"):
        walk(tmp_path, Recipe("int4"))


def test_windows_are_cut_and_spread() -> None:
    ids = list(range(107))
    assert cut_windows(ids, 10).shape == (10, 10)
    assert cut_windows(ids, 10, most=3)[:, 0].tolist() == [0, 40, 90]
    assert cut_windows(ids, 10, most=50).shape == (10, 10)
    with pytest.raises(ValueError, match="fills no window of 200"):
        cut_windows(ids, 200)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "int3"}, "'int3' is not one of none, int8"),
        ({"method": "gptq", "bits": 3}, "bits must be 4 or 8"),
        ({"method": "gptq", "group_size": 48}, "group_size must be"),
        ({"method": "gptq", "sparsity": "4:8"}, "sparsity must be none or 2:4"),
    ],
)
def test_bad_recipes(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**values)  # type: ignore[arg-type]


def test_activations_that_overflow_are_told_where(tmp_path: Path) -> None:
    tiny = make_tiny("llama", tmp_path)
    tiny.model.model.layers[1].mlp.up_proj.weight.data.fill_(3e38)
    tiny.model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="layer 1, what enters down: activations hold NaN"):
        walk(tmp_path, Recipe("gptq"))
