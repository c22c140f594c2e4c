"""What the kernel grants this process: memory and CPU time of its control groups, version 2 or 1.

A container's limits are not the host's memory and cores. The tightest of its own group and those above it counts.
"""

from collections.abc import Iterator
from pathlib import Path

UNLIMITED_BYTES = 1 << 60
"""More than any limit; version 1 writes a number near 2**63 for none."""


def available_bytes(root: Path) -> int:
    """Memory that can still be used before the kernel kills for it; `UNLIMITED_BYTES` where nothing limits.

    Args:
        root: of the file system, where /proc and /sys are.
    """
    new = ("memory.max", "memory.current", "inactive_file")
    old = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    left = [_left_bytes(folder, *(old if is_old else new)) for folder, is_old in _folders(root, "memory")]
    return min(left, default=UNLIMITED_BYTES)


def cpus(root: Path) -> float | None:
    """CPU time in seconds each second, the quota over its period; None where nothing limits.

    Args:
        root: of the file system, where /proc and /sys are.
    """
    quotas = [_cpus(folder, is_old) for folder, is_old in _folders(root, "cpu")]
    return min((quota for quota in quotas if quota is not None), default=None)


def _folders(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Where a controller's files of this process lie, its own group and those above; and whether they are version 1."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = Path("sys/fs/cgroup", controller if controllers else "")
        # A container sees its own cgroup as the root of the mount, whatever the path says; parents limit too.
        own = Path(path.lstrip("/"))
        for part in (own, *own.parents):
            yield root / mount / part, bool(controllers)


def _left_bytes(folder: Path, limit: str, usage: str, reclaimable: str) -> int:
    limit_bytes = _number(folder / limit)
    usage_bytes = _number(folder / usage)
    if limit_bytes is None or usage_bytes is None or limit_bytes >= UNLIMITED_BYTES:
        return UNLIMITED_BYTES
    counters = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat"))
    return max(0, limit_bytes - usage_bytes + int(counters.get(reclaimable, 0)))


def _cpus(folder: Path, is_old: bool) -> float | None:
    if is_old:
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    else:
        words = " ".join(_lines(folder / "cpu.max")).split()
        quota, period = (int(word) if word.isdigit() else None for word in words) if len(words) == 2 else (None, None)
    return quota / period if quota and period else None


def _number(file: Path) -> int | None:
    """The number in a file; None where there is no file, or "max" or -1 in it."""
    [text] = _lines(file) or [""]
    return int(text) if text.isdigit() else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
