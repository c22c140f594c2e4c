"""Memory and CPU limits of this process's control groups, version 2 or 1.

A container's limits differ from the host's memory and cores. The tightest limit of its group and all parents counts.
The argument `root` is the root of the file system that holds /proc and /sys.
"""

from collections.abc import Iterator
from pathlib import Path

UNLIMITED_BYTES = 1 << 60
"""More than any limit; version 1 writes a number near 2**63 for no limit."""

_MEMORY_FILES_V2 = ("memory.max", "memory.current", "inactive_file")
_MEMORY_FILES_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
"""Files of the limit and the usage; field of memory.stat with reclaimable bytes."""


def available_bytes(root: Path) -> int:
    """Return the memory left before the kernel kills the process; `UNLIMITED_BYTES` without a limit."""
    return min(
        (
            _available_bytes(group, *(_MEMORY_FILES_V1 if is_v1 else _MEMORY_FILES_V2))
            for group, is_v1 in _groups(root, "memory")
        ),
        default=UNLIMITED_BYTES,
    )


def cpu_limit(root: Path) -> float | None:
    """Return the CPU limit in cores, quota over period; None without a limit."""
    limits = [_cpu_limit(group, is_v1) for group, is_v1 in _groups(root, "cpu")]
    return min((limit for limit in limits if limit is not None), default=None)


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Yield the directories of this process's group and its parents, each with whether it is version 1."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = Path("sys/fs/cgroup", controller if controllers else "")
        # A container sees its own cgroup as the root of the mount, whatever the path is; parents limit too.
        own = Path(path.lstrip("/"))
        for group in (own, *own.parents):
            yield root / mount / group, bool(controllers)


def _available_bytes(group: Path, limit: str, usage: str, reclaimable: str) -> int:
    limit_bytes = _number(group / limit)
    usage_bytes = _number(group / usage)
    if limit_bytes is None or usage_bytes is None or limit_bytes >= UNLIMITED_BYTES:
        return UNLIMITED_BYTES
    counters = dict(line.split(" ", 1) for line in _lines(group / "memory.stat"))
    return max(0, limit_bytes - usage_bytes + int(counters.get(reclaimable, 0)))


def _cpu_limit(group: Path, is_v1: bool) -> float | None:
    if is_v1:
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    else:
        words = " ".join(_lines(group / "cpu.max")).split()
        quota, period = (int(word) if word.isdigit() else None for word in words) if len(words) == 2 else (None, None)
    return quota / period if quota and period else None


def _number(file: Path) -> int | None:
    """Return the number in a file; None if the file is missing or contains "max" or -1."""
    [text] = _lines(file) or [""]
    return int(text) if text.isdigit() else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
