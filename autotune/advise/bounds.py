"""What no configuration can beat on this device: bounds from bytes, operations and ceilings.

Each is a lower bound of a time (or an upper one of a rate) by one argument: a token of an answer
needs a pass over the weights and its sequence's keys and values; a prompt needs its operations; and
both need the fastest rate that the device was seen to reach. A bound of each request is one of any
statistic over requests: what is at least b(x) for every x has a percentile of at least that of b.

A pass yields a sequence several tokens where drafts are accepted, so that what a pass bounds is
divided by the most tokens a step that are known of this traffic. Other drafts may do better: such a
bound is certain only where the most that can be drafted at all would not meet the limit either.
"""

from __future__ import annotations

from dataclasses import dataclass

from autotune.advise.device_rates import DeviceRates, device_rates
from autotune.diagnose.sentences import number, percent, seconds, size
from autotune.profiling.schema import ModelFacts, Profile, Spread
from autotune.slo import Slo
from autotune.slo_grammar import Limit
from engine.speculate.draft import MOST_DRAFTED

# Tokens of a step that no drafts exceed.
_MOST_TOKENS = MOST_DRAFTED + 1
# Ceilings that were measured a moment ago, on a machine that others may use too, are known to
# about a tenth; a bound must break a limit by more.
MARGIN = 1.1
# Percentiles of lengths that a profile holds.
_KNOWN = (50.0, 95.0, 99.0)


@dataclass(frozen=True, slots=True)
class Bound:
    """The least value that a limit's quantity can have, or the greatest where more is better.

    In the unit of the limit. `certain` is false where a part of it was assumed; `proof` says how
    it follows.
    """

    value: float
    certain: bool
    proof: str


class Bounds:
    """Bounds of one profile's device, model and traffic."""

    def __init__(self, profile: Profile, model: ModelFacts, rates: DeviceRates) -> None:
        self._profile = profile
        self._model = model
        self._rates = rates
        hits = profile.kv.attainable_hit_rate
        self._hits_known = hits is not None
        self._hits = hits if hits is not None else profile.kv.hit_rate or 0.0
        self._tokens = _tokens_a_step(profile)

    @classmethod
    def of(cls, profile: Profile) -> Bounds | None:
        """The bounds that a profile allows; None without a model or measured ceilings."""
        rates = device_rates(profile)
        if rates is None or profile.model is None:
            return None
        return cls(profile, profile.model, rates)

    def of_limit(self, limit: Limit, slo: Slo) -> Bound | None:
        """The bound on what a limit holds; None where nothing is known to bound it."""
        statistic = limit.statistic or "p95"
        match limit.metric:
            case "tpot":
                return self._tpot(limit, statistic)
            case "itl":
                return self._gap(limit, statistic)
            case "ttft":
                return self._ttft(statistic)
            case "e2e":
                return self._e2e(limit, statistic)
            case "throughput":
                return self._throughput()
            case "goodput":
                return self._goodput(slo)
        return None

    def utilisation(self) -> Bound | None:
        """Seconds of arithmetic that arrive a second, at the device's fastest; above 1 queues grow.

        The operations of prompts that no cache can have, and of answers, without attention.
        """
        traffic = self._profile.traffic
        if traffic.rate is None or traffic.input_tokens is None or traffic.output_tokens is None:
            return None
        prompt, answer = traffic.input_tokens.mean, traffic.output_tokens.mean
        operations = 2.0 * self._model.matmul_parameters * prompt * (1 - self._hits)
        operations += 2.0 * (self._model.matmul_parameters + self._model.head_parameters) * answer
        load = traffic.rate * operations / self._rates.operations_per_s
        return Bound(
            load,
            self._hits_known,
            f"{number(traffic.rate)} requests a second of {number(prompt)} prompt and "
            f"{number(answer)} output tokens need {number(traffic.rate * operations / 1e9)} "
            f"billion operations a second; the device does {self._speed()}",
        )

    def _tpot(self, limit: Limit, statistic: str) -> Bound:
        """Tokens after the first need steps, which read the weights and the sequence's context."""
        inputs = self._profile.traffic.input_tokens
        tokens = _at(inputs, statistic) if inputs is not None else 0.0
        read = self._rates.read
        context = read.kv_per_token * tokens
        step = (read.weights + context) / self._rates.bytes_per_s
        cached = f" and {size(context)} of keys and values" if context else ""
        certain = self._certain(limit, step / _MOST_TOKENS)
        return Bound(step / self._tokens, certain, self._reading(cached, step))

    def _gap(self, limit: Limit, statistic: str) -> Bound:
        """The weights alone: which gaps belong to long prompts is not known.

        The tokens of one step come at once, so that of t tokens a step all gaps but a share 1 / t
        are nothing; a percentile above that share of nothings is a step, and the mean a t-th of it.
        """
        step = self._pass_s()

        def least(tokens: float) -> float:
            if statistic == "mean":
                return step / tokens
            return step if float(statistic[1:]) / 100 > 1 - 1 / tokens else 0.0

        certain = self._certain(limit, least(_MOST_TOKENS))
        return Bound(least(self._tokens), certain, self._reading("", step))

    def _ttft(self, statistic: str) -> Bound:
        inputs = self._profile.traffic.input_tokens
        tokens = self._computed(inputs, statistic) if inputs is not None else 1.0
        value, one_pass = self._prompt_s(tokens), self._pass_s()
        if value <= one_pass:
            return Bound(one_pass, self._rates.read.measured, self._reading("", one_pass))
        hits = (
            f" after every prefix hit that the trace allows ({percent(self._hits)})"
            if self._hits > 0
            else ""
        )
        if not self._hits_known:
            hits += " (how many more a cache could find is not known)"
        proof = (
            f"the {statistic} of prompts has at least {number(tokens)} tokens to compute{hits}: "
            f"{number(value * self._rates.operations_per_s / 1e9)} billion operations, which take "
            f"{seconds(value)} at {self._speed()}, with no wait and nothing else on the device"
        )
        return Bound(value, self._hits_known, proof)

    def _e2e(self, limit: Limit, statistic: str) -> Bound:
        """A first token, and of the further ones as many to a pass as a step yields."""
        first = self._ttft(statistic)
        outputs = self._profile.traffic.output_tokens
        if outputs is None:
            return first
        passes = max(0.0, _at(outputs, statistic) - 1) * self._pass_s()
        # Long prompts need not have long answers: percentiles of a sum are those of no part's sum.
        apart = statistic != "mean"

        def least(tokens: float) -> float:
            further = passes / tokens
            return max(first.value, further) if apart else first.value + further

        value = least(self._tokens)
        if value <= first.value:
            return first
        tokens = number(_at(outputs, statistic))
        proof = (
            f"the {statistic} of answers has {tokens} tokens: "
            f"{self._reading('', self._pass_s())}; together {seconds(value)}"
        )
        certain = first.certain and self._certain(limit, least(_MOST_TOKENS))
        return Bound(value, certain, proof)

    def _throughput(self) -> Bound:
        """Operations of an output token and of its part of a prompt; or no more than is asked."""
        traffic, model = self._profile.traffic, self._model
        ratio = traffic.prompt_output_ratio or 0.0
        operations = 2.0 * (model.matmul_parameters + model.head_parameters)
        if self._hits_known:
            operations += 2.0 * model.matmul_parameters * ratio * (1 - self._hits)
        most = self._rates.operations_per_s / operations
        outputs = traffic.output_tokens
        asked = traffic.rate * outputs.mean if traffic.rate and outputs else None
        if asked is not None and asked < most:
            proof = (
                f"{number(traffic.rate or 0.0)} requests a second with {number(outputs.mean)} "
                f"output tokens each ask for {number(asked)} tok/s; no server gives more than that"
                if outputs
                else ""
            )
            return Bound(asked, True, proof)
        proof = (
            f"an output token with its part of a prompt takes {number(operations / 1e9)} billion "
            f"operations: at {self._speed()} that is {number(most)} tok/s at most"
        )
        return Bound(most, True, proof)

    def _goodput(self, slo: Slo) -> Bound | None:
        """The share of requests whose own bounds are within the limits that each has to meet."""
        best: Bound | None = None
        for limit in slo.limits:
            if not limit.per_request or limit.metric == "itl":
                continue
            for percentile in (0.0, *_KNOWN):
                bound = self.of_limit(_with_percentile(limit, percentile), slo)
                if bound is None or bound.value < limit.bound * MARGIN:
                    continue
                share = percentile / 100
                if best is None or share < best.value:
                    proof = (
                        f"at most {percent(share)} of the requests can meet {limit.text}: "
                        f"{bound.proof}"
                    )
                    best = Bound(share, bound.certain, proof)
                break
        return best

    def _computed(self, inputs: Spread, statistic: str) -> float:
        """Prompt tokens that must be computed, by the same statistic over requests.

        Hits are known in sum alone. To bring the q-quantile below x, hits must shorten a share
        q - r of the requests from at least the r-quantile to x, for any r < q: so x is at least the
        r-quantile less the mean hits over (q - r).
        """
        hit_tokens = self._hits * inputs.mean
        if statistic == "mean":
            return inputs.mean - hit_tokens
        if hit_tokens == 0:
            return _at(inputs, statistic)
        q = float(statistic[1:])
        lower = [r for r in _KNOWN if r < q]
        bounds = [_at(inputs, f"p{r:g}") - 100 * hit_tokens / (q - r) for r in lower]
        # The last token of a prompt is always computed.
        return max(1.0, *bounds) if bounds else 1.0

    def _prompt_s(self, tokens: float) -> float:
        """Seconds of a prompt's operations: linear layers, the head once, causal attention."""
        model = self._model
        operations = 2.0 * model.matmul_parameters * tokens + 2.0 * model.head_parameters
        if not model.has_windows:
            operations += 4.0 * model.attention_features * tokens * tokens / 2
        return operations / self._rates.operations_per_s

    def _pass_s(self) -> float:
        """Seconds of reading the weights once."""
        return self._rates.read.weights / self._rates.bytes_per_s

    def _certain(self, limit: Limit, least: float) -> bool:
        """Whether even the most tokens a step break the limit, by what was timed."""
        return self._rates.read.measured and least >= limit.bound * MARGIN

    def _reading(self, more: str, step: float) -> str:
        """What bounds a step of so many seconds, and what a token takes of it."""
        read, rates = self._rates.read, self._rates
        method = "as they are" if read.method == "none" else f"as {read.method}"
        doubt = "" if read.measured else ", or a cache holds weights so small, which was not timed"
        known = (
            f"{seconds(step)} a token, unless a step yields several (speculative decoding)"
            if self._tokens <= 1
            else f"{seconds(step)} a step, of the {number(self._tokens)} tokens that are the most "
            f"known for this traffic (speculative decoding) {seconds(step / self._tokens)} each"
        )
        return (
            f"each step reads {size(read.weights)} of weights {method}{more}, and the device "
            f"{self._together()}reads at most {size(rates.bytes_per_s)}/s: {known}{doubt}"
        )

    def _speed(self) -> str:
        return (
            f"{number(self._rates.operations_per_s / 1e9)} billion operations a second "
            f"{self._together()}({self._rates.rounding}), the fastest seen"
        )

    def _together(self) -> str:
        devices = self._rates.devices
        return f"with all {devices} GPUs " if devices > 1 else ""


def _tokens_a_step(profile: Profile) -> float:
    """The most tokens of a step that are known of the traffic, by a measurement or the dry run."""
    measured, dry_run = profile.measured_speculation, profile.speculation
    known = [] if measured is None else [measured.tokens_per_step.high]
    known += [] if dry_run is None else dry_run.tokens_per_step.values()
    return max([1.0, *known])


def _with_percentile(limit: Limit, percentile: float) -> Limit:
    statistic = f"p{percentile:g}"
    return Limit(limit.metric, statistic, limit.operator, limit.bound, limit.text)


def _at(spread: Spread, statistic: str) -> float:
    """A statistic of a length, or the next lower one that is known: at least 0."""
    if statistic == "mean":
        return spread.mean
    asked = float(statistic[1:])
    known = {50.0: spread.p50, 95.0: spread.p95, 99.0: spread.p99}
    return max((value for q, value in known.items() if q <= asked), default=0.0)
