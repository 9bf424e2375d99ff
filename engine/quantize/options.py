"""What a written checkpoint is to be: a method and how it rounds. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from engine.errors import ConfigError
from engine.quantize.method_table import METHODS

WriteMethod = Literal["none", "rtn", "gptq", "awq", "smoothquant", "fp8"]
Sparsity = Literal["none", "2:4"]
Granularity = Literal["channel", "tensor"]

WRITE_METHODS: tuple[WriteMethod, ...] = ("rtn", "gptq", "awq", "smoothquant", "fp8", "none")
# Methods of the knob that no compressed-tensors scheme can hold.
_AT_LOAD = ("nf4", "llm_int8")
DEFAULT_GROUP_SIZE = 64
_GROUP_SIZES = (16, 32, 64, 128, 256)
# As many tokens as GPTQ's and AWQ's statistics settle on for small models; more is slower only.
DEFAULT_CALIBRATION_TOKENS = 32768


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    """How to quantize; every field is part of what the result depends on.

    - `bits` of a weight: 4 or 8; None takes the method's usual.
    - `group_size`: columns that share a scale (and a zero, unless `symmetric`) where weights are
      rounded in groups. None takes 64; or none at all for `rtn` with 8 bits, whose weights then
      have a scale by channel and whose activations become int8 too (W8A8).
    - `symmetric`: None means so, as every reader of the format takes it.
    - `granularity`: of FP8 scales.
    - `activation_order`: GPTQ rounds columns of large activations first.
    - `sparsity`: "2:4" prunes before the method rounds.
    - `calibration_tokens` of text go through the model where activations matter; `seed` picks them
      where the text has more.

    Raises:
        ConfigError: a value that does not exist, or two that contradict each other.
    """

    method: WriteMethod
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    granularity: Granularity = "channel"
    activation_order: bool = True
    sparsity: Sparsity = "none"
    calibration_tokens: int = DEFAULT_CALIBRATION_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method in _AT_LOAD:
            raise ConfigError(
                f"method {self.method} cannot be written: no scheme of compressed-tensors holds "
                f"it; it is applied when a model is loaded (quantization={self.method})"
            )
        if self.method not in WRITE_METHODS:
            raise ConfigError(
                f"method {self.method!r} does not exist; there are {', '.join(WRITE_METHODS)}"
            )
        if self.sparsity not in ("none", "2:4"):
            raise ConfigError(f"sparsity {self.sparsity!r} does not exist; there is 2:4")
        if self.method == "none" and self.sparsity == "none":
            raise ConfigError(
                "method none changes nothing: give --sparsity 2:4 with it, or another method"
            )
        self._check_bits()
        self._check_groups()
        if self.granularity not in ("channel", "tensor"):
            raise ConfigError(
                f"granularity {self.granularity!r} does not exist; there are channel and tensor"
            )
        if self.granularity == "tensor" and self.method != "fp8":
            raise ConfigError(f"granularity tensor is of method fp8, not of {self.method}")
        if self.calibration_tokens < 128:
            raise ConfigError(
                f"calibration_tokens={self.calibration_tokens} must be at least 128 tokens"
            )
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} must be at least 0")

    @property
    def calibrated(self) -> bool:
        """Whether text goes through the model."""
        known = METHODS.get(self.method)
        return self.sparsity != "none" or (known is not None and known.calibrated)

    @property
    def weight_only(self) -> bool:
        """Whether weights are integers in groups and activations stay floats."""
        return self.method in ("gptq", "awq") or (
            self.method == "rtn" and (self.weight_bits == 4 or self.group_size is not None)
        )

    @property
    def weight_bits(self) -> int:
        """Bits of a quantized weight."""
        if self.bits is not None:
            return self.bits
        return 16 if self.method == "none" else 8 if self.method in ("smoothquant", "fp8") else 4

    @property
    def columns_per_group(self) -> int:
        """Columns that share a scale where weights are rounded in groups."""
        return self.group_size or DEFAULT_GROUP_SIZE

    def resolved(self) -> WriteOptions:
        """The same options with nothing left open."""
        return dataclasses.replace(
            self,
            bits=None if self.method == "none" else self.weight_bits,
            group_size=self.columns_per_group if self.weight_only else None,
            symmetric=self.symmetric is not False,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    def describe(self) -> str:
        """For people: "awq int4 group 64 asymmetric", "rtn int8 channel, int8 activations"."""
        if self.method == "none":
            text = "floats"
        elif self.method == "fp8":
            text = f"fp8 {self.granularity}, fp8 activations"
        elif not self.weight_only:
            text = f"{self.method} int8 channel, int8 activations"
        else:
            kind = "symmetric" if self.symmetric else "asymmetric"
            text = f"{self.method} int{self.weight_bits} group {self.columns_per_group} {kind}"
        return text if self.sparsity == "none" else f"{text}, {self.sparsity} sparse"

    def _check_bits(self) -> None:
        allowed = {"none": (), "smoothquant": (8,), "fp8": (8,)}.get(self.method, (4, 8))
        if self.bits is None or self.bits in allowed:
            return
        raise ConfigError(
            f"bits={self.bits} is not possible with method {self.method}; "
            + (f"possible: {' or '.join(map(str, allowed))}" if allowed else "leave it out")
        )

    def _check_groups(self) -> None:
        if self.group_size is not None and self.group_size not in _GROUP_SIZES:
            raise ConfigError(
                f"group_size={self.group_size} is not possible; possible: "
                f"{', '.join(map(str, _GROUP_SIZES))} columns"
            )
        if self.weight_only:
            return
        named = "rtn with 8 bits and no group size" if self.method == "rtn" else self.method
        if self.group_size is not None:
            raise ConfigError(f"group_size is of integers in groups, not of method {named}")
        if self.symmetric is False:
            raise ConfigError(
                f"asymmetric is of integers in groups, not of method {named}, which is symmetric"
            )
