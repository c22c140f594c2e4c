"""`benchmarks.compare`: its measurements on the demo model's server, and its tables."""

import asyncio
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest

from benchmarks import compare, comparison_tables, long_prompts, machine, servers
from benchmarks.comparison import Case, Comparison, Load
from benchmarks.long_prompts import Disturbance
from devtools import processes
from devtools.paths import DEMO_MODEL
from kserve_llm.bench import Completion, Run, Server
from kserve_llm.errors import BenchmarkError


@pytest.fixture(scope="module")
def predictor() -> Iterator[Server]:
    flags = ["--dtype", "float32", "--kv_cache_tokens", "4096"]
    with servers.predictor("ours-none", DEMO_MODEL, flags) as server:
        yield server


def test_comparison_measures_exact_token_counts_in_turns(predictor: Server) -> None:
    vocabulary = json.loads((DEMO_MODEL / "config.json").read_text())["vocab_size"]
    comparison = Comparison([predictor], vocabulary, seed=7, left_out={})
    # Few tokens, which may arrive in one event, and many.
    loads = [Load(1, 16, 4, requests=2, repetitions=2), Load(2, 80, 100, requests=1, repetitions=1)]
    cases = asyncio.run(comparison.measure(loads))
    assert [(case.server, case.callers, case.input_tokens) for case in cases] == [
        ("ours-none", 1, 16),
        ("ours-none", 2, 80),
    ]
    assert [len(case.runs) for case in cases] == [2, 1]
    for case in cases:
        assert len(case.other_cpu_percent) == len(case.runs)
        for run in case.runs:
            assert run.requests == max(case.callers, 2 if case.callers == 1 else 1)
            assert run.input_tokens == case.input_tokens * run.requests
            assert run.output_tokens == case.output_tokens * run.requests
    assert psutil.Process(predictor.process_id).status() != psutil.STATUS_STOPPED
    disturbed = asyncio.run(comparison.disturb(128, repetitions=1))["ours-none"]
    for one in disturbed:
        # Zero between tokens that arrive in one block.
        assert 0 <= one.before_p50_ms <= one.before_p99_ms
        assert 0 <= one.during_p50_ms <= one.during_p99_ms


def test_comparison_leaves_out_a_server_that_fails_and_measures_the_others(predictor: Server) -> None:
    gone = Server("gone", f"http://127.0.0.1:{processes.free_port()}/v1", "m")
    left_out: dict[str, str] = {}
    comparison = Comparison([gone, predictor], 100, seed=7, left_out=left_out)
    cases = asyncio.run(comparison.measure([Load(1, 8, 4, requests=1, repetitions=2)]))
    assert [(case.server, len(case.runs)) for case in cases] == [("ours-none", 2)]
    assert list(left_out) == ["gone"]
    assert "incomplete response" in left_out["gone"]


def test_disturbance_separates_gaps_before_and_during_a_prompt() -> None:
    long = Completion(10.0, [12.0, 12.1], 2000, 2)
    other = Completion(0.0, [7.0, 9.0, 9.5, 10.0, 11.5, 12.5, 13.0], 64, 7)
    assert long_prompts.disturbance(long, [other], quiet_from=8.0) == Disturbance(500, 500, 1000, 1500)
    assert long_prompts.disturbance(long, [Completion(0.0, [13.0, 14.0], 64, 2)], quiet_from=8.0) is None


def test_start_all_leaves_out_a_server_that_does_not_start() -> None:
    @contextmanager
    def ready(name: str) -> Iterator[Server]:
        yield Server(name, "http://127.0.0.1/v1", "m")

    missing = partial(servers.command_server, "absent", [sys.executable, "-c", "raise SystemExit(1)"], 1)
    with ExitStack() as stack:
        started, left_out = compare.start_all(
            stack, {"one": partial(ready, "one"), "absent": missing, "two": partial(ready, "two")}
        )
        assert [server.name for server in started] == ["one", "two"]
    assert list(left_out) == ["absent"]
    assert "did not start" in left_out["absent"]
    with pytest.raises(BenchmarkError, match="No server"), ExitStack() as stack:
        compare.start_all(stack, {"absent": missing})


def test_start_all_interrupted_ends_the_servers_that_are_starting() -> None:
    @contextmanager
    def interrupt() -> Iterator[Server]:
        while len(psutil.Process().children()) == number:
            time.sleep(0.01)
        signal.pthread_kill(main_thread, signal.SIGINT)
        yield Server("one", "http://127.0.0.1/v1", "m")

    main_thread = threading.get_ident()
    number = len(psutil.Process().children())
    starting = partial(servers.command_server, "slow", [sys.executable, "-c", "import time; time.sleep(600)"], 1)
    with pytest.raises(KeyboardInterrupt), ExitStack() as stack:
        compare.start_all(stack, {"slow": starting, "one": interrupt})
    assert len(psutil.Process().children()) == number


def run(tokens_per_second: float, ttft_ms: float = 1.0, last_ttft_ms: float = 1.0) -> Run:
    return Run(8, 512, 512, 1.0, tokens_per_second, ttft_ms, last_ttft_ms, 20.0, 40.0, 1.0)


def case(server: str, *rates: float, callers: int = 8) -> Case:
    return Case(server, callers, 64, 64, [run(rate) for rate in rates], [3.0 for _ in rates])


def test_tables_ratio_is_the_median_over_pairs_of_runs() -> None:
    cases = [case("ours-8bit", 20.0, 30.0, 90.0), case("vllm-bf16", 10.0, 10.0, 60.0), case("peer", 1.0, 1.0, 1.0)]
    text = "\n".join(comparison_tables.ratios(cases, [("ours-8bit", "peer")]))
    assert "| ours-8bit / vllm-bf16 | 2.00 (1.50 to 3.00)    |" in text
    assert "| ours-8bit / peer      | 30.00 (20.00 to 90.00) |" in text
    assert "vllm-int8" not in text, "it was not measured"


def test_tables_rates_have_spread_and_the_time_of_a_step() -> None:
    cases = [case("ours-8bit", 90.0, 100.0, 110.0), case("ours-8bit", 10.0, callers=1)]
    lines = list(comparison_tables.rates(cases))
    assert lines[0] == "| server    | 8 callers             | 1 caller            |"
    assert lines[2] == "| ours-8bit | 100.0 ± 10 %, 20.0 ms | 10.0 ± 0 %, 20.0 ms |"


def test_tables_first_token_has_the_median_and_the_last_caller() -> None:
    one = Case("ours-8bit", 1, 128, 4, [run(1.0, 100.0, 100.0), run(1.0, 300.0, 300.0), run(1.0, 200.0, 200.0)], [])
    eight = Case("ours-8bit", 8, 128, 4, [run(1.0, 400.0, 700.0)], [])
    lines = list(comparison_tables.first_tokens([one, eight]))
    assert lines[0] == "| server    | 128 tokens, 1 caller | 128 tokens, 8 callers |"
    assert lines[2] == "| ours-8bit | 200                  | 400, last 700         |"


def test_tables_disturbance_is_compared_with_the_quiet_median() -> None:
    measured = {"a": [Disturbance(40.0, 50.0, 60.0, 100.0)], "b": [], "c": [Disturbance(0.0, 50.0, 60.0, 100.0)]}
    lines = list(comparison_tables.disturbances(measured))
    assert lines[2].split("|")[1:-1] == [
        " a      ",
        " 40            ",
        " 50         ",
        " 60             ",
        " 100         ",
        " 2.5                       ",
    ]
    assert lines[3].count(comparison_tables.ABSENT) == 5
    assert lines[4].count(comparison_tables.ABSENT) == 1, "tokens that arrive together have no time between them"


def test_report_writes_tables_and_figures(tmp_path: Path) -> None:
    facts = machine.facts() | {
        "cpu": "A (R) CPU",
        "cores": 2,
        "peers": {"llamacpp": {"AMX": "not on this CPU"}},
        "left_out": {"vllm-int8": "It did not start."},
    }
    content = {"date": "2026-11-28", "machine": facts, "settings": {"long_prompt": 2048}}
    rates = [case("ours-8bit", 10.0), case("vllm-bf16", 5.0), case("program", 40.0)]
    lines = compare.report(content, rates, rates, {"ours-8bit": [Disturbance(1.0, 2.0, 3.0, 4.0)]}, tmp_path)
    text = (tmp_path / "a-r-cpu-2-cores-2026-11-28.md").read_text()
    assert text == "\n".join(lines) + "\n"
    for sentence in (
        "llamacpp: AMX not on this CPU.",
        "Left out: vllm-int8: It did not start.",
        "2.00 (2.00 to 2.00)",
        "8bit / program",
    ):
        assert sentence in text
    assert "Other processes used 3 % of one core" in text
    assert json.loads((tmp_path / "a-r-cpu-2-cores-2026-11-28.json").read_text())["machine"]["cpu"] == "A (R) CPU"


def test_machine_facts_describe_this_machine() -> None:
    facts = machine.facts()
    assert facts["cores"] >= 1
    assert facts["memory_gib"] > 0
    assert facts["versions"].keys() == {"torch", "transformers", "kserve"}
    assert set(facts["isa"]) <= set(machine.ISA_FLAGS)


def test_compare_unknown_peer_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.parse(["--model_dir", "m", "--peers", "vllm-fp4"])
    assert "vllm-fp4 is none of vllm-bf16, " in capsys.readouterr().err
