"""Which quantizations a search may choose on a device, and in which order they are worth a trial.

What a method multiplies fast by is declared once, in `engine.quantize.method_table`: measured for
CPUs, expected for GPUs. The search offers no other. Methods that end in the same kernels (equal
bits of weights and equal activations) have the same speed and differ in quality and in what
preparing them costs. So one of each such class is a seed of the search, the one that needs no
calibration; where its harm breaks the SLO's guard, the others of its class are its heirs: as fast
and, calibrated, gentler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.errors import BadInput
from engine.config import KNOBS, MODEL_METHODS, EngineConfig
from engine.quantize.method_table import METHODS, Method

# Least compute capabilities of the attention kernels, and of GPUs that convert e4m3 in hardware.
_KERNELS_CAPABILITY = (8, 0)
_FP8_CAPABILITY = (8, 9)
_HALF_CACHES = ("auto", "int8", "fp8")


@dataclass(frozen=True, slots=True)
class Offer:
    """The values of `quantization`, `kv_cache_dtype` and others worth a trial on a device, by knob.

    `quantized` says that the checkpoint's weights are quantized already, and stay as they are.
    """

    values: Mapping[str, tuple[Any, ...]]
    quantized: bool = False

    def also(self, knob: str, values: tuple[Any, ...]) -> Offer:
        """The same with the values of another knob."""
        return Offer({**self.values, knob: values}, self.quantized)

    def check(self, knob: str, values: Sequence[Any], where: str) -> None:
        """Refuse values that are not offered.

        Raises:
            BadInput: there are some; the message says why and what may be chosen.
        """
        for value in values:
            if value not in self.values[knob]:
                raise BadInput(f"{where}: {self.why_not(knob, value)}")

    def why_not(self, knob: str, value: Any) -> str:
        """Why a value is not offered, and what is; one sentence."""
        if self.quantized and knob == "quantization":
            return (
                f"{knob}={value} is not offered: the checkpoint is quantized already and is served "
                "as it is"
            )
        if knob == "tensor_parallel_size":
            sizes = ", ".join(map(str, self.values[knob]))
            return (
                f"{knob}={value} is not offered: a search may choose {sizes}, what divides the "
                "model's heads and features among the GPUs that are here"
            )
        if knob == "speculative_method":
            return (
                f"{knob}={value} is not offered: {KNOBS['speculative_model'].flag} names no folder "
                f"of {MODEL_METHODS[value]}"
            )
        return (
            f"{knob}={value} is not offered: nothing on this device runs it as fast as floats at "
            f"both prefill and decode; a search may choose {', '.join(self.values[knob])}, and "
            f"{KNOBS[knob].flag} {value} makes it the default all the same"
        )

    def notes_on(self, config: EngineConfig) -> list[str]:
        """A note on each value of the default config that the search itself would not choose."""
        return [
            f"{knob}={getattr(config, knob)} was asked for and is measured as the default, though "
            "nothing on this device runs it as fast as floats at both prefill and decode"
            for knob, values in self.values.items()
            if knob in ("quantization", "kv_cache_dtype") and getattr(config, knob) not in values
        ]


def offer_for(hardware: Mapping[str, Any], *, quantized: bool) -> Offer:
    """What a search may choose on a machine; `hardware` is what `describe_hardware` tells."""
    features, capability = device_abilities(hardware)
    methods = tuple(
        name
        for name, method in METHODS.items()
        if name == "none" or (not quantized and method.is_fast(features, capability))
    )
    return Offer({"quantization": methods, "kv_cache_dtype": _caches(capability)}, quantized)


def methods_by_speed(hardware: Mapping[str, Any]) -> dict[str, bool]:
    """Whether each method runs on a machine as fast as floats, at prefill and at decode."""
    features, capability = device_abilities(hardware)
    return {name: method.is_fast(features, capability) for name, method in METHODS.items()}


def device_abilities(hardware: Mapping[str, Any]) -> tuple[list[str], tuple[int, int] | None]:
    """(CPU features, CUDA compute capability) as `Method.is_fast` asks for them.

    The capability is None on a CPU, and (0, 0) for a GPU that does not tell its own or on which the
    compiled kernels do not run (no Triton): quantized weights are then widened at every step.
    """
    features = list((hardware.get("cpu") or {}).get("features") or ())
    if hardware.get("device") != "cuda":
        return features, None
    if not (hardware.get("gpu_kernels") or {"available": True})["available"]:
        return features, (0, 0)
    gpus = hardware.get("gpus") or [{}]
    text = str(gpus[0].get("compute_capability") or "0.0")
    major, _, minor = text.partition(".")
    return features, (int(major), int(minor or 0))


def seed_methods(values: Sequence[str], default: str) -> list[str]:
    """One method of each speed class that the default's class is not, the most promising first.

    Methods that round activations too come first, as they speed up prefill and decode alike; then
    those with the fewest bits, which decode reads fastest. Within a class, the one without
    calibration stands for all.
    """
    classes: dict[tuple[int, str], Method] = {}
    for method in (METHODS[v] for v in values if v in METHODS):
        known = classes.get(speed_class(method.name))
        if known is None or (known.calibrated and not method.calibrated):
            classes[speed_class(method.name)] = method
    classes.pop(speed_class(default), None)

    # What the checkpoint is comes last: it is what the others are to beat.
    def promise(method: Method) -> tuple[bool, bool, int]:
        return method.name == "none", method.activation == "float", method.weight_bits

    return [method.name for method in sorted(classes.values(), key=promise)]


def heirs(method: str, values: Sequence[str]) -> list[str]:
    """Calibrated methods among `values` that are as fast as this one, in the table's order."""
    return [
        name
        for name in METHODS
        if name in values
        and name != method
        and METHODS[name].calibrated
        and speed_class(name) == speed_class(method)
    ]


def speed_class(method: str) -> tuple[int, str]:
    """What decides the speed of a method's matmuls: bits of a weight, and the activations."""
    return METHODS[method].weight_bits, METHODS[method].activation


def _caches(capability: tuple[int, int] | None) -> tuple[str, ...]:
    if capability is None or capability >= _FP8_CAPABILITY:
        return _HALF_CACHES
    if capability < _KERNELS_CAPABILITY:
        return ("auto",)
    return tuple(name for name in _HALF_CACHES if name != "fp8")
