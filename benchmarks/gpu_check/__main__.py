"""Prove and measure the predictor on a GPU, on a bare machine with python3 and torch, from a folder of wheels.

`python3 -m benchmarks.gpu_check --wheels FOLDER` needs no network and, at its start, the standard library only. It
installs the wheels of `make gpu-wheels` into a directory of its own and runs stages, each a process with a time limit:

    device   name, versions, memory bandwidth
    load     the demo model in every mode: load time, memory, share of correct sums
    tests    the tests marked `gpu`
    modes    a model of each of `--mode_shapes` with random weights in every quantization: memory, KV cache, tokens/s
    bench    a model of each of `--shapes` with random weights: ready time, tokens/s next to sequential `generate`, TTFT

A stage that fails or runs out of time is reported with what it had measured, and the next one runs. The results are
written as JSON and Markdown; those of another call on the same device and day are kept, so that stages can be split
over several calls. All figures are compared with what is expected of an H100 or H200 (`bars`), which does not change
the exit code: it is 0 if every stage passed.
"""

import argparse
import datetime
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import install, report

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("device", "load", "tests", "modes", "bench")
LIMIT_SECONDS = {"device": 40, "load": 120, "tests": 180, "modes": 180, "bench": 200}
BUDGET_SECONDS = 480
LEAST_SECONDS = 5
"""A stage with less time left is not started."""
_LOG_LINES = 30
"""Lines of a failed stage's log that are shown."""
_TEST = re.compile(r"^(?P<name>\S+::.+?) (?P<outcome>PASSED|FAILED|ERROR|SKIPPED)\b")
DEVICE_TESTS = "tests/predictor/devices"


def main() -> int:
    """Run the stages that the flags select and return the exit code."""
    arguments = parse(sys.argv[1:])
    deadline = time.monotonic() + arguments.budget
    environment = dict(os.environ)
    if arguments.wheels:
        began = time.monotonic()
        try:
            install.install(arguments.wheels, arguments.site)
            install.declare_project(ROOT / "pyproject.toml", arguments.site)
        except install.InstallError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(f"wheels installed in {time.monotonic() - began:.0f} s", flush=True)
    if arguments.site.is_dir():
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(arguments.site), os.environ.get("PYTHONPATH")]))
    versions = install.compare_versions(environment, ROOT / "constraints.txt")
    print(install.describe(versions), flush=True)

    arguments.logs.mkdir(parents=True, exist_ok=True)
    today = datetime.datetime.now(datetime.UTC).date()
    failed = False
    # Here, since a stage that is killed leaves its files.
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        for name, command in commands(arguments, scratch).items():
            limit = min(arguments.limit or LIMIT_SECONDS[name.partition("-")[0]], deadline - time.monotonic())
            result = run(name, command, environment, limit, arguments.logs)
            failed |= result["status"] != "passed"
            print(f"{name}: {result['status']}, {result['seconds']:.0f} s", flush=True)
            # After every stage, since this program may be killed too.
            written = report.write(arguments.results, arguments.device, today, versions, {name: result})
    print(written.read_text())
    print(f"results: {written} and {written.with_suffix('.json').name}")
    return int(failed)


def commands(arguments: argparse.Namespace, scratch: str) -> dict[str, list[str]]:
    """Return the command of each selected stage, by its name; `modes` and `bench` are one stage per shape."""
    stages: dict[str, list[str]] = {}
    for stage in arguments.stages:
        module = [sys.executable, "-m", f"benchmarks.gpu_check.{stage}_stage", "--device", arguments.device]
        if stage == "tests":
            # The same tests on every device: those of a GPU have the marker, the others its device's name.
            selection = ["-m", "gpu"] if arguments.device.startswith("cuda") else ["-k", arguments.device]
            flags = ["--verbose", "-p", "no:cacheprovider", "-W", "default"]
            stages[stage] = [sys.executable, "-m", "pytest", *flags, *selection, *arguments.tests]
        elif stage == "bench":
            for shape in arguments.shapes:
                levels = ["--levels", ",".join(map(str, arguments.levels)), "--scratch", scratch]
                tokens = ["--output_tokens", str(arguments.output_tokens)]
                stages[f"{stage}-{shape}"] = [*module, "--shape", shape, *levels, *tokens]
        elif stage == "modes":
            for shape in arguments.mode_shapes:
                flags = ["--scratch", scratch, "--output_tokens", str(arguments.output_tokens)]
                stages[f"{stage}-{shape}"] = [*module, "--shape", shape, *flags]
        elif stage == "load":
            stages[stage] = [*module, "--questions", str(arguments.questions)]
        else:
            stages[stage] = module
    return stages


def run(
    name: str, command: Sequence[str], environment: dict[str, str], limit_seconds: float, logs: Path
) -> dict[str, Any]:
    """Run a stage in a process group of its own, and kill the group when it ends or its time is up.

    Returns:
        `status` ("passed", "failed", "out of time", "not run"), `seconds`, and the stage's own figures.
    """
    if limit_seconds < LEAST_SECONDS:
        return {"status": "not run", "seconds": 0.0, "reason": "the budget is used up"}
    log, output = logs / f"{name}.log", logs / f"{name}.json"
    output.unlink(missing_ok=True)
    began = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | {"GPU_CHECK_OUTPUT": str(output.resolve()), "PYTHONUNBUFFERED": "1"},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = "failed" if process.wait(limit_seconds) else "passed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            _kill_group(process.pid)
            process.wait()
    result: dict[str, Any] = {"status": status, "seconds": time.monotonic() - began, **report.read(output)}
    text = log.read_text(errors="replace")
    if name == "tests":
        result |= count_tests(text)
        if status == "passed" and not result["counts"].get("PASSED"):
            result["status"] = "failed"
            result["reason"] = "no test ran"
    if result["status"] != "passed":
        print(f"--- end of {log}", *text.splitlines()[-_LOG_LINES:], "---", sep="\n", flush=True)
    return result


def count_tests(log: str) -> dict[str, Any]:
    """Return `counts` of the outcomes in a verbose log of pytest, and the names of tests that `failed`."""
    outcomes = [match.groupdict() for line in log.splitlines() if (match := _TEST.match(line))]
    counts: dict[str, int] = {}
    for test in outcomes:
        counts[test["outcome"]] = counts.get(test["outcome"], 0) + 1
    return {
        "counts": counts,
        "failed": [test["name"] for test in outcomes if test["outcome"] in ("FAILED", "ERROR")],
    }


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build = ROOT / "build"
    parser.add_argument("--wheels", type=Path, help="folder of wheels, also in folders below it; default: install none")
    parser.add_argument(
        "--site", type=Path, default=build / "gpu-site", help="directory to install into (default: %(default)s)"
    )
    parser.add_argument(
        "--stages",
        type=_stages,
        default=list(STAGES),
        help=f"comma-separated (default: {','.join(STAGES)}, in this order)",
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu for a trial (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="seconds for all (default: %(default)s)")
    parser.add_argument("--limit", type=float, help="seconds for each stage (default: a limit of its own)")
    parser.add_argument("--shapes", type=_names, default=["1b", "7b"], help="of benchmarks.make_model (default: 1b,7b)")
    parser.add_argument("--mode_shapes", type=_names, default=["7b"], help="of the stage modes (default: 7b)")
    parser.add_argument("--levels", type=_numbers, default=[1, 8, 32, 64, 128], help="callers (default: 1,8,32,64,128)")
    parser.add_argument("--output_tokens", type=int, default=128, help="per completion (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=200, help="sums per mode (default: %(default)s)")
    parser.add_argument("--tests", nargs="+", default=[DEVICE_TESTS], help="arguments of pytest (default: %(default)s)")
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path("/dev/shm"),  # noqa: S108, in memory, so that the disk is not measured
        help="folder for the weights of 1 B and 7 B models, 2.5 and 14 GB (default: %(default)s)",
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--logs", type=Path, default=build / "gpu-check", help="folder of the stages' logs (default: %(default)s)"
    )
    return parser.parse_args(argv)


def _names(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _stages(text: str) -> list[str]:
    names = sorted(text.split(","), key=lambda name: STAGES.index(name) if name in STAGES else 0)
    if unknown := sorted(set(names) - set(STAGES)):
        raise argparse.ArgumentTypeError(f"unknown stage {unknown[0]}; choose from {', '.join(STAGES)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
