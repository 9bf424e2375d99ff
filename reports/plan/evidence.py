"""A plan read once: its options, what was asked of them, and which is recommended."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from reports.estimate import Estimate, read_estimate
from reports.formatting import mapping, number, sequence
from reports.limits import LATENCIES, limit_metric
from reports.plan.money import HOURS_PER_MONTH

Standing = Literal["met", "missed", "failed"]
_THRESHOLD = 0.9
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_BOUND = re.compile(r"[<>]=?\s*(\d+(?:\.\d+)?(?:e[+-]?\d{1,3})?)\s*(us|ms|s)\s*$")


@dataclass(frozen=True, slots=True)
class PlanLimit:
    """One limit of the promise; `bound` in seconds for latencies, None where it was not told."""

    text: str
    metric: str
    statistic: str
    bound: float | None


@dataclass(frozen=True, slots=True)
class Option:
    """One choice of hardware and configuration; `rank` counts from 1 in the plan's own order."""

    rank: int
    raw: Mapping[str, Any]
    title: str
    threshold: float

    @property
    def gpu(self) -> str:
        """The GPU's name in the catalogue."""
        return str(self.raw.get("gpu") or "?")

    @property
    def fits(self) -> bool:
        """Whether the model and the KV cache that it needs fit in memory."""
        return self.raw.get("fits") is True

    @property
    def tensor_parallel_size(self) -> int:
        """GPUs of one replica."""
        return int(number(self.raw.get("tensor_parallel_size")) or 1)

    @property
    def replicas(self) -> int:
        """Replicas with those for bursts and failures; 0 where none was found to suffice."""
        return int(number(self.raw.get("replicas")) or 0)

    @property
    def gpus(self) -> int:
        """GPUs altogether."""
        told = number(self.raw.get("gpus"))
        return int(told) if told is not None else self.replicas * self.tensor_parallel_size

    @property
    def chance(self) -> float | None:
        """The probability that the promise is kept."""
        return number(self.raw.get("p_meets_slo"))

    @property
    def standing(self) -> Standing:
        """Whether it keeps the promise surely enough, does not, or cannot be run at all."""
        if not self.fits:
            return "failed"
        if isinstance(feasible := self.raw.get("feasible"), bool):
            return "met" if feasible else "missed"
        return "met" if (self.chance or 0.0) >= self.threshold else "missed"

    @property
    def simulated(self) -> bool:
        """Whether its latencies are from simulated traffic, not from arithmetic alone."""
        return str(self.raw.get("method") or "simulated") == "simulated"

    @property
    def per_hour(self) -> Estimate | None:
        """USD per hour for all GPUs."""
        return self.estimate("usd_per_hour")

    @property
    def per_month(self) -> Estimate | None:
        """USD per month for all GPUs."""
        return None if self.per_hour is None else self.per_hour.times(HOURS_PER_MONTH)

    @property
    def memory(self) -> Mapping[str, Any]:
        """Where the memory of one GPU goes, in bytes."""
        return mapping(self.raw.get("memory"))

    @property
    def quantization(self) -> str:
        """Weights' and cache's formats in words."""
        weights = str(self.raw.get("quantization") or "none")
        cache = str(self.raw.get("kv_cache_dtype") or "auto")
        text = "unquantized" if weights == "none" else weights
        return text if cache in ("auto", "none") else f"{text}, KV {cache}"

    @property
    def short(self) -> str:
        """A name for charts, such as `5×h100-sxm fp8` or `2×tp4 l40s int4`."""
        size = self.tensor_parallel_size
        weights = str(self.raw.get("quantization") or "none")
        count = f"{self.replicas}×" if self.replicas else ""
        parts = [f"{count}{f'tp{size} ' if size > 1 else ''}{self.gpu}"]
        return " ".join([*parts, *([] if weights == "none" else [weights])])

    @property
    def one(self) -> str:
        """One replica's kind, such as `l40s tp2 int4`: without how many there are."""
        size = self.tensor_parallel_size
        weights = str(self.raw.get("quantization") or "none")
        parts = [self.gpu, *([f"tp{size}"] if size > 1 else [])]
        return " ".join([*parts, *([] if weights == "none" else [weights])])

    @property
    def named(self) -> str:
        """GPUs in words, such as `8 × NVIDIA L40S`."""
        count = self.gpus or self.tensor_parallel_size
        return f"{count} × {self.title}"

    @property
    def layout(self) -> str:
        """How the GPUs are arranged."""
        size, replicas = self.tensor_parallel_size, self.replicas
        each = "" if size == 1 else f" of {size} GPUs"
        if not replicas:
            return "one replica" + each
        return f"{replicas} replica{'s' if replicas != 1 else ''}{each}"

    def estimate(self, key: str) -> Estimate | None:
        """A number of the option, with its bounds where the plan tells some."""
        plain = read_estimate(self.raw.get(key))
        bounded = read_estimate(mapping(self.raw.get("intervals")).get(key))
        return plain if plain is None or plain.spread or bounded is None else bounded

    def latency(self, metric: str, statistic: str, *, normal: bool = False) -> Estimate | None:
        """A latency statistic in seconds: in a burst with the spares away, or of a normal day."""
        at = mapping(self.raw.get("normal")) if normal else self.raw
        return read_estimate(mapping(at.get(metric)).get(statistic))


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole plan."""

    raw: Mapping[str, Any]
    options: Sequence[Option]
    recommended: Option | None
    limits: Sequence[PlanLimit]
    threshold: float

    @property
    def request(self) -> Mapping[str, Any]:
        """What was asked."""
        return mapping(self.raw.get("request"))

    @property
    def model(self) -> Mapping[str, Any]:
        """What was read of the model."""
        return mapping(self.request.get("model"))

    @property
    def best_of_each(self) -> list[Option]:
        """The first option of each GPU in the order of the plan, the recommended one before all."""
        chosen = {o.gpu: o for o in reversed(self.options)}
        if self.recommended is not None:
            chosen[self.recommended.gpu] = self.recommended
        return sorted(chosen.values(), key=lambda o: (o is not self.recommended, o.rank))

    @property
    def axes(self) -> list[tuple[str, str, float | None]]:
        """The (metric, statistic, bound) of the latencies that the promise is on, at most two.

        Without a limit on latencies, TTFT and TPOT at p95.
        """
        asked = [(x.metric, x.statistic, x.bound) for x in self.limits if x.metric in LATENCIES]
        for metric in ("ttft", "tpot"):
            if len(asked) < 2 and all(metric != known for known, _, _ in asked):
                asked.append((metric, "p95", None))
        return asked[:2]

    def option_at(self, index: object) -> Option | None:
        """The option at a place in the plan's list."""
        place = number(index)
        if place is None or not 0 <= place < len(self.options):
            return None
        return self.options[int(place)]


def read_plan(raw: Mapping[str, Any]) -> Plan:
    """Arrange a plan; what is missing in it is left out of the page."""
    request = mapping(raw.get("request"))
    told = number(request.get("probability"))
    threshold = _THRESHOLD if told is None else told
    titles = {str(k): mapping(v).get("title") for k, v in mapping(raw.get("catalogue")).items()}
    options = []
    for rank, item in enumerate(map(mapping, sequence(raw.get("options"))), start=1):
        gpu = str(item.get("gpu") or "?")
        title = str(item.get("gpu_title") or titles.get(gpu) or gpu)
        options.append(Option(rank, item, title, threshold))
    plan = Plan(raw, options, None, read_plan_limits(request), threshold)
    # Options come ranked: the first that keeps the promise is the one to get.
    recommended = next((o for o in options if o.standing == "met"), None)
    return Plan(raw, options, recommended, plan.limits, threshold)


def read_plan_limits(request: Mapping[str, Any]) -> list[PlanLimit]:
    """The limits as the plan lists them, else as they stand in the text of the promise."""
    limits = []
    for item in sequence(request.get("limits")):
        entry = mapping(item)
        text = str(entry.get("limit") or item)
        metric, statistic = limit_metric(text)
        limits.append(
            PlanLimit(
                text,
                str(entry.get("metric") or metric),
                str(entry.get("statistic") or statistic),
                _bound(text) if (told := number(entry.get("bound"))) is None else told,
            )
        )
    if limits:
        return limits
    texts = [part.strip() for part in str(request.get("slo") or "").split(",") if part.strip()]
    return [PlanLimit(text, *limit_metric(text), _bound(text)) for text in texts]


def _bound(text: str) -> float | None:
    match = _BOUND.search(text)
    return None if match is None else number(float(match[1]) * _SECONDS[match[2]])
