"""The catalogue against vendors' printed figures, copied here by hand, and against plausibility."""

import itertools

import pytest

from autotune.hardware.catalogue import Catalogue, Gpu, load_catalogue

# name: printed memory (GB of 2^30, as vendors round them), bandwidth in GB/s, dense TFLOPS of 16
# bits, fp8, int8 and fp4 with float32 accumulation, link in GB/s of BOTH directions, watts.
# From NVIDIA's, AMD's and Intel's data sheets, of which the sparse rates were halved.
PRINTED: dict[str, tuple[float, float, float, float, float, float, float, float]] = {
    "t4": (16, 320, 65, 0, 130, 0, 32, 70),
    "v100-sxm2-32gb": (32, 900, 125, 0, 0, 0, 300, 300),
    "a10": (24, 600, 125, 0, 250, 0, 64, 150),
    "a10g": (24, 600, 70, 0, 140, 0, 64, 300),
    "a30": (24, 933, 165, 0, 330, 0, 64, 165),
    "a100-40gb-sxm": (40, 1555, 312, 0, 624, 0, 600, 400),
    "a100-40gb-pcie": (40, 1555, 312, 0, 624, 0, 64, 250),
    "a100-80gb-pcie": (80, 1935, 312, 0, 624, 0, 64, 300),
    "a100-80gb-sxm": (80, 2039, 312, 0, 624, 0, 600, 400),
    "l4": (24, 300, 121, 242, 242, 0, 64, 72),
    "l40s": (48, 864, 362.05, 733, 733, 0, 64, 350),
    "rtx-3090": (24, 936, 71, 0, 284, 0, 64, 350),
    "rtx-4090": (24, 1008, 165.2, 330.3, 660.6, 0, 64, 450),
    "rtx-5090": (32, 1792, 209.5, 419, 838, 1676, 128, 575),
    "rtx-6000-ada": (48, 960, 364, 728, 728, 0, 64, 300),
    "rtx-pro-6000-server": (96, 1597, 467.8, 935.6, 935.6, 1871, 128, 600),
    "rtx-pro-6000-workstation": (96, 1792, 503.8, 1007.6, 1007.6, 2015, 128, 600),
    "h100-pcie": (80, 2000, 756.5, 1513, 1513, 0, 128, 350),
    "h100-sxm": (80, 3350, 989.4, 1979, 1979, 0, 900, 700),
    "h100-nvl": (94, 3900, 835.5, 1671, 1671, 0, 600, 400),
    "h200-sxm": (141, 4800, 989.5, 1979, 1979, 0, 900, 700),
    "h200-nvl": (141, 4800, 835.5, 1671, 1671, 0, 900, 600),
    "gh200-96gb": (96, 4000, 989, 1979, 1979, 0, 128, 1000),
    "b200": (180, 7700, 2250, 4500, 4500, 9000, 1800, 1000),
    "gb200": (186, 8000, 2500, 5000, 5000, 10000, 1800, 1200),
    "b300": (270, 7700, 2250, 4500, 0, 14000, 1800, 1100),
    "mi300x": (192, 5300, 1307.4, 2614.9, 2615, 0, 896, 750),
    "mi325x": (256, 6000, 1307.4, 2614.9, 2615, 0, 896, 1000),
    "mi355x": (288, 8000, 2516.6, 5033, 5033, 10066, 1075, 1400),
    "gaudi3": (128, 3700, 1835, 1835, 0, 0, 1050, 900),
}
WITHOUT_BF16 = {"t4", "v100-sxm2-16gb", "v100-sxm2-32gb"}
# Peak / bandwidth: from how many operations a byte a matmul in 16 bits is bound by compute.
RIDGE = {
    "t4": 203,
    "v100": 139,
    "a100-80gb": 153,
    "l40s": 419,
    "rtx-4090": 164,
    "rtx-5090": 117,
    "h100": 295,
    "h200": 206,
    "b200": 292,
    "gb200": 312,
    "mi300x": 247,
    "mi355x": 315,
    "gaudi3": 496,
}


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return load_catalogue()


def every(catalogue: Catalogue) -> list[Gpu]:
    return [catalogue.find(name) for name in catalogue.names()]


@pytest.mark.parametrize("name", PRINTED)
def test_figures_are_those_that_the_vendor_prints(catalogue: Catalogue, name: str) -> None:
    gpu = catalogue.find(name)
    memory, bandwidth, sixteen, fp8, int8, fp4, link, watts = PRINTED[name]
    # The driver keeps some for itself (ECC on GDDR6: a sixteenth), and reports binary units.
    assert 0.93 * memory <= gpu.memory_bytes / 2**30 <= 1.005 * memory
    assert gpu.bandwidth == pytest.approx(bandwidth * 1e9, rel=0.01)
    assert gpu.tdp_watts == watts
    assert 2 * gpu.link.bytes_per_s == pytest.approx(link * 1e9, rel=0.01)
    printed = {"fp16": sixteen, "fp8": fp8, "int8": int8, "fp4": fp4}
    if name not in WITHOUT_BF16:
        printed["bf16"] = sixteen
    if name == "gaudi3":
        del printed["fp16"]
    assert set(gpu.rates) == {dtype for dtype, rate in printed.items() if rate}
    for dtype, rate in gpu.rates.items():
        # Sources differ by 4% on fp4 of the B300; sparse figures would be off by a factor of two.
        assert rate == pytest.approx(printed[dtype] * 1e12, rel=0.04), dtype


@pytest.mark.parametrize("name", RIDGE)
def test_ridge_points(catalogue: Catalogue, name: str) -> None:
    gpu = catalogue.find(name)
    assert gpu.ridge("fp16" if "bf16" not in gpu.rates else "bf16") == pytest.approx(
        RIDGE[name], rel=0.01
    )


def test_memory_is_told_in_the_driver_s_units(catalogue: Catalogue) -> None:
    # nvidia-smi's totals: 141 GB of an H200 are neither 141e9 bytes nor 141 GiB.
    for name, mebibytes in (
        ("h200", 143771),
        ("h100", 81559),
        ("b200", 183359),
        ("b300", 275040),
        ("gb200", 189471),
        ("rtx-pro-6000", 97887),
        ("h100-nvl", 95830),
    ):
        assert catalogue.find(name).memory_bytes == mebibytes * 2**20


def test_dtypes_that_a_generation_lacks_are_missing(catalogue: Catalogue) -> None:
    for gpu in every(catalogue):
        capability = gpu.compute_capability
        if capability is None:
            continue
        assert ("bf16" in gpu.rates) == (capability >= (8, 0)), gpu.name
        assert ("fp8" in gpu.rates) == (capability >= (8, 9)), gpu.name
        assert ("fp4" in gpu.rates) == (capability >= (10, 0)), gpu.name
        # Tensor cores multiply int8 from Turing on; Blackwell Ultra gave them up again.
        assert ("int8" in gpu.rates) == (capability >= (7, 5) and capability != (10, 3)), gpu.name


def test_rates_are_dense_and_double_with_each_halving_of_the_bits(catalogue: Catalogue) -> None:
    for gpu in every(catalogue):
        sixteen = gpu.rates.get("bf16", gpu.rates.get("fp16"))
        assert sixteen is not None
        assert gpu.rates.get("fp16", sixteen) == sixteen
        for dtype, least, most in (("fp8", 1, 2.03), ("int8", 1, 4.02), ("fp4", 3.9, 8.1)):
            if dtype in gpu.rates:
                assert least <= gpu.rates[dtype] / sixteen <= most, (gpu.name, dtype)


def test_units_are_plausible(catalogue: Catalogue) -> None:
    for gpu in every(catalogue):
        assert 8e9 < gpu.memory_bytes < 1e12
        assert 1e11 < gpu.bandwidth < 2e13
        assert 5e13 < max(gpu.rates.values()) < 3e16
        assert 1e10 < gpu.link.bytes_per_s <= 1e12
        assert gpu.host_link_bytes_per_s < gpu.bandwidth
        assert 30 < gpu.ridge("fp16" if "fp16" in gpu.rates else "bf16") < 600
        assert 50 < gpu.tdp_watts < 2000
        # A second to a minute to fill the memory over the host's link.
        assert 0.2 < gpu.memory_bytes / gpu.host_link_bytes_per_s < 10


def test_generations_grow(catalogue: Catalogue) -> None:
    line = [catalogue.find(n) for n in ("v100", "a100", "h100", "h200", "b200", "b300")]
    for older, newer in itertools.pairwise(line):
        assert newer.memory_bytes > 0.99 * older.memory_bytes  # both "80 GB", reserves differ
        assert newer.bandwidth >= older.bandwidth
        assert newer.rates["fp16"] >= older.rates["fp16"]
        assert newer.link.bytes_per_s >= older.link.bytes_per_s
        assert (newer.compute_capability or (0, 0)) >= (older.compute_capability or (0, 0))
