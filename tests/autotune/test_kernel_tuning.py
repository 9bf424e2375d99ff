"""What is tuned for a model: floats and each method that this GPU is offered, within one budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autotune import kernel_tuning
from autotune.errors import EnvironmentMissing
from autotune.kernel_tuning import methods_to_tune, tune_kernels
from autotune.search.methods_offered import Offer, offer_for
from engine import kernel_tuning as engine_tuning
from engine import loading
from engine.config import EngineConfig
from engine.errors import EnvironmentLacks
from engine.kernel_tuning import Progress, TuningReport
from engine.parallel import Ranks
from engine.tunable_operations import Sizes
from kernels.triton.measure import Outcome
from kernels.triton.tuning import Choice, Problem
from kernels.triton.tuning_cache import Measured

HOPPER: dict[str, Any] = {
    "device": "cuda",
    "name": "Some GPU",
    "gpus": [{"compute_capability": "9.0"}],
}
OUTCOME = Outcome(
    Problem("fp8_linear", (16, 64, 32), ("bf16",)),
    Measured(Choice("scaled_mm"), 1e-5, 2e-5),
    [],
    [(Choice("triton"), "failed")],
)


class Engine:
    """Stands for the engine: what it was asked to load and to tune."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.loaded: list[str] = []
        self.hardware = dict(HOPPER)
        self.full: set[str] = set()
        self.tuned: list[tuple[Sizes, float]] = []
        self.seconds_each = 1.0
        self.now = 0.0
        self.reports: list[TuningReport] = []
        decoder = SimpleNamespace(device="cuda")

        def load(config: EngineConfig, _weights: Path, _device: Any, ranks: Ranks) -> Any:
            name = config.quantization + (f"/{ranks.size}" if ranks.size > 1 else "")
            self.loaded.append(name)
            if name in self.full:
                raise EnvironmentLacks(f"{name} does not fit")
            return decoder

        def tune(
            _decoder: Any,
            sizes: Sizes,
            budget: float,
            _timer: Any,
            on_progress: Callable[[Progress], None],
            _should_stop: Callable[[], bool],
        ) -> TuningReport:
            self.tuned.append((sizes, budget))
            self.now += self.seconds_each
            on_progress(Progress(1, 2, "qkv, 1 row"))
            return self.reports.pop(0) if self.reports else TuningReport()

        monkeypatch.setattr(loading, "load_part", load)
        monkeypatch.setattr(loading, "resolve_device", lambda config: "cuda")
        monkeypatch.setattr(engine_tuning, "tune_decoder", tune)
        monkeypatch.setattr(engine_tuning, "default_timer", lambda device: None)
        monkeypatch.setattr(engine_tuning, "check_tunable", lambda device: "Some GPU")
        monkeypatch.setattr(engine_tuning, "tuning_file", lambda device: tmp_path / "f.json")
        monkeypatch.setattr(kernel_tuning, "describe_hardware", lambda device: self.hardware)
        monkeypatch.setattr("autotune.kernel_tuning.time.monotonic", lambda: self.now)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Engine:
    return Engine(monkeypatch, tmp_path)


def test_each_method_is_loaded_and_tuned_with_what_is_left_of_the_budget(engine: Engine) -> None:
    engine.reports = [TuningReport(known=3), TuningReport([OUTCOME], 0, ["head: no memory"], 5)]
    heard: list[tuple[str, int, int, str]] = []
    found = tune_kernels("", 100.0, lambda *what: heard.append(what))
    methods = engine.loaded
    assert methods[0] == "none"
    assert set(methods) == {"none", "int8", "int4", "fp8", "nf4", "llm_int8"}
    assert [budget for _, budget in engine.tuned] == [100.0 - i for i in range(len(methods))]
    assert ("quantization none", 1, 2, "qkv, 1 row") in heard
    assert (found.model, found.device, found.known) == ("embedded", "Some GPU", 3)
    assert found.failures == [f"quantization {methods[1]}: head: no memory"]
    assert found.left == [f"quantization {methods[1]}: 5 operations"]
    (row,) = found.improved
    assert (row["path"], row["refused"], row["quantization"]) == ("scaled_mm", 1, methods[1])
    sizes = engine.tuned[0][0]
    assert sizes.block_sizes[0] == EngineConfig().block_size
    assert sizes.cache_dtypes[0] is None
    assert len(sizes.cache_dtypes) == 3
    assert sizes.max_num_seqs >= 256


def test_what_the_budget_does_not_reach_is_named(engine: Engine) -> None:
    engine.seconds_each = 60.0
    found = tune_kernels("", 100.0, lambda *_: None)
    assert len(engine.loaded) == 2
    assert all(text.endswith(": everything") for text in found.left)
    assert len(found.left) == 4
    assert found.seconds == 120.0
    assert tune_kernels("", 100.0, lambda *_: None, lambda: True).results == []
    assert len(engine.loaded) == 2


def test_with_several_gpus_one_ranks_part_is_tuned_too(engine: Engine) -> None:
    engine.hardware["gpus"] = HOPPER["gpus"] * 2
    found = tune_kernels("", 100.0, lambda *_: None)
    whole = engine.loaded[: len(engine.loaded) // 2]
    assert engine.loaded == whole + [f"{name}/2" for name in whole]
    assert found.failures == []


def test_what_does_not_fit_is_told_of_and_the_rest_is_tuned(engine: Engine) -> None:
    engine.full = {"none", "fp8"}
    found = tune_kernels("", 100.0, lambda *_: None)
    assert sorted(found.failures) == [
        "quantization fp8: fp8 does not fit",
        "quantization none: none does not fit",
    ]
    assert len(engine.tuned) == 4
    engine.full = set(engine.loaded)
    with pytest.raises(EnvironmentLacks, match="none does not fit"):
        tune_kernels("", 100.0, lambda *_: None)


def test_results_that_cannot_be_saved_are_told_of_first(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(engine_tuning, "tuning_file", lambda device: tmp_path / "file" / "f.json")
    with pytest.raises(EnvironmentMissing, match=r"cannot be saved in .* set XDG_CACHE_HOME"):
        tune_kernels("", 100.0, lambda *_: None)
    assert engine.loaded == []


def test_a_quantized_checkpoint_is_tuned_as_it_is() -> None:
    assert methods_to_tune(offer_for(HOPPER, quantized=True)) == ["none"]
    assert methods_to_tune(Offer({"quantization": ("none", "gptq", "awq")})) == ["none", "gptq"]


def test_the_first_ranks_weights_are_loaded_without_the_others() -> None:
    from autotune.embedded import TARGET
    from autotune.kernel_tuning import _load, _Part

    config = EngineConfig(model=str(TARGET), device="cpu")
    whole, half = (_load(_Part(config, ranks)) for ranks in (1, 2))
    assert half.spec.num_heads * 2 == whole.spec.num_heads
    assert half.layers[0].output.shape[1] * 2 == whole.layers[0].output.shape[1]
