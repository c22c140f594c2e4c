"""The programs' settings, checked without their servers."""

import subprocess
import sys

import pytest
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from devtools.paths import ROOT
from preflight.programs import PREDICTOR, STORAGE_INITIALIZER, Program


def test_preflight_loads_neither_torch_nor_the_servers() -> None:
    code = "import preflight.__main__, sys; print(sorted({'torch', 'transformers', 'kserve'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("PREDICTOR_TRACING", ("true", "1", "Off", "no")),
        ("PREDICTOR_REQUEST_TIMEOUT_SECONDS", ("590", "0.5")),
        ("PREDICTOR_MODEL_REFERENCE", ("", "hf://owner/model")),
        ("UNRELATED", ("anything",)),
    ],
)
def test_variable_problem_valid_value_has_none(name: str, values: tuple[str, ...]) -> None:
    assert [PREDICTOR.variable_problem(name, value) for value in values] == [None] * len(values)


def test_variable_problem_ignores_the_environment_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREDICTOR_DTYPE", "int8")
    monkeypatch.setenv("STORAGE_INITIALIZER_ATTEMPTS", "0")
    assert PREDICTOR.variable_problem("PREDICTOR_QUANTIZATION", "8bit") is None
    assert list(PREDICTOR.argument_problems(["--quantization=8bit"])) == []
    assert STORAGE_INITIALIZER.variable_problem("STORAGE_INITIALIZER_UMASK", "0022") is None


def test_variable_problem_value_that_is_not_json_has_a_remedy() -> None:
    class Settings(BaseSettings):
        model_config = SettingsConfigDict(env_prefix="X_")
        words: dict[str, int] = Field(default_factory=dict)

    program = Program("program", Settings, lambda *_: None, ())
    assert program.variable_problem("X_WORDS", '{"a": 1}') is None
    problem, remedy = program.variable_problem("X_WORDS", "{a: 1}") or ("", "")
    assert problem.startswith("X_WORDS is '{a: 1}', so the program does not start: error parsing value")
    assert remedy == "write it as JSON"
