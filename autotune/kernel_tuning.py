"""`autotune doctor --tune-kernels`: measure the engine's kernels for a model on this GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autotune.hardware.detect import describe_hardware
from autotune.model_info import read_model_info, with_default_model
from autotune.search.methods_offered import Offer, offer_for, seed_methods
from autotune.search.space import load_space
from engine.config import KNOBS, EngineConfig
from engine.quantize.method_table import METHODS

if TYPE_CHECKING:
    from engine.tunable_operations import Sizes

# For load_model only: the tuning brings caches of its own.
CACHE_BYTES = 1 << 30
CACHE_TOKENS = 512

# Told: quantization, operations done, of all, what is measured now.
Listener = Callable[[str, int, int, str], None]


@dataclass(slots=True)
class KernelTuning:
    """What a tuning came to; `results` has a row for each problem that was measured now."""

    model: str
    device: str
    file: str
    seconds: float = 0.0
    known: int = 0
    left: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def improved(self) -> list[dict[str, Any]]:
        """Rows whose default was beaten."""
        return [row for row in self.results if row["seconds"] < row["default_seconds"]]

    def to_json(self) -> dict[str, Any]:
        """Plain values; seconds."""
        return {
            "model": self.model,
            "device": self.device,
            "file": self.file,
            "seconds": self.seconds,
            "known": self.known,
            "measured": len(self.results),
            "improved": len(self.improved),
            "left": self.left,
            "failures": self.failures,
            "results": self.results,
        }


def tune_kernels(
    model: str,
    budget_s: float,
    listener: Listener,
    should_stop: Callable[[], bool] = lambda: False,
) -> KernelTuning:
    """Measure the kernels for a model as it is and in the quantizations that are offered here.

    An empty `model` is the embedded one. Results are saved as they are found; problems that are
    known are not measured again.

    Raises:
        engine.errors.EnvironmentLacks: there is no GPU that the kernels run on, or the model does
            not fit it.
        engine.errors.EngineError: the model cannot be used, or a kernel broke the GPU's context.
    """
    import torch

    from engine.kernel_tuning import check_tunable, tuning_file

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_tunable(device)
    hardware = describe_hardware("cuda")
    base = with_default_model(EngineConfig(model=model, device="cuda"))
    info = read_model_info(base)
    offer = offer_for(hardware, quantized=info.quantization is not None)
    done = KernelTuning(info.name, str(hardware["name"]), str(tuning_file(device)))
    began = time.monotonic()
    methods = methods_to_tune(offer)
    for method in methods:
        left = budget_s - (time.monotonic() - began)
        if left <= 0 or should_stop():
            done.left.append(f"quantization {method}: everything")
            continue
        listener(method, 0, 0, "loading the model")
        config = base.replace(quantization=method, **_small_cache(info.max_model_len))
        _tune_one(config, offer, info.max_model_len, left, listener, should_stop, done)
    done.seconds = time.monotonic() - began
    return done


def methods_to_tune(offer: Offer) -> list[str]:
    """Floats, one method of each speed, then what is left that needs no calibration.

    A calibrated method's weights go through the kernels of the plain one with as many bits.
    """
    offered = offer.values["quantization"]
    plain = [name for name in offered if not METHODS[name].calibrated]
    return list(dict.fromkeys(["none", *seed_methods(offered, "none"), *plain]))


def _tune_one(
    config: EngineConfig,
    offer: Offer,
    max_model_len: int,
    budget_s: float,
    listener: Listener,
    should_stop: Callable[[], bool],
    done: KernelTuning,
) -> None:
    from engine.kernel_tuning import default_timer, tune_decoder
    from engine.loading import load_model

    method = config.quantization
    began = time.monotonic()
    decoder = load_model(config).runner.decoder
    report = tune_decoder(
        decoder,
        _sizes(config, offer, max_model_len),
        budget_s - (time.monotonic() - began),
        default_timer(decoder.device),
        lambda progress: listener(method, progress.done, progress.total, progress.name),
        should_stop,
    )
    done.known += report.known
    done.failures += [f"quantization {method}: {text}" for text in report.failures]
    if report.left:
        done.left.append(f"quantization {method}: {report.left} operations")
    done.results += [
        {
            "quantization": method,
            "kernel": outcome.problem.kernel,
            "sizes": list(outcome.problem.sizes),
            "dtypes": list(outcome.problem.dtypes),
            "path": outcome.measured.choice.path,
            "tiles": dict(outcome.measured.choice.tiles),
            "seconds": outcome.measured.seconds,
            "default_seconds": outcome.measured.default_seconds,
            "refused": len(outcome.refused),
        }
        for outcome in report.outcomes
    ]


def _small_cache(max_model_len: int) -> dict[str, Any]:
    """Knobs of an engine that is loaded for its weights alone."""
    small: dict[str, Any] = {
        "max_model_len": min(CACHE_TOKENS, max_model_len),
        "kv_cache_memory_bytes": CACHE_BYTES,
    }
    if "cuda_graphs" in KNOBS:
        small["cuda_graphs"] = False
    return small


def _sizes(config: EngineConfig, offer: Offer, max_model_len: int) -> Sizes:
    """Up to the largest that a search may choose, the default's own first."""
    from engine.kv_cache import CACHE_DTYPES
    from engine.tunable_operations import Sizes

    space = load_space("cuda", {}).values

    def largest(knob: str) -> int:
        return max(int(value) for value in (*space.get(knob, ()), getattr(config, knob)))

    blocks: Sequence[int] = space.get("block_size", ())
    return Sizes(
        max_num_seqs=largest("max_num_seqs"),
        max_num_batched_tokens=largest("max_num_batched_tokens"),
        max_model_len=max_model_len,
        cache_dtypes=[CACHE_DTYPES.get(name) for name in offer.values["kv_cache_dtype"]],
        block_sizes=list(dict.fromkeys([config.block_size, *blocks])),
    )
