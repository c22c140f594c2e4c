"""Download the wheels that `benchmarks.gpu_check` installs on a bare machine with python3, torch and CUDA.

`python -m devtools.gpu_wheels FOLDER` takes what the predictor's lock pins for linux on x86_64, without torch and the
packages next to it, and what the tests need. The wheels are in `part1`, `part2` and so on of FOLDER, each of at most
`--part_mib`; bitsandbytes, the largest, is in the last part.
"""

import argparse
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from devtools.paths import ROOT

LOCK = ROOT / "images" / "predictor" / "requirements.txt"
CONSTRAINTS = ROOT / "constraints.txt"
TEST_PACKAGES = (
    "execnet",
    "hypothesis",
    "iniconfig",
    "pluggy",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "sortedcontainers",
)
BESIDE_TORCH = frozenset({"filelock", "fsspec", "mpmath", "networkx", "setuptools", "sympy"})
"""Packages of the lock that are installed wherever torch is, in versions that torch accepts."""
NEWEST_GLIBC = 35
"""Minor version of glibc 2 on the machine; wheels for a newer one do not load."""
LAST = "bitsandbytes"
"""Needed for quantized weights only, so that all other stages run with the parts before it."""
_MIB = 2**20


def requirements(python_version: str, skipped: Collection[str] = ()) -> list[str]:
    """Return the pinned requirements, sorted; `skipped` are names of packages that the machine has.

    Raises:
        SystemExit: the tests need a package that constraints.txt does not pin.
    """
    environment = {
        "implementation_name": "cpython",
        "os_name": "posix",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{python_version}.0",
        "python_version": python_version,
        "sys_platform": "linux",
    }
    pins = _pins(LOCK, environment)
    constraints = _pins(CONSTRAINTS, environment)
    for name in TEST_PACKAGES:
        if name not in constraints:
            raise SystemExit(f"constraints.txt does not pin {name}, which the tests need. Add it.")
        pins[name] = constraints[name]
    left_out = BESIDE_TORCH | {canonicalize_name(name) for name in skipped}
    return [f"{name}=={version}" for name, version in sorted(pins.items()) if name not in left_out]


def download(pinned: Sequence[str], python_version: str, folder: Path) -> None:
    """Download the wheels of exactly these requirements.

    Raises:
        SystemExit: a package has no such wheel.
    """
    glibc = [f"manylinux_2_{minor}_x86_64" for minor in range(5, NEWEST_GLIBC + 1)]
    platforms = [*glibc, "manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python_version]
    for platform in platforms:
        command += ["--platform", platform]
    if subprocess.run([*command, "--dest", str(folder), *pinned]).returncode:
        raise SystemExit("pip could not download every wheel; its output has the reason.")


def split(sizes: Mapping[str, int], part_bytes: int) -> list[list[str]]:
    """Distribute wheels, given by file name and bytes, over as few parts as first-fit needs, the largest first.

    Raises:
        SystemExit: one wheel is larger than a part.
    """
    parts: list[list[str]] = []
    ordered = sorted(sizes, key=lambda name: (parse_wheel_filename(name)[0] == LAST, -sizes[name], name))
    for name in ordered:
        if sizes[name] > part_bytes:
            raise SystemExit(f"{name} has {sizes[name] / _MIB:.0f} MiB, more than a part. Raise --part_mib.")
        fitting = (part for part in parts if sum(sizes[other] for other in part) + sizes[name] <= part_bytes)
        part = next(fitting, None)
        if part is None:
            parts.append([name])
        else:
            part.append(name)
    return parts


def _pins(file: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return name and version of each pinned requirement of a file that applies in the environment."""
    pins: dict[str, str] = {}
    for line in file.read_text().splitlines():
        if not line or line[0] in " #":  # hashes are on lines of their own
            continue
        requirement = Requirement(line.rstrip("\\ "))
        if requirement.marker is None or requirement.marker.evaluate(dict(environment)):
            [specifier] = requirement.specifier
            pins[canonicalize_name(requirement.name)] = specifier.version
    return pins


def main() -> None:
    """Download and split the wheels that the flags describe."""
    parser = argparse.ArgumentParser(
        prog="python -m devtools.gpu_wheels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="empty or new")
    parser.add_argument("--python_version", default="3.12", help="of the machine (default: %(default)s)")
    parser.add_argument("--skip", nargs="*", default=[], help="packages that the machine has")
    parser.add_argument("--part_mib", type=int, default=50, help="largest size of a part (default: %(default)s)")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{folder} is not empty. Remove it first: two versions of a package would be installed.")
    folder.mkdir(parents=True, exist_ok=True)
    download(requirements(arguments.python_version, arguments.skip), arguments.python_version, folder)
    sizes = {wheel.name: wheel.stat().st_size for wheel in folder.glob("*.whl")}
    for number, part in enumerate(split(sizes, arguments.part_mib * _MIB), 1):
        directory = folder / f"part{number}"
        directory.mkdir()
        for name in part:
            (folder / name).rename(directory / name)
        total = sum(sizes[name] for name in part)
        print(f"{directory}: {len(part)} wheels, {total / _MIB:.1f} MiB")


if __name__ == "__main__":
    main()
