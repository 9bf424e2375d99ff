"""`autotune doctor --tune-kernels`: measure the engine's kernels for a model on this GPU."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune.errors import EnvironmentMissing
from autotune.hardware.detect import describe_hardware
from autotune.model_info import read_model_info, with_default_model
from autotune.search.methods_offered import Offer, offer_for, seed_methods
from autotune.search.sizes_offered import sizes_offered
from autotune.search.space import load_space
from engine.checkpoints.model_folder import open_model_folder
from engine.config import EngineConfig
from engine.errors import EnvironmentLacks
from engine.models.registry import decoder_spec
from engine.quantize.method_table import METHODS

if TYPE_CHECKING:
    from engine.models.decoder import Decoder
    from engine.tunable_operations import Sizes

# Told: what of the model, operations done, of all, what is measured now.
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

    Where there are several GPUs, also for one rank's part of the model.

    An empty `model` is the embedded one. Results are saved as they are found; problems that are
    known are not measured again.

    Raises:
        engine.errors.EnvironmentLacks: there is no GPU that the kernels run on, or the model does
            not fit it.
        EnvironmentMissing: the results cannot be saved.
        engine.errors.EngineError: the model cannot be used, or a kernel broke the GPU's context.
    """
    import torch

    from engine.kernel_tuning import check_tunable, tuning_file

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = check_tunable(device)
    hardware = describe_hardware("cuda")
    base = with_default_model(EngineConfig(model=model, device="cuda"))
    info = read_model_info(base)
    offer = offer_for(hardware, quantized=info.quantization is not None)
    done = KernelTuning(info.name, name, str(tuning_file(device)))
    _check_writable(tuning_file(device).parent)
    began = time.monotonic()
    lacking: list[str] = []
    parts = _parts(
        base, offer, sizes_offered(hardware, decoder_spec(open_model_folder(base.model)))
    )
    for part in parts:
        left = budget_s - (time.monotonic() - began)
        if left <= 0 or should_stop():
            done.left.append(f"{part.name}: everything")
            continue
        listener(part.name, 0, 0, "loading the model")
        try:
            _tune_part(
                part, _sizes(base, offer, info.max_model_len), left, listener, should_stop, done
            )
        except EnvironmentLacks as error:  # it may fit in another quantization, or in parts
            lacking.append(str(error))  # not the error, whose frames hold what was loaded
            done.failures.append(f"{part.name}: {error}")
        gc.collect()  # graphs and what they were captured from, before the next part is loaded
    if len(lacking) == len(parts):
        raise EnvironmentLacks(lacking[0])
    done.seconds = time.monotonic() - began
    return done


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise EnvironmentMissing(
            f"what is measured cannot be saved in {folder}: {error.strerror or error}; set "
            "XDG_CACHE_HOME to a folder that can be written"
        ) from error


@dataclass(frozen=True, slots=True)
class _Part:
    """The model, or what the first of several ranks has of it, in one quantization."""

    config: EngineConfig
    ranks: int

    @property
    def name(self) -> str:
        """For people."""
        ranks = f" on {self.ranks} GPUs" if self.ranks > 1 else ""
        return f"quantization {self.config.quantization}{ranks}"


def _parts(base: EngineConfig, offer: Offer, sizes: Sequence[int]) -> list[_Part]:
    """What is tuned, in order."""
    methods = methods_to_tune(offer)
    return [_Part(base.replace(quantization=method), size) for size in sizes for method in methods]


def methods_to_tune(offer: Offer) -> list[str]:
    """Floats, one method of each speed, then what is left that needs no calibration.

    A calibrated method's weights go through the kernels of the plain one with as many bits.
    """
    offered = offer.values["quantization"]
    plain = [name for name in offered if not METHODS[name].calibrated]
    return list(dict.fromkeys(["none", *seed_methods(offered, "none"), *plain]))


def _tune_part(
    part: _Part,
    sizes: Sizes,
    budget_s: float,
    listener: Listener,
    should_stop: Callable[[], bool],
    done: KernelTuning,
) -> None:
    from engine.kernel_tuning import default_timer, tune_decoder

    began = time.monotonic()
    decoder = _load(part)
    report = tune_decoder(
        decoder,
        sizes,
        budget_s - (time.monotonic() - began),
        default_timer(decoder.device),
        lambda progress: listener(part.name, progress.done, progress.total, progress.name),
        should_stop,
    )
    done.known += report.known
    done.failures += [f"{part.name}: {text}" for text in report.failures]
    if report.left:
        done.left.append(f"{part.name}: {report.left} operations")
    done.results += [
        {
            "quantization": part.config.quantization,
            "tensor_parallel_size": part.ranks,
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


def _load(part: _Part) -> Decoder:
    """The weights of the first rank, without caches and without the other ranks."""
    from engine.loading import load_part, resolve_device
    from engine.parallel import Alone

    class First(Alone):
        size = part.ranks

    folder = open_model_folder(part.config.model)
    return load_part(part.config, folder.path, resolve_device(part.config), First())


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
