"""Responses conform to the server's OpenAPI document, and to the Open Inference Protocol's."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import schemathesis
import yaml
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from devtools import tiny_poolers
from tests.predictor import servers

SPECIFICATIONS = os.environ.get("OPEN_INFERENCE_DIR")
HANG_SECONDS = 300
"""Guard against a server that hangs; no request may depend on the machine's speed."""
CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
PATH_PARAMETERS = {"model_name": "demo", "model_version": "1", "MODEL_NAME": "demo", "MODEL_VERSION": "1"}
MAX_TOKENS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
LIMITS = {**dict.fromkeys(MAX_TOKENS, 4), "n": 2}
TENSOR = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["17+25="]}
MESSAGE = {"role": "user", "content": "What is 17 + 25?"}
VALID_BODIES: dict[str, dict[str, Any]] = {
    "/infer": {"inputs": [TENSOR], "outputs": [{"name": "text_output"}, {"name": "logprobs"}]},
    "/generate": {"text_input": "17+25=", "parameters": {"details": True}},
    "/generate_stream": {"text_input": "17+25=", "parameters": {"details": True}},
    "/chat/completions": {"model": "demo", "messages": [MESSAGE], "logprobs": True, "service_tier": "auto"},
    "/messages/count_tokens": {"model": "demo", "messages": [MESSAGE]},
    "/responses/input_tokens": {"model": "demo", "input": [MESSAGE]},
    "/responses": {"model": "demo", "input": [MESSAGE], "top_logprobs": 1},
    "/completions": {"model": "demo", "prompt": "17+25=", "logprobs": 1},
    "/messages": {"model": "demo", "messages": [MESSAGE], "max_tokens": 4},
    "/tokenize": {"messages": [MESSAGE], "return_token_strs": True},
    "/detokenize": {"tokens": [1, 60]},
    "/embeddings": {"model": "demo", "input": ["w1", "w2 w3"], "encoding_format": "base64"},
    "/rerank": {"query": "w1", "documents": ["w2", {"text": "w3"}], "top_n": 1},
    "/score": {"text_1": "w1", "text_2": ["w2", "w3"]},
    ":predict": {"instances": ["17+25=", [MESSAGE]]},
}
"""Valid bodies, by the end of the path."""
POOLING = ("/embeddings", "/rerank", "/score")
"""Ends of the paths that a model which generates refuses."""
TOKEN_LIMITS = {"/completions": "max_tokens", "/messages": "max_tokens", "/responses": "max_output_tokens"}
"""Ends of the paths whose bodies have sampling parameters next to the prompt: the field that limits tokens."""

Call = Callable[[Case[Any]], requests.Response]


@contextmanager
def caller(url: str, model_name: str) -> Iterator[Call]:
    with requests.Session() as session:
        session.trust_env = False

        def send(case: Case[Any]) -> Any:
            case.path_parameters = {name: PATH_PARAMETERS[name] for name in case.path_parameters or {}}
            case.body = shorten(case.body, case.path, model_name)
            return case.call(base_url=url, session=session, timeout=HANG_SECONDS)

        yield send


@pytest.fixture
def call(server_url: str) -> Iterator[Call]:
    with caller(server_url, "demo") as send:
        yield send


def shorten(body: Any, path: str, model_name: str) -> Any:
    """Set the served model and a small token limit; invalid values are kept."""
    if not isinstance(body, dict):
        return body
    if isinstance(body.get("model"), str):
        body = body | {"model": model_name}
    limits = [limit for end, limit in TOKEN_LIMITS.items() if path.endswith(end)]
    if limits:
        return limit_tokens(body, limits[0])
    parameters = body.get("parameters", {})
    return body | {"parameters": limit_tokens(parameters)} if isinstance(parameters, dict) else body


def limit_tokens(fields: dict[str, Any], default: str = "max_tokens") -> dict[str, Any]:
    present = {name: limit for name, limit in LIMITS.items() if type(fields.get(name)) is int}
    lowered = {name: limit for name, limit in present.items() if limit < fields[name] <= 100}
    unlimited = all(fields.get(name) is None for name in MAX_TOKENS)
    return fields | lowered | ({default: LIMITS[default]} if unlimited else {})


def operations_of(document: dict[str, Any]) -> list[Any]:
    operations = []
    for result in schemathesis.openapi.from_dict(document).get_all_operations():
        assert isinstance(result, Ok), result
        operations.append(result.ok())
    return operations


def specification(name: str) -> list[Any]:
    if SPECIFICATIONS is None:
        pytest.skip("OPEN_INFERENCE_DIR does not name a folder with the protocol's specifications")
    document = yaml.safe_load((Path(SPECIFICATIONS) / name).read_text().replace("/${MODEL_", "/{MODEL_"))
    for path in document["paths"].values():
        for response in path.get("post", {}).get("responses", {}).values():
            if stream := response["content"].get("text/event-stream"):
                # The specification has the schema of an event's data, not of the event.
                data = {"type": "string", "contentMediaType": "application/json", "contentSchema": stream["schema"]}
                stream["schema"] = {"type": "object", "required": ["data"], "properties": {"data": data}}
    return operations_of(document)


def check_conformance(operation: Any, call: Call, mode: GenerationMode) -> None:
    """Check that responses to generated requests conform to the operation; examples as the profile has it."""
    checks = [*CHECKS, negative_data_rejection] if mode is GenerationMode.NEGATIVE else CHECKS

    @settings(
        max_examples=max(1, settings().max_examples // 6),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def conforms(case: Case[Any]) -> None:
        case.validate_response(call(case), checks=checks)

    conforms()


def modes(operation: Any) -> list[GenerationMode]:
    return list(GenerationMode) if operation.body else [GenerationMode.POSITIVE]


def valid_case(operation: Any) -> Case[Any]:
    """Return a request that must succeed."""
    ends = [end for end in VALID_BODIES if operation.path.endswith(end)]
    parameters = {parameter.name: PATH_PARAMETERS[parameter.name] for parameter in operation.path_parameters}
    body = {"body": VALID_BODIES[ends[0]], "media_type": "application/json"} if ends else {}
    case: Case[Any] = operation.Case(path_parameters=parameters, **body)
    return case


def test_operation_with_a_valid_request_conforms_to_openapi_document(client: httpx.Client, call: Call) -> None:
    operations = operations_of(client.get("/openapi.json").json())
    assert len(operations) > 20
    for operation in operations:
        case = valid_case(operation)
        response = call(case)
        expected = 400 if operation.path.endswith(POOLING) else 200
        assert response.status_code == expected, (operation.label, response.text)
        case.validate_response(response, checks=CHECKS)


@pytest.mark.parametrize("task", ["embed", "classify"])
@pytest.mark.parametrize("any_request", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_operation_of_a_pooling_model_conforms_to_openapi_document(
    tmp_path: Path, task: str, any_request: bool
) -> None:
    make, ends = {
        "embed": (tiny_poolers.make_bert, ("/embeddings",)),
        "classify": (tiny_poolers.make_classifier, ("/rerank", "/score")),
    }[task]
    with (
        servers.in_process("--model_dir", str(make(tmp_path)), model_name=task) as server,
        caller(server.url, task) as call,
    ):
        for operation in operations_of(server.client.get("/openapi.json").json()):
            if operation.path.endswith(ends):
                case = valid_case(operation)
                response = call(case)
                assert response.status_code == 200, (operation.label, response.text)
                case.validate_response(response, checks=CHECKS)
                for mode in modes(operation) if any_request else ():
                    check_conformance(operation, call, mode)


@pytest.mark.slow
def test_operation_with_any_request_conforms_to_openapi_document(client: httpx.Client, call: Call) -> None:
    for operation in operations_of(client.get("/openapi.json").json()):
        for mode in modes(operation):
            check_conformance(operation, call, mode)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["open_inference_rest.yaml", "generate_rest.yaml"])
def test_operations_conform_to_the_open_inference_protocol(call: Call, name: str) -> None:
    operations = specification(name)
    assert operations
    for operation in operations:
        case = valid_case(operation)
        case.validate_response(call(case), checks=CHECKS)
        check_conformance(operation, call, GenerationMode.POSITIVE)
