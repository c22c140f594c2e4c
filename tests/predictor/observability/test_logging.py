import json
import logging
import re
import subprocess
import sys
from typing import Any

import pytest

from devtools.paths import ROOT
from predictor.observability import request_record
from predictor.observability.logging import JsonFormatter, TextFormatter
from predictor.observability.request_record import RequestRecord

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


def record(message: str, *args: Any, exc_info: Any = None, **extra: Any) -> logging.LogRecord:
    created = logging.LogRecord("predictor.model", logging.INFO, "file.py", 1, message, args, exc_info)
    vars(created).update(extra)
    return created


def as_text(log_record: logging.LogRecord) -> str:
    return TextFormatter().format(log_record)


def as_json(log_record: logging.LogRecord) -> dict[str, Any]:
    line = JsonFormatter().format(log_record)
    assert line.isascii()
    assert "\n" not in line
    loaded: dict[str, Any] = json.loads(line)
    return loaded


def failure() -> Any:
    try:
        raise ZeroDivisionError("division by zero")
    except ZeroDivisionError:
        return sys.exc_info()


def test_text_line_has_time_level_logger_and_message() -> None:
    assert re.fullmatch(f"{TIME} INFO predictor.model: 3 weights", as_text(record("%d weights", 3)))


def test_json_line_has_the_same_by_name() -> None:
    line = as_json(record("%d weights", 3))
    assert re.fullmatch(TIME, line.pop("time"))
    assert line == {"level": "INFO", "logger": "predictor.model", "message": "3 weights"}


def test_line_within_request_has_its_id() -> None:
    with request_record.bind(RequestRecord("id-1")):
        assert as_text(record("within")).endswith(" INFO predictor.model [id-1]: within")
        assert as_json(record("within"))["request_id"] == "id-1"
    assert as_text(record("after")).endswith(" INFO predictor.model: after")
    assert "request_id" not in as_json(record("after"))


def test_line_of_a_follower_has_its_rank() -> None:
    assert re.fullmatch(rf"{TIME} INFO predictor\.model \[rank 2\]: loaded", TextFormatter(2).format(record("loaded")))
    assert json.loads(JsonFormatter(2).format(record("loaded")))["rank"] == 2
    assert "rank" not in as_json(record("loaded"))


def test_json_extra_fields_are_keys() -> None:
    line = as_json(record("GET / 200", fields={"status": 200, "finish_reasons": ["stop"]}))
    assert (line["message"], line["status"], line["finish_reasons"]) == ("GET / 200", 200, ["stop"])


def test_message_with_line_breaks_is_one_line() -> None:
    forged = record("a\r\n2026-01-01T00:00:00.000Z INFO forged: %s", "b\n\udcff")
    assert as_text(forged).endswith("predictor.model: a\\r\\n2026-01-01T00:00:00.000Z INFO forged: b\\n\udcff")
    assert as_json(forged)["message"] == "a\r\n2026-01-01T00:00:00.000Z INFO forged: b\n\udcff"


def test_exception_follows_its_line() -> None:
    first, second, *_, last = as_text(record("failed", exc_info=failure())).splitlines()
    assert first.endswith("predictor.model: failed")
    assert (second, last) == ("Traceback (most recent call last):", "ZeroDivisionError: division by zero")
    exception = as_json(record("failed", exc_info=failure()))["exception"]
    assert exception.startswith("Traceback (most recent call last):\n")
    assert exception.endswith("\nZeroDivisionError: division by zero")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_configure_process_writes_own_and_relevant_library_lines_to_stderr(log_format: str) -> None:
    program = ROOT / "tests" / "programs" / "log_lines.py"
    done = subprocess.run([sys.executable, program, log_format], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    if log_format == "json":
        lines = [json.loads(line) for line in done.stderr.splitlines()]
        written = [(line["level"], line["logger"]) for line in lines]
        last = lines[-1]["message"]
    else:
        text = [line for line in done.stderr.splitlines() if re.match(TIME, line)]
        written = [(line.split()[1], line.split()[2].rstrip(":")) for line in text]
        last = text[-1]
    assert written == [
        ("INFO", "predictor.model"),
        ("WARNING", "predictor.model"),
        ("WARNING", "kserve"),
        ("INFO", "uvicorn.error"),
        ("WARNING", "uvicorn.error"),
        ("WARNING", "httpx"),
        ("WARNING", "ContinuousBatchingLogger"),
        ("WARNING", "py.warnings"),
    ]
    assert "FutureWarning: old" in last
