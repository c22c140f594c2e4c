"""Fetch the same model with the storage initializer and with plain `snapshot_download`, side by side.

`python -m benchmarks.download` makes a model of random bytes, serves it from a Hub on loopback, and has both fetch it
into empty directories by turns, A B B A. Each fetch is a program of its own, timed from its start to its end, so ours
includes what the peer leaves out: the sha256 of every file, fsync, the record. Peak resident memory is what the kernel
counted. Afterwards it times ours once more where everything is published already, against an interpreter that does
nothing.

Needs twice the size of the model on the disk, and cleans up.
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
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

REPOSITORY = "bench/model"
_BLOCK_BYTES = 1 << 20
"""Small, since the kernel counts the memory of whoever starts a program as that program's own."""

_PEER = """\
import sys
from huggingface_hub import snapshot_download
snapshot_download(sys.argv[1], local_dir=sys.argv[2], token=False)
"""

_FOREIGN = ("HF_", "HUGGING", "STORAGE_", "LOG_LEVEL")
"""How variables begin that would make the two differ from what anybody else measures."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """One program from its start to its end."""

    who: str
    seconds: float
    peak_mib: float
    """Most memory that was resident at once, files mapped into it included."""


def make_model(directory: Path, size_bytes: int, shards: int) -> None:
    """Random bytes under the names of a sharded model; no two shards are the same."""
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
    """The URL of a Hub that runs as a program of its own, as tests have it."""
    command = [sys.executable, "-m", "tests.local_hub", f"{REPOSITORY}={directory}"]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE) as hub:
        try:
            yield hub.stdout.readline().strip() if hub.stdout else ""
        finally:
            hub.terminate()


def run(who: str, words: list[str], url: str) -> Fetch:
    """Run a Python program to its end; what it writes is of interest only if it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    environment |= {"HF_ENDPOINT": url, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
    with tempfile.TemporaryFile("w+") as output:
        began = time.perf_counter()
        program = subprocess.Popen([sys.executable, *words], env=environment, stdout=output, stderr=output)
        _, status, used = os.wait4(program.pid, 0)
        seconds = time.perf_counter() - began
        program.returncode = os.waitstatus_to_exitcode(status)
        if program.returncode:
            output.seek(0)
            raise SystemExit(f"{who} failed:\n{output.read()}")
    return Fetch(who, seconds, used.ru_maxrss / 1024)


def ours(url: str, volume: Path, revision: str = "main") -> Fetch:
    """The storage initializer, as a cluster runs it."""
    return run("ours", ["-m", "storage_initializer", f"hf://{REPOSITORY}:{revision}", str(volume)], url)


def peer(url: str, directory: Path) -> Fetch:
    """huggingface_hub alone, as its users call it: eight files at a time, no checksum compared."""
    return run("snapshot_download", ["-c", _PEER, REPOSITORY, str(directory)], url)


def compare(url: str, work: Path, repetitions: int) -> list[Fetch]:
    """Both in turn, each into an empty directory; of the last one of ours, the volume stays."""
    fetches: list[Fetch] = []
    for repetition in range(repetitions):
        both = [lambda: ours(url, work / "volume"), lambda: peer(url, work / "plain")]
        for fetch in reversed(both) if repetition % 2 else both:
            for directory in ("volume", "plain"):
                shutil.rmtree(work / directory, ignore_errors=True)
            # Nobody pays for what the one before has not brought to the disk yet.
            os.sync()
            fetches.append(fetch())
            print(f"{fetches[-1].who:>18}  {fetches[-1].seconds:6.2f} s  {fetches[-1].peak_mib:5.0f} MiB", flush=True)
    if not (work / "volume").is_dir():
        ours(url, work / "volume")
    return fetches


def warm_seconds(url: str, volume: Path, repetitions: int) -> tuple[float, float]:
    """Medians where all is published: of ours with a commit, and of an interpreter that does nothing."""
    (ref,) = volume.glob("*--*/refs/main")
    commit = ref.read_text().strip()
    published = [ours(url, volume, commit).seconds for _ in range(repetitions)]
    nothing = [run("python", ["-c", "pass"], url).seconds for _ in range(repetitions)]
    return statistics.median(published), statistics.median(nothing)


def main() -> None:
    """Measure what the flags say."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.download",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mib", type=int, default=4096, help="size of the model (4096)")
    parser.add_argument("--shards", type=int, default=8, help="files that it is made of (8)")
    parser.add_argument("--repetitions", type=int, default=4, help="fetches of each (4)")
    parser.add_argument("--directory", type=Path, help="where to work (that of temporary files)")
    parser.add_argument("--json", type=Path, help="write every single fetch there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="download-", dir=given.directory) as name:
        work = Path(name)
        size_bytes = given.mib << 20
        make_model(work / "model", size_bytes, given.shards)
        with served(work / "model") as url:
            fetches = compare(url, work, given.repetitions)
            published, nothing = warm_seconds(url, work / "volume", max(5, given.repetitions))
    medians: dict[str, float] = {}
    print(f"\nPython {platform.python_version()}, {os.cpu_count()} cores, {given.mib} MiB in {given.shards} files")
    for who in ("ours", "snapshot_download"):
        its = [fetch for fetch in fetches if fetch.who == who]
        medians[who] = statistics.median(size_bytes / fetch.seconds for fetch in its)
        peak = max(fetch.peak_mib for fetch in its)
        print(f"{who}: median {medians[who] / 2**20:.0f} MiB/s, peak {peak:.0f} MiB resident")
    ratio = medians["ours"] / medians["snapshot_download"]
    print(f"ratio of medians: {ratio:.2f}")
    print(f"published already: {published:.2f} s, of which the interpreter takes {nothing:.2f} s")
    if given.json:
        rows = [asdict(fetch) for fetch in fetches]
        given.json.write_text(json.dumps({"fetches": rows, "ratio": ratio, "warm_seconds": published}, indent=2))


if __name__ == "__main__":
    main()
