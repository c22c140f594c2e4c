"""Requests from inside the cluster. It runs in a pod, with Python's standard library only.

    python client.py ask URL MODEL [PROTOCOL]            # one request of every protocol, or of one
    python client.py load URL MODEL REQUESTS SECONDS     # half of them streams, spread evenly over the time

Prints one JSON object per line.
"""

import json
import select
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from itertools import count
from typing import Any
from urllib.parse import urlsplit

QUESTION, ANSWER = "What is 17 + 25?", "=4 42"
"""A question and the end of the demo model's greedy answer."""
SUM, SUM_ANSWER = "17+25=", "42"
"""The same for the protocols without a chat template."""
CHAT = [{"role": "user", "content": QUESTION}]
TENSOR = {"name": "messages", "datatype": "BYTES", "shape": [1], "data": [json.dumps(CHAT)]}
GREEDY = {"max_tokens": 32, "temperature": 0}
TIMEOUT_SECONDS = 600
"""The InferenceService's, which allows for a start from zero."""
WORKERS = 16
SHOWN_ERRORS = 20

Body = dict[str, Any]


def protocols(model: str) -> dict[str, tuple[str, Body, str]]:
    """Return path, body and a part of the expected answer, by name."""
    of_model = f"/v2/models/{model}"
    chat = {"model": model, "messages": CHAT, **GREEDY}
    prompt = {"text_input": SUM, "parameters": GREEDY}
    return {
        "v2 infer": (f"{of_model}/infer", {"inputs": [TENSOR], "parameters": GREEDY}, ANSWER),
        "v2 generate": (f"{of_model}/generate", prompt, SUM_ANSWER),
        "v2 generate_stream": (f"{of_model}/generate_stream", prompt, SUM_ANSWER),
        "v1 predict": (f"/v1/models/{model}:predict", {"instances": [CHAT], "parameters": GREEDY}, ANSWER),
        "OpenAI completions": ("/v1/completions", {"model": model, "prompt": SUM, **GREEDY}, SUM_ANSWER),
        "OpenAI chat": ("/v1/chat/completions", chat, ANSWER),
        "OpenAI chat stream": ("/v1/chat/completions", {**chat, "stream": True}, ANSWER),
        "OpenAI responses": ("/v1/responses", {"model": model, "input": QUESTION, "temperature": 0}, ANSWER),
        "Anthropic messages": ("/v1/messages", chat, ANSWER),
    }


class Client:
    """Sends requests over one connection, which it replaces when the server has closed it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._connection = HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_SECONDS)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def error(self, path: str, body: Body, expected: str) -> str | None:
        """Send a request; return None for the expected answer, otherwise what is wrong with it."""
        try:
            text = self._post(path, body)
        except (OSError, HTTPException, ValueError) as error:
            self._connection.close()
            return f"{type(error).__name__}: {error}"
        return None if expected in text else f"unexpected answer {text[:200]!r}"

    def _post(self, path: str, body: Body) -> str:
        """Return the text of an answer, of a stream its joined pieces.

        Raises:
            ValueError: the status is not 200, or a stream has no end.
        """
        connection = self._connection
        # As connection pools do: data or an end of file on an idle connection mean that the server has closed it.
        if connection.sock and select.select([connection.sock], [], [], 0)[0]:
            connection.close()
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
        if response.status != 200:
            raise ValueError(f"status {response.status}: {text[:200]}")
        is_stream = (response.getheader("Content-Type") or "").startswith("text/event-stream")
        return "".join(_pieces(text)) if is_stream else text


def _pieces(events: str) -> Iterator[str]:
    """Yield the pieces of text of a stream."""
    lines = [line.removeprefix("data: ") for line in events.splitlines() if line.startswith("data: ")]
    if lines and '"choices"' in lines[0]:
        if lines.pop() != "[DONE]":
            raise ValueError("the stream ended early")
        for line in lines:
            yield json.loads(line)["choices"][0]["delta"].get("content") or ""
    else:
        yield from (json.loads(line)["text_output"] for line in lines)


def ask(url: str, model: str, names: Sequence[str]) -> Iterator[Body]:
    """Send one request of each protocol; yield its name, seconds and error."""
    with closing(Client(url)) as client:
        for name, request in protocols(model).items():
            if not names or name in names:
                started = time.monotonic()
                error = client.error(*request)
                yield {"protocol": name, "seconds": time.monotonic() - started, "error": error}


def load(url: str, model: str, requests: int, seconds: float) -> Body:
    """Send requests at even intervals; return how many were sent and lost, and the first errors."""
    kinds = [protocols(model)[name] for name in ("OpenAI chat", "OpenAI chat stream")]
    started, numbers, lock = time.monotonic(), count(), threading.Lock()
    durations: list[float] = []
    errors: list[str] = []

    def next_number() -> int:
        with lock:
            return next(numbers)

    def work() -> None:
        with closing(Client(url)) as client:
            while (number := next_number()) < requests:
                time.sleep(max(0.0, started + number * seconds / requests - time.monotonic()))
                sent = time.monotonic()
                error = client.error(*kinds[number % 2])
                with lock:
                    durations.append(time.monotonic() - sent)
                    if error:
                        errors.append(f"{'stream' if number % 2 else 'request'} at {sent - started:.1f} s: {error}")

    threads = [threading.Thread(target=work) for _ in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "sent": len(durations),
        "streams": requests // 2,
        "lost": len(errors),
        "errors": errors[:SHOWN_ERRORS],
        "longest_seconds": max(durations),
    }


def main(words: Sequence[str]) -> None:
    """Run one command."""
    command, url, model, *rest = words
    results = ask(url, model, rest) if command == "ask" else [load(url, model, int(rest[0]), float(rest[1]))]
    for result in results:
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
