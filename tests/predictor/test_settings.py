import json

import pytest

from predictor import settings
from predictor.errors import InvalidSettings


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in settings.Settings.model_fields:
        monkeypatch.delenv(f"PREDICTOR_{name.upper()}", raising=False)
    for name in ("MODEL_REFERENCE", "ADAPTER_REFERENCE", "LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)


def test_read_without_flags_returns_defaults() -> None:
    read = settings.read([])
    assert (read.served_model_name, str(read.model_dir), read.http_port) == ("model", "/mnt/models", 8080)
    assert (read.device, read.dtype, read.trust_remote_code, read.log_level) == ("auto", "auto", False, "INFO")
    assert read.shutdown_grace_seconds == 600


def test_read_flag_overrides_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREDICTOR_HTTP_PORT", "9001")
    assert settings.read([]).http_port == 9001
    assert settings.read(["--http_port", "9002"]).http_port == 9002


def test_read_flag_with_dashes_equals_underscores() -> None:
    read = settings.read(["--http-port=9003", "--max-num-seqs", "4", "--served-model-name", "a-b_c"])
    assert (read.http_port, read.max_num_seqs, read.served_model_name) == (9003, 4, "a-b_c")
    assert settings.read(["--no-enable-grpc"]).enable_grpc is False
    assert settings.read(["--enable-grpc"]).enable_grpc is True


def test_read_help_lists_every_flag_and_exits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        settings.read(["--help"])
    assert raised.value.code == 0
    text = capsys.readouterr().out
    assert [name for name in settings.Settings.model_fields if f"--{name}" not in text] == []


def test_read_uses_variables_shared_with_storage_initializer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_REFERENCE", "hf://owner/model")
    monkeypatch.setenv("LOG_LEVEL", "debug")
    read = settings.read([])
    assert (read.model_reference, read.log_level) == ("hf://owner/model", "DEBUG")


def test_read_empty_model_reference_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_REFERENCE", "")
    assert settings.read([]).model_reference is None


@pytest.mark.parametrize(
    ("value", "origins"),
    [
        ("", ()),
        ("*", ("*",)),
        ("https://ui.example.org", ("https://ui.example.org",)),
        (" HTTPS://UI.example.org:8443, http://[::1]:3000,", ("https://ui.example.org:8443", "http://[::1]:3000")),
        ("tauri://localhost,null-app://x", ("tauri://localhost", "null-app://x")),
    ],
)
def test_read_allowed_origins_are_a_list(value: str, origins: tuple[str, ...]) -> None:
    assert settings.read(["--allowed_origins", value]).origins == origins


@pytest.mark.parametrize(
    "value", ["https://ui.example.org/", "ui.example.org", '["*"]', "https://*.example.org", "*, a b"]
)
def test_read_allowed_origin_that_no_browser_sends_is_an_error(value: str) -> None:
    with pytest.raises(InvalidSettings, match=r"--allowed_origins \(PREDICTOR_ALLOWED_ORIGINS\): .* \* or origins"):
        settings.read(["--allowed_origins", value])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--modl_dir", "/x"], "Unknown flag: --modl_dir. Did you mean --model_dir?"),
        (["--modl-dir=/x"], "Unknown flag: --modl_dir. Did you mean --model_dir?"),
        (["--model", "/x"], "Unknown flag: --model. Did you mean --model_dir?"),
        (["--no-enable-grcp"], "Unknown flag: --no-enable_grcp. Did you mean --no-enable_grpc?"),
        (["--frobnicate"], "Unknown flag: --frobnicate. `python -m predictor --help` lists all settings."),
        (["/some/dir"], "Invalid command line: error parsing CLI: unrecognized arguments: /some/dir. Run `python -m"),
        (["--no-http_port"], "Invalid command line: error parsing CLI: unrecognized arguments: --no-http_port."),
        (
            ["--http_port", "http"],
            "Invalid value of --http_port (PREDICTOR_HTTP_PORT): 'http'. Input should be",
        ),
        (["--http_port", "70000"], "Invalid value of --http_port (PREDICTOR_HTTP_PORT): '70000'. Input should be less"),
        (["--device", "tpu"], "Invalid value of --device (PREDICTOR_DEVICE): 'tpu'. Input should be auto, cuda,"),
        *(
            (
                ["--tensor_parallel_size", size],
                f"Invalid value of --tensor_parallel_size (PREDICTOR_TENSOR_PARALLEL_SIZE): '{size}'. Input should be "
                "auto or a positive integer.",
            )
            for size in ("0", "-1", "all", "1.5")
        ),
        (["--served_model_name", "a/b"], "Invalid value of --served_model_name (PREDICTOR_SERVED_MODEL_NAME): 'a/b'."),
        (["--http_port"], "Invalid command line: error parsing CLI: argument --http_port: expected one argument."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_read_invalid_flag_names_problem_and_fix(argv: list[str], expected: str) -> None:
    with pytest.raises(InvalidSettings) as raised:
        settings.read(argv)
    assert str(raised.value).startswith(expected)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("value", "size"), [("auto", "auto"), ("1", 1), ("04", 4)])
def test_read_tensor_parallel_size_is_a_number_or_auto(value: str, size: int | str) -> None:
    assert settings.read(["--tensor_parallel_size", value]).tensor_parallel_size == size


@pytest.mark.parametrize("variable", ["PREDICTOR_HTTPPORT", "predictor_httpport"])
def test_read_unknown_variable_suggests_similar_name(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "8080")
    with pytest.raises(InvalidSettings, match=rf"^Unknown variable: {variable}\. Did you mean PREDICTOR_HTTP_PORT\?$"):
        settings.read([])


def test_read_unknown_variable_with_only_common_prefix_has_no_suggestion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREDICTOR_FOO", "1")
    with pytest.raises(InvalidSettings, match=r"^Unknown variable: PREDICTOR_FOO\. `python -m predictor --help`"):
        settings.read([])


def test_read_invalid_variable_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREDICTOR_MAX_NUM_SEQS", "none")
    with pytest.raises(InvalidSettings, match=r"PREDICTOR_MAX_NUM_SEQS\): 'none'"):
        settings.read([])


def test_read_ignores_kubernetes_service_links(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVICE_HOST", "SERVICE_PORT_HTTP1", "PORT", "PORT_8080_TCP_ADDR"):
        monkeypatch.setenv(f"PREDICTOR_{name}", "10.0.0.1")
    assert settings.read([]).http_port == 8080


def test_read_chat_template_kwargs_are_json(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"enable_thinking": False, "budget": 5}
    assert settings.read([]).template_variables == {}
    assert settings.read(["--chat_template_kwargs", json.dumps(expected)]).template_variables == expected
    monkeypatch.setenv("PREDICTOR_CHAT_TEMPLATE_KWARGS", json.dumps(expected))
    assert settings.read([]).template_variables == expected


@pytest.mark.parametrize("value", ["enable_thinking=false", "[1]", "{"])
def test_read_chat_template_kwargs_not_a_json_object_are_rejected(value: str) -> None:
    with pytest.raises(
        InvalidSettings, match=r'--chat_template_kwargs .*JSON object, as in {"enable_thinking": false}'
    ):
        settings.read(["--chat_template_kwargs", value])


def test_read_ready_while_loading_needs_hold() -> None:
    with pytest.raises(InvalidSettings, match=r"--ready_while_loading: .*Set --hold_while_loading too"):
        settings.read(["--ready_while_loading"])
    assert settings.read(["--hold_while_loading", "60", "--ready_while_loading"]).ready_while_loading


def test_read_adapter_reference_needs_a_model_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_REFERENCE", "hf://owner/adapter")
    with pytest.raises(InvalidSettings, match=r"^--adapter_reference: .* Set --model_reference too\.$"):
        settings.read([])
    assert settings.read(["--model_reference", "hf://owner/model"]).adapter_reference == "hf://owner/adapter"
