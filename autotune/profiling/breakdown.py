"""Where the time of TTFT, TPOT and throughput goes, request by request.

Each step's time is split into parts (host, collectives, and the device's by its fitted cost), and
each part is made a function of time that grows evenly within a step. What a request's wait was made
of is then the difference of these functions between two of its moments, for ten thousand requests
in a hundred thousand steps at once. What of an interval no step covers is `idle`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from autotune.predict.step_cost import TERMS, StepWork
from autotune.profiling.counted_cost import CostOfSteps
from autotune.profiling.enough import LEAST_REQUESTS, NOT_TOLD, lacking
from autotune.profiling.schema import Breakdown
from autotune.profiling.step_columns import Floats, StepColumns
from autotune.records import RequestRecord
from engine.step_record import StepRecord

# Parts of a step's time; `prefill_linear` and `linear_compute` are the rows' of prompts and of
# decodes, without drafted ones: what these add is `verification`. `unexplained` is what the device
# took beyond the fitted cost, below 0 where less.
_STEP_PARTS = (
    "host",
    "drafting",
    "verification",
    "communication",
    "weights",
    "prefill_linear",
    "linear_compute",
    "prefill_attention",
    "kv_reads",
    "overhead",
    "unexplained",
)
_MODELLED = (
    "weights",
    "prefill_linear",
    "linear_compute",
    "prefill_attention",
    "kv_reads",
    "verification",
    "interference",
    "other",
)

_HAIR = 1e-9


class Timeline:
    """The parts of the steps' time as functions of time.

    Args:
        records: the steps, in time.
        columns: the same.
        cost: what explains their device seconds.
    """

    def __init__(
        self, records: Sequence[StepRecord], columns: StepColumns, cost: CostOfSteps
    ) -> None:
        self.columns = columns
        self.parts = _step_parts(records, columns, cost)
        # A step that another overlaps ends early; all of its parts lie before that.
        self._knots = np.stack([columns.start, columns.end], axis=1).ravel()

    def between(self, values: Floats, begin: Floats, end: Floats) -> Floats:
        """How much of a quantity of steps falls into each interval."""
        sums = np.concatenate([[0.0], np.cumsum(values)])
        heights = np.stack([sums[:-1], sums[1:]], axis=1).ravel()
        result = np.interp(end, self._knots, heights) - np.interp(begin, self._knots, heights)
        return np.asarray(result, dtype=np.float64)

    def step_end(self, at: Floats) -> Floats:
        """When the step ends that is under way at a moment; the moment itself if none is."""
        place = np.searchsorted(self.columns.start, at, side="right") - 1
        ends = np.where(place >= 0, self.columns.end[np.maximum(place, 0)], at)
        return np.asarray(np.maximum(ends, at), dtype=np.float64)

    def split(self, begin: Floats, end: Floats) -> dict[str, Floats]:
        """Seconds of each interval by part of a step, and those that no step covers (`idle`).

        Time of a step that the next one overlaps counts within the time that both took.
        """
        covered = self.between(self.columns.end - self.columns.start, begin, end)
        found = {name: self.between(self.parts[name], begin, end) for name in _STEP_PARTS}
        found["idle"] = np.maximum(0.0, end - begin - covered)
        return found


def breakdowns(
    requests: Sequence[RequestRecord],
    timeline: Timeline,
    recomputed_share: float | None,
) -> tuple[list[Breakdown], list[str]]:
    """The breakdowns that the records allow, and what could not be told."""
    found: list[Breakdown] = []
    partial: list[str] = []
    scheduled = [r for r in requests if r.token_times and r.first_scheduled is not None]
    answered = [r for r in requests if r.tpot is not None]
    for name, those, make in (
        ("time to first token", scheduled, ttft),
        ("time per output token", answered, tpot),
    ):
        if len(those) >= LEAST_REQUESTS:
            found.append(make(those, timeline))
        elif make is ttft and len(answered) >= LEAST_REQUESTS and not scheduled:
            partial.append(f"the breakdown of {name} is unknown: {NOT_TOLD}")
        else:
            partial.append(
                lacking(f"the breakdown of {name}", "requests", LEAST_REQUESTS, len(those))
            )
    found.append(throughput(requests, timeline, recomputed_share or 0.0))
    return found, partial


def ttft(requests: Sequence[RequestRecord], timeline: Timeline) -> Breakdown:
    """The mean time to first token: the wait for a seat, and the steps until the first token.

    The end of a step that was under way at the send is awaited as one of these, and not as a seat.
    Of the steps' prompt work as much is a request's own as it has of their prompt tokens (linear
    layers) and of their pairs of query and key (attention); the rest is `interference`.
    """
    sent = _array(r.intended_send for r in requests)
    first = _array(r.token_times[0] for r in requests)
    seated = np.clip(_array(r.first_scheduled or 0.0 for r in requests), sent, first)
    cached = _array(r.cached_tokens for r in requests)
    new = _array(r.input_tokens for r in requests) - cached
    pairs = new * cached + new * (new + 1) / 2
    begin = np.minimum(timeline.step_end(sent), seated)
    parts = timeline.split(seated, first)
    under_way = timeline.split(sent, begin)
    columns = timeline.columns
    own_tokens = _ratio(new, timeline.between(columns.prefill_tokens, seated, first))
    own_pairs = _ratio(pairs, timeline.between(columns.prefill_pairs, seated, first))
    linear, attention = parts["prefill_linear"], parts["prefill_attention"]
    parts = {name: seconds + under_way[name] for name, seconds in parts.items()}
    parts["interference"] = linear * (1 - own_tokens) + attention * (1 - own_pairs)
    parts["interference"] += under_way["prefill_linear"] + under_way["prefill_attention"]
    parts["prefill_linear"] = linear * own_tokens
    parts["prefill_attention"] = attention * own_pairs
    parts["queue"] = seated - begin
    return _breakdown("ttft", {name: float(v.sum()) for name, v in parts.items()}, len(requests))


def tpot(requests: Sequence[RequestRecord], timeline: Timeline) -> Breakdown:
    """The mean time per output token; others' prompts in the same steps are `interference`.

    Between two tokens of a request lies one step, or none if both are of one; unless the request
    was preempted: then the whole gap is `preempted`.
    """
    first = _array(r.token_times[0] for r in requests)
    last = _array(r.token_times[-1] for r in requests)
    gaps = _array(len(r.token_times) - 1 for r in requests)
    parts = timeline.split(first, last)
    owner, begin, end = _preempted_gaps(requests, timeline.columns)
    for name, seconds in timeline.split(begin, end).items():
        parts[name] = parts[name] - np.bincount(owner, seconds, minlength=len(requests))
    lost = np.zeros(len(requests))
    np.add.at(lost, owner, end - begin)
    parts["preempted"] = lost
    parts["interference"] = parts.pop("prefill_linear") + parts.pop("prefill_attention")
    totals = {name: float((seconds / gaps).sum()) for name, seconds in parts.items()}
    return _breakdown("tpot", totals, len(requests))


def throughput(
    requests: Sequence[RequestRecord], timeline: Timeline, recomputed_share: float
) -> Breakdown:
    """Wall time from the first send to the last step's end or token."""
    columns = timeline.columns
    begin = min([float(columns.start[0]), *(r.intended_send for r in requests)])
    end = max([float(columns.end[-1]), *(r.token_times[-1] for r in requests if r.token_times)])
    parts = timeline.split(np.array([begin]), np.array([end]))
    totals = {name: float(seconds.sum()) for name, seconds in parts.items()}
    # Prompt work that preemptions made necessary again.
    totals["preempted"] = 0.0
    for name in ("prefill_linear", "prefill_attention"):
        again = totals[name] * recomputed_share
        totals[name] -= again
        totals["preempted"] += again
    return _breakdown("throughput", totals, 1)


def _step_parts(
    records: Sequence[StepRecord], columns: StepColumns, cost: CostOfSteps
) -> dict[str, Floats]:
    """Seconds of each step by part; they sum to its time."""
    modelled = [cost.terms(StepWork.of(undrafted(step))) for step in records]
    terms = {name: _array(each[name] for each in modelled) for name in TERMS}
    measured = columns.communication
    communication = np.where(np.isnan(measured), terms["communication"], measured)
    communication = np.minimum(communication, columns.device)
    rows = np.maximum(columns.prefill_tokens + columns.decodes, 1.0)
    of_prompts = columns.prefill_tokens / rows
    drafting = np.minimum(columns.drafting, columns.host)
    parts = {
        "host": columns.host - drafting,
        "drafting": drafting,
        "verification": _array(verification_seconds(step, cost) for step in records),
        "communication": communication,
        "weights": terms["weights"],
        "prefill_linear": terms["linear_compute"] * of_prompts,
        "linear_compute": terms["linear_compute"] * (1 - of_prompts),
        "prefill_attention": terms["prefill_attention"],
        "kv_reads": terms["kv_reads"],
        "overhead": terms["overhead"],
    }
    parts["unexplained"] = columns.seconds - sum(parts.values(), np.zeros(len(columns)))
    # Where the next step overlaps, only the time up to its start is this step's.
    taken = np.divide(
        columns.end - columns.start,
        columns.seconds,
        out=np.ones(len(columns)),
        where=columns.seconds > 0,
    )
    return {name: seconds * taken for name, seconds in parts.items()}


def undrafted(step: StepRecord) -> StepRecord:
    """The step as it would be without the drafted tokens in it."""
    if not step.drafted_tokens:
        return step
    return dataclasses.replace(
        step, drafted_tokens=0, accepted_tokens=0, drafted_by_depth=(), accepted_by_depth=()
    )


def verification_seconds(step: StepRecord, cost: CostOfSteps) -> float:
    """Device seconds that the drafted tokens of a step add to it, by its cost."""
    if not step.drafted_tokens:
        return 0.0
    with_them = cost.device_seconds(StepWork.of(step))
    return max(0.0, with_them - cost.device_seconds(StepWork.of(undrafted(step))))


def _preempted_gaps(
    requests: Sequence[RequestRecord], columns: StepColumns
) -> tuple[npt.NDArray[np.int64], Floats, Floats]:
    """The gaps between tokens in which more than one step ended: whose, begin and end."""
    owners, begins, ends = [np.empty(0, np.int64)], [np.empty(0)], [np.empty(0)]
    for index, request in enumerate(requests):
        if not request.preemptions:
            continue
        times = np.asarray(request.token_times, dtype=np.float64)
        # A token is stamped when its step has ended, which sums of floats may miss by a hair.
        ended = np.searchsorted(columns.end, times + _HAIR, side="right")
        long = np.diff(ended) > 1
        begins.append(times[:-1][long])
        ends.append(times[1:][long])
        owners.append(np.full(int(long.sum()), index, dtype=np.int64))
    return np.concatenate(owners), np.concatenate(begins), np.concatenate(ends)


def _breakdown(metric: str, totals: dict[str, float], count: int) -> Breakdown:
    """Shares of the totals' sum; what the cost explained too much of is taken from its parts."""
    totals["other"] = totals.pop("overhead") + totals.pop("unexplained")
    if totals["other"] < 0:
        excess, totals["other"] = totals["other"], 0.0
        modelled = sum(totals.get(name, 0.0) for name in _MODELLED)
        keep = max(0.0, 1 + excess / modelled) if modelled > 0 else 0.0
        for name in _MODELLED:
            if name in totals:
                totals[name] *= keep
    totals = {name: max(0.0, seconds) for name, seconds in totals.items()}
    whole = sum(totals.values())
    shares = {name: seconds / whole if whole > 0 else 0.0 for name, seconds in totals.items()}
    return Breakdown.model_validate({"metric": metric, "seconds": whole / count, "parts": shares})


def _ratio(own: Floats, all_of_them: Floats) -> Floats:
    """The part of a step's prompt work that is a request's own; 1 where no more is counted."""
    ratio = np.divide(own, all_of_them, out=np.ones(len(own)), where=all_of_them > own)
    return np.asarray(ratio, dtype=np.float64)


def _array(values: Iterable[float]) -> Floats:
    return np.fromiter(values, dtype=np.float64)
