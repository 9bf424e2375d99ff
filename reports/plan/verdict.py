"""The first thing on the page of a plan: what to get, what it costs, how sure the promise is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from reports.charts.growth_bars import growth_asked, read_growth
from reports.charts.memory_bars import read_memory
from reports.estimate import Estimate, read_estimate
from reports.formatting import MISSING, mapping, number, percent, sequence, significant, size
from reports.limits import LATENCIES, limit_value
from reports.plan.evidence import Option, Plan, PlanLimit
from reports.plan.money import chance, dollar_range, dollars

Tone = Literal["good", "caution", "bad", "neutral"]
_CONSTRAINTS = {
    "weights": "memory for the weights",
    "kv": "memory for the KV cache",
    "kv_cache": "memory for the KV cache",
    "compute": "arithmetic",
    "bandwidth": "memory bandwidth",
    "latency": "the floor of the latency",
    "latency_floor": "the floor of the latency",
    "queue": "waiting in the queue",
    "link": "the link between GPUs",
}


@dataclass(frozen=True, slots=True)
class Kept:
    """One limit of the promise beside what is predicted for the recommended option."""

    limit: str
    predicted: str
    normal: str
    standing: str
    note: str


@dataclass(frozen=True, slots=True)
class PlanVerdict:
    """What the page says first. `doubts` say plainly what the numbers do not rest on.

    `obstacles` tell what is in the way of each GPU where none is to be had.
    """

    tone: Tone
    badge: str
    headline: str
    lead: str
    doubts: Sequence[str]
    obstacles: Sequence[str]
    fits_nowhere: bool
    price: str
    price_note: str
    purchase: Sequence[tuple[str, str]]
    money: Sequence[tuple[str, str]]
    limits: Sequence[Kept]


def judge_plan(plan: Plan) -> PlanVerdict:
    """The verdict on a plan in whatever state it is."""
    chosen = plan.recommended
    closest = chosen or _closest(plan)
    # Of what no number of replicas helps there is nothing to get.
    shown = closest if closest is not None and closest.replicas else None
    tone, badge, headline, lead = _say(plan, chosen, closest)
    return PlanVerdict(
        tone=tone,
        badge=badge,
        headline=headline,
        lead=lead,
        doubts=_doubts(plan, shown),
        obstacles=[] if shown is not None else _obstacles(plan),
        fits_nowhere=bool(plan.options) and closest is None,
        price=MISSING if shown is None or shown.per_month is None else _monthly(shown),
        price_note=_price_note(shown),
        purchase=[] if shown is None else [*purchase(shown), *_lasting(plan, shown)],
        money=[] if shown is None else _money(shown),
        limits=[] if shown is None else [_kept(shown, limit) for limit in plan.limits],
    )


def constraint(option: Option) -> str:
    """What bounds an option, in words."""
    name = str(option.raw.get("binding_constraint") or "")
    return _CONSTRAINTS.get(name, name.replace("_", " ")) or MISSING


def binding_text(option: Option) -> str:
    """The sentence on what bounds an option; empty without one."""
    return str(mapping(option.raw.get("binding")).get("text") or "")


def purchase(option: Option) -> list[tuple[str, str]]:
    """What to run and how, without what was not told."""
    raw = option.raw
    load, spare = (number(raw.get(key)) for key in ("replicas_needed", "spare_replicas"))
    split = ""
    if load is not None and spare:
        split = f": {significant(load)} for the burst, {significant(spare)} spare"
    facts = [
        ("GPUs", option.named),
        ("Arranged as", option.layout + split),
        ("Weights", option.quantization),
        ("max_num_seqs", significant(number(raw.get("max_num_seqs")), 6)),
        ("max_num_batched_tokens", significant(number(raw.get("max_num_batched_tokens")), 6)),
        ("KV cache", _cache(option)),
        ("Busy at the mean rate", percent(number(raw.get("utilization")), 2)),
        ("Bounded by", constraint(option)),
        ("", binding_text(option)),
    ]
    return [(name, value) for name, value in facts if value not in (MISSING, "")]


def _lasting(plan: Plan, option: Option) -> list[tuple[str, str]]:
    """How long it suffices while the traffic grows, where a growth was asked for."""
    growth = growth_asked(plan)
    return [
        (f"Growing {growth}" if growth else "Growing", entry.text)
        for entry in read_growth(plan)
        if entry.option is option
    ]


def _say(plan: Plan, chosen: Option | None, shown: Option | None) -> tuple[Tone, str, str, str]:
    asked = _asked(plan)
    if chosen is not None:
        sure = chance(chosen.chance)
        price = chosen.per_month
        cost = "at a price that is not known" if price is None else f"{_monthly(chosen)} a month"
        headline = f"Get {chosen.named}: {cost}, {sure} chance to keep the promise"
        if chosen.standing == "met":
            badge = "Expected to keep the promise"
            return "good", badge, headline, f"{asked} {_others(plan, chosen)}".strip()
        return "caution", "May break the promise", headline, asked
    if not plan.options:
        return "neutral", "Nothing to choose from", "No option was looked at", asked
    if shown is None:
        return (
            "bad",
            "Fits nowhere",
            "The model fits on none of these GPUs",
            f"{asked} {_shortest(plan)}".strip(),
        )
    if not shown.replicas:
        headline = "No number of these GPUs keeps the promise"
        return "bad", "No option keeps the promise", headline, asked
    closest = f"the closest is {shown.named} with {chance(shown.chance)}"
    headline = f"No option keeps the promise with {percent(plan.threshold)} chance; {closest}"
    return "bad", "No option keeps the promise", headline, asked


def _asked(plan: Plan) -> str:
    rate = number(plan.request.get("rate"))
    parts = []
    if rate is not None:
        parts.append(f"for {significant(rate)} requests/s")
    if plan.limits:
        parts.append("with " + ", ".join(limit.text for limit in plan.limits))
    return f"Planned {' '.join(parts)}." if parts else ""


def _others(plan: Plan, chosen: Option) -> str:
    """The next best of another GPU, and what is cheaper but too unsure."""
    price = chosen.per_month
    if price is None or price.value <= 0:
        return ""
    said = []
    for option in plan.best_of_each:
        cost = option.per_month
        if option is chosen or option.standing != "met" or cost is None:
            continue
        more = cost.value / price.value - 1
        differs = f"{percent(abs(more), 2)} {'more' if more >= 0 else 'less'}"
        said.append(f"Next: {option.named} for {_monthly(option)}, {differs}.")
        break
    unsure = [
        (cost.value, option)
        for option in plan.options
        if option.standing == "missed"
        and (cost := option.per_month) is not None
        and 0 < cost.value < price.value
        and option.chance is not None
    ]
    if unsure:
        option = max(unsure, key=lambda item: (item[1].chance or 0.0, -item[0]))[1]
        sure = chance(option.chance)
        said.append(f"Cheaper, {option.named} for {_monthly(option)}, but {sure} chance only.")
    return " ".join(said)


def _shortest(plan: Plan) -> str:
    """Which GPU comes nearest to holding the model."""
    short = [
        (shortfall, option)
        for option in plan.options
        if (shortfall := read_memory(option).shortfall) > 0
    ]
    if not short:
        return ""
    least, option = min(short, key=lambda item: (item[0], item[1].rank))
    size_ = option.tensor_parallel_size
    split = f" split over {size_} GPUs" if size_ > 1 else ""
    kind = f"{option.title}, {option.quantization}{split}"
    return f"The closest, {kind}, is {size(least)} short on each GPU."


def _closest(plan: Plan) -> Option | None:
    """The option that is likeliest to keep the promise, of those that can be run."""
    runnable = [o for o in plan.options if o.standing != "failed"]
    return max(runnable, key=lambda o: (o.chance or 0.0, -o.rank)) if runnable else None


def _obstacles(plan: Plan) -> list[str]:
    """Why the best option of each GPU is none."""
    return [
        f"{option.title}, {option.quantization}: {reason}"
        for option in plan.best_of_each
        if (reason := str(option.raw.get("reason") or ""))
    ]


def _doubts(plan: Plan, shown: Option | None) -> list[str]:
    told = [str(note) for note in sequence(plan.raw.get("warnings")) if note]
    if shown is None:
        return told
    measured = plan.request.get("calibrated_gpu", shown.gpu)
    if not plan.request.get("calibration") or measured != shown.gpu:
        told.append(
            f"Nothing was measured on {shown.title}: this rests on data sheets and published "
            "measurements, whose spread the intervals carry. A profile of one such GPU, given as "
            "calibration, tightens them before the rest is paid for."
        )
    if not shown.simulated:
        reason = str(shown.raw.get("reason") or "")
        text = "This option is from arithmetic alone and was not simulated" + (
            f": {reason}" if reason else ""
        )
        told.append(text + ("" if text.endswith(".") else "."))
    return told


def _monthly(option: Option) -> str:
    cost = option.per_month
    return "an unknown price" if cost is None else dollars(cost.value)


def _price_note(option: Option | None) -> str:
    if option is None or option.per_month is None:
        return "no price is known"
    between = dollar_range(option.per_month)
    return "a month of 730 hours" + (
        f"; {between} across listed prices and what may be needed" if between else ""
    )


def _money(option: Option) -> list[tuple[str, str]]:
    def written(estimate: Estimate | None) -> str:
        if estimate is None:
            return MISSING
        between = dollar_range(estimate)
        return dollars(estimate.value) + (f" ({between})" if between else "")

    watts, throughput = option.estimate("watts"), option.estimate("output_tokens_per_s")
    facts = [
        ("Chance to keep the promise", chance(option.chance)),
        ("An hour", written(option.per_hour)),
        ("A million output tokens", written(option.estimate("usd_per_million_tokens"))),
        ("Output", MISSING if throughput is None else f"{significant(throughput.value)} tokens/s"),
        ("Power, at most", MISSING if watts is None else f"{significant(watts.value / 1000)} kW"),
    ]
    return [(name, value) for name, value in facts if value != MISSING]


def _cache(option: Option) -> str:
    memory = mapping(option.memory)
    tokens = number(memory.get("kv_tokens"))
    return MISSING if tokens is None else f"{significant(tokens)} tokens a replica"


def _kept(option: Option, limit: PlanLimit) -> Kept:
    told = next(
        (
            row
            for row in map(mapping, sequence(option.raw.get("limits")))
            if row.get("limit") == limit.text
        ),
        {},
    )
    bound = number(told.get("bound"))
    bound = limit.bound if bound is None else bound
    predicted = read_estimate(told.get("measured"))
    if predicted is None:
        predicted = option.latency(limit.metric, limit.statistic)
    share = number(told.get("p"))

    def write(value: float | None) -> str:
        return limit_value(limit.text, value)

    unit = " ms" if limit.metric in LATENCIES else ""
    day = option.latency(limit.metric, limit.statistic, normal=True)
    standing, note = _standing(predicted, bound, limit, share)
    return Kept(
        limit.text,
        MISSING if predicted is None else predicted.written(write, unit),
        "" if day is None else day.written(write, unit),
        standing,
        note,
    )


def _standing(
    predicted: Estimate | None, bound: float | None, limit: PlanLimit, share: float | None
) -> tuple[str, str]:
    """Whether a limit is kept, and by how much; nothing where neither is known."""
    in_draws = "" if share is None else f"in {percent(share, 2)} of the simulations"
    if predicted is None:
        return "", "not predicted by itself"
    if bound is None or bound <= 0:
        return "", in_draws
    up = ">" in limit.text  # what must be large, such as a throughput
    ends = (predicted.low, predicted.high)
    kept = [value >= bound if up else value <= bound for value in (predicted.value, *ends)]
    if not kept[0]:
        return "missed", f"by {percent(abs(predicted.value / bound - 1), 2)}"
    if all(kept):
        return "met", f"{percent(abs(1 - predicted.value / bound), 2)} to spare"
    return "unsure", "its interval passes the limit" + (f"; kept {in_draws}" if in_draws else "")
