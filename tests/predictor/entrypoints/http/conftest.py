"""OpenAI's client for the in-process predictor."""

from collections.abc import Iterator

import openai
import pytest


@pytest.fixture(params=["/v1", "/openai/v1"])
def openai_client(server_url: str, request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server_url + request.param, api_key="none", max_retries=0, timeout=300) as client:
        yield client
