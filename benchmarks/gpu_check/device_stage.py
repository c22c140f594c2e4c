"""Stage `device`: what the device is, its memory bandwidth, and the time of sampling there."""

import argparse
import platform
import time

import torch

from benchmarks import sampling
from benchmarks.gpu_check import report

COPIED_BYTES = {"cuda": 4 * 2**30, "cpu": 2**28}
REPETITIONS = 10
SAMPLED_ROWS = 64
SAMPLING_REPETITIONS = 3


def copy_bytes_per_second(device: torch.device) -> float:
    """Return the rate of the fastest copy from one buffer of the device to another, bytes read and written."""
    source = torch.randint(0, 2**31, (COPIED_BYTES[device.type] // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    durations = []
    for _ in range(REPETITIONS):
        _synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        durations.append(time.perf_counter() - began)
    return float(2 * source.nbytes / min(durations))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Save the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.device_stage", description=__doc__)
    parser.add_argument("--device", required=True)
    device = torch.device(parser.parse_args().device)
    figures: dict[str, object] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        figures |= {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
        }
    else:
        figures["name"] = f"{device.type} {platform.machine()}"
    report.save(figures)
    figures["copy_bytes_per_second"] = copy_bytes_per_second(device)
    report.save(figures)
    figures["sampling_ms"] = sampling.measure_all(SAMPLED_ROWS, device, SAMPLING_REPETITIONS)
    report.save(figures)


if __name__ == "__main__":
    main()
