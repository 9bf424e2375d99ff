"""Calibrated methods at load: quantized once, reused, and made again where the cache is broken."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoints.model_folder import open_model_folder
from engine.config import EngineConfig
from engine.errors import ConfigError, EnvironmentLacks
from engine.loading import load_model
from engine.quantize import prepared as module
from engine.quantize.options import WriteOptions
from engine.quantize.prepared import cache_folder, prepared_folder
from engine.quantize.write_checkpoint import write_checkpoint
from kernels.ops import dequantize
from tests.engine.quantize.checkpoints import CPU, TEXT, content, make_model
from tests.engine.tiny_models import paged_logits

TOKENS = list(range(5, 35))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "CALIBRATION_TOKENS", 512)
    return tmp_path / "cache" / "autotune" / "quantized"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model("qwen3", folder)
    return folder


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The method of each quantization that is really done."""
    done: list[str] = []

    def counting(folder: Any, options: WriteOptions, *rest: Any, **named: Any) -> Any:
        done.append(options.method)
        return write_checkpoint(folder, options, *rest, **named)

    monkeypatch.setattr(module, "write_checkpoint", counting)
    return done


def config(model: Path, quantization: str = "awq", **knobs: Any) -> EngineConfig:
    return EngineConfig(
        model=str(model),
        quantization=quantization,
        device="cpu",
        max_model_len=96,
        num_threads=1,
        kv_cache_memory_bytes=1 << 20,
        **knobs,
    )


def prepare(model: Path, quantization: str = "awq", **knobs: Any) -> Path:
    return prepared_folder(config(model, quantization, **knobs), open_model_folder(model), CPU)


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant"])
def test_a_model_loads_with_each_calibrated_method(
    method: str, model: Path, cache: Path, writes: list[str]
) -> None:
    told: list[tuple[int, int]] = []
    loaded = load_model(config(model, method), lambda *at: told.append(at))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    plain = load_model(config(model, "none"))
    own = paged_logits(loaded.runner.decoder, TOKENS, [30])
    reference = paged_logits(plain.runner.decoder, TOKENS, [30])
    # Random weights feel four bits strongly; what is wrongly put together is off by more than 1.
    assert float((own - reference).abs().mean()) < 0.5 * float(reference.std())
    # The head is tied to embeddings that stay as they are, and is int8 as that of `int4`.
    decoder = loaded.runner.decoder
    assert decoder.head is not decoder.embedding
    assert torch.equal(
        dequantize(decoder.head).float(),
        dequantize(load_model(config(model, "int8")).runner.decoder.head).float(),
    )
    assert load_model(config(model, method), lambda *at: told.append(at)) is not None
    assert writes == [method]
    assert len(told) == 4


def test_another_model_method_or_text_is_another_entry(
    model: Path, cache: Path, writes: list[str], tmp_path: Path
) -> None:
    first = prepare(model)
    assert first.parent == cache == cache_folder()
    text, other = tmp_path / "text.txt", tmp_path / "other"
    text.write_text(TEXT)
    shutil.copytree(model, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-2] ^= 1  # a bit of one weight
    (other / "model.safetensors").write_bytes(weights)
    found = {first, prepare(model, "gptq"), prepare(model, calibration=str(text)), prepare(other)}
    assert len(found) == 4
    (other / "merges.txt").write_text("a b")
    assert prepare(other) not in found
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    assert prepare(moved) == first
    assert writes == ["awq", "gptq", "awq", "awq", "awq"]


@pytest.mark.parametrize("harm", ["cut", "lost", "config"])
def test_a_broken_entry_is_made_again(
    harm: str, model: Path, cache: Path, writes: list[str]
) -> None:
    folder = prepare(model)
    before = content(folder)
    shard = folder / "model-00002-of-00004.safetensors"
    if harm == "cut":
        shard.write_bytes(shard.read_bytes()[:-3])
    elif harm == "lost":
        shard.unlink()
    else:
        (folder / "config.json").write_text("{")
    assert prepare(model) == folder
    assert content(folder) == before
    assert len(writes) == 2


def test_a_killed_preparation_is_gone_on_with(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    folder = open_model_folder(model)
    with pytest.raises(KeyboardInterrupt):
        prepared_folder(config(model), folder, CPU, killed)
    assert [p.suffix for p in sorted(cache.iterdir())] == [".lock", ".partial"]
    told: list[int] = []
    ready = prepared_folder(config(model), folder, CPU, lambda done, _: told.append(done))
    assert told == [2, 3]
    assert not any(p.name.startswith(".") for p in ready.iterdir())


def test_of_two_at_once_one_works_and_the_other_waits(
    model: Path, cache: Path, writes: list[str]
) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(prepare(model))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1
    assert writes == ["awq"]


def test_what_cannot_be_prepared_is_one_sentence(
    model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"missing\.txt cannot be read"):
        prepare(model, calibration=str(tmp_path / "missing.txt"))
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8 text: byte 0"):
        prepare(model, calibration=str(binary))
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(ConfigError, match="is empty"):
        prepare(model, calibration=str(tmp_path / "empty"))
    blocked = tmp_path / "a-file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.raises(EnvironmentLacks, match="cannot be written"):
        prepare(model)
