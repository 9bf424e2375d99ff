"""The GPUs that can be planned for: what their data sheets say, each figure with its source.

All rates are dense (without 2:4 sparsity) and, where a GPU has both, those that accumulate in
float32, as PyTorch does. Links are told per direction. Memory is what the driver reports.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from autotune.errors import BadInput
from autotune.hardware.price import Price

Figure = Literal["memory", "bandwidth", "rates", "link", "power"]
LinkKind = Literal["nvlink", "nvlink-bridge", "infinity-fabric", "ethernet", "pcie"]
Basis = Literal["read", "quoted", "recalled"]
FIGURES: tuple[Figure, ...] = ("memory", "bandwidth", "rates", "link", "power")
NEAREST = 4


@dataclass(frozen=True, slots=True)
class Source:
    """Where a figure is from.

    `basis` says how it came from there: `read` in the source itself, `quoted` by somebody else who
    read it, or `recalled` and not looked up again. `date` is that of the looking up.
    """

    title: str
    where: str
    date: str
    basis: Basis

    def to_json(self) -> dict[str, str]:
        """Plain values."""
        return {"title": self.title, "where": self.where, "date": self.date, "basis": self.basis}


@dataclass(frozen=True, slots=True)
class Link:
    """How GPUs of one server reach each other: bytes/s that one GPU sends, in one direction."""

    name: str
    kind: LinkKind
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU's data sheet.

    Arguments:
        generation: groups GPUs of like efficiency; a key of `efficiency.yaml`.
        compute_capability: CUDA's, as (major, minor); None for GPUs of other vendors.
        memory_bytes: what the driver reports as the total, which is less than the printed GB times
            2^30 and often more than times 10^9.
        bandwidth: of the memory, bytes/s.
        rates: dense multiply-adds counted as two operations, per second, by dtype (`bf16`, `fp16`,
            `fp8`, `int8`, `fp4`); a dtype in which the GPU has no fast matmul is missing.
        link: the fastest way to other GPUs, for up to `max_link_size` of them; see `link_among`.
        host_link_bytes_per_s: to the host, one direction.
        tdp_watts: the most that the board draws.
        price: an example, or None where none was found.
        sources: of each of FIGURES.
        notes: where sources conflict, and what is missing.
    """

    name: str
    aliases: tuple[str, ...]
    title: str
    vendor: str
    generation: str
    compute_capability: tuple[int, int] | None
    memory_bytes: int
    bandwidth: float
    rates: Mapping[str, float]
    link: Link
    max_link_size: int
    link_is_mesh: bool
    host_link: Link
    tdp_watts: float
    price: Price | None
    driver_names: tuple[str, ...]
    sources: Mapping[Figure, Source]
    notes: tuple[str, ...]

    @property
    def host_link_bytes_per_s(self) -> float:
        """To the host, bytes/s in one direction."""
        return self.host_link.bytes_per_s

    def link_among(self, gpus: int) -> Link:
        """What joins that many GPUs: their own link as far as it reaches, the host's beyond.

        In a mesh each GPU has a wire to each other one, of which those to GPUs outside lie idle.
        """
        if gpus > self.max_link_size:
            return self.host_link
        if not self.link_is_mesh or gpus < 2:
            return self.link
        share = (gpus - 1) / (self.max_link_size - 1)
        return dataclasses.replace(self.link, bytes_per_s=self.link.bytes_per_s * share)

    @property
    def recalled(self) -> tuple[Figure, ...]:
        """Figures that nobody looked up again."""
        return tuple(f for f, source in self.sources.items() if source.basis == "recalled")

    def ridge(self, dtype: str) -> float:
        """Operations per byte from which on matmuls in a dtype are no longer bound by memory.

        The roofline's ridge point, peak rate / memory bandwidth (Williams et al., 2009).

        Raises:
            KeyError: the GPU has no fast matmul in the dtype.
        """
        return self.rates[dtype] / self.bandwidth

    def to_json(self) -> dict[str, Any]:
        """Plain values, each figure with its source."""
        return {
            "name": self.name,
            "title": self.title,
            "generation": self.generation,
            "memory_bytes": self.memory_bytes,
            "bandwidth_bytes_per_s": self.bandwidth,
            "operations_per_s": dict(self.rates),
            "link": {
                "name": self.link.name,
                "bytes_per_s": self.link.bytes_per_s,
                "gpus": self.max_link_size,
            },
            "tdp_watts": self.tdp_watts,
            "price": None if self.price is None else self.price.to_json(),
            "sources": {figure: source.to_json() for figure, source in self.sources.items()},
            "notes": list(self.notes),
        }


class Catalogue:
    """GPUs by name and alias."""

    def __init__(self, gpus: Iterable[Gpu]) -> None:
        self._gpus = {gpu.name: gpu for gpu in gpus}
        self._names = {alias: gpu.name for gpu in self._gpus.values() for alias in gpu.aliases}
        self._names |= {name: name for name in self._gpus}

    def names(self) -> list[str]:
        """Of all GPUs, without aliases, in the file's order."""
        return list(self._gpus)

    def find(self, name: str) -> Gpu:
        """The GPU of a name or an alias; case, blanks and the vendor's name do not matter.

        Raises:
            BadInput: there is none; the message tells the nearest names.
        """
        wanted = _plain(name)
        if wanted in self._names:
            return self._gpus[self._names[wanted]]
        nearest = ", ".join(self._nearest(wanted))
        raise BadInput(f"unknown GPU {name!r}: the nearest names are {nearest}")

    def of_driver(self, name: str | None) -> Gpu | None:
        """The GPU that a driver names so, such as `NVIDIA H100 80GB HBM3`; None if unknown."""
        if name is None:
            return None
        wanted = name.casefold()
        for gpu in self._gpus.values():
            if wanted in (known.casefold() for known in gpu.driver_names):
                return gpu
        return None

    def _nearest(self, wanted: str) -> list[str]:
        """Names most like the wanted one; those that begin like it come first."""

        def likeness(known: str) -> tuple[bool, float]:
            ratio = difflib.SequenceMatcher(None, wanted, known).ratio()
            return known.startswith(wanted) and bool(wanted), ratio

        best: dict[str, tuple[bool, float]] = {}
        for known, name in self._names.items():
            best[name] = max(best.get(name, (False, 0.0)), likeness(known))
        return sorted(best, key=best.__getitem__, reverse=True)[:NEAREST]


def load_catalogue(file: Path | None = None) -> Catalogue:
    """The installed catalogue; the GPUs of a file, in the same format, are added or replace.

    Raises:
        BadInput: the file cannot be read, or an entry of it is wrong.
    """
    from autotune.hardware.catalogue_file import read_entries

    if file is None:
        return _installed()
    own = {gpu.name: gpu for gpu in read_entries(file)}
    known = _installed()
    return Catalogue(({name: known.find(name) for name in known.names()} | own).values())


@functools.cache
def _installed() -> Catalogue:
    from autotune.hardware.catalogue_file import read_entries

    with resources.as_file(resources.files("autotune.hardware") / "gpus.yaml") as path:
        return Catalogue(read_entries(path))


def frozen(values: Mapping[str, float]) -> Mapping[str, float]:
    """A copy that cannot be changed."""
    return MappingProxyType(dict(values))


def _plain(name: str) -> str:
    bare = re.sub(r"[\s_]+", "-", name.strip().casefold())
    return re.sub(r"^(nvidia|amd|intel)-|geforce-|instinct-|tesla-", "", bare)
