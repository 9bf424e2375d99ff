"""The most that a device was seen to do, over every configuration that may be chosen on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from autotune.profiling.schema import ModelFacts, Profile
from autotune.search.methods_offered import offer_for, speed_class
from engine.quantize.method_table import METHODS

_CACHE_BITS = 8  # of an element of the quantized caches
_HEAD_BITS = 8  # of the output head under any method, see `engine.quantize.methods`
_DTYPE_BITS = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16}
_ACTIVATION_DTYPES = {"int8": "int8", "fp8": "float8_e4m3fn"}


@dataclass(frozen=True, slots=True)
class LeastRead:
    """The least bytes that a token's step reads, and with which quantization.

    `weights` are of one forward pass, `kv_per_token` of one cached token (0 where windows keep
    most of them from being read). `measured` says whether the rate at which these weights are read
    was seen here, rather than that of larger ones, which a cache might not hold.
    """

    method: str
    weights: float
    kv_per_token: float
    measured: bool


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """Bytes/s and operations/s that nothing here exceeds, over `devices` devices together.

    They are the fastest that were seen, in ceilings or in probes: a bound must not rest on a
    ceiling that a kernel has beaten. `rounding` names the type that multiplies fastest.
    """

    bytes_per_s: float
    operations_per_s: float
    rounding: str
    devices: int
    read: LeastRead


def device_rates(profile: Profile) -> DeviceRates | None:
    """The rates of the profiled device; None without a model or measured ceilings."""
    model, ceilings = profile.model, profile.ceilings
    if model is None or ceilings is None or not ceilings.matmul:
        return None
    methods = offered_methods(profile)
    devices = max(1, len((profile.hardware or {}).get("gpus") or ())) if _on_gpu(profile) else 1
    bandwidths = [ceilings.bandwidth, ceilings.working_set_bandwidth]
    own = ceilings.matmul.get(ceilings.compute_dtype)
    matmuls = {ceilings.compute_dtype: own} if own is not None else dict(ceilings.matmul)
    for method in methods:
        dtype = _ACTIVATION_DTYPES.get(METHODS[method].activation) if method in METHODS else None
        if dtype in ceilings.matmul:
            matmuls[dtype] = ceilings.matmul[dtype]
    for method, rows, layers_s, head_s in _probed(profile):
        operations = 2.0 * rows * (model.matmul_parameters + model.head_parameters)
        matmuls[f"{method} layers"] = max(
            matmuls.get(f"{method} layers", 0.0), operations / (layers_s + head_s)
        )
        if rows == 1:
            bandwidths.append(_weights(model, method, profile) / (layers_s + head_s))
    fastest = max(matmuls, key=lambda name: matmuls[name])
    return DeviceRates(
        bytes_per_s=devices * max(bandwidths),
        operations_per_s=devices * matmuls[fastest],
        rounding=fastest,
        devices=devices,
        read=_least_read(model, profile, methods),
    )


def offered_methods(profile: Profile) -> tuple[str, ...]:
    """Quantizations that may be chosen on the profiled device, the one in use among them."""
    current = own_method(profile)
    if profile.hardware is None:
        return tuple(dict.fromkeys((current, *METHODS)))
    offered = offer_for(profile.hardware, quantized=_stored_quantized(profile))
    return tuple(dict.fromkeys((current, *offered.values["quantization"])))


def own_method(profile: Profile) -> str:
    """The quantization that was profiled, as the knob names it."""
    return str((profile.engine_config or {}).get("quantization") or "none")


def _stored_quantized(profile: Profile) -> bool:
    """Whether the checkpoint's own weights are quantized, so that no method can be chosen."""
    quantized = profile.model is not None and profile.model.quantization is not None
    return quantized and own_method(profile) == "none"


def _least_read(model: ModelFacts, profile: Profile, methods: tuple[str, ...]) -> LeastRead:
    method = min(methods, key=lambda name: _weights(model, name, profile))
    # Methods of one speed class differ in the values of the weights, not in how they are read.
    probed = {speed_class(name) for name, *_ in _probed(profile)}
    kv = 0.0 if model.has_windows else model.kv_bytes_per_token
    in_use = str((profile.engine_config or {}).get("kv_cache_dtype") or "auto")
    offered = (
        offer_for(profile.hardware, quantized=False).values["kv_cache_dtype"]
        if profile.hardware is not None
        else ("int8",)
    )
    if in_use == "auto" and len(offered) > 1:
        # Scales are left out: a bound may be too low, not too high.
        kv *= _CACHE_BITS / _DTYPE_BITS.get(model.dtype, 16)
    return LeastRead(
        method=method,
        weights=_weights(model, method, profile),
        kv_per_token=kv,
        measured=method == own_method(profile) or speed_class(method) in probed,
    )


def _weights(model: ModelFacts, method: str, profile: Profile) -> float:
    """Bytes that a step of one row reads; of another method than the profiled at least."""
    if method == own_method(profile):
        unmet = 0.0
        if model.num_experts:
            unmet = model.expert_bytes * (1 - model.experts_per_token / model.num_experts)
        return model.weight_bytes - unmet
    bits = METHODS[method].weight_bits
    head = bits if bits == 16 else _HEAD_BITS
    return (model.matmul_parameters * bits + model.head_parameters * head) / 8


def _probed(profile: Profile) -> Iterator[tuple[str, int, float, float]]:
    """(method, rows, seconds of all layers, of the head) of every probe of linear layers."""
    for probe in profile.probes.linears if profile.probes else ():
        for rows, layers_s, head_s in zip(probe.rows, probe.layers_s, probe.head_s, strict=True):
            if layers_s > 0 and probe.method in METHODS:
                yield probe.method, rows, layers_s, head_s


def _on_gpu(profile: Profile) -> bool:
    return (profile.hardware or {}).get("device") == "cuda"
