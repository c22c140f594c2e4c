"""What is written to stderr, seen from outside: each test is a small program of its own."""

import asyncio
import json
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from devtools.processes import ROOT
from predictor.observability import request_record
from predictor.observability.request_record import RequestRecord
from predictor.types import FinishedSequence

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"

HEAD = """
import logging, sys
from predictor.observability import logging
logs.configure("INFO", sys.argv[1])
log = logging.getLogger("predictor.model")
"""

FINISHED = FinishedSequence(
    index=0,
    outcome="length",
    prompt_tokens=3,
    completion_tokens=5,
    admitted_at=100.0,
    total_seconds=0.7,
    queue_seconds=0.1,
    first_token_seconds=0.2,
)


def written(program: str, form: str) -> list[str]:
    """The lines on stderr of `program` after the logs were configured."""
    ended = subprocess.run(
        [sys.executable, "-c", HEAD + program, form], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ended.stdout == ""
    return ended.stderr.splitlines()


def objects(program: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written(program, "json")]


def test_a_text_line_tells_time_level_logger_and_message() -> None:
    [line] = written("log.debug('no'); log.info('%d weights', 3)", "text")
    assert re.fullmatch(f"{TIME} INFO predictor.model: 3 weights", line)


def test_a_json_line_has_the_same_by_name() -> None:
    [line] = objects("log.debug('no'); log.info('%d weights', 3)")
    assert re.fullmatch(TIME, line.pop("time"))
    assert line == {"level": "INFO", "logger": "predictor.model", "message": "3 weights"}


REQUEST = """
log.info("before")
with request_record.bind(request_record.RequestRecord("id-1")):
    log.info("within")
    logging.getLogger("kserve.model").warning("theirs")
log.info("after")
"""


def test_lines_of_a_request_carry_its_id() -> None:
    text = [line.split(" ", 2)[2] for line in written(REQUEST, "text")]
    assert text == [
        "predictor.model: before",
        "predictor.model [id-1]: within",
        "kserve.model [id-1]: theirs",
        "predictor.model: after",
    ]
    assert [line.get("request_id") for line in objects(REQUEST)] == [None, "id-1", "id-1", None]


def test_the_fields_of_a_line_are_keys_of_its_object() -> None:
    [line] = objects("log.info('GET / 200', extra={'fields': {'status': 200, 'finish_reasons': ['stop']}})")
    assert (line["message"], line["status"], line["finish_reasons"]) == ("GET / 200", 200, ["stop"])


def test_an_event_is_one_line_whatever_its_message_holds() -> None:
    program = r"log.info('a\r\n2026-01-01T00:00:00.000Z INFO forged: %s', 'b\n\udcff')"
    [text] = written(program, "text")
    assert text.endswith(r"predictor.model: a\r\n2026-01-01T00:00:00.000Z INFO forged: b\n\udcff")
    [line] = objects(program)
    assert line["message"] == "a\r\n2026-01-01T00:00:00.000Z INFO forged: b\n\udcff"


FAILURE = """
try:
    1 / 0
except ZeroDivisionError:
    log.exception("failed")
"""


def test_an_exception_follows_its_line() -> None:
    first, second, *_, last = written(FAILURE, "text")
    assert first.endswith("ERROR predictor.model: failed")
    assert (second, last) == ("Traceback (most recent call last):", "ZeroDivisionError: division by zero")
    [line] = objects(FAILURE)
    assert line["exception"].startswith("Traceback (most recent call last):\n")
    assert line["exception"].endswith("\nZeroDivisionError: division by zero")


LIBRARIES = """
del sys.argv[1:]
import kserve.logging
kserve.logging.configure_logging()
for name in ("kserve", "kserve.trace", "uvicorn.access", "uvicorn.error", "httpx", "ContinuousBatchingLogger"):
    for level in (logging.INFO, logging.WARNING):
        logging.getLogger(name).log(level, "told")
"""


def test_libraries_write_our_lines_and_no_more_than_matters() -> None:
    assert [(line["level"], line["logger"]) for line in objects(LIBRARIES)] == [
        ("WARNING", "kserve"),
        ("INFO", "uvicorn.error"),
        ("WARNING", "uvicorn.error"),
        ("WARNING", "httpx"),
        ("WARNING", "ContinuousBatchingLogger"),
    ]


def test_a_warning_of_python_is_a_line_too() -> None:
    [line] = objects("import warnings; warnings.warn('old', FutureWarning)")
    assert (line["level"], line["logger"]) == ("WARNING", "py.warnings")
    assert "FutureWarning: old" in line["message"]


def test_uvicorn_does_not_even_make_access_lines() -> None:
    assert written("print(logging.getLogger('uvicorn.access').hasHandlers(), file=sys.stderr)", "text") == ["False"]


def test_outside_of_a_request_what_is_noted_is_forgotten() -> None:
    request_record.current().error = "Overloaded"
    assert request_record.current() == RequestRecord()


def test_a_request_has_one_record_also_in_its_tasks_and_threads() -> None:
    async def note(key: str) -> None:
        await asyncio.sleep(0)
        request_record.current().key = (request_record.current().key or "") + key

    async def answer(request_id: str, key: str) -> RequestRecord:
        with request_record.bind(RequestRecord(request_id)) as record:
            await asyncio.gather(note(key), note(key))
            assert await asyncio.to_thread(request_record.current) is record
        return record

    async def answer_two() -> list[RequestRecord]:
        return list(await asyncio.gather(answer("a", "x"), answer("b", "y")))

    assert asyncio.run(answer_two()) == [RequestRecord("a", "xx"), RequestRecord("b", "yy")]
    assert request_record.current() == RequestRecord()


def test_a_record_is_out_of_use_after_a_failure() -> None:
    with pytest.raises(ZeroDivisionError), request_record.bind(RequestRecord("a")):
        raise ZeroDivisionError
    assert request_record.current().request_id == ""


def test_a_record_tells_what_is_known() -> None:
    assert RequestRecord("a").as_fields() == {}
    assert RequestRecord("a", "alice", operation="chat", error="Overloaded").as_fields() == {
        "key": "alice",
        "error": "Overloaded",
    }


def test_a_record_tells_of_all_sequences_tokens_and_of_the_slowest_ones_times() -> None:
    record = RequestRecord("a", trace_id="0af7651916cd43dd8448eb211c80319c")
    record.finished.append(replace(FINISHED, index=1, queue_seconds=0.0, first_token_seconds=0.123456))
    assert record.as_fields() == {
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "sequences": 1,
        "finish_reasons": ["length"],
        "queue_seconds": 0.0,
        "first_token_seconds": 0.1235,
    }
    record.finished.append(
        replace(FINISHED, outcome="cancelled", completion_tokens=0, queue_seconds=0.2, first_token_seconds=None)
    )
    known = record.as_fields()
    assert (known["prompt_tokens"], known["completion_tokens"], known["sequences"]) == (6, 5, 2)
    assert known["finish_reasons"] == ["length", "cancelled"]
    assert (known["queue_seconds"], known["first_token_seconds"]) == (0.2, 0.1235)


def test_a_record_does_not_tell_of_times_that_no_sequence_has() -> None:
    record = RequestRecord("a")
    record.finished.append(replace(FINISHED, outcome="cancelled", queue_seconds=None, first_token_seconds=None))
    assert {"queue_seconds", "first_token_seconds"}.isdisjoint(record.as_fields())
