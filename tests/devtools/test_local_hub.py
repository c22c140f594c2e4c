"""The local Hub: ranges, counts, faults, and as a program."""

import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import HfApi, RepoFile

from devtools.local_hub import LocalHub, Request, Response
from devtools.paths import ROOT


def get(url: str, **headers: str) -> tuple[int, bytes]:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as response:  # noqa: S310 - loopback
        return response.status, response.read()


def test_range_request_returns_range_and_counts_bytes(hub: LocalHub, model: Path) -> None:
    content = (model / "model.safetensors").read_bytes()
    url = f"{hub.url}/demo/arithmetic/resolve/main/model.safetensors"
    assert get(url, Range="bytes=100-199") == (206, content[100:200])
    assert get(url, Range="bytes=19000-") == (206, content[19000:])
    assert get(url) == (200, content)
    assert hub.downloads() == {"model.safetensors": 3}
    assert hub.sent_bytes() == {"model.safetensors": 100 + len(content) - 19000 + len(content)}


def test_fault_truncates_download(hub: LocalHub) -> None:
    def cut(_request: Request, response: Response) -> Response:
        response.cut_after_bytes = 10
        return response

    hub.fault = cut
    with pytest.raises(ConnectionResetError):
        get(f"{hub.url}/demo/arithmetic/resolve/main/model.safetensors")


def test_program_runs_until_sigterm(model: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "devtools.local_hub", "--port", "0", f"demo/arithmetic={model}"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        status, _ = get(f"{url}/api/models/demo/arithmetic")
        assert status == 200
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_listing_has_large_files_as_lfs_and_small_as_blobs(hub: LocalHub) -> None:
    api = HfApi(endpoint=hub.url, token=False)
    entries = api.list_repo_tree("demo/arithmetic", recursive=True)
    tree = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    blobs = hub.blobs("demo/arithmetic")
    lfs = tree["model.safetensors"].lfs
    assert lfs is not None
    assert lfs.sha256 == blobs["model.safetensors"].sha256
    assert tree["config.json"].lfs is None
    assert tree["config.json"].blob_id == blobs["config.json"].git_sha1
