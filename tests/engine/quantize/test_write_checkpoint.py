"""Written checkpoints: equal logits in transformers and here, resumed runs, and what is refused."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoints.model_folder import open_model_folder
from engine.checkpoints.open_source import open_source
from engine.errors import ConfigError, EnvironmentLacks, ModelError
from engine.models.registry import decoder_spec
from engine.models.tensors import Root, layer_linears
from engine.quantize import shard_writer
from engine.quantize.forms import dequantize
from engine.quantize.options import WriteOptions
from engine.quantize.shard_writer import PROGRESS_FILE
from engine.quantize.write_checkpoint import Stopped, write_checkpoint
from tests.engine.quantize.checkpoints import (
    CPU,
    TEXT,
    content,
    make_model,
    our_logits,
    stop_after,
    their_logits,
    write,
)

TOKENS = torch.randint(0, 96, (30,), generator=torch.Generator().manual_seed(3)).tolist()
GROUPS_OF_32 = {"group_size": 32}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_model("llama", folder)
    return folder


def assert_equal(a: torch.Tensor, b: torch.Tensor, share: float = 1e-4) -> None:
    """Equal but for rounding: by a share of the spread of the logits."""
    assert float((a - b).abs().max()) < share * float(b.std())


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("llama", {"method": "rtn", **GROUPS_OF_32}),
        ("qwen2", {"method": "gptq", **GROUPS_OF_32}),
        ("phi3", {"method": "awq", **GROUPS_OF_32}),
        ("gemma2", {"method": "awq", "bits": 8, **GROUPS_OF_32}),
        ("gemma3_images", {"method": "rtn", "bits": 8, **GROUPS_OF_32}),
        ("mixtral", {"method": "awq", **GROUPS_OF_32}),
        ("qwen3_moe", {"method": "gptq", **GROUPS_OF_32}),
        ("qwen3", {"method": "rtn", "group_size": 128}),
        ("mistral_window", {"method": "gptq", "sparsity": "2:4", "activation_order": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_weight_only_checkpoints_give_equal_logits_in_transformers(
    case: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    make_model(case, model)
    write(model, out, **options)
    theirs = their_logits(out, TOKENS)
    assert_equal(our_logits(out, TOKENS, dequantized=True), theirs)
    # The kernels' int4 and int8 paths round what they multiply to bf16 on some CPUs.
    own = our_logits(out, TOKENS, dequantized=False)
    assert float((own - theirs).abs().mean()) < 0.08 * float(theirs.std())


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("llama", {"method": "rtn", "bits": 8}),
        ("gemma3", {"method": "smoothquant"}),
        ("qwen2", {"method": "fp8"}),
        ("phi3", {"method": "fp8", "granularity": "tensor"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_checkpoints_with_rounded_activations_hold_equal_weights_in_transformers(
    case: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    make_model(case, model)
    write(model, out, **options)
    theirs = their_logits(out, TOKENS, dequantized=True)
    assert_equal(our_logits(out, TOKENS, dequantized=True), theirs)
    # Activations are rounded too, int8 by 127 here and by 127.5 there.
    with_activations = their_logits(out, TOKENS)
    own = our_logits(out, TOKENS, dequantized=False)
    assert float((own - with_activations).abs().mean()) < 0.12 * float(theirs.std())


def test_an_asymmetric_checkpoint_gives_equal_logits_where_transformers_dequantizes(
    llama: Path, tmp_path: Path
) -> None:
    write(llama, tmp_path, method="gptq", symmetric=False, **GROUPS_OF_32)
    theirs = their_logits(tmp_path, TOKENS, dequantized=True)
    assert_equal(our_logits(tmp_path, TOKENS, dequantized=True), theirs)


def test_layers_of_different_columns_are_targeted_one_by_one(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    make_model("llama", model, intermediate_size=80)  # 16 divides 80, 32 does not
    write(model, out, method="rtn", **GROUPS_OF_32)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    groups = list(config["config_groups"].values())
    assert [group["weights"]["group_size"] for group in groups] == [32, 16]
    assert groups[0]["targets"] == ["Linear"]
    assert len(groups[1]["targets"]) == 3
    assert_equal(our_logits(out, TOKENS, dequantized=True), their_logits(out, TOKENS))


def test_what_is_no_part_of_the_model_is_passed_on(llama: Path, tmp_path: Path) -> None:
    """Tensors of any name, and a link that leads nowhere."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(llama, model)
    names = ["model", "tower(x.weight", "model.layers.9.extra"]
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {name: torch.ones(3) for name in names}, model / "model.safetensors")
    (model / "old.safetensors").symlink_to(tmp_path / "gone")
    write(model, out, method="rtn", **GROUPS_OF_32)
    kept = load_file(out / "model-00001-of-00004.safetensors")
    assert all(torch.equal(kept[name], torch.ones(3)) for name in names)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert [bool(re.match(t.removeprefix("re:"), "tower(x.y")) for t in config["ignore"]][1:] == [
        True
    ]
    assert our_logits(out, TOKENS, dequantized=True).isfinite().all()


def test_a_checkpoint_in_bf16_has_scales_that_bf16_holds(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    make_model("llama", model, dtype=torch.bfloat16)
    write(model, out, method="rtn", bits=8)
    tensors = load_file(out / "model-00002-of-00004.safetensors")
    name = "model.layers.0.mlp.up_proj"
    scales, q = tensors[f"{name}.weight_scale"], tensors[f"{name}.weight"]
    assert scales.dtype == torch.bfloat16
    weight = load_file(model / "model.safetensors")[f"{name}.weight"].double()
    error = (q.double() * scales.double() - weight).abs()
    # Rounded on the stored grid: no weight is farther off than half a step.
    assert bool((error <= scales.double() / 2 * 1.0001)[q.abs() < 127].all())


def test_what_is_written_is_what_hugging_face_folders_hold(llama: Path, tmp_path: Path) -> None:
    write(llama, tmp_path, method="awq", **GROUPS_OF_32)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert [n for n in names if n.endswith(".safetensors")] == [
        f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)
    ]
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= set(names)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    held = {
        name: tensor
        for file in tmp_path.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    assert set(index["weight_map"]) == set(held)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in held.values())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["quantization_config"]["format"] == "pack-quantized"
    original = load_file(llama / "model.safetensors")
    assert torch.equal(held["lm_head.weight"], original["lm_head.weight"])
    assert oct((tmp_path / "model-00001-of-00004.safetensors").stat().st_mode)[-3:] == "644"


def test_two_of_four_weights_are_zero_in_a_sparse_checkpoint(llama: Path, tmp_path: Path) -> None:
    write(llama, tmp_path, method="none", sparsity="2:4")
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    folder = open_model_folder(tmp_path)
    spec, source = decoder_spec(folder), open_source(folder)
    for parts in layer_linears(spec, Root.find(spec, source), 1).values():
        for prefix, rows in zip(parts.prefixes, parts.rows, strict=True):
            weight = dequantize(source.linear(prefix, (rows, parts.columns)))
            zeros = (weight.reshape(rows, -1, 4) == 0).sum(-1)
            assert bool((zeros == 2).all())


@pytest.mark.parametrize(
    "options",
    [
        {"method": "gptq", **GROUPS_OF_32},
        {"method": "awq", "symmetric": False, **GROUPS_OF_32},
        {"method": "smoothquant"},
        {"method": "fp8"},
        {"method": "none", "sparsity": "2:4"},
    ],
    ids=lambda options: options["method"],
)
def test_a_resumed_run_ends_in_the_same_bytes(options: dict[str, Any], tmp_path: Path) -> None:
    model = tmp_path / "model"
    make_model("qwen3", model, dtype=torch.bfloat16)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write(model, whole, **options)
    chosen = WriteOptions(**{"calibration_tokens": 512, **options})
    stop, listen = stop_after(1)
    folder = open_model_folder(model)
    with pytest.raises(Stopped):
        write_checkpoint(folder, chosen, TEXT, broken, device=CPU, on_layer=listen, stop=stop)
    assert not (broken / "config.json").exists()
    assert (broken / PROGRESS_FILE).exists()
    (broken / ".writing-model-00003-of-00004.safetensors").write_bytes(b"cut off")
    told: list[tuple[int, int]] = []
    write_checkpoint(folder, chosen, TEXT, broken, device=CPU, on_layer=lambda *at: told.append(at))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert content(broken) == content(whole)


def test_a_kill_in_the_middle_of_a_shard_loses_that_shard_alone(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write(llama, whole, method="gptq", **GROUPS_OF_32)
    save, saved = shard_writer.save_file, []

    def dying(tensors: Any, path: Path, **rest: Any) -> None:
        saved.append(path)
        if len(saved) == 3:
            path.write_bytes(b"half a header")
            raise KeyboardInterrupt
        save(tensors, path, **rest)

    monkeypatch.setattr(shard_writer, "save_file", dying)
    with pytest.raises(KeyboardInterrupt):
        write(llama, broken, method="gptq", **GROUPS_OF_32)
    # A shard that was cut off after it was finished is made again as well.
    last = broken / "model-00002-of-00004.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    write(llama, broken, method="gptq", **GROUPS_OF_32)
    assert content(broken) == content(whole)


def test_a_folder_begun_otherwise_is_refused(llama: Path, tmp_path: Path) -> None:
    stop, listen = stop_after(1)
    options = WriteOptions(method="awq", group_size=32, calibration_tokens=512)
    folder = open_model_folder(llama)
    with pytest.raises(Stopped):
        write_checkpoint(folder, options, TEXT, tmp_path, device=CPU, on_layer=listen, stop=stop)
    with pytest.raises(ConfigError, match="the calibration text changed since"):
        write_checkpoint(folder, options, TEXT + "more", tmp_path, device=CPU)
    with pytest.raises(ConfigError, match="the options changed since"):
        write(llama, tmp_path, method="awq", bits=8, **GROUPS_OF_32)
    (tmp_path / PROGRESS_FILE).write_text("{}")
    with pytest.raises(ConfigError, match="is broken"):
        write_checkpoint(folder, options, TEXT, tmp_path, device=CPU)


@pytest.mark.parametrize("how", ["errno", "safetensors"])
def test_a_full_disk_is_one_sentence(
    how: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        if how == "errno":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise shard_writer.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(shard_writer, "save_file", full)
    with pytest.raises(EnvironmentLacks, match="no space is left on the disk"):
        write(llama, tmp_path, method="rtn")


def test_a_disk_too_small_is_told_before_the_first_layer(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(EnvironmentLacks, match="needs about"):
        write(llama, tmp_path / "out", method="rtn")


def test_a_quantized_model_is_not_quantized_again(llama: Path, tmp_path: Path) -> None:
    write(llama, tmp_path / "once", method="fp8")
    with pytest.raises(ConfigError, match="already quantized"):
        write(tmp_path / "once", tmp_path / "twice", method="rtn")


def test_calibration_needs_a_tokenizer_and_some_text(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must have at least 2"):
        write(llama, tmp_path / "out", text="a", method="awq", **GROUPS_OF_32)
    bare = tmp_path / "bare"
    shutil.copytree(llama, bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        write(bare, tmp_path / "out", method="awq", **GROUPS_OF_32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "nf4"}, "applied when a model is loaded"),
        ({"method": "llm_int8"}, "quantization=llm_int8"),
        ({"method": "int3"}, "does not exist; there are rtn"),
        ({"method": "awq", "bits": 3}, "possible: 4 or 8"),
        ({"method": "smoothquant", "bits": 4}, "possible: 8"),
        ({"method": "gptq", "group_size": 48}, "possible: 16, 32"),
        ({"method": "smoothquant", "group_size": 64}, "of integers in groups"),
        ({"method": "rtn", "bits": 8, "symmetric": False}, "rtn with 8 bits and no group size"),
        ({"method": "awq", "granularity": "tensor"}, "of method fp8"),
        ({"method": "fp8", "granularity": "block"}, "there are channel and tensor"),
        ({"method": "none"}, "changes nothing"),
        ({"method": "awq", "sparsity": "1:4"}, "there is 2:4"),
        ({"method": "awq", "calibration_tokens": 5}, "at least 128"),
        ({"method": "awq", "seed": -1}, "at least 0"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_one_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        WriteOptions(**options)
    assert "\n" not in str(caught.value)
