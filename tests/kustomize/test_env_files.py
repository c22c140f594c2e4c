"""Base's *.env files: every setting of both programs, with its default and one comment."""

import re

import pytest
from pydantic import AliasChoices, TypeAdapter
from pydantic_settings import BaseSettings

from devtools.paths import ROOT
from predictor.settings import Settings as PredictorSettings
from storage_initializer.settings import Settings as InitializerSettings
from tests.kustomize.conftest import BASE

PROGRAMS = pytest.mark.parametrize(
    ("name", "settings"), [("predictor.env", PredictorSettings), ("storage-initializer.env", InitializerSettings)]
)
LINE = re.compile(r"(?P<unset>#?)(?P<key>[A-Z][A-Z0-9_]*)=(?P<value>.*)")


def entries(name: str) -> dict[str, tuple[str, bool, str]]:
    """Map each key to its value, whether it is commented out, and the line above."""
    lines = (ROOT / BASE / name).read_text().splitlines()
    return {
        match["key"]: (match["value"], bool(match["unset"]), above)
        for above, line in zip(["", *lines], lines, strict=False)
        if (match := LINE.fullmatch(line))
    }


def variables(settings: type[BaseSettings], name: str) -> set[str]:
    """Return the environment variables of a setting."""
    alias = settings.model_fields[name].validation_alias
    choices = alias.choices if isinstance(alias, AliasChoices) else [alias or ""]
    return {f"{settings.model_config['env_prefix']}{name.upper()}", *map(str, choices)}


@PROGRAMS
def test_env_file_has_every_setting_with_its_default(name: str, settings: type[BaseSettings]) -> None:
    lines = entries(name)
    for setting, field in settings.model_fields.items():
        keys = variables(settings, setting) & set(lines)
        assert len(keys) == 1, f"{name} should have one of {sorted(variables(settings, setting))}"
        value, unset, comment = lines[keys.pop()]
        adapter = TypeAdapter(settings.__annotations__[setting])
        if stated := re.search(r"Default: ([^\s.]+)\.", comment):
            assert adapter.validate_python(stated[1]) == field.default, setting
        elif unset:
            assert (field.default, value) == (None, ""), setting
        else:
            assert adapter.validate_python(value) == field.default, setting


@pytest.mark.parametrize("name", ["predictor.env", "storage-initializer.env"])
def test_env_file_key_has_one_comment_above(name: str) -> None:
    for key, (_, _, above) in entries(name).items():
        assert above.startswith("# "), key
        assert len(above) <= 140, key


@PROGRAMS
def test_env_file_prefixed_key_is_a_setting(name: str, settings: type[BaseSettings]) -> None:
    prefix = settings.model_config["env_prefix"]
    allowed = set().union(*(variables(settings, setting) for setting in settings.model_fields))
    lines = entries(name)
    assert {key for key in lines if key.startswith(prefix)} <= allowed
