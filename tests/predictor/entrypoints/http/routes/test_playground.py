"""The page's files and headers; tests in a browser are in `test_playground_page`."""

import re
from pathlib import Path

import httpx
import pytest

from predictor.entrypoints.http.routes.playground import DIRECTORY, PAGE
from tests.predictor import servers

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
MAX_BYTES = 150_000


@pytest.mark.parametrize("accept", [None, "*/*", "application/json"])
def test_root_without_a_browser_is_kserves_liveness(client: httpx.Client, accept: str | None) -> None:
    response = client.get("/", headers={"Accept": accept} if accept else {})
    assert response.json()["status"] == "alive"
    assert response.headers["vary"] == "Accept"


def test_root_in_a_browser_is_the_page_with_a_strict_policy(client: httpx.Client) -> None:
    response = client.get("/", headers=BROWSER)
    assert response.content == (DIRECTORY / PAGE).read_bytes()
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert response.headers["vary"] == "Accept"


def test_page_names_only_its_own_files_and_no_inline_code(client: httpx.Client) -> None:
    sources = {file.name: file.read_text() for file in DIRECTORY.iterdir()}
    links = set(re.findall(r'(?:src|href)="playground/([^"]+)"', sources[PAGE]))
    for source in sources.values():
        links |= set(re.findall(r'from "\./([^"]+)"', source))
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\bon\w+=|style=|https?://", source
        )
    assert links == sources.keys() - {PAGE}
    served = [client.get(f"/playground/{name}") for name in links]
    assert {response.status_code for response in served} == {200}
    assert sum(map(len, sources.values())) < MAX_BYTES
    # Headers of one response are not those of the next: `x-request-id` would accumulate.
    assert all(len(client.get(f"/playground/{name}").headers.get_list("x-request-id")) == 1 for name in links)


def test_unknown_file_of_the_page_is_404(client: httpx.Client) -> None:
    response = client.get("/playground/..%2Findex.html")
    assert response.status_code == 404
    response = client.get("/playground/other.js")
    assert (response.status_code, "playground.js" in response.text) == (404, True)


def test_page_needs_no_key_and_what_it_requests_does(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("team:secret-key-of-the-team\n")
    with servers.in_process(model_name="playground-keys", keys=keys) as keyed:
        assert keyed.client.get("/", headers=BROWSER).status_code == 200
        assert keyed.client.get("/playground/playground.js").status_code == 200
        assert keyed.client.post("/playground/playground.js").status_code == 401
        assert keyed.client.get("/v1/models").status_code == 401


def test_no_playground_has_no_page() -> None:
    with servers.in_process("--no-playground", model_name="no-playground") as running:
        assert running.client.get("/", headers=BROWSER).json()["status"] == "alive"
        assert running.client.get("/playground/playground.js").status_code == 404
