import asyncio
import logging
from dataclasses import replace

import pytest

from predictor.observability import request_record
from predictor.observability.request_record import RequestRecord
from predictor.types import Caller, FinishedSequence

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


def test_current_outside_of_request_is_discarded() -> None:
    request_record.current().error = "Overloaded"
    assert request_record.current() == RequestRecord()


def test_bind_applies_to_tasks_and_threads_of_one_request_only() -> None:
    async def append(protocol: str) -> None:
        await asyncio.sleep(0)
        request_record.current().protocol = (request_record.current().protocol or "") + protocol

    async def handle(request_id: str, protocol: str) -> RequestRecord:
        with request_record.bind(RequestRecord(request_id)) as record:
            await asyncio.gather(append(protocol), append(protocol))
            assert await asyncio.to_thread(request_record.current) is record
        return record

    async def handle_two() -> list[RequestRecord]:
        return list(await asyncio.gather(handle("a", "x"), handle("b", "y")))

    assert asyncio.run(handle_two()) == [RequestRecord("a", "xx"), RequestRecord("b", "yy")]
    assert request_record.current() == RequestRecord()


def test_bind_after_exception_restores_previous_record() -> None:
    with pytest.raises(ZeroDivisionError), request_record.bind(RequestRecord("a")):
        raise ZeroDivisionError
    assert request_record.current().request_id == ""


def test_as_fields_omits_unset_values_and_operation() -> None:
    assert RequestRecord("a").as_fields() == {}
    assert RequestRecord("a", caller=Caller("alice"), operation="chat", error="Overloaded").as_fields() == {
        "key": "alice",
        "error": "Overloaded",
    }


def test_as_fields_sums_tokens_and_takes_longest_times() -> None:
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
    fields = record.as_fields()
    assert (fields["prompt_tokens"], fields["completion_tokens"], fields["sequences"]) == (6, 5, 2)
    assert fields["finish_reasons"] == ["length", "cancelled"]
    assert (fields["queue_seconds"], fields["first_token_seconds"]) == (0.2, 0.1235)


def test_as_fields_omits_times_that_no_sequence_has() -> None:
    record = RequestRecord("a")
    record.finished.append(replace(FINISHED, outcome="cancelled", queue_seconds=None, first_token_seconds=None))
    assert {"queue_seconds", "first_token_seconds"}.isdisjoint(record.as_fields())


def test_ignored_fields_are_bounded_and_safe_for_headers() -> None:
    record = RequestRecord()
    record.add_ignored_fields(["max_token", "a\r\nb: ü,", "x" * 100])
    assert record.ignored_fields == ["max_token", "a??b????", "x" * 64]
    record.add_ignored_fields(str(number) for number in range(1000))
    record.add_ignored_fields(["further"])
    assert (len(record.ignored_fields), record.ignored_fields[-2:]) == (17, ["12", "..."])
    assert record.as_fields() == {"ignored_fields": record.ignored_fields}


def test_log_request_writes_text_and_fields(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "predictor.request")
    record = RequestRecord("a", "grpc", finished=[FINISHED], caller=Caller("alice"))
    request_record.log_request("gRPC OK", record, {"status": "OK"}, duration_ms=1.5)
    [line] = caplog.records
    assert line.getMessage().startswith("gRPC OK duration_ms=1.5 key=alice protocol=grpc prompt_tokens=3")
    assert " finish_reasons=length " in line.getMessage()
    assert vars(line)["fields"] == {"status": "OK", "duration_ms": 1.5, **record.as_fields()}
