"""What a person asks of a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from autotune.errors import BadInput
from autotune.planning.growth import Growth
from autotune.traffic_options import TrafficOptions
from engine.quantize.method_table import METHODS
from engine.server.routing import ROUTERS, Router

Objective = Literal["cost", "power", "gpus", "latency"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
# What the engine can be divided among (its knob `tensor_parallel_size`).
TENSOR_PARALLEL_SIZES = (1, 2, 4, 8, 16)
# A server has 8 GPUs almost everywhere; more only where a link joins more.
USUAL_SIZES = (1, 2, 4, 8)
# One method of each class of speed that needs no calibration text: within a class the arithmetic
# is the same, and which is gentlest is to be measured, not planned.
USUAL_QUANTIZATIONS = ("none", "fp8", "int8", "int4")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """The question: what to serve, to whom, how well, and on which of which GPUs.

    Args:
        model: folder of a model or its config.json; weights need not be there.
        traffic: the workload and its mean rate.
        slo: limits on the traffic.
        gpus: names of the catalogue.
        tensor_parallel_sizes: GPUs that one replica may be divided among; None: 1, 2, 4 and 8.
        quantizations: weight quantizations to consider; None: those of `USUAL_QUANTIZATIONS` that
            a GPU runs fast.
        kv_cache_dtype: of the cached keys and values.
        max_model_len: longest sequence in tokens; None: the longest of the traffic, rounded up to
            a power of two.
        headroom: how far bursts of the rate rise above its mean, as a share of it; replicas are
            counted for the burst.
        spares: replicas that may be away while the SLO still holds (N+1).
        probability: the least chance of meeting the SLO with which an option counts as feasible.
        objective: what the options are ranked by.
        router: who gets the next request.
        growth: how the rate is going to grow.
        prices: US dollars for a GPU-hour that the user pays, by name.
        price_files: the same in files.
        catalogue: file of GPUs that join the installed catalogue.
        calibration: file or folder of a calibration made on one of the GPUs.
        draws: guesses at what is not known, for the chance of meeting the SLO.
        seed: of everything drawn.

    Raises:
        BadInput: a value is out of range, or two contradict each other.
    """

    model: str
    traffic: TrafficOptions
    slo: str
    gpus: tuple[str, ...]
    tensor_parallel_sizes: tuple[int, ...] | None = None
    quantizations: tuple[str, ...] | None = None
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = None
    headroom: float = 0.25
    spares: int = 1
    probability: float = 0.9
    objective: Objective = "cost"
    router: Router = "round_robin"
    growth: Growth | None = None
    prices: tuple[str, ...] = ()
    catalogue: Path | None = None
    calibration: Path | None = None
    draws: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.gpus:
            raise BadInput("--gpus names no GPU: write for instance --gpus h100,l40s")
        for size in self.tensor_parallel_sizes or ():
            if size not in TENSOR_PARALLEL_SIZES:
                allowed = ", ".join(map(str, TENSOR_PARALLEL_SIZES))
                raise BadInput(
                    f"--tensor-parallel-size {size}: a model is divided among {allowed} GPUs"
                )
        for method in self.quantizations or ():
            if method not in METHODS:
                raise BadInput(
                    f"--quantization {method!r} does not exist; there are {', '.join(METHODS)}"
                )
        if self.kv_cache_dtype not in ("auto", "int8", "fp8"):
            raise BadInput(
                f"--kv-cache-dtype {self.kv_cache_dtype!r} does not exist; there are auto, int8 "
                "and fp8"
            )
        if not 0 <= self.headroom <= 10:
            raise BadInput(
                f"--headroom must be between 0 and 1000% of the mean rate, got {self.headroom:.0%}"
            )
        if not 0 <= self.spares <= 100:
            raise BadInput(f"--spares must be between 0 and 100 replicas, got {self.spares}")
        if not 0.5 <= self.probability < 1:
            raise BadInput(
                f"--probability must be at least 0.5 and below 1, got {self.probability:g}: what "
                "is predicted is never certain"
            )
        if self.objective not in OBJECTIVES:
            raise BadInput(
                f"--objective {self.objective!r} does not exist; there are {', '.join(OBJECTIVES)}"
            )
        if self.router not in ROUTERS:
            raise BadInput(
                f"--router {self.router!r} does not exist; there are {', '.join(ROUTERS)}"
            )
        if self.max_model_len is not None and self.max_model_len < 2:
            raise BadInput(f"--max-model-len must be at least 2 tokens, got {self.max_model_len}")
        if not 4 <= self.draws <= 200:
            raise BadInput(f"--draws must be between 4 and 200, got {self.draws}")
        if self.seed < 0:
            raise BadInput(f"--seed must be at least 0, got {self.seed}")
        self._check_traffic()

    def _check_traffic(self) -> None:
        traffic = self.traffic
        if traffic.load_factor is not None:
            raise BadInput(
                "--load is a share of what a measured engine sustains, and nothing is measured "
                "here: give --rate in requests per second"
            )
        if traffic.rate is None and traffic.is_preset:
            raise BadInput(
                f"the preset {traffic.source} has no rate of its own: give --rate in requests per "
                "second, for instance --rate 50"
            )
        if traffic.rate is not None and math.isinf(traffic.rate):
            raise BadInput(
                "--rate inf offers all requests at once, for which no number of GPUs can be "
                "planned: give the mean rate in requests per second"
            )
        stretch = traffic.start_s or traffic.duration_s is not None or traffic.requests is not None
        if traffic.is_preset and stretch:
            raise BadInput(
                "--start, --duration and --requests choose a stretch of a trace; a preset has none"
            )

    @property
    def tp_sizes(self) -> tuple[int, ...]:
        """GPUs that one replica may be divided among."""
        return self.tensor_parallel_sizes or USUAL_SIZES

    @property
    def methods(self) -> tuple[str, ...]:
        """Weight quantizations to consider, where a GPU runs them fast."""
        return self.quantizations or USUAL_QUANTIZATIONS


def split_names(text: str, flag: str) -> tuple[str, ...]:
    """Names of a list such as `h100,l40s`, each once.

    Raises:
        BadInput: the list is empty.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise BadInput(f"{flag} {text!r} names nothing: write for instance {flag} h100,l40s")
    return names


def parse_share(text: str, flag: str) -> float:
    """A share such as `25%` or `0.25`.

    Raises:
        BadInput: it is none.
    """
    plain = text.strip()
    try:
        value = float(plain.removesuffix("%")) / (100 if plain.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BadInput(f"{flag} {text!r} is not a share: write for instance 25% or 0.25")
    return value


def overridden(prices: Mapping[str, float]) -> list[str]:
    """How the user's prices read, for the notes."""
    return [f"{name} {price:g} USD/h" for name, price in prices.items()]
