"""Publication of snapshots: files, record, refs, modes and output."""

import io
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from devtools.local_hub import LocalHub, Request, Response
from devtools.paths import ROOT
from tests.storage_initializer.conftest import Run, Start, finish, make_model, problems


def contents(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_publish_writes_snapshot_record_and_ref(run: Run, hub: LocalHub, model: Path, volume: Path) -> None:
    result = run("hf://demo/arithmetic", volume)

    commit = hub.commit("demo/arithmetic")
    snapshot = volume / "demo--arithmetic" / commit
    assert result.code == 0
    assert result.stdout.startswith(f"published hf://demo/arithmetic@{commit[:12]} at {snapshot}: 4 files, ")
    assert problems(snapshot) == []
    assert (volume / "demo--arithmetic" / "refs" / "main").read_text() == f"{commit}\n"
    assert (snapshot / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    record = json.loads((snapshot / ".snapshot.json").read_text())
    assert record["format_version"] == 1
    assert record["reference"] == "hf://demo/arithmetic:main"
    assert record["commit"] == commit
    assert record["tool"].startswith("kserve-llm ")
    assert {"path": "tokenizer.json", "size": 2, "sha256": hub.blobs("demo/arithmetic")["tokenizer.json"].sha256} in (
        record["files"]
    )


def test_publish_reader_never_sees_incomplete_snapshot(environment: dict[str, str], volume: Path) -> None:
    command = [sys.executable, "-m", "tests.programs.observed_initializer", "hf://demo/arithmetic", str(volume)]
    watched = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert watched.returncode == 0, watched.stderr
    assert watched.stdout.splitlines()[1:] == ["[]", "nothing"]


def test_publish_fsyncs_before_rename(run: Run, hub: LocalHub, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = volume / "demo--arithmetic" / hub.commit("demo/arithmetic")
    synced: dict[int, bool] = {}
    fsync = os.fsync

    def note(descriptor: int) -> None:
        fsync(descriptor)
        synced[os.fstat(descriptor).st_ino] = snapshot.exists()

    monkeypatch.setattr("os.fsync", note)
    assert run("hf://demo/arithmetic", volume).code == 0
    assert {path.name: synced.get(path.stat().st_ino) for path in (snapshot, *snapshot.iterdir())} == dict.fromkeys(
        [snapshot.name, ".snapshot.json", "README.md", "config.json", "model.safetensors", "tokenizer.json"], False
    )
    # The rename, too.
    assert synced[snapshot.parent.stat().st_ino]


def test_publish_leaves_no_staging_files_or_leases(run: Run, volume: Path) -> None:
    run("hf://demo/arithmetic", volume)
    assert list((volume / ".staging").iterdir()) == []
    assert list((volume / ".locks").iterdir()) == []


def test_publish_excludes_pickles_and_hidden_files(run: Run, hub: LocalHub, volume: Path) -> None:
    result = run("hf://demo/arithmetic", volume)
    published = set(contents(volume / "demo--arithmetic" / hub.commit("demo/arithmetic")))
    assert published == {"config.json", "tokenizer.json", "README.md", "model.safetensors", ".snapshot.json"}
    assert "excluding pytorch_model.bin" in result.stderr
    assert "pytorch_model.bin" not in hub.downloads()


def test_second_run_only_resolves_the_branch(run: Run, hub: LocalHub, volume: Path) -> None:
    run("hf://demo/arithmetic", volume)
    before = {path: path.stat().st_mtime_ns for path in volume.rglob("*")}
    hub.forget()

    result = run("hf://demo/arithmetic", volume)

    assert result.code == 0
    assert result.stdout.startswith("already published hf://demo/arithmetic@")
    assert "nothing to do" in result.stdout
    assert [request.kind for request in hub.requests] == ["info"]
    assert {path: path.stat().st_mtime_ns for path in volume.rglob("*")} == before


def test_second_run_with_commit_sends_no_request(run: Run, hub: LocalHub, volume: Path) -> None:
    reference = f"hf://demo/arithmetic:{hub.commit('demo/arithmetic')}"
    assert run(reference, volume).code == 0
    assert not (volume / "demo--arithmetic" / "refs").exists()
    hub.forget()

    result = run(reference.replace(":main", "@"), volume)

    assert result.code == 0
    assert "nothing to do" in result.stdout
    assert hub.requests == []


def test_moved_branch_publishes_new_snapshot_and_keeps_old(
    run: Run, hub: LocalHub, volume: Path, tmp_path: Path
) -> None:
    run("hf://demo/arithmetic", volume)
    old = hub.commit("demo/arithmetic")
    new = hub.add("demo/arithmetic", make_model(tmp_path / "newer", seed=1))

    assert run("hf://demo/arithmetic", volume).code == 0

    assert old != new
    assert (volume / "demo--arithmetic" / "refs" / "main").read_text() == f"{new}\n"
    assert problems(volume / "demo--arithmetic" / old) == problems(volume / "demo--arithmetic" / new) == []


@pytest.mark.parametrize("separator", [":", "@"])
def test_revision_with_slash_has_one_escaped_ref(
    run: Run, hub: LocalHub, model: Path, volume: Path, separator: str
) -> None:
    commit = hub.add("demo/arithmetic", model, revision="refs/pr/4")
    assert run(f"hf://demo/arithmetic{separator}refs/pr/4", volume).code == 0
    (ref,) = (volume / "demo--arithmetic" / "refs").iterdir()
    assert ref.name == "refs%2Fpr%2F4"
    assert unquote(ref.name) == "refs/pr/4"
    assert ref.read_text() == f"{commit}\n"


def test_publish_includes_shards_and_nested_files(run: Run, hub: LocalHub, volume: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "sharded", shards=3)
    (model / "extra").mkdir()
    (model / "extra" / "notes on it.txt").write_text("nested, with spaces\n")
    commit = hub.add("demo/sharded", model)
    assert run("--allow", "*", "hf://demo/sharded", volume).code == 0
    snapshot = volume / "demo--sharded" / commit
    assert problems(snapshot) == []
    assert len(list(snapshot.glob("*.safetensors"))) == 3
    assert (snapshot / "extra" / "notes on it.txt").read_text() == "nested, with spaces\n"


def test_directory_is_published_under_its_fingerprint(run: Run, hub: LocalHub, model: Path, volume: Path) -> None:
    first = run(f"file://{model}", volume)
    commit = (volume / "file--model" / "refs" / "main").read_text().strip()
    assert first.code == 0
    assert len(commit) == 40
    assert problems(volume / "file--model" / commit) == []

    assert "nothing to do" in run(f"file://{model}", volume).stdout

    (model / "config.json").write_text('{"changed": true}')
    assert run(f"file://{model}", volume).code == 0
    changed = (volume / "file--model" / "refs" / "main").read_text().strip()
    assert changed != commit
    assert problems(volume / "file--model" / commit) == problems(volume / "file--model" / changed) == []
    assert hub.requests == []


def test_several_pairs_are_published_in_one_run(run: Run, model: Path, tmp_path: Path) -> None:
    result = run("hf://demo/arithmetic", tmp_path / "a", f"file://{model}", tmp_path / "b")
    assert result.code == 0
    assert len(result.stdout.splitlines()) == 2
    assert (tmp_path / "a" / "demo--arithmetic" / "refs" / "main").is_file()
    assert (tmp_path / "b" / "file--model" / "refs" / "main").is_file()


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o000])
def test_group_modes_do_not_depend_on_the_umask(run: Run, hub: LocalHub, volume: Path, umask: int) -> None:
    leases: list[int] = []

    def look(_request: Request, response: Response) -> Response:
        leases.extend(stat.S_IMODE(path.stat().st_mode) for path in volume.glob(".locks/*.lease"))
        return response

    hub.fault = look
    before = os.umask(umask)
    try:
        assert run("hf://demo/arithmetic", volume).code == 0
        assert os.umask(umask) == umask
    finally:
        os.umask(before)

    model = volume / "demo--arithmetic"
    shared = [volume / ".locks", volume / ".staging", model, model / "refs"]
    snapshot = model / hub.commit("demo/arithmetic")
    modes = {path: stat.S_IMODE(path.stat().st_mode) & 0o070 for path in (volume, *volume.rglob("*"))}
    assert [modes.pop(path) for path in shared] == [0o070] * len(shared)
    assert modes.pop(volume) & 0o050 == 0o050
    assert modes.pop(snapshot) == 0o050
    assert set(modes.values()) == {0o040}
    assert set(leases) == {0o664}


def test_token_opens_gated_repository_and_is_never_logged(run: Run, hub: LocalHub, model: Path, volume: Path) -> None:
    commit = hub.add("demo/gated", model, gated=True)
    hub.token = "hf_s3cr3t"  # noqa: S105 - opens nothing but this hub
    result = run("hf://demo/gated", volume, env={"HF_TOKEN": "hf_s3cr3t\n", "LOG_LEVEL": "DEBUG"})
    assert result.code == 0
    assert problems(volume / "demo--gated" / commit) == []
    assert "s3cr3t" not in result.stdout + result.stderr
    assert not any(b"s3cr3t" in content for content in contents(volume).values())


def test_progress_in_a_log_is_lines(run: Run, hub: LocalHub, volume: Path) -> None:
    hub.bytes_per_second = 100_000
    result = run("hf://demo/arithmetic", volume, env={"STORAGE_INITIALIZER_PROGRESS_SECONDS": "0.01"})
    lines = [line for line in result.stderr.splitlines() if "INFO fetched " in line]
    assert len(lines) > 1
    assert "(100 %)" in lines[-1]
    assert "\r" not in result.stderr


def test_json_format_applies_to_all_lines_but_the_last(run: Run, hub: LocalHub, volume: Path) -> None:
    env = {"STORAGE_INITIALIZER_LOG_FORMAT": "json"}
    done = run("hf://demo/arithmetic", volume, env=env)
    (summary,) = map(json.loads, done.stdout.splitlines())
    assert summary["commit"] == hub.commit("demo/arithmetic")
    assert (summary["files"], summary["fresh"]) == (4, True)
    assert summary["seconds"] > 0
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert {line["level"] for line in lines} == {"INFO"}
    assert any("done_bytes" in line and line["done_bytes"] == line["total_bytes"] for line in lines)

    failed = run("hf://demo/absent", volume, env=env)
    *others, reason = failed.stderr.splitlines()
    assert [json.loads(line)["level"] for line in others] == ["WARNING"] * len(others)
    assert reason.startswith("hf://demo/absent:main at ")


def test_progress_on_a_terminal_is_one_line(
    run: Run, hub: LocalHub, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    hub.bytes_per_second = 50_000
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert run("hf://demo/arithmetic", volume).code == 0
    [line] = [line for line in terminal.getvalue().split("\n") if "fetched: " in line]
    bars = line.split("\r")[1:]
    assert len(bars) > 1
    assert all(bar.startswith("fetched: ") for bar in bars)
    assert "100%" in bars[-1]


def test_proxy_variables_are_used(start: Start, hub: LocalHub, volume: Path) -> None:
    env = {"HF_ENDPOINT": "http://hub.invalid", "HTTP_PROXY": hub.url, "http_proxy": hub.url}
    result = finish(start("hf://demo/arithmetic", volume, env=env))
    assert result.code == 0, result.stderr
    assert all(request.path.startswith("http://hub.invalid/") for request in hub.requests)
    assert problems(volume / "demo--arithmetic" / hub.commit("demo/arithmetic")) == []


def test_private_certificate_is_trusted(start: Start, model: Path, volume: Path, tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificate")
    key, private, both = tmp_path / "key.pem", tmp_path / "private.pem", tmp_path / "both.pem"
    words = f"req -x509 -newkey rsa:2048 -nodes -subj /CN=hub -addext subjectAltName=IP:127.0.0.1 -keyout {key}"
    subprocess.run([openssl, *words.split(), "-out", private], check=True, capture_output=True)
    both.write_text(key.read_text() + private.read_text())
    with LocalHub({"demo/arithmetic": model}, certificate=both) as hub:
        env = {"HF_ENDPOINT": hub.url, "STORAGE_INITIALIZER_ATTEMPTS": "1"}
        unknown = finish(start("hf://demo/arithmetic", volume, env=env))
        known = finish(start("hf://demo/arithmetic", volume, env=env | {"SSL_CERT_FILE": str(private)}))
        assert unknown.code == 1
        assert "certificate verify failed" in unknown.reason
        assert known.code == 0, known.stderr
        assert problems(volume / "demo--arithmetic" / hub.commit("demo/arithmetic")) == []


def test_xet_download_is_verified_and_published_without_bookkeeping(run: Run, hub: LocalHub, volume: Path) -> None:
    def claim_xet(request: Request, response: Response) -> Response:
        # The listing promises Xet and the file's own headers do not: the library falls back to plain HTTP.
        if request.kind == "tree":
            assert isinstance(response.body, bytes)
            entries = json.loads(response.body)
            for entry in entries:
                if "lfs" in entry:
                    entry["xetHash"] = entry["lfs"]["oid"]
            response.body = json.dumps(entries).encode()
            response.length = len(response.body)
        return response

    hub.fault = claim_xet
    result = run("hf://demo/arithmetic", volume)
    assert result.code == 0, result.stderr
    assert [request.method for request in hub.requests if request.file == "model.safetensors"] == ["HEAD", "GET"]
    assert problems(volume / "demo--arithmetic" / hub.commit("demo/arithmetic")) == []
    assert list((volume / ".staging").iterdir()) == []
