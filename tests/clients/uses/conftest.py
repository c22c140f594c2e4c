"""Fixtures of the client tests, which run in the clients' own virtual environment."""

import os

import pytest


@pytest.fixture(scope="session")
def server_url() -> str:
    """URL of the predictor, without a path."""
    return os.environ["PREDICTOR_URL"]


@pytest.fixture(scope="session", params=["/v1", "/openai/v1"])
def openai_url(server_url: str, request: pytest.FixtureRequest) -> str:
    """URL of OpenAI's API, at both of its paths."""
    return server_url + str(request.param)


@pytest.fixture(scope="session")
def base_url(server_url: str) -> str:
    """URL of OpenAI's API."""
    return server_url + "/v1"
