"""What cannot be done ends with the promised code and one sentence, never with a traceback or half a snapshot."""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from devtools.local_hub import LocalHub, Request, Response
from tests.storage_initializer.conftest import Result, Run, Start, finish, make_model, problems, safetensors


def assert_refused(result: Result, code: int, *words: str) -> None:
    assert result.code == code, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.reason


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "0 arguments do not make pairs"),
        (("hf://demo/arithmetic",), "1 arguments do not make pairs"),
        (("hf://demo/arithmetic", "VOLUME", "hf://demo/other"), "3 arguments do not make pairs"),
        (("--force", "hf://demo/arithmetic", "VOLUME"), "unrecognized arguments: --force"),
        (("s3://bucket/model", "VOLUME"), "'s3://bucket/model' is not a reference. Expected hf://owner/model"),
        (("arithmetic", "VOLUME"), "'arithmetic' is not a reference"),
        (("hf://arithmetic", "VOLUME"), "is not a reference"),
        (("hf://demo/arithmetic/main", "VOLUME"), "is not a reference"),
        (("hf://demo/a--b", "VOLUME"), "'a--b', which is not a valid name on the Hub"),
        (("hf://demo/..", "VOLUME"), "'..', which is not a valid name on the Hub"),
        (("hf://demo/arithmetic:../../etc", "VOLUME"), "'../../etc', which is not a branch, tag or commit"),
        (("file://relative/model", "VOLUME"), "is not an absolute directory"),
        (("file:///", "VOLUME"), "has no usable directory name"),
        (("file:///does/not/exist", "VOLUME"), "file:///does/not/exist does not exist. Check the path"),
        (("hf://demo/absent", "VOLUME"), "hf://demo/absent:main at http://127.0.0.1"),
        (("hf://demo/arithmetic:absent", "VOLUME"), "hf://demo/arithmetic has no revision absent"),
        (("hf://demo/arithmetic:" + "0" * 40, "VOLUME"), "has no revision 0000"),
    ],
)
def test_invalid_arguments_are_rejected(run: Run, volume: Path, words: tuple[str, ...], expected: str) -> None:
    result = run(*(volume if word == "VOLUME" else word for word in words))
    assert_refused(result, 2, expected)
    assert not volume.exists()


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("STORAGE_INITIALIZER_LOCK_STALE", "5", "Unknown setting: STORAGE_INITIALIZER_LOCK_STALE"),
        ("STORAGE_INITIALIZER_PARALLEL_FILES", "many", "STORAGE_INITIALIZER_PARALLEL_FILES has an invalid value"),
        ("STORAGE_INITIALIZER_PARALLEL_FILES", "0", "STORAGE_INITIALIZER_PARALLEL_FILES has an invalid value"),
        (
            "STORAGE_INITIALIZER_LOCK_STALE_SECONDS",
            "inf",
            "STORAGE_INITIALIZER_LOCK_STALE_SECONDS has an invalid",
        ),
        (
            "STORAGE_INITIALIZER_LOCK_STALE_SECONDS",
            "nan",
            "STORAGE_INITIALIZER_LOCK_STALE_SECONDS has an invalid",
        ),
        (
            "STORAGE_INITIALIZER_LOCK_STALE_SECONDS",
            "3601",
            "STORAGE_INITIALIZER_LOCK_STALE_SECONDS has an invalid",
        ),
        (
            "STORAGE_INITIALIZER_LOCK_STALE_SECONDS",
            "1e-9",
            "STORAGE_INITIALIZER_LOCK_STALE_SECONDS has an invalid",
        ),
        ("STORAGE_INITIALIZER_LOCK_TIMEOUT_SECONDS", "inf", "STORAGE_INITIALIZER_LOCK_TIMEOUT_SECONDS has an invalid"),
        ("STORAGE_INITIALIZER_LOCK_TIMEOUT_SECONDS", "1e10", "STORAGE_INITIALIZER_LOCK_TIMEOUT_SECONDS has an invalid"),
        ("STORAGE_INITIALIZER_PROGRESS_SECONDS", "nan", "STORAGE_INITIALIZER_PROGRESS_SECONDS has an invalid"),
        ("STORAGE_INITIALIZER_PROGRESS_SECONDS", "1e10", "STORAGE_INITIALIZER_PROGRESS_SECONDS has an invalid"),
        ("LOG_LEVEL", "LOUD", "LOG_LEVEL has an invalid value"),
        ("STORAGE_INITIALIZER_LOG_LEVEL", "LOUD", "STORAGE_INITIALIZER_LOG_LEVEL has an invalid value"),
    ],
)
def test_invalid_variables_are_rejected(run: Run, volume: Path, variable: str, value: str, expected: str) -> None:
    result = run("hf://demo/arithmetic", volume, env={variable: value})
    assert_refused(result, 2)
    assert result.reason.startswith(expected)
    assert result.stderr == f"{result.reason}\n"


def test_invalid_log_level_names_the_effective_variable(run: Run, volume: Path) -> None:
    both = {"LOG_LEVEL": "INFO", "STORAGE_INITIALIZER_LOG_LEVEL": "LOUD"}
    assert run("hf://demo/arithmetic", volume, env=both).reason.startswith("STORAGE_INITIALIZER_LOG_LEVEL has")
    empty = {"LOG_LEVEL": "LOUD", "STORAGE_INITIALIZER_LOG_LEVEL": ""}
    assert run("hf://demo/arithmetic", volume, env=empty).reason.startswith("LOG_LEVEL has")


@pytest.mark.parametrize(
    "endpoint",
    [
        "huggingface.co",
        "http://",
        "http://:80",
        "http://[:::1",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:0",
        "http://127.0.0.1:port",
        "http://two words",
        "http://two\nlines",
        "http://a..b",
        "http://host?query",
        "ftp://host",
    ],
)
def test_unusable_endpoint_is_rejected(run: Run, volume: Path, endpoint: str) -> None:
    result = run("hf://demo/arithmetic", volume, env={"HF_ENDPOINT": endpoint})
    assert_refused(result, 2, "HF_ENDPOINT has an invalid value: expected https://host")


@pytest.mark.parametrize(
    "endpoint", ["http://user:s3cr3t@127.0.0.1:9", "https://s3cr3t@host", "http://user:s3cr3t@h:x"]
)
def test_endpoint_with_password_is_rejected_and_not_logged(run: Run, volume: Path, endpoint: str) -> None:
    result = run("hf://demo/arithmetic", volume, env={"HF_ENDPOINT": endpoint, "LOG_LEVEL": "DEBUG"})
    assert_refused(result, 2, "HF_ENDPOINT has an invalid value")
    assert "s3cr3t" not in result.stderr


@pytest.mark.parametrize("token", ["hf_s3cr3ts3cr3t\nfoo", "hf_s3cr3t foo", "hf_s3cr3té", "hf_s3cr3t\x7f"])
def test_invalid_token_is_rejected_and_not_logged(run: Run, volume: Path, token: str) -> None:
    result = run("hf://demo/arithmetic", volume, env={"HF_TOKEN": token, "LOG_LEVEL": "DEBUG"})
    assert_refused(result, 2, "HF_TOKEN has an invalid value")
    assert "s3cr3t" not in result.stderr
    assert "foo" not in result.stderr


def test_secrets_in_library_errors_are_redacted(run: Run, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError(r"b'Bearer hf_0th3r' of http://user:p@ss@proxy:1/x is not hf_s3cr3t\'s")

    monkeypatch.setattr("storage_initializer.sources.file_selection.make_plan", explode)
    result = run("hf://demo/arithmetic", volume, env={"HF_TOKEN": "hf_s3cr3t\\'s", "LOG_LEVEL": "DEBUG"})
    shown = "Unexpected RuntimeError (b'Bearer ***' of http://***@proxy:1/x is not ***). Run again"
    assert_refused(dataclasses.replace(result, stderr=result.reason), 1, shown)
    assert not any(secret in result.stderr for secret in ("s3cr3t", "0th3r", "p@ss"))


def test_library_import_error_is_reported_on_stderr_only(start: Start, volume: Path) -> None:
    result = finish(start("hf://demo/arithmetic", volume, env={"HF_HUB_DOWNLOAD_TIMEOUT": "soon"}))
    assert_refused(result, 2, "Cannot load huggingface_hub", "'soon'", "HF_*")


def test_help_lists_exit_codes(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "SOURCE DEST" in shown
    assert "0 done, 1 worth a retry, 2 pointless to retry" in shown


def test_gated_repository_without_token_is_rejected(run: Run, hub: LocalHub, model: Path, volume: Path) -> None:
    hub.add("demo/gated", model, gated=True)
    assert_refused(run("hf://demo/gated", volume), 2, "is gated", f"{hub.url}/demo/gated", "set HF_TOKEN")


def test_rejected_token_is_reported(run: Run, hub: LocalHub, model: Path, volume: Path) -> None:
    hub.add("demo/private", model, private=True)
    assert_refused(run("hf://demo/private", volume, env={"HF_TOKEN": "hf_wrong"}), 2, "401", "check HF_TOKEN")
    assert_refused(run("hf://demo/private", volume), 2, "does not exist or is private", "set HF_TOKEN")


def test_unreachable_hub_is_worth_a_retry(run: Run, volume: Path) -> None:
    result = run("hf://demo/arithmetic", volume, env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert_refused(result, 1, "http://127.0.0.1:9 is unreachable", "HF_ENDPOINT")


def test_failing_hub_is_worth_a_retry(run: Run, hub: LocalHub, volume: Path) -> None:
    hub.fault = lambda _request, _response: Response(503)
    assert_refused(run("hf://demo/arithmetic", volume), 1, "returned 503", "Run again later")


def test_endpoint_without_hub_is_permanent(run: Run, hub: LocalHub, volume: Path) -> None:
    result = run("hf://demo/arithmetic", volume, env={"HF_ENDPOINT": f"{hub.url}/elsewhere"})
    assert_refused(result, 2, "returned status 404", "Check HF_ENDPOINT")


def test_repository_with_pickles_only_is_rejected(run: Run, hub: LocalHub, model: Path, volume: Path) -> None:
    (model / "model.safetensors").unlink()
    hub.add("demo/pickle", model)
    assert_refused(
        run("hf://demo/pickle", volume), 2, "hf://demo/pickle:main has no weights as safetensors", "pytorch_model.bin"
    )


def test_repository_without_config_is_rejected(run: Run, hub: LocalHub, model: Path, volume: Path) -> None:
    (model / "config.json").unlink()
    hub.add("demo/bare", model)
    assert_refused(run("hf://demo/bare", volume), 2, "has no config.json")
    assert_refused(run(f"file://{model}", volume), 2, "has no config.json")


def test_repository_with_missing_shard_is_rejected(run: Run, hub: LocalHub, volume: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "sharded", shards=3)
    (model / "model-00002-of-00003.safetensors").unlink()
    commit = hub.add("demo/sharded", model)
    assert_refused(run("hf://demo/sharded", volume), 2, "misses model-00002-of-00003.safetensors")
    assert not (volume / "demo--sharded" / commit).exists()


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 3416512\n".encode()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("source", ["file", "hf"])
def test_git_lfs_pointer_is_rejected_with_the_remedy(
    run: Run, hub: LocalHub, model: Path, volume: Path, name: str, source: str
) -> None:
    (model / name).write_bytes(POINTER)
    commit = hub.add("demo/pointer", model)
    reference = f"file://{model}" if source == "file" else "hf://demo/pointer"
    expected = f"{name} of {reference}", "is a Git LFS pointer instead of the file itself. Run git lfs pull"
    assert_refused(run(reference, volume), 2, *expected)
    # Staged files of the first run have the right checksums.
    assert_refused(run(reference, volume), 2, *expected)
    assert not (volume / "demo--pointer" / commit).exists()
    assert not (volume / "file--model").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (safetensors(1000)[:500], "has 500 of "),
        (safetensors(1000)[:20], "is truncated: 20 bytes end in its header"),
        (safetensors(1000) + b"x", "bytes"),
        (b"\x02" + bytes(7) + b"[]", "has a damaged safetensors header"),
        (b"no weights at all", "is not a safetensors file"),
    ],
    ids=["empty", "data", "header", "longer", "list", "other"],
)
def test_damaged_weights_are_rejected(run: Run, model: Path, volume: Path, content: bytes, problem: str) -> None:
    (model / "model.safetensors").write_bytes(content)
    assert_refused(
        run(f"file://{model}", volume), 2, f"model.safetensors of file://{model} ", problem, "Replace it at its source"
    )
    assert not (volume / "file--model").exists()


@pytest.mark.parametrize("path", ["../evil.txt", "/etc/evil.txt", "a/../../evil.txt", "a\\..\\evil.txt", ".cache/../x"])
def test_unsafe_path_is_rejected(run: Run, hub: LocalHub, volume: Path, path: str) -> None:
    blobs = hub.blobs("demo/arithmetic")
    blobs[path] = blobs["README.md"]
    assert_refused(run("hf://demo/arithmetic", volume), 2, "unsafe path")
    assert not volume.exists()


def test_directory_with_link_is_rejected(run: Run, model: Path, volume: Path) -> None:
    (model / "extra.json").symlink_to("/etc/passwd")
    assert_refused(run(f"file://{model}", volume), 2, "extra.json is a link or a device")


def test_wrong_bytes_are_reported_and_not_published(run: Run, hub: LocalHub, model: Path, volume: Path) -> None:
    right = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    (model / "tokenizer.json").write_text("[]")

    result = run("hf://demo/arithmetic", volume)

    assert_refused(
        result, 1, "2 of its files are wrong", "model.safetensors has sha256", "tokenizer.json has git blob id"
    )
    assert not (volume / "demo--arithmetic").exists()

    (model / "model.safetensors").write_bytes(right)
    (model / "tokenizer.json").write_text("{}")
    hub.forget()
    assert run("hf://demo/arithmetic", volume).code == 0
    assert problems(volume / "demo--arithmetic" / hub.commit("demo/arithmetic")) == []
    assert hub.downloads() == {"model.safetensors": 1, "tokenizer.json": 1}


def test_next_run_keeps_complete_files(run: Run, hub: LocalHub, volume: Path) -> None:
    def lose_weights(request: Request, response: Response) -> Response:
        return Response(404, {"X-Error-Code": "EntryNotFound"}) if request.file == "model.safetensors" else response

    hub.fault = lose_weights
    one_by_one = {"STORAGE_INITIALIZER_PARALLEL_FILES": "1"}
    assert run("hf://demo/arithmetic", volume, env=one_by_one).code == 1

    hub.fault = None
    assert run("hf://demo/arithmetic", volume, env=one_by_one).code == 0
    # tokenizer.json may have been begun when the failure was noticed, and is then fetched anew.
    fetched = hub.downloads()
    assert fetched["README.md"] == fetched["config.json"] == fetched["model.safetensors"] == 1


def test_missing_space_fails_before_download(run: Run, hub: LocalHub, volume: Path) -> None:
    blobs = hub.blobs("demo/arithmetic")
    blobs["model.safetensors"] = dataclasses.replace(blobs["model.safetensors"], size=1 << 60)
    result = run("hf://demo/arithmetic", volume)
    assert_refused(result, 1, "needs 1048576.0 TiB", f"free on {volume}", "Enlarge", "(gc)")
    assert hub.downloads() == {}


def test_destination_file_is_rejected(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(
        run("hf://demo/arithmetic", tmp_path / "file"), 2, "is not a directory. Specify the root of a volume"
    )


def test_destination_without_write_permission_is_worth_a_retry(
    start: Start, public: Path, unprivileged: int | None
) -> None:
    (public / "volume").mkdir()
    (public / "volume").chmod(0o555)
    result = finish(start("hf://demo/arithmetic", public / "volume", user=unprivileged))
    assert_refused(
        result, 1, f"{public}/volume/.locks is not usable (Permission denied)", "writable", "fsGroup", "chown"
    )
    (public / "volume").chmod(0o777)
    assert finish(start("hf://demo/arithmetic", public / "volume", user=unprivileged)).code == 0


@pytest.mark.parametrize(("number", "code"), [(errno.EROFS, 2), (errno.EACCES, 1), (errno.EPERM, 1)])
def test_volume_that_is_read_only_is_permanent_and_one_without_permission_is_not(
    run: Run, volume: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    def refuse(path: Path) -> Path:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("storage_initializer.volume.lease.make_shared_directory", refuse)
    assert_refused(run("hf://demo/arithmetic", volume), code, f"is not usable ({os.strerror(number)})", "writable")


@pytest.mark.parametrize("closed", ["model", "model/model.safetensors", "model/extra"])
def test_unreadable_source_path_is_named(start: Start, public: Path, unprivileged: int | None, closed: str) -> None:
    make_model(public / "model")
    (public / "model" / "extra").mkdir()
    (public / "volume").mkdir()
    (public / "volume").chmod(0o777)
    (public / closed).chmod(0)

    result = finish(start(f"file://{public}/model", public / "volume", user=unprivileged))

    (public / closed).chmod(0o755)
    assert_refused(
        result, 2, f"file://{public}/model is not readable ({public}/{closed}: Permission denied)", "chmod -R a+rX"
    )
    assert "volume" not in result.reason
    assert [path.name for path in (public / "volume").iterdir()] == [".status"]


def test_file_removed_during_copy_is_a_source_error(
    run: Run, model: Path, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Between the reading for the fingerprint and the copying.
    monkeypatch.setattr("storage_initializer.volume.layout.require_space", lambda *_: (model / "README.md").unlink())
    result = run(f"file://{model}", volume)
    assert_refused(result, 1, f"file://{model} failed ({model}/README.md: No such file", "un again")
    assert list((volume / ".locks").iterdir()) == []


def test_missing_certificate_file_is_a_hub_error(start: Start, volume: Path) -> None:
    env = {"SSL_CERT_FILE": "/does/not/exist.pem", "HF_ENDPOINT": "https://127.0.0.1:9"}
    result = finish(start("hf://demo/arithmetic", volume, env=env))
    assert_refused(result, 1, "hf://demo/arithmetic:main at https://127.0.0.1:9 failed", "No such file", "un again")


def test_other_format_version_is_rejected(run: Run, hub: LocalHub, volume: Path) -> None:
    run("hf://demo/arithmetic", volume)
    path = volume / "demo--arithmetic" / hub.commit("demo/arithmetic") / ".snapshot.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    assert_refused(run("hf://demo/arithmetic", volume), 2, "format version 2", "reads 1", "Use the version")
    path.unlink()
    assert_refused(run("hf://demo/arithmetic", volume), 2, "no readable .snapshot.json", "Remove it")


def test_unexpected_error_is_one_line(run: Run, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("storage_initializer.sources.file_selection.make_plan", explode)
    assert_refused(run("hf://demo/arithmetic", volume), 1, "Unexpected RuntimeError (two lines)", "LOG_LEVEL=DEBUG")
    result = run("hf://demo/arithmetic", volume, env={"LOG_LEVEL": "debug"})
    assert "Traceback" in result.stderr
    assert result.reason.startswith("Unexpected RuntimeError")


def test_published_commit_needs_no_source(run: Run, hub: LocalHub, model: Path, volume: Path) -> None:
    commit = hub.commit("demo/arithmetic")
    run(f"hf://demo/arithmetic:{commit}", volume)
    shutil.rmtree(model)
    result = run(f"hf://demo/arithmetic:{commit}", volume, env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert result.code == 0
