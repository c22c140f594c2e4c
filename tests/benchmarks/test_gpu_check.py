"""`benchmarks.gpu_check` on a CPU with the smallest shape: every stage, its limits, and what it writes."""

import ast
import base64
import datetime
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks import make_model
from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import install, report
from benchmarks.gpu_check.bars import compare
from devtools.paths import ROOT

TODAY = datetime.date(2026, 11, 28)
VERSIONS = {"python": "3.12.3", "installed": {"torch": "2.11.0"}, "differ": {}, "missing": []}


def check(folder: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    paths = ["--site", "site", "--results", "results", "--logs", "logs", "--scratch", "."]
    absolute = [str(folder / part) if not part.startswith("--") else part for part in paths]
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", *absolute, *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def results(folder: Path) -> tuple[dict[str, Any], str]:
    """The JSON and the Markdown."""
    [file] = (folder / "results").glob("*.json")
    return json.loads(file.read_text()), file.with_suffix(".md").read_text()


@pytest.mark.slow
def test_gpu_check_runs_every_stage(tmp_path: Path) -> None:
    one_test = f"{gpu_check.DEVICE_TESTS}/test_devices.py::test_mode_answers_sums_correctly[cpu-float32]"
    bench = ["--shapes", "tiny", "--mode_shapes", "tiny", "--levels", "1,2", "--output_tokens", "16"]
    process = check(tmp_path, *bench, "--questions", "50", "--tests", one_test, "--budget", "900", "--limit", "600")
    assert process.returncode == 0, process.stdout + process.stderr
    content, markdown = results(tmp_path)
    stages = content["stages"]
    assert {name: stage["status"] for name, stage in stages.items()} == dict.fromkeys(
        ("device", "load", "tests", "modes-tiny", "bench-tiny"), "passed"
    )
    quantizations = stages["modes-tiny"]["quantizations"]
    assert quantizations.keys() == {"bfloat16", "8bit", "4bit"}
    for mode in quantizations.values():
        assert mode["kv_cache_tokens"] > 0
        assert {level: rate > 0 for level, rate in mode["tokens_per_second"].items()} == {"1": True, "64": True}
    assert stages["device"]["copy_bytes_per_second"] > 1e8
    assert stages["device"]["sampling_ms"]["temperature"] > 0
    assert {"float32", "bfloat16", "8bit", "4bit"} <= stages["load"]["modes"].keys()
    assert all(mode["correct"] >= 0.97 for mode in stages["load"]["modes"].values())
    assert (stages["tests"]["counts"], stages["tests"]["failed"]) == ({"PASSED": 1}, [])
    bench_tiny = stages["bench-tiny"]
    assert [level["concurrency"] for level in bench_tiny["levels"]] == [1, 2]
    assert [level["concurrency"] for level in bench_tiny["sequential"]] == [1]
    assert bench_tiny["weight_bytes"] == 2 * make_model.parameters(make_model.SHAPES["tiny"])
    assert bench_tiny["ready_seconds"] > 0
    assert bench_tiny["first_token_ms"] > 0
    assert "| callers | tokens/s |" in markdown
    assert "of the memory bandwidth" in markdown
    assert list(tmp_path.glob("tmp*")) == [], "the weights are removed"


@pytest.mark.slow
def test_gpu_check_reports_a_failed_stage_and_goes_on(tmp_path: Path) -> None:
    process = check(tmp_path, "--stages", "tests,device", "--tests", "tests/absent.py")
    assert process.returncode == 1
    assert "tests/absent.py" in process.stdout, "the end of the log"
    content, markdown = results(tmp_path)
    assert {name: stage["status"] for name, stage in content["stages"].items()} == {
        "tests": "failed",
        "device": "passed",
    }
    assert "| tests | failed |" in markdown


@pytest.mark.slow
def test_gpu_check_stage_out_of_time_keeps_its_figures_and_leaves_no_process(tmp_path: Path) -> None:
    child = tmp_path / "child"
    program = (
        "import pathlib, subprocess, sys, time; from benchmarks.gpu_check import report; report.save({'so_far': 1});"
        "process = subprocess.Popen(['sleep', '600']);"
        f"pathlib.Path({str(child)!r}).write_text(str(process.pid)); time.sleep(600)"
    )
    result = gpu_check.run("load", [sys.executable, "-c", program], dict(os.environ), 20, tmp_path)
    assert (result["status"], result["so_far"]) == ("out of time", 1)
    state = Path(f"/proc/{child.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_gpu_check_stage_that_fails_or_has_no_time_left_has_not_passed(tmp_path: Path, capfd: Any) -> None:
    program = [sys.executable, "-c", "print('no such device'); raise SystemExit(3)"]
    assert gpu_check.run("load", program, dict(os.environ), 60, tmp_path)["status"] == "failed"
    assert "no such device" in capfd.readouterr().out
    assert gpu_check.run("load", program, {}, 4.9, tmp_path)["status"] == "not run"
    skipped = [sys.executable, "-c", "print('a.py::test_x[cuda] SKIPPED (no device)')"]
    result = gpu_check.run("tests", skipped, dict(os.environ), 60, tmp_path)
    assert (result["status"], result["reason"]) == ("failed", "no test ran")


def test_gpu_check_stages_of_later_calls_are_added_to_the_results_of_the_day(tmp_path: Path) -> None:
    device = {"status": "passed", "seconds": 1.0, "name": "NVIDIA H200", "copy_bytes_per_second": 4e12}
    report.write(tmp_path, "cuda", TODAY, VERSIONS, {"device": device})
    level = {"concurrency": 1, "tokens_per_second": 100.0, "ttft_p50_ms": 1.0, "ttft_p99_ms": 1.0}
    level |= {"itl_p50_ms": 7.0, "itl_p99_ms": 8.0}
    bench = {"status": "passed", "seconds": 1.0, "weight_bytes": 14e9, "make_seconds": 2.0, "levels": [level]}
    bench["sequential"] = [level | {"tokens_per_second": 20.0}]
    file = report.write(tmp_path, "cuda", TODAY, VERSIONS, {"bench-7b": bench})
    assert file.name == "nvidia-h200-2026-11-28.md"
    assert json.loads(file.with_suffix(".json").read_text())["stages"].keys() == {"device", "bench-7b"}
    text = file.read_text()
    assert "one caller: 0.50 of the memory bandwidth (at least 3.50 ms per token)" in text
    assert "| 1 | 100.0 | 1.0 | 1.0 | 7.0 | 8.0 | 5.0 |" in text


def bars(stages: dict[str, Any]) -> dict[str, tuple[str | None, bool | None]]:
    """Measured figure and result of each bar, by its name."""
    return {bar["name"]: (bar["measured"], bar["passed"]) for bar in compare(stages)}


def test_gpu_check_bars_compare_the_figures_of_the_stages() -> None:
    level = {"concurrency": 1, "tokens_per_second": 100.0, "itl_p50_ms": 5.0}
    bench = {"weight_bytes": 14e9, "levels": [level, level | {"concurrency": 64, "tokens_per_second": 1999.0}]}
    bench |= {"sequential": [level], "first_token_ms": 149.9, "ready_seconds": 20.1}
    bench |= {"disturbed": {"before_p99_ms": 8.0, "during_p99_ms": 16.0}}
    stages = {
        "device": {"copy_bytes_per_second": 4e12, "sampling_ms": {"temperature": 0.25, "penalties": 1.0}},
        "bench-7b": bench,
        "tests": {"status": "failed", "counts": {"PASSED": 3, "FAILED": 1}},
        "load": {"modes": {"bfloat16": {"correct": 0.99}, "fp8": {"error": "no kernel"}}},
    }
    assert list(bars(stages).values()) == [
        ("0.7", True),
        ("20", False),
        ("150", True),
        ("2", True),
        ("20.1", False),
        ("0.05", True),
        (None, None),
        (None, None),
        ("0.2", False),
        (None, None),
        ("3 passed, 1 failed", False),
        ("0.99", True),
        (None, None),
        (None, None),
        ("0", False),
    ]
    assert set(bars({}).values()) == {(None, None)}, "nothing is measured"
    together = {"itl_p50_ms": 0.0}
    bench |= {"levels": [level | together, level | together | {"concurrency": 64}]}
    bench["disturbed"] = {"before_p99_ms": 0.0, "during_p99_ms": 16.0}
    results = list(bars(stages).values())
    assert [results[0], results[3], results[5]] == [(None, None)] * 3, "tokens that arrive together have no step time"


def test_gpu_check_writes_bars_and_modes(tmp_path: Path) -> None:
    quantizations = {
        "bfloat16": {
            "load_seconds": 9.0,
            "device_bytes": 2**33,
            "kv_cache_tokens": 4096,
            "tokens_per_second": {"1": 150.0, "64": 5000.0},
        },
        "fp8": {"error": "exit code 1"},
    }
    stage = {"status": "failed", "seconds": 90.0, "quantizations": quantizations}
    bench = {"status": "passed", "seconds": 9.0, "ready_seconds": 15.0}
    file = report.write(tmp_path, "cuda", TODAY, VERSIONS, {"modes-7b": stage, "bench-7b": bench})
    text = file.read_text()
    assert "| bfloat16 | 8.00 | 9.0 | 4096 | 150.0 | 5000.0 |" in text
    assert "| fp8 | exit code 1 |  |  |  |  |" in text
    assert "| 7b: ready, s | at most 20 | 15 | pass |" in text
    assert "| tests marked `gpu` | all pass |  | not measured |" in text
    ready = next(bar for bar in json.loads(file.with_suffix(".json").read_text())["bars"] if "ready" in bar["name"])
    assert ready["passed"] is True


def test_gpu_check_counts_tests_also_of_a_run_that_was_killed() -> None:
    outcomes = ("test_x[cuda] PASSED [ 5%]", "test_y[a b] FAILED [ 10%]", "test_z SKIPPED (no)", "test_killed")
    log = "\n".join(["collecting", *(f"a.py::{outcome}" for outcome in outcomes)])
    assert gpu_check.count_tests(log) == {
        "counts": {"PASSED": 1, "FAILED": 1, "SKIPPED": 1},
        "failed": ["a.py::test_y[a b]"],
    }


def test_gpu_check_selects_the_marked_tests_on_a_gpu() -> None:
    stages = gpu_check.commands(gpu_check.parse(["--shapes", "1b,7b", "--stages", "tests,bench"]), "scratch")
    assert list(stages) == ["tests", "bench-1b", "bench-7b"]
    assert stages["tests"][-3:] == ["-m", "gpu", gpu_check.DEVICE_TESTS]


def test_gpu_check_starts_with_the_standard_library_only() -> None:
    for name in ("__main__", "bars", "install", "report"):
        tree = ast.parse((ROOT / "benchmarks" / "gpu_check" / f"{name}.py").read_text())
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names) <= {"benchmarks"}
        assert {module for module in modules if module.startswith("benchmarks")} <= {"benchmarks.gpu_check"}


def make_wheel(folder: Path, version: str) -> None:
    """Write a wheel of the package `uvicorn` with one module."""
    info = f"uvicorn-{version}.dist-info"
    files = {
        "uvicorn.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: uvicorn\nVersion: {version}\nRequires-Dist: absent\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {
        name: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        for name, text in files.items()
    }
    record = "".join(f"{name},sha256={digests[name]},{len(text)}\n" for name, text in files.items())
    folder.mkdir()
    with zipfile.ZipFile(folder / f"uvicorn-{version}-py3-none-any.whl", "w") as wheel:
        for name, text in (files | {f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}).items():
            wheel.writestr(name, text)


def test_gpu_check_installs_wheels_over_what_the_machine_has(tmp_path: Path) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    with pytest.raises(install.InstallError, match="Run `make gpu-wheels`"):
        install.install(wheels, site)
    make_wheel(wheels / "part2", "0.1")
    install.install(wheels, site)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    versions = install.compare_versions(environment, ROOT / "constraints.txt")
    assert versions["installed"]["uvicorn"] == "0.1"
    assert versions["differ"]["uvicorn"] != "0.1"
    assert versions["missing"] == []
    assert "uvicorn is 0.1, constraints.txt has" in install.describe(versions)
    command = [sys.executable, "-c", "import uvicorn; print(uvicorn.VERSION)"]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "0.1\n"


def test_gpu_check_declares_the_project_whose_sources_run(tmp_path: Path) -> None:
    install.declare_project(ROOT / "pyproject.toml", tmp_path)
    [found] = importlib.metadata.distributions(name="kserve-llm", path=[str(tmp_path)])
    assert found.version == install.SOURCES_VERSION
