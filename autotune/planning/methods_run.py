"""Which quantizations a GPU of the catalogue runs fast, and in which units it multiplies what."""

from __future__ import annotations

from autotune.hardware.catalogue import Gpu
from autotune.planning.model_shape import ModelShape
from engine.quantize.method_table import METHODS

# Least compute capability whose GPUs convert e4m3 in hardware, as a search asks for it.
_FP8_CAPABILITY = (8, 9)
# Float32 runs outside the matrix units by default: 67 of 989 Tflop/s on an H100, 19.5 of 312 on an
# A100 (NVIDIA's data sheets).
_FLOAT32_SHARE = 1 / 15


def methods_run(gpu: Gpu, shape: ModelShape | None = None) -> tuple[str, ...]:
    """Values of `quantization` that a GPU runs no slower than floats, `none` first.

    By the engine's table of methods where the compute capability is known. For GPUs of other
    vendors the data sheet decides: what rounds activations needs units of that type. A checkpoint
    that is quantized already is served as it is.
    """
    if shape is not None and shape.stored is not None:
        return ("none",)
    return tuple(name for name in METHODS if why_not(gpu, name) is None)


def why_not(gpu: Gpu, quantization: str) -> str | None:
    """Why a GPU is not to run a quantization, in one sentence; None if it is."""
    method = METHODS[quantization]
    if quantization == "none":
        return None
    activation = method.activation
    if activation != "float" and activation not in gpu.rates:
        return f"{gpu.title} has no fast {activation} matrix units, which {quantization} needs"
    capability = gpu.compute_capability
    if capability is not None and not method.is_fast(cuda_capability=capability):
        known = f"compute capability {capability[0]}.{capability[1]}"
        return f"the engine has no fast kernels for {quantization} on {gpu.title} ({known})"
    if capability is None and activation == "float":
        return f"the engine has no kernels for {quantization} on {gpu.title}"
    return None


def cache_dtypes_run(gpu: Gpu) -> tuple[str, ...]:
    """Values of `kv_cache_dtype` that a GPU reads without losing what they save."""
    capability = gpu.compute_capability
    if capability is None:
        return ("auto", "fp8") if "fp8" in gpu.rates else ("auto",)
    if capability < (8, 0):
        return ("auto",)
    return ("auto", "int8", "fp8") if capability >= _FP8_CAPABILITY else ("auto", "int8")


def float_rate(gpu: Gpu, dtype: str) -> float:
    """Operations/s of matrix products in a float dtype, by the data sheet.

    A GPU without bfloat16 units serves such a checkpoint in float16, and the other way round.
    """
    half = gpu.rates.get("bf16") or gpu.rates.get("fp16") or max(gpu.rates.values()) / 2
    if dtype == "float16":
        half = gpu.rates.get("fp16", half)
    return half * _FLOAT32_SHARE if dtype == "float32" else half


def matmul_rates(gpu: Gpu, dtype: str) -> dict[str, float]:
    """Operations/s by what meets the weights ("float", "int8", "fp8"), by the data sheet."""
    known = {name: gpu.rates[name] for name in ("int8", "fp8") if name in gpu.rates}
    return {"float": float_rate(gpu, dtype), **known}
