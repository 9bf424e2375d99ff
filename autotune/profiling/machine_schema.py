"""What a profile holds of the machine: its ceilings, parts of a step measured alone, its GPUs."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """A part of a profile: it does not change, and a field that is not known is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Ceilings(Part):
    """What the device was measured to do: bytes/s and operations/s.

    `bandwidth` is that of main memory, `working_set_bandwidth` that of a buffer as large as the
    weights, which a cache may hold. `matmul` is by dtype; `compute_dtype` is the one that the
    engine multiplies in. The ridge, in operations per byte, is `matmul[compute_dtype]` over
    `working_set_bandwidth`.
    """

    bandwidth: float
    working_set_bandwidth: float
    matmul: dict[str, float]
    compute_dtype: str
    ridge: float
    launch_cost_s: float | None = None
    graph_launch_cost_s: float | None = None


class StepFit(Part):
    """Cost of a step fitted to the records; see `autotune.predict.step_cost`.

    `coefficients` by term; `median_error` and `p90_error` are relative, of held-out steps.
    """

    coefficients: dict[str, float]
    median_error: float
    p90_error: float
    steps: int


class LinearProbe(Part):
    """Seconds of all linear layers of a forward pass, the head apart, measured by rows of a step.

    `head` is the output head at the same rows. One entry a quantization method.
    """

    method: str
    rows: list[int]
    layers_s: list[float]
    head_s: list[float]


class AttentionProbe(Part):
    """Seconds of the attention of all layers, by cache dtype.

    Decodes: each point is (sequences, context tokens of each): seconds. Prompt chunks: each point
    is (new tokens, context tokens with them): seconds.
    """

    kv_cache_dtype: str
    sequences: list[int]
    contexts: list[int]
    seconds: list[float]
    chunk_tokens: list[int] = Field(default_factory=list)
    chunk_contexts: list[int] = Field(default_factory=list)
    chunk_seconds: list[float] = Field(default_factory=list)


class Probes(Part):
    """What parts of a step cost with each method that is offered here, measured alone."""

    linears: list[LinearProbe] = Field(default_factory=list)
    attention: list[AttentionProbe] = Field(default_factory=list)
    seconds: float = 0.0


class GpuSample(Part):
    """One reading; watts, Hz, bytes, bytes/s. `throttled_by` are the reasons that slow the GPU."""

    at_s: float
    index: int
    power_watts: float | None = None
    clock_sm_hz: int | None = None
    clock_memory_hz: int | None = None
    temperature_celsius: int | None = None
    memory_used_bytes: int | None = None
    utilisation: float | None = None
    pcie_rx_bytes_per_s: float | None = None
    pcie_tx_bytes_per_s: float | None = None
    throttled_by: list[str] | None = Field(default_factory=list)


class Gpu(Part):
    """Samples of the GPUs during the load; `throttled_share` of samples had a slowing reason."""

    samples: list[GpuSample]
    interval_s: float
    power_mean_watts: float | None = None
    power_limit_watts: float | None = None
    clock_ratio: float | None = None
    throttled_share: float | None = None
    throttle_reasons: dict[str, float] = Field(default_factory=dict)
