"""`profile.json`: everything that diagnosis and advice know of a serving engine.

Units are seconds, bytes, tokens, operations; shares lie in 0..1. What could not be measured is
None, and `partial` says why. Conditions of the technique table name these fields, so that a field
that is renamed here is renamed there.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from autotune.profiling.machine_schema import (
    AttentionProbe,
    Ceilings,
    Gpu,
    GpuSample,
    LinearProbe,
    Part,
    Probes,
    StepFit,
)
from autotune.profiling.speculation_schema import (
    AcceptancePosition,
    Bounded,
    DraftCost,
    MeasuredSpeculation,
    Speculation,
    SpeculativeLoad,
)

__all__ = [
    "PROFILE_VERSION",
    "AcceptancePosition",
    "AttentionProbe",
    "Bound",
    "Bounded",
    "Breakdown",
    "Ceilings",
    "Communication",
    "DraftCost",
    "Gpu",
    "GpuSample",
    "Host",
    "Imbalance",
    "KvCache",
    "LinearProbe",
    "MeasuredSpeculation",
    "ModelFacts",
    "Phase",
    "PhaseName",
    "Probes",
    "Profile",
    "Queueing",
    "SeriesPoint",
    "Source",
    "Speculation",
    "SpeculativeLoad",
    "Spread",
    "StepFit",
    "Traffic",
]

PROFILE_VERSION = 1

PhaseName = Literal["prefill", "decode", "mixed"]
Bound = Literal["compute", "bandwidth", "overhead"]


class Source(Part):
    """Where the profile comes from.

    `run`: the workload was run for it; `records`: a finished run or bench was read; `metrics`: a
    server's endpoint was sampled. `where` is the run folder or the endpoint, `server` the dialect
    of the endpoint, `trial` the number of the trial that was read.
    """

    kind: Literal["run", "records", "metrics"]
    where: str | None = None
    trial: int | None = None
    server: Literal["vllm", "sglang", "tgi", "llamacpp"] | None = None
    window_s: float | None = None


class ModelFacts(Part):
    """The model's arithmetic, as served. Sizes are the whole model's, over all its ranks together.

    `matmul_parameters` take part in a token's matrix products (of a mixture of experts those that
    one token meets; the output head only where a token is sampled: `head_parameters`, not among
    them). `weight_bytes` are read by a decode step at most: the embedding table is not, unless the
    head is tied to it. `resident_bytes` is all of the weights in memory. `attention_features` are
    query heads times head size, summed over the layers; a pair of query and key costs four
    operations for each. `kv_bytes_per_token` counts key/value heads as often as ranks hold them.
    Of a mixture of experts a token meets `experts_per_token` of the `num_experts` of a layer;
    `expert_bytes` are those of all experts of all layers. `head_bytes` are those of the output
    head, which is among `weight_bytes`; `kv_block_bytes` are those of one block of the cache.
    """

    name: str
    path: str | None = None
    architecture: str | None = None
    parameters: int
    matmul_parameters: int
    head_parameters: int
    weight_bytes: int
    resident_bytes: int
    kv_bytes_per_token: float
    attention_features: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_model_len: int
    weight_bits: int
    dtype: str
    quantization: str | None = None
    has_experts: bool = False
    has_windows: bool = False
    fingerprint: str | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    expert_bytes: int = 0
    head_bytes: int = 0
    kv_block_bytes: float = 0.0


class Phase(Part):
    """All steps of one kind. A mixed step has prompt chunks and decodes.

    `share` is of the time of all steps. `mean_batch` counts sequences a step, `tokens` all that the
    steps computed, drafted ones included. `intensity` is flops / bytes moved; `mfu` and `mbu` are
    over device time and the measured ceilings. `bound` says which ceiling is nearer, or `overhead`
    where neither is near.
    """

    name: PhaseName
    steps: int
    seconds: float
    share: float
    device_seconds: float
    host_seconds: float
    tokens: int
    sampled: int
    mean_batch: float
    step_p50: float
    step_p95: float
    flops: float | None = None
    weight_bytes: float | None = None
    kv_bytes: float | None = None
    intensity: float | None = None
    mfu: float | None = None
    mbu: float | None = None
    bound: Bound | None = None


class Spread(Part):
    """Statistics of a quantity over requests or steps."""

    mean: float
    p50: float
    p95: float
    p99: float
    max: float


class Traffic(Part):
    """What arrived: `arrival_cv` is the coefficient of variation of the gaps (1 for Poisson).

    `dispersion` is the variance over the mean of arrivals per `dispersion_window_s` (1 for
    Poisson). `top_output_share` is the part of all output tokens that the longest tenth of the
    answers has. `prompt_output_ratio` is mean input over mean output tokens. `texts` says whether
    prompts are recorded ones; synthesised tokens say nothing of acceptance.
    """

    requests: int
    completed: int
    refused: int
    failed: int
    timed_out: int
    duration_s: float
    rate: float | None
    input_tokens: Spread | None
    output_tokens: Spread | None
    arrival_cv: float | None = None
    dispersion: float | None = None
    dispersion_window_s: float | None = None
    top_output_share: float | None = None
    prompt_output_ratio: float | None = None
    texts: bool | None = None

    @classmethod
    def none(cls) -> Traffic:
        """No traffic at all."""
        return cls(
            requests=0,
            completed=0,
            refused=0,
            failed=0,
            timed_out=0,
            duration_s=0.0,
            rate=None,
            input_tokens=None,
            output_tokens=None,
        )


class KvCache(Part):
    """The KV cache: occupancy is blocks owned by requests over all blocks.

    `fragmentation` is the share of owned slots that hold no token. `hit_rate` is prompt tokens
    found in the cache over prompt tokens asked for; `attainable_hit_rate` what an unbounded cache
    would have found on this trace at this block size. `preempted_share` is the part of requests
    that were preempted, `recomputed_share` that of prefill tokens computed again after it.
    `blocked_share` is the part of the steps' time in which requests waited while seats and token
    budget were free, for want of blocks. `seats` is how many mean requests the cache holds at once.
    """

    blocks_total: int | None = None
    block_size: int | None = None
    total_bytes: float | None = None
    occupancy_mean: float | None = None
    occupancy_peak: float | None = None
    fragmentation: float | None = None
    preemptions: int | None = None
    preempted_share: float | None = None
    recomputed_share: float | None = None
    blocked_share: float | None = None
    refused_for_size: int | None = None
    hit_rate: float | None = None
    attainable_hit_rate: float | None = None
    seats: float | None = None


class Queueing(Part):
    """Waiting before the first step.

    `busy_share` is step time over wall time while requests arrive; `utilisation` the offered over
    the sustainable rate, 1 and above where the queue grows. `wait` is the time from the intended
    send to the first seat, `wait_share` its part of TTFT, summed over requests.
    `at_seat_limit_share` is the part of step time with every seat taken and requests waiting,
    `at_token_budget_share` with the token budget used up and requests waiting, `barrier_share` with
    seats free and requests waiting for a static batch to end. `growth_per_s` is the trend of
    waiting and running requests over the arrivals' span, and `stable` whether it is negligible.
    """

    busy_share: float | None = None
    utilisation: float | None = None
    wait: Spread | None = None
    wait_share: float | None = None
    queue_mean: float | None = None
    queue_max: int | None = None
    running_mean: float | None = None
    running_max: int | None = None
    at_seat_limit_share: float | None = None
    at_token_budget_share: float | None = None
    barrier_share: float | None = None
    growth_per_s: float | None = None
    stable: bool | None = None


class Host(Part):
    """Time that the device idles between steps because the host works.

    `share` is host seconds over step seconds, `per_step_s` the median of a step's host time,
    `scheduler_share` the scheduler's part of step time, `decode_share` the share within pure decode
    steps. Drafting is not among them.
    """

    share: float
    decode_share: float | None
    per_step_s: float
    scheduler_share: float


class Communication(Part):
    """Collectives among ranks: their share of device time, and how long the slowest is waited for.

    `imbalance` is the part of the collectives' time beyond what an idle collective takes: ranks
    waiting for slower ones.
    """

    ranks: int
    share: float | None = None
    per_step_s: float | None = None
    imbalance: float | None = None


class Imbalance(Part):
    """How unequal steps are: coefficients of variation of the time and tokens of all of them."""

    step_time_cv: float
    step_tokens_cv: float


class Breakdown(Part):
    """Where the time of one metric goes; `parts` are shares by component and sum to 1.

    Of TTFT and TPOT it is of the requests' own time, of throughput of wall time. Components:
    `queue` (waiting for a seat, beyond the end of a step under way), `prefill_linear` and
    `prefill_attention` (its own prompt), `interference` (steps longer through others' prompt
    chunks, and chunks of others before its own), `weights` (linear layers while memory bounds
    them), `linear_compute` (those of decodes while arithmetic does), `kv_reads` (decode attention
    as far as it grows with the context), `drafting` (guessing tokens, which is no part of `host`
    here), `verification` (what steps took longer for the drafted tokens in them), `host`,
    `communication`, `preempted` (waiting and computing again), `other` (device time that is neither
    reading nor arithmetic), `idle`.
    """

    metric: Literal["ttft", "tpot", "throughput"]
    seconds: float
    parts: dict[str, float]


class SeriesPoint(Part):
    """The engine at one moment of the load, for pictures; at most some hundred of them."""

    at_s: float
    queue: float
    running: float
    occupancy: float | None


class Profile(Part):
    """A whole profile; see the parts. `metrics` has the keys of `bench --json`."""

    profile_version: int = PROFILE_VERSION
    created_at: str
    source: Source
    engine_config: dict[str, Any] | None = None
    hardware: dict[str, Any] | None = None
    slo: str | None = None
    price: float | None = None
    model: ModelFacts | None = None
    ceilings: Ceilings | None = None
    traffic: Traffic
    metrics: dict[str, Any] | None = None
    phases: list[Phase] = Field(default_factory=list)
    kv: KvCache = Field(default_factory=KvCache)
    queueing: Queueing = Field(default_factory=Queueing)
    host: Host | None = None
    communication: Communication | None = None
    imbalance: Imbalance | None = None
    speculation: Speculation | None = None
    measured_speculation: MeasuredSpeculation | None = None
    breakdowns: list[Breakdown] = Field(default_factory=list)
    step_fit: StepFit | None = None
    probes: Probes | None = None
    gpu: Gpu | None = None
    series: list[SeriesPoint] = Field(default_factory=list)
    partial: list[str] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)

    def phase(self, name: PhaseName) -> Phase | None:
        """The phase of this name, if there were such steps."""
        return next((phase for phase in self.phases if phase.name == name), None)

    def breakdown(self, metric: str) -> Breakdown | None:
        """Where the time of a metric goes, if it is known."""
        return next((b for b in self.breakdowns if b.metric == metric), None)
