"""What no software can beat on a GPU: the least seconds of a first and of each further token."""

from __future__ import annotations

from dataclasses import dataclass

from autotune.hardware.catalogue import Gpu
from autotune.planning.memory import served_shape
from autotune.planning.methods_run import float_rate, matmul_rates
from autotune.planning.model_shape import ModelShape
from engine.config import EngineConfig
from engine.quantize.method_table import METHODS


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds, and in a few words what takes them."""

    seconds: float
    set_by: str


def token_floor(
    shape: ModelShape, gpu: Gpu, config: EngineConfig, context_tokens: float = 0.0
) -> Floor:
    """The least time of an output token of a sequence alone on its GPUs.

    Every weight that it meets and every key and value that it sees are read once, at the data
    sheet's bandwidth of all GPUs together (Pope et al. 2022, "Efficiently Scaling Transformer
    Inference", section 2).
    """
    shape = served_shape(shape, config)
    weights = _weights_met(shape, config, 1.0)
    cached = context_tokens * _cache_bytes(shape, config)
    seconds = (weights + cached) / gpu.bandwidth
    what = f"reading {_gigabytes(weights * config.tensor_parallel_size)} of weights"
    if cached > weights:
        what = f"reading {_gigabytes(cached * config.tensor_parallel_size)} of keys and values"
    return Floor(seconds, f"{what} at {_bandwidth(gpu, config)}")


def first_token_floor(
    shape: ModelShape, gpu: Gpu, config: EngineConfig, prompt_tokens: float
) -> Floor:
    """The least time of a prompt's step: of its arithmetic at the data sheet's rate, or of reading
    every weight that it meets, whichever is longer.
    """
    shape = served_shape(shape, config)
    ranks = config.tensor_parallel_size
    activation = METHODS[config.quantization].activation
    if config.quantization == "none" and shape.stored is not None:
        activation = shape.stored.activation
    rates = matmul_rates(gpu, shape.dtype)
    linear = 2.0 * shape.matmul_parameters * prompt_tokens / ranks
    pairs = shape.num_layers * shape.pair_flops(ranks) * prompt_tokens**2 / 2
    if any(shape.layer_windows):  # a token sees no more than its window
        windows = sum(min(w or prompt_tokens, prompt_tokens) for w in shape.layer_windows)
        pairs = min(pairs, shape.pair_flops(ranks) * prompt_tokens * windows)
    compute = linear / rates.get(activation, rates["float"]) + pairs / float_rate(gpu, shape.dtype)
    weights = _weights_met(shape, config, prompt_tokens)
    reading = weights / gpu.bandwidth
    if compute >= reading:
        operations = (linear + pairs) * ranks / 1e12
        return Floor(
            compute,
            f"{operations:.3g} trillion operations of a prompt of {prompt_tokens:.0f} tokens at "
            f"{operations / ranks / compute:.3g} Tflop/s{_each(ranks)}",
        )
    return Floor(
        reading, f"reading {_gigabytes(weights * ranks)} of weights at {_bandwidth(gpu, config)}"
    )


def _weights_met(shape: ModelShape, config: EngineConfig, rows: float) -> float:
    """Bytes of weights on one rank that a step of so many rows reads."""
    ranks = config.tensor_parallel_size
    total = float(shape.head_bytes(config.quantization, ranks))
    for kind in shape.layer_kinds():
        for linear in shape.linears(kind.has_experts):
            each = shape.linear_weight_bytes(linear.shard(ranks), config.quantization)
            met = 1.0
            if linear.copies > 1 and shape.experts is not None:
                met = shape.experts.touched(rows)
            total += kind.layers * met * each
    return total


def _cache_bytes(shape: ModelShape, config: EngineConfig) -> int:
    return shape.kv_bytes_per_token(config.kv_cache_dtype, config.tensor_parallel_size)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB"


def _bandwidth(gpu: Gpu, config: EngineConfig) -> str:
    return f"{gpu.bandwidth / 1e12:.3g} TB/s{_each(config.tensor_parallel_size)}"


def _each(ranks: int) -> str:
    return f" on each of {ranks} GPUs" if ranks > 1 else ""
