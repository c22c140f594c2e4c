import pytest

from predictor import settings
from predictor.errors import InvalidSettings


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in settings.Settings.model_fields:
        monkeypatch.delenv(f"PREDICTOR_{name.upper()}", raising=False)
    for name in ("MODEL_REFERENCE", "LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)


def test_promises_its_defaults() -> None:
    read = settings.read([])
    assert (read.model_name, str(read.model_dir), read.http_port) == ("model", "/mnt/models", 8080)
    assert (read.device, read.dtype, read.trust_remote_code, read.log_level) == ("auto", "auto", False, "INFO")
    assert read.shutdown_grace_seconds == 600


def test_a_flag_beats_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREDICTOR_HTTP_PORT", "9001")
    assert settings.read([]).http_port == 9001
    assert settings.read(["--http_port", "9002"]).http_port == 9002


def test_takes_dashes_for_underscores() -> None:
    assert settings.read(["--http-port=9003", "--max-running", "4"]).http_port == 9003
    assert settings.read(["--no-enable-grpc"]).enable_grpc is False


def test_reads_what_the_storage_initializer_shares_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_REFERENCE", "hf://owner/model")
    monkeypatch.setenv("LOG_LEVEL", "debug")
    read = settings.read([])
    assert (read.model_reference, read.log_level) == ("hf://owner/model", "DEBUG")


def test_an_empty_reference_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_REFERENCE", "")
    assert settings.read([]).model_reference is None


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--modl_dir", "/x"], "--modl_dir is not a flag; did you mean --model_dir."),
        (["--no-enable-grcp"], "--no-enable_grcp is not a flag; did you mean --no-enable_grpc."),
        (["--frobnicate"], "--frobnicate is not a flag; `python -m predictor --help` lists them all."),
        (["/some/dir"], "'/some/dir' stands alone; values follow a flag, as in --model_dir DIR."),
        (["--http_port", "http"], "--http_port (PREDICTOR_HTTP_PORT) is 'http': input should be a valid integer"),
        (["--http_port", "70000"], "--http_port (PREDICTOR_HTTP_PORT) is '70000': input should be less than"),
        (["--device", "tpu"], "--device (PREDICTOR_DEVICE) is 'tpu': should be auto, cuda, cuda:N, mps or cpu"),
        (["--served_model_name", "owner/model"], "--served_model_name (PREDICTOR_SERVED_MODEL_NAME) is 'owner/model'"),
        (["--http_port"], "argument --http_port: expected one argument"),
    ],
)
def test_names_the_flag_that_is_wrong(argv: list[str], expected: str) -> None:
    with pytest.raises(InvalidSettings) as raised:
        settings.read(argv)
    assert str(raised.value).startswith(expected)
    assert "\n" not in str(raised.value)


def test_refuses_an_unknown_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREDICTOR_HTTPPORT", "8080")
    with pytest.raises(
        InvalidSettings, match=r"^PREDICTOR_HTTPPORT is not a setting; did you mean PREDICTOR_HTTP_PORT"
    ):
        settings.read([])


def test_refuses_an_unknown_variable_in_lower_case_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("predictor_httpport", "8080")
    with pytest.raises(InvalidSettings, match=r"^predictor_httpport is not a setting; did you mean PREDICTOR_HTTP"):
        settings.read([])


def test_suggests_no_variable_that_has_only_the_prefix_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREDICTOR_FOO", "1")
    with pytest.raises(InvalidSettings, match=r"^PREDICTOR_FOO is not a setting; `python -m predictor --help`"):
        settings.read([])


def test_names_the_variable_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREDICTOR_MAX_NUM_SEQS", "none")
    with pytest.raises(InvalidSettings, match=r"PREDICTOR_MAX_NUM_SEQS\) is 'none'"):
        settings.read([])


def test_ignores_what_kubernetes_says_of_a_service_named_predictor(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVICE_HOST", "SERVICE_PORT_HTTP1", "PORT", "PORT_8080_TCP_ADDR"):
        monkeypatch.setenv(f"PREDICTOR_{name}", "10.0.0.1")
    assert settings.read([]).http_port == 8080
