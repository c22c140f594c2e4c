"""Limits of cgroups, on file trees like the kernel's."""

from pathlib import Path

import pytest

from predictor.resources import cgroup

UNLIMITED_V1 = "9223372036854771712"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return root


def v2(path: str, limit: str, usage: int, inactive_file: int = 0) -> dict[str, str]:
    folder = f"sys/fs/cgroup/{path}".rstrip("/")
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": str(usage),
        f"{folder}/memory.stat": f"anon {usage}\nfile 5\ninactive_file {inactive_file}\nactive_file 7",
    }


def v1(path: str, limit: str, usage: int, inactive_file: int = 0) -> dict[str, str]:
    folder = f"sys/fs/cgroup/memory/{path}".rstrip("/")
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": str(usage),
        f"{folder}/memory.stat": f"cache 1\ninactive_file 3\ntotal_inactive_file {inactive_file}\ntotal_rss 9",
    }


OWN_V2 = {"proc/self/cgroup": "0::/kubepods/pod1/container"}
OWN_V1 = {"proc/self/cgroup": "9:cpu,cpuacct:/pod1/container\n4:memory:/pod1/container\n0::/pod1/container"}


def test_available_bytes_v2_is_limit_minus_unreclaimable_usage(tmp_path: Path) -> None:
    files = OWN_V2 | v2("kubepods/pod1/container", "1000", usage=600, inactive_file=150)
    assert cgroup.available_bytes(tree(tmp_path, files)) == 1000 - 600 + 150


def test_available_bytes_tightest_parent_counts(tmp_path: Path) -> None:
    own = v2("kubepods/pod1/container", "1000", usage=100)
    pod = v2("kubepods/pod1", "700", usage=500)
    all_pods = v2("kubepods", "max", usage=90_000)
    assert cgroup.available_bytes(tree(tmp_path, OWN_V2 | own | pod | all_pods)) == 200


def test_available_bytes_v2_in_cgroup_namespace_reads_the_root(tmp_path: Path) -> None:
    assert cgroup.available_bytes(tree(tmp_path, OWN_V2 | v2("", "1000", usage=400))) == 600
    tree(tmp_path, {"proc/self/cgroup": "0::/"})
    assert cgroup.available_bytes(tmp_path) == 600
    tree(tmp_path, {"proc/self/cgroup": "0::/../../elsewhere"})
    assert cgroup.available_bytes(tmp_path) == 600


def test_available_bytes_v1_is_limit_minus_unreclaimable_usage(tmp_path: Path) -> None:
    files = OWN_V1 | v1("pod1/container", "1000", usage=600, inactive_file=150) | v1("", UNLIMITED_V1, usage=80_000)
    assert cgroup.available_bytes(tree(tmp_path, files)) == 550


def test_available_bytes_v1_in_cgroup_namespace_reads_the_root(tmp_path: Path) -> None:
    assert cgroup.available_bytes(tree(tmp_path, OWN_V1 | v1("", "1000", usage=1))) == 999


@pytest.mark.parametrize(
    "files",
    [
        {},
        OWN_V2,
        OWN_V2 | v2("kubepods/pod1/container", "max", usage=5),
        OWN_V1 | v1("pod1/container", UNLIMITED_V1, usage=5),
        OWN_V2 | {"sys/fs/cgroup/memory.max": "1000"},
        {"proc/self/cgroup": "3:cpu:/a\n0::/"},
    ],
)
def test_available_bytes_without_limit_is_unlimited(tmp_path: Path, files: dict[str, str]) -> None:
    assert cgroup.available_bytes(tree(tmp_path, files)) == cgroup.UNLIMITED_BYTES


def test_available_bytes_usage_above_limit_is_zero(tmp_path: Path) -> None:
    assert cgroup.available_bytes(tree(tmp_path, OWN_V2 | v2("", "1000", usage=1200))) == 0


def test_cpu_limit_v2_is_the_tightest_quota_over_period(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/kubepods/pod1/container/cpu.max": "max 100000"}
    assert cgroup.cpu_limit(tree(tmp_path, OWN_V2 | files)) is None
    assert cgroup.cpu_limit(tree(tmp_path, {"sys/fs/cgroup/kubepods/pod1/cpu.max": "250000 100000"})) == 2.5
    assert cgroup.cpu_limit(tree(tmp_path, {"sys/fs/cgroup/kubepods/pod1/container/cpu.max": "50000 100000"})) == 0.5


def test_cpu_limit_v1_is_quota_over_period(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/cpu/pod1/container"
    tree(tmp_path, OWN_V1 | {f"{folder}/cpu.cfs_quota_us": "-1", f"{folder}/cpu.cfs_period_us": "100000"})
    assert cgroup.cpu_limit(tmp_path) is None
    tree(tmp_path, {f"{folder}/cpu.cfs_quota_us": "400000"})
    assert cgroup.cpu_limit(tmp_path) == 4


@pytest.mark.parametrize("files", [{}, OWN_V2, OWN_V2 | {"sys/fs/cgroup/cpu.max": "nonsense"}])
def test_cpu_limit_without_quota_is_none(tmp_path: Path, files: dict[str, str]) -> None:
    assert cgroup.cpu_limit(tree(tmp_path, files)) is None
