"""Whole responses and errors."""

import json
from dataclasses import replace

import openai as client_package
import pytest
from openai.types import Completion as CompletionObject
from openai.types.chat import ChatCompletion

from predictor import errors
from predictor.errors import InvalidRequest, NotFound, RequestError
from predictor.protocols.openai import responses
from predictor.types import MIN_LOGPROB, Token
from tests.predictor.protocols.openai.helpers import (
    CUT,
    HELLO,
    MESSAGES,
    STOPPED,
    assert_conforms,
    chat,
    client,
    completions,
    rejected,
    template_messages,
    token,
)


def test_encode_chat_conforms_to_the_clients_type() -> None:
    decoded = chat(n=2)
    response = responses.encode(decoded, [HELLO, CUT])
    assert_conforms(ChatCompletion, response)
    assert response == {
        "id": decoded.id,
        "object": "chat.completion",
        "created": decoded.created,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Héllo", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            },
            {
                "index": 1,
                "message": {"role": "assistant", "content": "Hé", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            },
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }


def test_encode_completions_keeps_order_and_counts_each_prompt_once() -> None:
    response = responses.encode(completions(prompt=["a", "b"], n=2), [HELLO, CUT, STOPPED, STOPPED])
    assert_conforms(CompletionObject, response)
    assert [(choice["index"], choice["text"]) for choice in response["choices"]] == [
        (0, "Héllo"),
        (1, "Hé"),
        (2, ""),
        (3, ""),
    ]
    assert [choice["finish_reason"] for choice in response["choices"]] == ["stop", "length", "stop", "stop"]
    assert response["usage"] == {"prompt_tokens": 7, "completion_tokens": 8, "total_tokens": 15}


def test_encode_completion_logprobs_includes_the_sampled_token() -> None:
    response = responses.encode(completions(logprobs=2), [HELLO])
    assert_conforms(CompletionObject, response)
    assert response["choices"][0]["logprobs"] == {
        "tokens": ["Hé", "llo"],
        "token_logprobs": [-0.5, -2.0],
        "top_logprobs": [{"Hé": -0.5, "Ho": -1.5}, {"p": -0.1, "\ufffd": MIN_LOGPROB, "llo": -2.0}],
        "text_offset": [0, 2],
    }


PROMPT = (
    Token(0, "<|begin|>", None, special=True),
    Token(9, "a ", -1.0, False, (Token(8, "b ", -0.5, rank=1), Token(9, "a ", -1.0, rank=2)), 2),
)


def test_encode_echo_with_logprobs_reports_every_token_of_the_prompt_and_the_completion() -> None:
    completion = replace(HELLO, text="a Héllo", prompt=PROMPT)
    [choice] = responses.encode(completions(logprobs=1, prompt_logprobs=0, echo=True), [completion])["choices"]
    assert choice["logprobs"] == {
        "tokens": ["<|begin|>", "a ", "Hé", "llo", "<|end|>"],
        "token_logprobs": [None, -1.0, -0.5, -2.0, -0.1],
        "top_logprobs": [
            None,
            {"a ": -1.0, "b ": -0.5},
            {"Hé": -0.5},
            {"llo": -2.0, "p": -0.1},
            {"<|end|>": -0.1},
        ],
        "text_offset": [0, 0, 2, 4, 7],
    }
    assert choice["prompt_logprobs"] == [None, {"9": {"logprob": -1.0, "rank": 2, "decoded_token": "a "}}]
    written = replace(completion, text="<|begin|>a Héllo")
    [choice] = responses.encode(completions(logprobs=0, echo=True), [written])["choices"]
    assert choice["logprobs"]["text_offset"] == [0, 9, 11, 13, 16]
    assert "prompt_logprobs" not in choice


def test_encode_chat_prompt_logprobs_are_next_to_the_choices() -> None:
    response = responses.encode(chat(prompt_logprobs=1), [replace(HELLO, prompt=PROMPT)])
    assert response["choices"][0]["logprobs"] is None
    assert response["prompt_logprobs"] == [
        None,
        {
            "9": {"logprob": -1.0, "rank": 2, "decoded_token": "a "},
            "8": {"logprob": -0.5, "rank": 1, "decoded_token": "b "},
        },
    ]


def test_encode_best_of_returns_the_most_probable_ones_and_counts_all() -> None:
    candidates = [
        replace(HELLO, text=name, tokens=tuple(token("a", value) for value in values))
        for name, values in (("c", (-3.0,)), ("a", (-1.0, -1.0, -1.0)), ("b", (-2.0,)))
    ]
    response = responses.encode(completions(n=2, best_of=3), candidates)
    assert [(choice["index"], choice["text"]) for choice in response["choices"]] == [(0, "a"), (1, "b")]
    assert response["choices"][0]["logprobs"] is None
    assert response["usage"] == {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}


def test_encode_chat_logprobs_has_bytes_of_whole_characters() -> None:
    response = responses.encode(chat(logprobs=True, top_logprobs=2), [HELLO])
    assert_conforms(ChatCompletion, response)
    assert response["choices"][0]["logprobs"]["content"] == [
        {
            "token": "Hé",
            "logprob": -0.5,
            "bytes": [72, 195, 169],
            "top_logprobs": [
                {"token": "Hé", "logprob": -0.5, "bytes": [72, 195, 169]},
                {"token": "Ho", "logprob": -1.5, "bytes": [72, 111]},
            ],
        },
        {
            "token": "llo",
            "logprob": -2.0,
            "bytes": [108, 108, 111],
            "top_logprobs": [
                {"token": "p", "logprob": -0.1, "bytes": [112]},
                {"token": "\ufffd", "logprob": MIN_LOGPROB, "bytes": None},
            ],
        },
    ]


def test_encode_service_tier_if_requested() -> None:
    response = responses.encode(chat(service_tier="auto"), [HELLO])
    assert_conforms(ChatCompletion, response)
    assert response["service_tier"] == "default"


def test_response_message_is_accepted_in_the_next_request() -> None:
    message = responses.encode(chat(), [HELLO])["choices"][0]["message"]
    assert template_messages(MESSAGES[0], message)[1] == {"role": "assistant", "content": "Héllo"}


@pytest.mark.parametrize(
    ("error", "kind", "param", "code"),
    [
        (InvalidRequest("No."), "invalid_request_error", None, None),
        (InvalidRequest("No.", "top_p"), "invalid_request_error", "top_p", None),
        (errors.PromptTooLong("No.", "messages"), "invalid_request_error", "messages", "context_length_exceeded"),
        (errors.Unauthorized("No."), "authentication_error", None, "invalid_api_key"),
        (errors.Forbidden("No."), "permission_error", None, None),
        (NotFound("No."), "not_found_error", None, None),
        (errors.BodyTooLarge("No."), "invalid_request_error", None, None),
        (errors.Overloaded("No."), "rate_limit_error", None, "rate_limit_exceeded"),
        (errors.GenerationFailed("No."), "server_error", None, None),
        (errors.Draining("No."), "server_error", None, None),
        (errors.DeadlineExceeded("No."), "timeout", None, None),
    ],
)
def test_encode_error_has_the_apis_type_param_and_code(
    error: RequestError, kind: str, param: str | None, code: str | None
) -> None:
    assert responses.encode_error(error) == {"error": {"message": "No.", "type": kind, "param": param, "code": code}}


def test_encode_deadline_error_has_partial_text() -> None:
    described = responses.encode_error(errors.DeadlineExceeded("Too late.", ("Hé", "")))["error"]
    assert described["partial"] == ["Hé", ""]


def test_encode_error_param_is_read_by_the_openai_client() -> None:
    error = rejected(chat, top_p=2)
    content = json.dumps(responses.encode_error(error))
    with (
        client(error.status, content, "application/json") as connected,
        pytest.raises(client_package.BadRequestError) as raised,
    ):
        connected.chat.completions.create(model="m", messages=[])
    assert raised.value.param == "top_p"
