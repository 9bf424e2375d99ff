"""Reading a catalogue of GPUs from YAML, strictly: a figure without a source is refused."""

from __future__ import annotations

import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from autotune.deploy.strict_yaml import read_yaml_mapping
from autotune.errors import BadInput
from autotune.hardware.catalogue import FIGURES, Basis, Figure, Gpu, Link, LinkKind, Source, frozen
from autotune.hardware.price import Price

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Dtype = Literal["bf16", "fp16", "fp8", "int8", "fp4"]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", max_length=60)]
MIB, GIGA, TERA = 1 << 20, 1e9, 1e12
# Where a listing has no known rivals: the same GPU is offered at up to three times as much by one
# provider as by another (market overviews of May 2026), so a single listing may lie this far off.
UNKNOWN_SPREAD = 3**0.5


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Source(_Strict):
    title: str
    where: str
    date: datetime.date
    basis: Basis


class _Link(_Strict):
    name: str
    kind: LinkKind
    gb_per_s: Positive
    gpus: Annotated[int, Field(ge=2, le=1024)] = 8
    mesh: bool = False


class _HostLink(_Strict):
    name: str
    gb_per_s: Positive


class _Price(_Strict):
    usd_per_hour: Positive
    low: Positive | None = None
    high: Positive | None = None
    where: str
    date: datetime.date

    @model_validator(mode="after")
    def _ordered(self) -> _Price:
        low = self.usd_per_hour if self.low is None else self.low
        high = self.usd_per_hour if self.high is None else self.high
        if not low <= self.usd_per_hour <= high:
            raise ValueError("a price lies between its low and its high")
        return self

    def price(self) -> Price:
        usd = self.usd_per_hour
        low = usd / UNKNOWN_SPREAD if self.low is None else self.low
        high = usd * UNKNOWN_SPREAD if self.high is None else self.high
        return Price(usd, low, high, self.where, self.date.isoformat())


class _Entry(_Strict):
    """One GPU as the file writes it."""

    title: str
    vendor: str
    generation: str
    aliases: tuple[Name, ...] = ()
    compute_capability: Annotated[str, Field(pattern=r"^\d{1,2}\.\d$")] | None = None
    memory_mib: Annotated[int, Field(gt=0, le=64 << 20)]
    bandwidth_gb_per_s: Positive
    tflops: Annotated[dict[Dtype, Positive], Field(min_length=1)]
    link: _Link
    host_link: _HostLink
    tdp_watts: Positive
    price: _Price | None = None
    driver_names: tuple[str, ...] = ()
    source: str | None = None
    sources: dict[Figure, str] = {}
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _every_figure_has_a_source(self) -> _Entry:
        missing = [f for f in FIGURES if f not in self.sources and self.source is None]
        if missing:
            raise ValueError(f"no source is told for {', '.join(missing)}")
        return self


class _File(_Strict):
    sources: dict[str, _Source]
    gpus: dict[Name, _Entry]

    @model_validator(mode="after")
    def _sources_and_names_fit(self) -> _File:
        taken: dict[str, str] = {}
        for name, entry in self.gpus.items():
            for source in {entry.source, *entry.sources.values()} - {None}:
                if source not in self.sources:
                    raise ValueError(f"{name}: the source {source!r} is not told")
            for called in (name, *entry.aliases):
                if taken.setdefault(called, name) != name:
                    raise ValueError(f"{called} is both {taken[called]} and {name}")
        return self


def read_entries(path: Path) -> list[Gpu]:
    """The GPUs of a file.

    Raises:
        BadInput: it cannot be read or an entry is wrong; the message names file and entry.
    """
    try:
        content = _File.model_validate(read_yaml_mapping(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BadInput(f"{path}: {place}: {first['msg']}".replace(": : ", ": ")) from error
    sources = {
        key: Source(s.title, s.where, s.date.isoformat(), s.basis)
        for key, s in content.sources.items()
    }
    return [_gpu(name, entry, sources) for name, entry in content.gpus.items()]


def _gpu(name: str, entry: _Entry, sources: dict[str, Source]) -> Gpu:
    by_figure = {f: sources[entry.sources.get(f) or str(entry.source)] for f in FIGURES}
    link, host = entry.link, entry.host_link
    return Gpu(
        name=name,
        aliases=entry.aliases,
        title=entry.title,
        vendor=entry.vendor,
        generation=entry.generation,
        compute_capability=_capability(entry.compute_capability),
        memory_bytes=entry.memory_mib * MIB,
        bandwidth=entry.bandwidth_gb_per_s * GIGA,
        rates=frozen({dtype: rate * TERA for dtype, rate in entry.tflops.items()}),
        link=Link(link.name, link.kind, link.gb_per_s * GIGA),
        max_link_size=link.gpus,
        link_is_mesh=link.mesh,
        host_link=Link(host.name, "pcie", host.gb_per_s * GIGA),
        tdp_watts=entry.tdp_watts,
        price=None if entry.price is None else entry.price.price(),
        driver_names=entry.driver_names,
        sources=MappingProxyType(by_figure),
        notes=entry.notes,
    )


def _capability(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    major, minor = text.split(".")
    return int(major), int(minor)
