from benchmarks import compare
from benchmarks.throughput import Measurement, Run


def measurement(server: str, tokens_per_second: float) -> Measurement:
    run = Run(8, 512, 512, 1.0, tokens_per_second, 1.0, 1.0, 1.0, 1.0, 1.0)
    return Measurement(server, 8, run, spread_percent=3.0, ratio=1.0, runs=[run])


def test_compare_prints_every_ratio() -> None:
    table = compare.table([measurement("8bit", 30.0), measurement("none", 15.0), measurement("peer", 10.0)], ["peer"])
    assert "8bit / peer: 3.00" in table
    assert "none / peer: 1.50" in table
