"""Factors against measurements that were published of whole decode steps and of kernels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from autotune.errors import AutotuneError, BadInput
from autotune.hardware.catalogue import Gpu, load_catalogue
from autotune.hardware.efficiency import (
    SHARES,
    Efficiency,
    Factors,
    all_reduce_seconds,
    efficiency_of,
    efficiency_table,
    shifted,
)
from autotune.hardware.efficiency_file import read_table
from autotune.simulation.interval import Interval


def gpu(name: str) -> Gpu:
    return load_catalogue().find(name)


def drawn(efficiency: Efficiency, count: int = 2000) -> list[Factors[float]]:
    rng = np.random.default_rng(7)
    return [efficiency.drawn(rng) for _ in range(count)]


# A decode step of one sequence with a short context: GPU, bytes of weights read, bits of a weight,
# layers, whether a server drives it, milliseconds measured. H100 and B200: Llama-3.1-8B under
# vLLM (blog of 2026-04-22), and under SGLang at 158.3 tokens/s. A100: gpt-fast's README, from its
# tokens/s and GB/s, 7B and 70B.
STEPS = [
    ("h100", 15.01e9, 16, 32, True, 6.44),
    ("h100", 15.01e9, 16, 32, True, 1e3 / 158.3),
    ("b200", 15.01e9, 16, 32, True, 3.93),
    ("a100", 1397e9 / 104.9, 16, 32, False, 1e3 / 104.9),
    ("a100", 1069e9 / 155.58, 8, 32, False, 1e3 / 155.58),
    ("a100", 863e9 / 196.8, 4, 32, False, 1e3 / 196.8),
    ("a100", 1323e9 / 19.13, 8, 80, False, 1e3 / 19.13),
    ("a100", 1098e9 / 25.25, 4, 80, False, 1e3 / 25.25),
]


@pytest.mark.parametrize(("name", "size", "bits", "layers", "served", "measured_ms"), STEPS)
def test_a_step_is_met(
    name: str, size: float, bits: int, layers: int, served: bool, measured_ms: float
) -> None:
    device = gpu(name)

    def step(factors: Factors[float]) -> float:
        reading = size / (factors.bandwidth[bits] * device.bandwidth)
        kernels = layers * (8 * factors.kernel_latency + factors.attention_latency)
        host = factors.step_overhead + factors.sequence_overhead if served else 0.0
        return 1e3 * (reading + kernels + host)

    efficiency = efficiency_of(device)
    assert step(efficiency.middle()) == pytest.approx(measured_ms, rel=0.10)
    low, high = np.quantile([step(f) for f in drawn(efficiency)], (0.05, 0.95))
    assert low < measured_ms < high
    assert high / low < 1.9


# Shares of the dense peak that were measured with at least 2,048 rows (kernel database, vLLM 0.24).
MATMULS = [
    ("h200", "bf16", (841, 777)),
    ("h100", "bf16", (880, 723)),
    ("a100", "bf16", (279, 293)),
    ("l40s", "bf16", (242, 264)),
    ("b200", "bf16", (1809, 1396)),
    ("rtx-pro-6000", "bf16", (397, 389)),
    ("h200", "fp8", (1391, 1435)),
    ("h100", "fp8", (1228, 1432)),
    ("l40s", "fp8", (408, 387)),
    ("b200", "fp8", (2727, 2649)),
    ("b200", "fp4", (4440, 3801)),
]


@pytest.mark.parametrize(("name", "dtype", "measured"), MATMULS)
def test_matmuls_lie_in_their_range(name: str, dtype: str, measured: tuple[float, ...]) -> None:
    device = gpu(name)
    factor = efficiency_of(device).spread.matmul[dtype]
    for tflops in measured:
        assert factor.low <= tflops * 1e12 / device.rates[dtype] <= factor.high
    mean = sum(measured) / len(measured) * 1e12 / device.rates[dtype]
    assert factor.value == pytest.approx(mean, rel=0.1)


# TFLOP/s of causal prefill attention at 16,384 tokens; bytes of a large cache over the peak.
PREFILL = [("h200", 652), ("h100", 664), ("a100", 176), ("l40s", 186), ("b200", 1244)]
DECODE = [
    ("h200", 16, (0.83, 0.91)),
    ("h200", 8, (0.54, 0.65, 0.88)),
    ("h100", 16, (0.86, 0.93)),
    ("h100", 8, (0.70, 0.84)),
    ("a100", 16, (0.54, 0.70)),
    ("b200", 16, (0.82, 0.92)),
    ("b200", 8, (0.70, 0.87)),
]


@pytest.mark.parametrize(("name", "tflops"), PREFILL)
def test_prefill_attention_lies_in_its_range(name: str, tflops: float) -> None:
    device = gpu(name)
    factor = efficiency_of(device).spread.prefill_attention
    share = tflops * 1e12 / device.rates["bf16"]
    # Portable kernels reach 0.75 of these.
    assert factor.low <= 0.76 * share < share <= factor.high
    assert factor.value == pytest.approx(share, rel=0.15)


@pytest.mark.parametrize(("name", "bits", "shares"), DECODE)
def test_decode_attention_lies_in_its_range(
    name: str, bits: int, shares: tuple[float, ...]
) -> None:
    factor = efficiency_of(gpu(name)).spread.decode_attention[bits]
    for share in shares:
        assert factor.low <= share <= factor.high


def test_every_gpu_has_factors_for_all_it_can_do() -> None:
    catalogue = load_catalogue()
    for name in catalogue.names():
        device = catalogue.find(name)
        efficiency = efficiency_of(device)
        assert set(device.rates) <= set(efficiency.spread.matmul)
        assert {device.link.kind, device.host_link.kind} <= set(efficiency.spread.all_reduce)
        assert efficiency.basis
        assert efficiency.date.startswith("2026-")
    assert set(efficiency_table().devices) <= set(catalogue.names())


def test_the_unmeasured_are_less_certain_than_the_measured() -> None:
    def width(name: str) -> float:
        factor = efficiency_of(gpu(name)).spread.matmul["bf16"]
        return factor.high / factor.low

    measured = max(width(name) for name in ("h100", "h200", "a100", "l40s", "b200"))
    for name in ("mi355x", "gaudi3", "rtx-3090", "l4", "mi210"):
        assert width(name) > measured


def test_fewer_bits_never_stream_at_a_greater_share() -> None:
    for efficiency in efficiency_table().generations.values():
        shares = [efficiency.spread.bandwidth[bits].value for bits in (4, 8, 16)]
        assert shares == sorted(shares)
        # But always sooner: half the bytes at more than half the share.
        assert shares[0] > shares[1] / 2 > shares[2] / 4


def test_draws_have_the_quantiles_that_they_are_made_of() -> None:
    factors = drawn(efficiency_of(gpu("h100")), 20_000)
    spread = efficiency_of(gpu("h100")).spread
    for told, found in (
        (spread.kernel_latency, [f.kernel_latency for f in factors]),
        (spread.bandwidth[16], [f.bandwidth[16] for f in factors]),
        (spread.all_reduce["nvlink"], [f.all_reduce["nvlink"] for f in factors]),
    ):
        low, middle, high = np.quantile(found, (0.05, 0.5, 0.95))
        assert (low, middle, high) == pytest.approx((told.low, told.value, told.high), rel=0.03)
    # Kinds of one field share their cause; different fields do not.
    sixteen, eight = [f.bandwidth[16] for f in factors], [f.bandwidth[8] for f in factors]
    assert np.corrcoef(sixteen, eight)[0, 1] > 0.95
    assert abs(np.corrcoef(sixteen, [f.kernel_latency for f in factors])[0, 1]) < 0.05


def test_draws_repeat_and_no_share_exceeds_the_whole() -> None:
    efficiency = efficiency_of(gpu("rtx-pro-6000"))
    first, again = (efficiency.drawn(np.random.default_rng(3)) for _ in range(2))
    assert first == again
    assert first != efficiency.drawn(np.random.default_rng(4))
    seen: dict[str, list[float]] = {}
    for factors in drawn(efficiency, 3000):
        factors.each(lambda name, value: seen.setdefault(name, []).append(value))
    assert set(seen) == set(Factors.__dataclass_fields__)
    for name, values in seen.items():
        assert min(values) > 0
        assert name not in SHARES or max(values) <= 1


def test_shifted() -> None:
    factor = Interval(2.0, 1.0, 3.0)
    assert shifted(factor, 0.0) == 2.0
    assert shifted(factor, 1.6448536269514722) == pytest.approx(3.0)
    assert shifted(factor, -1.6448536269514722) == pytest.approx(1.0)
    assert shifted(factor, -100.0) > 0


def test_all_reduce() -> None:
    factors = efficiency_of(gpu("h100")).middle()
    assert all_reduce_seconds(factors, gpu("h100"), 1, 1e9) == 0
    # 366 GB/s of bus bandwidth were measured on four H100.
    seconds = all_reduce_seconds(factors, gpu("h100"), 4, 1e9)
    assert 2 * 3 / 4 * 1e9 / seconds == pytest.approx(366e9, rel=0.1)
    # One token of an 8B model: all latency.
    small = all_reduce_seconds(factors, gpu("h100"), 8, 8192)
    assert small == pytest.approx(factors.all_reduce_latency["nvlink"], rel=0.01)
    assert all_reduce_seconds(factors, gpu("l40s"), 4, 1e8) > 5 * all_reduce_seconds(
        factors, gpu("h100"), 4, 1e8
    )
    # Bus bandwidths of NCCL that were measured lie within what the spread allows.
    for name, gpus, measured in (
        ("rtx-5090", 4, 35e9),
        ("rtx-5090", 8, 28e9),
        ("h100-nvl", 2, 116e9),
        ("mi300x", 2, 48e9),
    ):
        share = efficiency_of(gpu(name)).spread.all_reduce[gpu(name).link_among(gpus).kind]
        assert share.low <= measured / gpu(name).link_among(gpus).bytes_per_s <= share.high
    # Two of a mesh of eight have one wire of seven.
    of_mesh = [all_reduce_seconds(factors, gpu("mi300x"), n, 1e9) for n in (2, 8)]
    assert of_mesh[0] > 3 * of_mesh[1]


def test_an_unknown_generation_is_told() -> None:
    import dataclasses

    strange = dataclasses.replace(gpu("h100"), name="mine", generation="future")
    with pytest.raises(BadInput, match="unknown generation 'future'; known are volta"):
        efficiency_of(strange)


def broken_tables() -> list[tuple[str, Any]]:
    return [
        ("bandwidth", {16: [0.9, 0.8, 0.95], 8: [0.5, 0.6, 0.7], 4: [0.5, 0.6, 0.7]}),
        ("bandwidth", {16: [0.7, 0.8, 0.95]}),
        ("prefill_attention", [0.5, 0.8, 1.2]),
        ("prefill_attention", [0, 0.5, 0.8]),
        ("kernel_us", [1, 2]),
        ("kernel_us", [1, 2, float("inf")]),
        ("matmul", {"bf17": [0.1, 0.2, 0.3]}),
        ("warp", 9),
    ]


@pytest.mark.parametrize(("key", "value"), broken_tables())
def test_a_broken_table_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    from importlib import resources

    text = (resources.files("autotune.hardware") / "efficiency.yaml").read_text()
    content = yaml.safe_load(text)
    path = tmp_path / "efficiency.yaml"
    path.write_text(yaml.safe_dump(content))
    assert read_table(path) == efficiency_table()
    content["generations"]["hopper"][key] = value
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(AutotuneError, match="broken"):
        read_table(path)
