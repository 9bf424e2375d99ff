"""Predictions by replaying the recorded traffic on the real scheduler with fitted step costs."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.measure import at_rate
from autotune.metrics import compute_metrics
from autotune.predict.apply import UNMEASURED_KNOBS, NotPredictable, apply_change
from autotune.predict.asked import latency_statistics
from autotune.predict.cache_after import Served, cache_after
from autotune.predict.change import Change, Factor, Term, value_of
from autotune.predict.comparing import latency_logs, latency_ratio, served_per_second
from autotune.predict.decoding import Decoding
from autotune.predict.draft_knowledge import DraftKnowledge
from autotune.predict.drafting import DraftProfile
from autotune.predict.fit import step_cost
from autotune.predict.gain import Basis, PredictedGain
from autotune.predict.intervals import Z90, bounds, misfit, single_trials_spread, trial_noise
from autotune.predict.load_times import LoadTimes, load_times
from autotune.predict.memory_need import memory_gain
from autotune.predict.pace import Pace, recorded_pace
from autotune.predict.recorded_traffic import (
    changed_traffic,
    jittered,
    leading_requests,
    recorded_drain_limit,
    recorded_outputs,
    recorded_requests,
)
from autotune.predict.replay import Replayed, replay
from autotune.predict.served import served
from autotune.predict.step_cost import StepCost
from autotune.predict.told_speculation import as_played
from autotune.profiling.evidence import LoadEvidence
from autotune.profiling.schema import Profile
from autotune.slo import Slo
from autotune.workload.materialise import LoadRequest
from engine.config import KNOBS, EngineConfig
from engine.engine import CacheShape
from engine.errors import EngineError

# Terms that an exchanged function of the cost replaces: knobs are judged by the probes.
COST_KNOBS = ("quantization", "kv_cache_dtype", "block_size", "speculative_method")
# How much is replayed: a budget of a second pays for so many output tokens, shared by so many
# replays. A constant rather than a clock, so that equal profiles give equal predictions.
TOKENS_PER_SECOND = 60_000
PLANNED_REPLAYS = 160
FEWEST_TOKENS = 2_000
FEWEST_REQUESTS = 60
# Trials alike differ by chance: by how much, so many replays with other chances tell, of the
# default and of each change. Predicted is the middle of them.
BASE_WOBBLES = 5
CHANGED_WOBBLES = 3
# With all requests at once batches are large, and a token takes so much less time to play.
AT_ONCE_TOKENS = 4
# Standard deviations of logarithms. Between two trials the machine itself changes its speed; a part
# that a probe measured alone lies so far from what it takes within a step.
DRIFT = 0.03
PROBE = 0.05
# How long after the last arrival a load gives up, where it never came to that.
DRAIN_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class _Situation:
    """A configuration under some traffic, ready to be replayed."""

    config: EngineConfig
    cost: StepCost
    cache: CacheShape
    requests: Sequence[LoadRequest]
    decoding: Decoding
    drafts: DraftProfile | None


class ReplayPredictor:
    """Predicts by replay; made by `replay_predictor`."""

    basis: Basis = "replay"

    def __init__(
        self,
        profile: Profile,
        evidence: LoadEvidence,
        base: Served,
        cost: StepCost,
        cache: CacheShape,
        slo: Slo | None,
        seed: int,
        budget_s: float,
    ) -> None:
        self._profile = profile
        self._evidence = evidence
        self._base = base
        self._cost = cost
        self._cache = cache
        self._slo = slo
        self._seed = seed
        self._times: LoadTimes = load_times(evidence)
        self._drafts = DraftKnowledge.of([(base.config, evidence)])
        self._pace = recorded_pace(evidence.steps, cost)
        self._outputs = recorded_outputs(evidence)
        limit = recorded_drain_limit(evidence)
        self._drain_limit = DRAIN_LIMIT_S if limit is None else limit
        tokens = max(FEWEST_TOKENS, int(budget_s * TOKENS_PER_SECOND / PLANNED_REPLAYS))
        requests = recorded_requests(evidence)
        self._paced = leading_requests(requests, tokens, FEWEST_REQUESTS)
        self._at_once = at_rate(
            leading_requests(requests, tokens * AT_ONCE_TOKENS, FEWEST_REQUESTS), None
        )
        if all(request.arrival_s == 0.0 for request in requests):
            self._paced = self._at_once
        self._statistics = latency_statistics(slo, profile.metrics)
        times = [step.seconds for step in evidence.steps]
        self._step_s = statistics.median(times) if times else 0.0
        self._replays: dict[str, Replayed | None] = {}
        self._noise: dict[str, float] = {}

    def metrics(
        self, change: Change | None = None, rate_factor: float | None = 1.0
    ) -> dict[str, Any] | None:
        """Metrics after a change, by the keys of `bench`; None where they cannot be predicted."""
        change = self._as_played(change or Change())
        played = self._play(change, rate_factor)
        config = self._config(change)
        if played is None or config is None:
            return None
        return compute_metrics(
            played.records,
            self._slo,
            duration=played.duration,
            config=config,
            load_delivered=True,
            load_note=None,
            engine=played.totals.to_metrics(),
            resamples=0,
        )

    def gains(self, change: Change) -> tuple[PredictedGain, ...]:
        """Gains over what was profiled, for each metric that can be judged."""
        change = self._as_played(change)
        base, changed = self._play(Change(), 1.0), self._play(change, 1.0)
        if base is None or changed is None:
            return ()
        spread = math.exp(Z90 * self._step_spread(change))
        speeds = [self._play(change, 1.0, slower) for slower in (spread, 1 / spread)]
        ends = [self._play(end, 1.0) for end in change.ends()]
        before = [self._play(Change(), 1.0, wobble=i) for i in range(BASE_WOBBLES)]
        after = [self._play(change, 1.0, wobble=i) for i in range(CHANGED_WOBBLES)]
        gains = []
        for metric, statistic in self._statistics.items():
            value = latency_ratio(base, changed, metric, statistic)
            if value is None:
                continue
            ranges = [
                [r / value for c in plays if c and (r := latency_ratio(base, c, metric, statistic))]
                for plays in (speeds, ends)
            ]
            first = latency_logs(before, metric, statistic)
            second = latency_logs(after, metric, statistic)
            if len(first) < len(second):
                continue
            # Each change meets the chances that the default met, so that these cancel.
            pairs = zip(first, second, strict=False)
            value = math.exp(statistics.fmean(a - b for a, b in pairs))
            chance = single_trials_spread(first, second)
            noise = max(chance, self._noise_of(metric, statistic, base))
            low, high = bounds(value, [[value * r for r in around] for around in ranges], noise)
            gains.append(PredictedGain(metric, value, low, high, "replay", statistic))
        gains += self._throughput(change)
        memory = memory_gain(self._profile, self._base, self._served(change), change.factors)
        return (*gains, *memory)

    def _throughput(self, change: Change) -> list[PredictedGain]:
        """Requests a second with all of them at once; cost follows.

        Requests that a technique keeps from the model are served too.
        """
        base, changed = self._play(Change(), None), self._play(change, None)
        if base is None or changed is None:
            return []
        before, after = served_per_second(base), served_per_second(changed)
        if not before or not after:
            return []
        value = after / before / value_of(change.factors, "requests")
        ends = [self._play(end, None) for end in change.ends()]
        told = [value * served_per_second(play) / after for play in ends if play is not None]
        # A step that takes longer makes so much less of it.
        low, high = bounds(value, [told], self._step_spread(change))
        price = value_of(change.factors, "price")
        return [
            PredictedGain("throughput", value, low, high, "replay"),
            PredictedGain("cost", value / price, low / price, high / price, "replay"),
        ]

    def _step_spread(self, change: Change) -> float:
        """Standard deviation of the logarithm of a changed step's time over an unchanged one's."""
        parts = [max(DRIFT, math.sqrt(2) * self._pace.drift)]
        config = self._base.config
        if any(
            name in change.knobs and change.knobs[name] != getattr(config, name)
            for name in COST_KNOBS
        ):
            parts.append(PROBE)
        fit = self._profile.step_fit
        if fit is not None and not change.is_same(config):
            parts.append(misfit(fit.median_error))
        return math.hypot(*parts)

    def _noise_of(self, metric: str, statistic: str, base: Replayed) -> float:
        key = f"{statistic}({metric})"
        if key not in self._noise:
            found = trial_noise(
                self._evidence.requests, base.records, metric, statistic, self._seed
            )
            self._noise[key] = DRIFT if found is None else found
        return self._noise[key]

    def _play(
        self,
        change: Change,
        rate_factor: float | None,
        slower: float = 1.0,
        wobble: int = 0,
    ) -> Replayed | None:
        """The replay of a change, its steps `slower` times as long; None if it is not possible."""
        key = json.dumps(
            [
                dict(change.knobs),
                {term: dataclasses.astuple(f) for term, f in change.factors.items()},
                rate_factor,
                slower,
                wobble,
            ],
            sort_keys=True,
        )
        if key not in self._replays:
            pace = self._pace if rate_factor == 1.0 else self._pace.steady
            # What all at once makes of it is asked of the engine, not of the load's patience.
            limit = math.inf if rate_factor is None else self._drain_limit
            situation = self._situation(change, rate_factor)
            if wobble and situation is not None:
                # Another trial has its slow moments elsewhere, and sends a little off.
                pace = pace.turned(wobble * len(pace.factors) // BASE_WOBBLES)
                later = jittered(situation.requests, self._step_s, self._seed + wobble)
                situation = dataclasses.replace(situation, requests=later)
            self._replays[key] = (
                None if situation is None else self._replay(situation, pace.slowed(slower), limit)
            )
        return self._replays[key]

    def _replay(self, situation: _Situation, pace: Pace, drain_limit: float) -> Replayed:
        return replay(
            situation.requests,
            situation.config,
            situation.cost,
            situation.cache,
            drain_limit=drain_limit,
            outputs=self._outputs,
            times=self._times,
            pace=pace,
            decoding=situation.decoding,
            drafts=situation.drafts,
        )

    def _situation(self, change: Change, rate_factor: float | None) -> _Situation | None:
        factors = change.factors
        config = self._config(change)
        changed = self._served(change)
        if config is None or changed is None:
            return None
        cost = self._cost_of(change)
        cache = self._cache_of(changed, factors)
        drafts = None if cost is None else self._drafts.profile(config, cost)
        unknown = config.speculative_method != "none" and drafts is None
        if cost is None or cache is None or unknown:
            return None
        requests: Sequence[LoadRequest] = self._at_once if rate_factor is None else self._paced
        if rate_factor is not None and rate_factor != 1.0:
            requests = at_rate(requests, rate_factor)
        terms: Sequence[Term] = ("rate", "input_tokens", "output_tokens", "requests")
        if any(value_of(factors, term) != 1.0 for term in terms):
            requests = changed_traffic(
                requests,
                rate=value_of(factors, "rate"),
                input_tokens=value_of(factors, "input_tokens"),
                output_tokens=value_of(factors, "output_tokens"),
                # At once there are as many as the engine can take, whichever reach it.
                share=1.0 if rate_factor is None else value_of(factors, "requests"),
            )
        decoding = Decoding(
            tokens_per_step=value_of(factors, "tokens_per_step"),
            verify_tokens=value_of(factors, "verify_tokens"),
            prompt_share=value_of(factors, "prefill_in_decode"),
        )
        if not requests:
            return None
        return _Situation(config, cost, cache, requests, decoding, drafts)

    def _as_played(self, change: Change) -> Change:
        return as_played(change, self._base.config, self._drafts, self._cost)

    def _config(self, change: Change) -> EngineConfig | None:
        """The changed config; None if it is refused, or a knob's effect is not known."""
        config = self._base.config
        if any(name not in KNOBS for name in change.knobs):
            return None
        try:
            return config.replace(**change.knobs)
        except EngineError:
            return None

    def _cost_of(self, change: Change) -> StepCost | None:
        """The changed cost of a step; None if nobody knows it.

        A technique that says what its knob does to the terms is taken at its word.
        """
        probes, config = self._profile.probes, self._base.config
        assert probes is not None
        knobs = dict(change.knobs)
        if change.factors:
            knobs = {n: v for n, v in knobs.items() if n not in UNMEASURED_KNOBS}
        try:
            return apply_change(
                self._cost, Change(knobs, change.factors), self._base.model, config, probes
            )
        except NotPredictable:
            return None

    def _served(self, change: Change) -> Served | None:
        config = self._config(change)
        if config is None:
            return None
        return self._base if config == self._base.config else served(config, self._base)

    def _cache_of(self, changed: Served, factors: Mapping[Term, Factor]) -> CacheShape | None:
        capacity, resident = value_of(factors, "kv_capacity"), value_of(factors, "resident_weights")
        if changed is self._base and capacity == 1.0 and resident == 1.0:
            return self._cache
        hardware = self._profile.hardware or {}
        return cache_after(
            self._base,
            changed,
            self._profile.kv,
            on_gpu=hardware.get("device") == "cuda",
            gpu_bytes=hardware.get("memory_bytes"),
            capacity=capacity,
            resident=resident,
        )


def replay_predictor(
    profile: Profile,
    evidence: LoadEvidence | None,
    slo: Slo | None,
    *,
    seed: int,
    budget_s: float,
) -> ReplayPredictor | None:
    """A predictor by replay; None if the profile or the records lack what it needs."""
    model, probes, fit = profile.model, profile.probes, profile.step_fit
    if evidence is None or not evidence.requests or profile.engine_config is None:
        return None
    if model is None or probes is None or fit is None:
        return None
    try:
        config = EngineConfig.from_mapping(profile.engine_config)
        cost = step_cost(fit, probes, config)
        base = served(config, None, model)
    except (EngineError, ValueError):
        return None
    if base is None:
        return None
    on_gpu = (profile.hardware or {}).get("device") == "cuda"
    cache = cache_after(base, base, profile.kv, on_gpu=on_gpu)
    if cache is None:
        return None
    return ReplayPredictor(profile, evidence, base, cost, cache, slo, seed, budget_s)
