"""The limits that a container or a service manager puts on this process (Linux control groups)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Version 1 writes "no limit" as the largest page-aligned 63-bit number; no machine has 2^60 bytes.
_UNLIMITED_BYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class CgroupLimits:
    """Limits of the process's control groups and their parents; None where there is none.

    `cpus` is the quota in processors (1.5: one and a half). `memory_bytes` is the limit, and
    `memory_free_bytes` what is left of it, where reclaimable file pages count as free.
    """

    cpus: float | None = None
    memory_bytes: int | None = None
    memory_free_bytes: int | None = None


def read_cgroup_limits(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> CgroupLimits:
    """Read the limits of version 1 or 2, whichever the system has; no limits where neither is."""
    quotas: list[float] = []
    memory: list[tuple[int, int | None]] = []
    for controllers, path in _memberships(membership):
        if not controllers:
            for folder in _folder_and_parents(root, path):
                quotas += _quota_v2(folder)
                memory += _memory(folder, "memory.max", "memory.current")
        if "cpu" in controllers:
            for folder in _folder_and_parents(root / ",".join(controllers), path):
                quotas += _quota_v1(folder)
            for folder in _folder_and_parents(root / "cpu", path):
                quotas += _quota_v1(folder)
        if "memory" in controllers:
            for folder in _folder_and_parents(root / "memory", path):
                memory += _memory(folder, "memory.limit_in_bytes", "memory.usage_in_bytes")
    free = [left for _, left in memory if left is not None]
    return CgroupLimits(
        cpus=min(quotas, default=None),
        memory_bytes=min((limit for limit, _ in memory), default=None),
        memory_free_bytes=min(free, default=None),
    )


def _memberships(membership: Path) -> Iterator[tuple[list[str], str]]:
    """Controllers and group of each line `id:controllers:path`; version 2 has no controllers."""
    for line in (_read(membership) or "").splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            yield [name for name in parts[1].split(",") if name], parts[2]


def _folder_and_parents(mount: Path, path: str) -> Iterator[Path]:
    """The group's folder and those above it up to the mount: the tightest limit holds.

    Inside a container the path may be the host's, of which only the mount itself is visible.
    """
    relative = Path(path.lstrip("/"))
    if ".." in relative.parts:
        relative = Path()
    for part in [relative, *relative.parents]:
        folder = mount / part
        if folder.is_dir():
            yield folder


def _quota_v2(folder: Path) -> list[float]:
    words = (_read(folder / "cpu.max") or "max").split()
    if words[0] == "max" or len(words) < 2:
        return []
    return _ratio(words[0], words[1])


def _quota_v1(folder: Path) -> list[float]:
    quota = _read(folder / "cpu.cfs_quota_us")
    period = _read(folder / "cpu.cfs_period_us")
    if quota is None or period is None or quota.strip().startswith("-"):
        return []
    return _ratio(quota, period)


def _ratio(quota: str, period: str) -> list[float]:
    try:
        return [int(quota) / int(period)]
    except (ValueError, ZeroDivisionError):
        return []


def _memory(folder: Path, limit_name: str, usage_name: str) -> list[tuple[int, int | None]]:
    limit = _integer(_read(folder / limit_name))
    if limit is None or limit >= _UNLIMITED_BYTES:
        return []
    usage = _integer(_read(folder / usage_name))
    if usage is None:
        return [(limit, None)]
    statistics = dict(
        line.split() for line in (_read(folder / "memory.stat") or "").splitlines() if " " in line
    )
    reclaimable = _integer(statistics.get("inactive_file") or statistics.get("total_inactive_file"))
    return [(limit, max(limit - usage + (reclaimable or 0), 0))]


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().isdigit() else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
