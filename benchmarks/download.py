"""Compare the storage initializer with plain `snapshot_download` on the same model.

`python -m benchmarks.download` serves a model of random bytes from a Hub on loopback, and both programs download it
into empty directories in turns (A B B A). Each download is timed as a whole process. The storage initializer also
computes every sha256, calls fsync and writes the record. Peak memory is the kernel's figure. At the end it times the
storage initializer on a published snapshot, next to an empty Python process.

Needs twice the size of the model on disk, and cleans up.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

REPOSITORY = "bench/model"
_BLOCK_BYTES = 1 << 20
"""Small, since the kernel counts the parent's memory at the start of a process as the child's peak."""

_PEER = """\
import sys
from huggingface_hub import snapshot_download
snapshot_download(sys.argv[1], local_dir=sys.argv[2], token=False)
"""

_FOREIGN = ("HF_", "HUGGING", "STORAGE_", "LOG_LEVEL")
"""Prefixes of environment variables that would change the behavior of either program."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """One download process."""

    program: str
    seconds: float
    peak_mib: float
    """Peak resident memory, mapped files included."""


def make_model(directory: Path, size_bytes: int, shards: int) -> None:
    """Write random bytes under the names of a sharded model; all shards differ."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    names = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
    block = os.urandom(min(_BLOCK_BYTES, size_bytes // shards))
    for number, name in enumerate(names):
        with (directory / name).open("wb") as shard:
            for offset in range(0, size_bytes // shards, len(block)):
                shard.write(number.to_bytes(8) + offset.to_bytes(8) + block[16:])
    index = {"weight_map": {f"layer.{number}": name for number, name in enumerate(names)}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@contextlib.contextmanager
def served(directory: Path) -> Iterator[str]:
    """Run the local Hub in a process and yield its URL."""
    command = [sys.executable, "-m", "devtools.local_hub", f"{REPOSITORY}={directory}"]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE) as hub:
        try:
            yield hub.stdout.readline().strip() if hub.stdout else ""
        finally:
            hub.terminate()


def run(program: str, words: list[str], url: str) -> Fetch:
    """Run a Python process to its end; its output is shown only if it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    environment |= {"HF_ENDPOINT": url, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
    with tempfile.TemporaryFile("w+") as output:
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, *words], env=environment, stdout=output, stderr=output)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{program} failed:\n{output.read()}")
    return Fetch(program, seconds, used.ru_maxrss / 1024)


def download_and_publish(url: str, volume: Path, revision: str = "main") -> Fetch:
    """Download with the storage initializer."""
    return run("storage initializer", ["-m", "storage_initializer", f"hf://{REPOSITORY}:{revision}", str(volume)], url)


def snapshot_download(url: str, directory: Path) -> Fetch:
    """Download with huggingface_hub's defaults: eight files at a time, no checksums."""
    return run("snapshot_download", ["-c", _PEER, REPOSITORY, str(directory)], url)


def compare(url: str, work: Path, repetitions: int) -> list[Fetch]:
    """Run both in turns into empty directories; keep the last volume."""
    fetches: list[Fetch] = []
    for repetition in range(repetitions):
        both: list[Callable[[], Fetch]] = [
            lambda: download_and_publish(url, work / "volume"),
            lambda: snapshot_download(url, work / "plain"),
        ]
        for fetch in reversed(both) if repetition % 2 else both:
            for directory in ("volume", "plain"):
                shutil.rmtree(work / directory, ignore_errors=True)
            # Flush the previous download, so that it does not slow down this one.
            os.sync()
            fetches.append(fetch())
            print(
                f"{fetches[-1].program:>19}  {fetches[-1].seconds:6.2f} s  {fetches[-1].peak_mib:5.0f} MiB", flush=True
            )
    if not (work / "volume").is_dir():
        download_and_publish(url, work / "volume")
    return fetches


def warm_seconds(url: str, volume: Path, repetitions: int) -> tuple[float, float]:
    """Return median seconds on a published commit, and of an empty Python process."""
    (ref,) = volume.glob("*--*/refs/main")
    commit = ref.read_text().strip()
    published = [download_and_publish(url, volume, commit).seconds for _ in range(repetitions)]
    empty = [run("python", ["-c", "pass"], url).seconds for _ in range(repetitions)]
    return statistics.median(published), statistics.median(empty)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.download",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mib", type=int, default=4096, help="size of the model (4096)")
    parser.add_argument("--shards", type=int, default=8, help="number of files (8)")
    parser.add_argument("--repetitions", type=int, default=4, help="downloads per program (4)")
    parser.add_argument("--directory", type=Path, help="working directory (that of temporary files)")
    parser.add_argument("--json", type=Path, help="write every download to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="download-", dir=arguments.directory) as name:
        work = Path(name)
        size_bytes = arguments.mib << 20
        make_model(work / "model", size_bytes, arguments.shards)
        with served(work / "model") as url:
            fetches = compare(url, work, arguments.repetitions)
            published, empty = warm_seconds(url, work / "volume", max(5, arguments.repetitions))
    medians: dict[str, float] = {}
    print(
        f"\nPython {platform.python_version()}, {os.cpu_count()} cores, {arguments.mib} MiB in {arguments.shards} files"
    )
    for program in ("storage initializer", "snapshot_download"):
        runs = [fetch for fetch in fetches if fetch.program == program]
        medians[program] = statistics.median(size_bytes / fetch.seconds for fetch in runs)
        peak = max(fetch.peak_mib for fetch in runs)
        print(f"{program}: median {medians[program] / 2**20:.0f} MiB/s, peak {peak:.0f} MiB resident")
    ratio = medians["storage initializer"] / medians["snapshot_download"]
    print(f"ratio of medians: {ratio:.2f}")
    print(f"published snapshot: {published:.2f} s, an empty Python process {empty:.2f} s")
    if arguments.json:
        rows = [asdict(fetch) for fetch in fetches]
        arguments.json.write_text(json.dumps({"fetches": rows, "ratio": ratio, "warm_seconds": published}, indent=2))


if __name__ == "__main__":
    main()
