"""Causes that are the work itself, or the device and the host at it: shared by all metrics."""

from __future__ import annotations

from autotune.diagnose.cause import Cause, Evidence
from autotune.diagnose.parts import PREFILL_PARTS, total
from autotune.diagnose.sentences import joined, number, percent, seconds
from autotune.diagnose.thresholds import (
    ERRATIC_STEPS,
    IMBALANCED,
    LONG_PROMPT_RATIO,
    LOSS,
    LOST_HITS,
    THROTTLED_CLOCK,
    THROTTLED_SAMPLES,
    TRAIT,
    WORK,
)
from autotune.profiling.schema import Profile

# How a metric's time is called in a sentence.
TIME_OF = {
    "ttft": "the time to the first token",
    "tpot": "the time between tokens",
    "throughput": "the engine's time",
    "cost": "what is paid for",
    "memory": "the memory",
}


def prefill_causes(profile: Profile, metric: str, parts: dict[str, float]) -> list[Cause]:
    """What computing prompts costs: what was computed before, and the rest by what bounds it."""
    work = total(parts, PREFILL_PARTS)
    causes: list[Cause] = []
    of = TIME_OF[metric]
    kv, traffic = profile.kv, profile.traffic
    repeated = 0.0
    if kv.attainable_hit_rate is not None:
        had = kv.hit_rate or 0.0
        lost = kv.attainable_hit_rate - had
        if lost >= LOST_HITS and had < 1:
            repeated = work * min(1.0, lost / (1 - had))
            causes.append(
                Cause(
                    "poor_prefix_reuse",
                    repeated,
                    LOSS,
                    joined(
                        f"{percent(repeated)} of {of} goes to computing prompt beginnings that "
                        "were computed before",
                        f"this traffic would find {percent(kv.attainable_hit_rate)} of its prompt "
                        f"tokens in a cache that keeps them, and found {percent(had)}",
                    ),
                    {
                        "kv.hit_rate": kv.hit_rate,
                        "kv.attainable_hit_rate": kv.attainable_hit_rate,
                        "engine_config.enable_prefix_caching": _knob(
                            profile, "enable_prefix_caching"
                        ),
                    },
                )
            )
    causes += _prefill_work(profile, metric, parts, work - repeated)
    ratio = traffic.prompt_output_ratio
    if ratio is not None and ratio >= LONG_PROMPT_RATIO and traffic.input_tokens is not None:
        causes.append(
            Cause(
                "long_prompts",
                work,
                TRAIT,
                f"Prompts are {number(ratio)} times as long as answers "
                f"({number(traffic.input_tokens.mean)} tokens on average), and reading them takes "
                f"{percent(work)} of {of}.",
                {
                    "traffic.prompt_output_ratio": ratio,
                    "traffic.input_tokens.mean": traffic.input_tokens.mean,
                },
            )
        )
    return causes


def _prefill_work(
    profile: Profile, metric: str, parts: dict[str, float], compute: float
) -> list[Cause]:
    """Arithmetic of prompts, and the reading of weights in steps that have too little of it."""
    of = TIME_OF[metric]
    phase = profile.phase("prefill") or profile.phase("mixed")
    ridge = None if profile.ceilings is None else profile.ceilings.ridge
    evidence: Evidence = {"ceilings.ridge": ridge}
    reached = few = None
    intensity = None
    if phase is not None:
        where, intensity = f"phases.{phase.name}", phase.intensity
        evidence |= {
            f"{where}.intensity": intensity,
            f"{where}.mfu": phase.mfu,
            f"{where}.mbu": phase.mbu,
        }
        if phase.mfu is not None:
            reached = (
                f"the device multiplies at {percent(phase.mfu)} of the rate that was measured of it"
            )
        few = f"a step has {number(phase.tokens / max(1, phase.steps))} tokens on average"
    # Of the time to the first token, all steps are those with the request's prompt in them.
    reading = parts.get("weights", 0.0) if metric == "ttft" else 0.0
    known = None
    if intensity is not None and ridge is not None:
        known = (
            f"{number(intensity)} operations a byte, where this device is busy with arithmetic "
            f"from {number(ridge)} on"
        )
        if profile.breakdown(metric) is None and intensity < ridge:
            # Only waiting was told apart; then the phase says what the rest is.
            reading, compute = reading + compute, 0.0
    return [
        Cause(
            "prefill_compute",
            compute,
            WORK,
            joined(f"{percent(compute)} of {of} is arithmetic on the prompts", reached),
            evidence,
        ),
        Cause(
            "prefill_bandwidth",
            reading,
            WORK,
            joined(
                f"{percent(reading)} of {of} goes to fetching the model's weights for steps with "
                "so little of prompts in them that their arithmetic is done sooner",
                few,
                known,
            ),
            evidence,
        ),
    ]


def decode_causes(profile: Profile, metric: str, parts: dict[str, float]) -> list[Cause]:
    """What computing answers costs, by what a decode step spends its time on."""
    of = TIME_OF[metric]
    phase = profile.phase("decode") or profile.phase("mixed")
    evidence: Evidence = {}
    batch = None
    reached = None
    if phase is not None:
        where = f"phases.{phase.name}"
        evidence = {
            f"{where}.mean_batch": phase.mean_batch,
            f"{where}.step_p50": phase.step_p50,
            f"{where}.mbu": phase.mbu,
            f"{where}.mfu": phase.mfu,
            f"{where}.intensity": phase.intensity,
        }
        batch = f"a decode step serves {number(phase.mean_batch)} sequences on average"
        if phase.mbu is not None:
            reached = f"memory delivers {percent(phase.mbu)} of what was measured of it"
    weights, compute, kv = (parts.get(n, 0.0) for n in ("weights", "linear_compute", "kv_reads"))
    return [
        Cause(
            "decode_weights",
            weights,
            WORK,
            joined(
                f"{percent(weights)} of {of} goes to fetching the model's weights from memory, "
                "once for every decode step",
                batch,
                reached,
            ),
            evidence,
        ),
        Cause(
            "decode_kv",
            kv,
            WORK,
            joined(
                f"{percent(kv)} of {of} goes to fetching the keys and values of what was said "
                "before, which grow with every token of every sequence",
                batch,
                reached,
            ),
            {**evidence, "model.kv_bytes_per_token": _kv_bytes(profile)},
        ),
        Cause(
            "decode_compute",
            compute,
            WORK,
            joined(
                f"{percent(compute)} of {of} is arithmetic of decode steps, which grows with "
                "sequences that share a step",
                batch,
            ),
            evidence,
        ),
    ]


def host_cause(profile: Profile, metric: str, share: float) -> Cause:
    """The device waits while the host schedules and prepares."""
    host = profile.host
    each = None if host is None else f"{seconds(host.per_step_s)} in a typical step"
    return Cause(
        "host_bound",
        share,
        LOSS,
        joined(
            f"In {percent(share)} of {TIME_OF[metric]} the device stands idle while the host "
            "prepares the next step",
            each,
        ),
        {}
        if host is None
        else {
            "host.share": host.share,
            "host.per_step_s": host.per_step_s,
            "host.scheduler_share": host.scheduler_share,
        },
    )


def overhead_causes(profile: Profile, metric: str, share: float) -> list[Cause]:
    """Device time that the fitted cost of a step explains by neither reads nor arithmetic."""
    fit = profile.step_fit
    if fit is None:
        return []
    phase = profile.phase("decode") or profile.phase("mixed") or profile.phase("prefill")
    typical = None if phase is None else f"a typical step takes {seconds(phase.step_p50)}"
    erratic = None
    if fit.median_error > ERRATIC_STEPS:
        erratic = (
            f"half of the steps are off by {percent(fit.median_error)} or more from what their "
            "work explains, so measure again when nothing else runs here"
        )
    return [
        Cause(
            "step_overhead",
            share,
            WORK,
            joined(
                f"{percent(share)} of {TIME_OF[metric]} is spent on the device beyond what reading "
                "and arithmetic take: on many small operations, or because something else uses "
                "this machine",
                typical,
                erratic,
            ),
            {
                "step_fit.median_error": fit.median_error,
                "step_fit.p90_error": fit.p90_error,
                **({} if phase is None else {f"phases.{phase.name}.bound": phase.bound}),
            },
        )
    ]


def communication_causes(profile: Profile, metric: str, share: float) -> list[Cause]:
    """Collectives among ranks: what they cost, and what of it is waiting for a slower rank."""
    facts = profile.communication
    if facts is None or share <= 0:
        return []
    evidence: Evidence = {
        "communication.ranks": facts.ranks,
        "communication.share": facts.share,
        "communication.imbalance": facts.imbalance,
    }
    waiting = facts.imbalance or 0.0
    of = TIME_OF[metric]
    late = Cause(
        "load_imbalance",
        share * waiting,
        LOSS,
        f"In {percent(share * waiting)} of {of} ranks wait for a slower one: "
        f"{percent(waiting)} of the time in collectives is beyond what these take when all "
        "ranks come at once.",
        evidence,
    )
    links = Cause(
        "communication",
        share * (1 - waiting),
        LOSS,
        f"{percent(share * (1 - waiting))} of {of} goes to adding up partial results among "
        f"{facts.ranks} ranks.",
        evidence,
    )
    return [late, links] if waiting >= IMBALANCED else [links, late]


def throttled_part(profile: Profile) -> float:
    """The part of the device's time that lowered clocks cost.

    Work at a clock of r times the full one takes 1/r times as long, so 1 - r of that time is lost.
    `clock_ratio` is the mean of r over all samples while busy, slowed or not; no more can be lost
    than there are slowed ones.
    """
    gpu = profile.gpu
    if gpu is None or gpu.throttled_share is None or gpu.clock_ratio is None:
        return 0.0
    if gpu.throttled_share < THROTTLED_SAMPLES or gpu.clock_ratio > THROTTLED_CLOCK:
        return 0.0
    return min(gpu.throttled_share, 1 - gpu.clock_ratio)


def throttling_cause(profile: Profile, metric: str, share: float) -> Cause | None:
    """Lowered clocks, if there were any."""
    gpu = profile.gpu
    if gpu is None or gpu.clock_ratio is None or gpu.throttled_share is None or share <= 0:
        return None
    reasons = sorted(gpu.throttle_reasons, key=lambda name: -gpu.throttle_reasons[name])
    power = None
    if gpu.power_mean_watts is not None and gpu.power_limit_watts is not None:
        power = (
            f"it drew {number(gpu.power_mean_watts)} of {number(gpu.power_limit_watts)} W on "
            "average"
        )
    return Cause(
        "throttling",
        share,
        LOSS,
        joined(
            f"The GPU ran at {percent(gpu.clock_ratio)} of its full clock, slowed in "
            f"{percent(gpu.throttled_share)} of the samples, which costs {percent(share)} of "
            f"{TIME_OF[metric]}",
            f"reasons: {', '.join(reasons)}" if reasons else None,
            power,
        ),
        {
            "gpu.clock_ratio": gpu.clock_ratio,
            "gpu.throttled_share": gpu.throttled_share,
            "gpu.power_mean_watts": gpu.power_mean_watts,
            "gpu.power_limit_watts": gpu.power_limit_watts,
            **{f"gpu.throttle_reasons.{name}": gpu.throttle_reasons[name] for name in reasons},
        },
    )


def _knob(profile: Profile, name: str) -> float | int | str | bool | None:
    value = (profile.engine_config or {}).get(name)
    return value if isinstance(value, bool | int | float | str) else None


def _kv_bytes(profile: Profile) -> float | None:
    return None if profile.model is None else profile.model.kv_bytes_per_token
