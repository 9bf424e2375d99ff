"""Every value of the knob `quantization`: what it makes of a linear layer, and what runs it fast.

The knob's choices, the search's and the command line's are this table. It imports no torch, so
that the config and the search can read it for nothing.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

Activation = Literal["float", "int8", "fp8"]

# B300 (10.3): its int8 rate is about a fifteenth of its bf16 rate, by NVIDIA's data sheet.
NO_INT8_UNITS = frozenset({(10, 3)})


@dataclass(frozen=True, slots=True)
class Method:
    """One quantization method.

    `weight_bits` counts an element without its scales. `activation` is what the rows that meet the
    weight are rounded to. A `calibrated` method needs text; the others look at the weight alone.
    `cpu_features`: instructions, as Linux names them in /proc/cpuinfo, any one of which makes it
    faster than floats at decode and about as fast or faster at prefill, as measured by
    `benchmarks/quantization_speed.py`; None: no fast path today.
    `cuda_capability`: the least compute capability for which there are kernels that read the
    weight's own bits, and at "int8" and "fp8" activations multiply in units of that type. That is
    an expectation from bytes and units, not a measurement: a search offers the method there and
    measures it, and `autotune doctor --tune-kernels` finds the fastest kernel for each shape.
    """

    name: str
    title: str
    paper: str
    weight_bits: int
    activation: Activation
    calibrated: bool
    cpu_features: tuple[str, ...] | None
    cuda_capability: tuple[int, int] | None

    def is_fast(
        self, cpu_features: Collection[str] = (), cuda_capability: tuple[int, int] | None = None
    ) -> bool:
        """Whether a GPU of `cuda_capability`, or else a CPU with `cpu_features`, runs it fast.

        `none` always is: it is what the others are compared with. On a GPU this is expected, not
        measured; see `cuda_capability`.
        """
        if self.name == "none":
            return True
        if cuda_capability is not None:
            if self.activation == "int8" and cuda_capability in NO_INT8_UNITS:
                return False
            return self.cuda_capability is not None and cuda_capability >= self.cuda_capability
        return self.cpu_features is not None and any(f in cpu_features for f in self.cpu_features)


# Integers by VNNI or AMX tiles; bf16 tiles multiply what is widened from 4 bits or e4m3 on the way.
_INT8 = ("amx_int8", "avx512_vnni")
_TILES = ("amx_bf16",)
# bf16 matrix units and asynchronous copies, which the Triton kernels are written for; and e4m3.
_AMPERE = (8, 0)
_ADA = (8, 9)

METHODS: Mapping[str, Method] = types.MappingProxyType(
    {
        method.name: method
        for method in (
            Method("none", "as the checkpoint is", "", 16, "float", False, None, None),
            Method(
                "int8",
                "int8 weights and activations, round to nearest",
                "Dettmers et al. 2022, LLM.int8(), section 2.1 (row-wise absmax)",
                8,
                "int8",
                False,
                _INT8,
                _AMPERE,
            ),
            Method(
                "int4",
                "int4 weights in groups of 64, round to nearest",
                "the baseline RTN of Frantar et al. 2022 (GPTQ)",
                4,
                "float",
                False,
                _TILES,
                _AMPERE,
            ),
            Method(
                "fp8",
                "FP8 e4m3 weights by channel and activations by row",
                "Micikevicius et al. 2022, FP8 Formats for Deep Learning",
                8,
                "fp8",
                False,
                _TILES,
                _ADA,
            ),
            Method(
                "nf4",
                "4-bit NormalFloat in blocks of 64",
                "Dettmers et al. 2023, QLoRA, section 3",
                4,
                "float",
                False,
                _TILES,
                _AMPERE,
            ),
            Method(
                "llm_int8",
                "int8 weights and activations, outliers in floating point",
                "Dettmers et al. 2022, LLM.int8(), section 3",
                8,
                "int8",
                False,
                ("amx_int8",),
                _AMPERE,
            ),
            Method(
                "smoothquant",
                "int8 weights and activations, activation ranges moved into the weights",
                "Xiao et al. 2022, SmoothQuant",
                8,
                "int8",
                True,
                _INT8,
                _AMPERE,
            ),
            Method(
                "gptq",
                "int4 weights in groups of 64, each rounding made up for by the rest",
                "Frantar et al. 2022, GPTQ",
                4,
                "float",
                True,
                _TILES,
                _AMPERE,
            ),
            Method(
                "awq",
                "int4 weights in groups of 64, channels scaled by their activations",
                "Lin et al. 2023, AWQ",
                4,
                "float",
                True,
                _TILES,
                _AMPERE,
            ),
        )
    }
)
