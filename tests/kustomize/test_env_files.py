"""Base's *.env files hold every setting of the two programs, with its default and one comment."""

import re

import pytest
from pydantic import AliasChoices, TypeAdapter

from predictor.settings import Settings as PredictorSettings
from storage_initializer.settings import Settings as InitializerSettings

PROGRAMS = pytest.mark.parametrize(
    ("name", "settings"), [("predictor.env", PredictorSettings), ("storage-initializer.env", InitializerSettings)]
)
LINE = re.compile(r"(?P<unset>#?)(?P<key>[A-Z][A-Z0-9_]*)=(?P<value>.*)")


def entries(text):
    """Every key with its value, whether it is commented out, and the line above."""
    lines = text.splitlines()
    return {
        match["key"]: (match["value"], bool(match["unset"]), above)
        for above, line in zip(["", *lines], lines, strict=False)
        if (match := LINE.fullmatch(line))
    }


def variables(settings, name):
    """The variables that tell a setting."""
    alias = settings.model_fields[name].validation_alias
    choices = alias.choices if isinstance(alias, AliasChoices) else [alias or ""]
    return {f"{settings.model_config['env_prefix']}{name.upper()}", *choices}


@PROGRAMS
def test_every_setting_is_there_with_its_default_or_says_what_that_is(tree, name, settings):
    said = entries((tree.root / tree.base / name).read_text())
    for setting, field in settings.model_fields.items():
        keys = variables(settings, setting) & set(said)
        assert len(keys) == 1, f"{name} should have one of {sorted(variables(settings, setting))}"
        value, unset, comment = said[keys.pop()]
        adapter = TypeAdapter(settings.__annotations__[setting])
        if stated := re.search(r"Default: ([^\s.]+)\.", comment):
            assert adapter.validate_python(stated[1]) == field.default, setting
        elif unset:
            assert (field.default, value) == (None, ""), setting
        else:
            assert adapter.validate_python(value) == field.default, setting


@PROGRAMS
def test_every_key_has_one_comment_right_above(tree, name, settings):
    del settings
    for key, (_, _, above) in entries((tree.root / tree.base / name).read_text()).items():
        assert above.startswith("# "), key
        assert len(above) <= 140, key


@PROGRAMS
def test_every_key_of_a_program_is_one_of_its_settings(tree, name, settings):
    prefix = settings.model_config["env_prefix"]
    known = set().union(*(variables(settings, setting) for setting in settings.model_fields))
    said = entries((tree.root / tree.base / name).read_text())
    assert {key for key in said if key.startswith(prefix)} <= known
