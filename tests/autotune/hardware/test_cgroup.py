from pathlib import Path

import pytest

from autotune.hardware.cgroup import CgroupLimits, read_cgroup_limits

GIB = 1 << 30


def system(folder: Path, membership: str, files: dict[str, str]) -> CgroupLimits:
    (folder / "cgroup").write_text(membership)
    for name, content in files.items():
        path = folder / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return read_cgroup_limits(folder / "cgroup", folder / "fs")


def test_version_2_takes_the_tightest_of_the_group_and_its_parents(tmp_path: Path) -> None:
    limits = system(
        tmp_path,
        "0::/outer/inner\n",
        {
            "outer/cpu.max": "150000 100000\n",
            "outer/memory.max": f"{4 * GIB}\n",
            "outer/memory.current": f"{3 * GIB}\n",
            "outer/inner/cpu.max": "max 100000\n",
            "outer/inner/memory.max": f"{8 * GIB}\n",
            "outer/inner/memory.current": f"{GIB}\n",
        },
    )
    assert limits == CgroupLimits(cpus=1.5, memory_bytes=4 * GIB, memory_free_bytes=GIB)


def test_file_pages_that_can_be_reclaimed_count_as_free(tmp_path: Path) -> None:
    limits = system(
        tmp_path,
        "0::/\n",
        {
            "memory.max": f"{4 * GIB}",
            "memory.current": f"{3 * GIB}",
            "memory.stat": f"anon 5\ninactive_file {2 * GIB}\n",
        },
    )
    assert limits.memory_free_bytes == 3 * GIB


def test_version_1(tmp_path: Path) -> None:
    limits = system(
        tmp_path,
        "4:memory:/job\n1:cpu,cpuacct:/job\n0::/\n",
        {
            "memory/job/memory.limit_in_bytes": f"{2 * GIB}\n",
            "memory/job/memory.usage_in_bytes": f"{GIB // 2}\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "cpu,cpuacct/job/cpu.cfs_quota_us": "50000\n",
            "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
            "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
    )
    assert limits == CgroupLimits(0.5, 2 * GIB, 2 * GIB - GIB // 2)


def test_a_path_of_the_host_falls_back_to_what_the_container_sees(tmp_path: Path) -> None:
    limits = system(tmp_path, "0::/../../docker/abc\n", {"cpu.max": "200000 100000"})
    assert limits.cpus == 2.0


@pytest.mark.parametrize(
    ("membership", "files"),
    [
        ("", {}),
        ("nonsense\n", {"cpu.max": "100000 100000"}),
        ("0::/\n", {"cpu.max": "max 100000", "memory.max": "max"}),
        ("0::/\n", {"cpu.max": "100000 0", "memory.max": "a lot"}),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}),
    ],
)
def test_no_limit_or_nonsense_is_no_limit(
    tmp_path: Path, membership: str, files: dict[str, str]
) -> None:
    assert system(tmp_path, membership, files) == CgroupLimits()


def test_systems_without_control_groups_have_no_limits(tmp_path: Path) -> None:
    assert read_cgroup_limits(tmp_path / "none", tmp_path / "neither") == CgroupLimits()
