import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from autotune.errors import BadInput
from autotune.hardware.catalogue import FIGURES, Catalogue, load_catalogue

OWN: dict[str, Any] = {
    "sources": {
        "bench": {
            "title": "Own measurements",
            "where": "rack 3",
            "date": "2026-11-01",
            "basis": "read",
        }
    },
    "gpus": {
        "x100": {
            "title": "Example X100",
            "vendor": "nvidia",
            "generation": "hopper",
            "aliases": ["x"],
            "compute_capability": "9.0",
            "memory_mib": 1024,
            "bandwidth_gb_per_s": 100,
            "tflops": {"bf16": 10},
            "link": {"name": "wires", "kind": "nvlink", "gb_per_s": 30, "gpus": 4, "mesh": True},
            "host_link": {"name": "bus", "gb_per_s": 5},
            "tdp_watts": 50,
            "price": {"usd_per_hour": 1.5, "where": "shop", "date": "2026-11-02"},
            "driver_names": ["Example X100 1GB"],
            "source": "bench",
        }
    },
}


def write(folder: Path, content: Any) -> Path:
    path = folder / "gpus.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def changed(**entry: Any) -> dict[str, Any]:
    return {**OWN, "gpus": {"x100": {**OWN["gpus"]["x100"], **entry}}}


@pytest.fixture
def installed() -> Catalogue:
    return load_catalogue()


def test_names_and_aliases_are_found_however_they_are_written(installed: Catalogue) -> None:
    for name in installed.names():
        gpu = installed.find(name)
        assert gpu.name == name
        for alias in gpu.aliases:
            assert installed.find(alias) is gpu
    for text in ("H100", " h100-sxm ", "NVIDIA H100", "h100_sxm", "nvidia-h100-80gb"):
        assert installed.find(text).name == "h100-sxm"
    assert installed.find("GeForce RTX 4090").name == "rtx-4090"
    assert installed.find("AMD Instinct MI300X").name == "mi300x"
    assert installed.find("a100-80gb").name == "a100-80gb-sxm"


@pytest.mark.parametrize("name", ["h10", "a100-800gb", "mi300", "l40ss", "", "\0", "x" * 5000])
def test_an_unknown_gpu_is_refused_with_names_that_exist(installed: Catalogue, name: str) -> None:
    with pytest.raises(BadInput) as error:
        installed.find(name)
    told = str(error.value).partition("the nearest names are ")[2].split(", ")
    assert told
    assert set(told) <= set(installed.names())


def test_the_nearest_names_are_near(installed: Catalogue) -> None:
    with pytest.raises(BadInput, match=r"^unknown GPU 'h10': .* are h100-"):
        installed.find("h10")
    with pytest.raises(BadInput, match="are mi300x"):
        installed.find("mi300")


def test_there_are_enough_devices_and_all_is_told_of_each(installed: Catalogue) -> None:
    assert len(installed.names()) >= 25
    for name in installed.names():
        gpu = installed.find(name)
        assert set(gpu.sources) == set(FIGURES)
        for source in gpu.sources.values():
            assert source.title
            assert source.where
            assert "2026-01-01" <= source.date <= "2026-12-31"
        assert (gpu.vendor == "nvidia") == (gpu.compute_capability is not None)
        if gpu.price is not None:
            assert gpu.price.low <= gpu.price.usd_per_hour <= gpu.price.high
            assert gpu.price.where
            assert gpu.price.date


def test_a_driver_name_belongs_to_one_gpu(installed: Catalogue) -> None:
    seen: set[str] = set()
    for name in installed.names():
        for driver_name in installed.find(name).driver_names:
            assert driver_name.casefold() not in seen
            seen.add(driver_name.casefold())
            found = installed.of_driver(driver_name)
            assert found is not None
            assert found.name == name
    assert installed.of_driver("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert installed.of_driver(None) is None


def test_links_among_a_few_gpus(tmp_path: Path, installed: Catalogue) -> None:
    h100 = installed.find("h100")
    assert h100.link_among(2) == h100.link_among(8) == h100.link
    assert h100.link_among(9) == h100.host_link
    assert installed.find("h100-nvl").link_among(4).kind == "pcie"
    # A wire of 10 GB/s to each of the three others.
    mesh = load_catalogue(write(tmp_path, OWN)).find("x100")
    assert [mesh.link_among(n).bytes_per_s / 1e9 for n in (2, 3, 4, 5)] == pytest.approx(
        [10, 20, 30, 5]
    )


def test_a_file_adds_gpus_and_replaces_them(tmp_path: Path, installed: Catalogue) -> None:
    own = load_catalogue(write(tmp_path, OWN))
    assert own.names() == [*installed.names(), "x100"]
    gpu = own.find("x")
    assert (gpu.memory_bytes, gpu.bandwidth, gpu.rates["bf16"]) == (1 << 30, 1e11, 1e13)
    assert gpu.ridge("bf16") == pytest.approx(100)
    assert gpu.compute_capability == (9, 0)
    assert gpu.price is not None
    assert gpu.price.low < 1.5 < gpu.price.high
    with pytest.raises(KeyError):
        gpu.ridge("fp8")

    replaced = {**OWN, "gpus": {"t4": {**OWN["gpus"]["x100"], "aliases": []}}}
    other = load_catalogue(write(tmp_path, replaced))
    assert other.names() == installed.names()
    assert other.find("t4").title == "Example X100"
    assert load_catalogue().find("t4").title == "NVIDIA T4"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (changed(source=None), "no source is told for memory, bandwidth, rates, link, power"),
        (changed(source="rumour"), "'rumour' is not told"),
        (changed(sources={"colour": "bench"}), "colour"),
        (changed(memory_mib=0), "memory_mib"),
        (changed(memory_mib=10**12), "memory_mib"),
        (changed(bandwidth_gb_per_s=float("nan")), "bandwidth_gb_per_s"),
        (changed(bandwidth_gb_per_s=-1), "bandwidth_gb_per_s"),
        (changed(tflops={}), "tflops"),
        (changed(tflops={"fp6": 3}), "fp6"),
        (changed(compute_capability="nine"), "compute_capability"),
        (changed(power=3), "power"),
        (changed(link={"name": "a", "kind": "smoke", "gb_per_s": 3}), "kind"),
        (changed(price={"usd_per_hour": 1, "low": 2, "where": "a", "date": "2026-01-01"}), "low"),
        (changed(price={"usd_per_hour": 1, "where": "a", "date": "soon"}), "date"),
        (changed(aliases=["X 100"]), "aliases"),
        ({"gpus": {}}, "sources"),
        ([], "top level"),
    ],
)
def test_a_broken_entry_is_refused_with_its_place(tmp_path: Path, content: Any, told: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(BadInput) as error:
        load_catalogue(path)
    assert str(path) in str(error.value)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_an_alias_cannot_be_taken_twice(tmp_path: Path) -> None:
    entry = OWN["gpus"]["x100"]
    with pytest.raises(BadInput, match="x is both x100 and y100"):
        load_catalogue(write(tmp_path, {**OWN, "gpus": {"x100": entry, "y100": entry}}))


def test_all_of_it_can_be_written_as_json(installed: Catalogue) -> None:
    told = installed.find("h200").to_json()
    assert told["memory_bytes"] == 143771 * 2**20
    assert told["link"] == {"name": "NVLink 4", "bytes_per_s": 450e9, "gpus": 8}
    assert told["sources"]["memory"]["basis"] == "read"
    assert told["price"]["usd_per_hour"] == 3.50
    assert json.loads(json.dumps(told)) == told


def test_figures_that_nobody_looked_up_are_known(installed: Catalogue) -> None:
    assert installed.find("h200").recalled == ()
    assert installed.find("a100").recalled == ("memory",)
    assert set(installed.find("mi210").recalled) == set(FIGURES)
