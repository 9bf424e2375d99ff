"""Reading the table of efficiencies from YAML, strictly."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from autotune.deploy.strict_yaml import read_yaml_mapping
from autotune.errors import AutotuneError
from autotune.hardware.catalogue import LinkKind
from autotune.hardware.efficiency import Efficiency, EfficiencyTable, Factors
from autotune.simulation.interval import Interval

MICROSECOND = 1e-6
Number = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Dtype = Literal["bf16", "fp16", "fp8", "int8", "fp4"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="after")
    def _ordered(self) -> _Strict:
        """Every factor is low, value, high."""
        for name in type(self).model_fields:
            found = getattr(self, name)
            for factor in found.values() if isinstance(found, dict) else [found]:
                if isinstance(factor, tuple) and not factor[0] <= factor[1] <= factor[2]:
                    raise ValueError(f"{name}: {list(factor)} is not of the form low, value, high")
        return self


_Time = tuple[Number, Number, Number]
_Part = tuple[Share, Share, Share]


class _Host(_Strict):
    eager_kernel_us: _Time
    step_us: _Time
    sequence_us: _Time


class _LinkShare(_Strict):
    share: _Part
    latency_us: _Time


class _Generation(_Strict):
    basis: str
    date: datetime.date
    bandwidth: dict[Literal[16, 8, 4], _Part]
    matmul: dict[Dtype, _Part]
    prefill_attention: _Part
    decode_attention: dict[Literal[16, 8], _Part]
    attention_us: _Time
    kernel_us: _Time

    @model_validator(mode="after")
    def _complete(self) -> _Generation:
        if set(self.bandwidth) != {16, 8, 4} or set(self.decode_attention) != {16, 8}:
            raise ValueError(
                "bandwidth is told for 16, 8 and 4 bits, decode_attention for 16 and 8"
            )
        return self


class _Device(_Strict):
    generation: str
    basis: str
    date: datetime.date
    bandwidth: dict[Literal[16, 8, 4], _Part] | None = None
    matmul: dict[Dtype, _Part] | None = None
    prefill_attention: _Part | None = None
    decode_attention: dict[Literal[16, 8], _Part] | None = None
    attention_us: _Time | None = None
    kernel_us: _Time | None = None


class _File(_Strict):
    host: _Host
    links: dict[LinkKind, _LinkShare]
    generations: dict[str, _Generation]
    devices: dict[str, _Device] = {}


def read_table(path: Path) -> EfficiencyTable:
    """The table that a file holds.

    Raises:
        AutotuneError: the file is broken.
    """
    try:
        content = _File.model_validate(read_yaml_mapping(path))
        devices = {
            name: _of_device(device, content.generations[device.generation])
            for name, device in content.devices.items()
        }
    except (ValidationError, KeyError) as error:
        raise AutotuneError(f"{path}: the table of efficiencies is broken: {error}") from error

    def efficiencies(entries: Mapping[str, _Generation]) -> Mapping[str, Efficiency]:
        return MappingProxyType({name: _efficiency(e, content) for name, e in entries.items()})

    return EfficiencyTable(efficiencies(content.generations), efficiencies(devices))


def _of_device(device: _Device, generation: _Generation) -> _Generation:
    """The generation's factors with what was measured on the device itself."""
    told = device.model_dump(exclude={"generation"}, exclude_none=True)
    return _Generation.model_validate(generation.model_dump() | told)


def _efficiency(entry: _Generation, content: _File) -> Efficiency:
    matmul = {str(dtype): _share(part) for dtype, part in entry.matmul.items()}
    if "bf16" in matmul:
        matmul.setdefault("fp16", matmul["bf16"])
    spread = Factors(
        bandwidth=MappingProxyType({b: _share(p) for b, p in entry.bandwidth.items()}),
        matmul=MappingProxyType(matmul),
        prefill_attention=_share(entry.prefill_attention),
        decode_attention=MappingProxyType(
            {b: _share(p) for b, p in entry.decode_attention.items()}
        ),
        attention_latency=_seconds(entry.attention_us),
        kernel_latency=_seconds(entry.kernel_us),
        eager_kernel_latency=_seconds(content.host.eager_kernel_us),
        step_overhead=_seconds(content.host.step_us),
        sequence_overhead=_seconds(content.host.sequence_us),
        all_reduce=MappingProxyType({k: _share(v.share) for k, v in content.links.items()}),
        all_reduce_latency=MappingProxyType(
            {k: _seconds(v.latency_us) for k, v in content.links.items()}
        ),
    )
    return Efficiency(spread, entry.basis, entry.date.isoformat())


def _share(part: tuple[float, float, float]) -> Interval:
    low, value, high = part
    return Interval(value, low, high)


def _seconds(microseconds: tuple[float, float, float]) -> Interval:
    return _share(microseconds).scaled(MICROSECOND)
