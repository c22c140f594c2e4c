"""Where a model of this machine is served."""

from pathlib import Path

import pytest

from kserve_llm.local_server import LocalModel


@pytest.mark.parametrize(
    ("flags", "url"),
    [
        ([], "http://127.0.0.1:8080"),
        (["--dtype", "float32"], "http://127.0.0.1:8080"),
        (["--host", "0.0.0.0"], "http://127.0.0.1:8080"),
        (["--host=192.0.2.1"], "http://192.0.2.1:8080"),
        (["--host", "192.0.2.1", "--dtype", "float32"], "http://192.0.2.1:8080"),
    ],
)
def test_url_is_of_this_machine_unless_another_address_is_chosen(flags: list[str], url: str) -> None:
    assert LocalModel(Path("model"), Path("cache"), flags).url(8080) == url
