"""The settings of the two programs, and the file of API keys, checked by the programs' own code.

Nothing else is imported from them. This code needs pydantic only; torch and kserve are not loaded.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, cast

from pydantic import ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsError

from predictor import settings as predictor_settings
from predictor.entrypoints import ray_settings
from predictor.entrypoints.api_keys import parse as parse_api_keys
from predictor.errors import InvalidSettings
from preflight.deployment import flags
from preflight.findings import Problems
from storage_initializer import settings as initializer_settings
from storage_initializer.cli import arguments as initializer_arguments
from storage_initializer.errors import InvalidReference, InvalidUsage

_WORD = re.compile(r"[\w:.-]+")
_SIMILAR = 0.5
"""Minimum similarity of a suggested word, so that `fp16` suggests `float16`."""


class _Isolated(BaseSettings):
    """Settings that do not read the environment of this process."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - passed by position
        init_settings: PydanticBaseSettingsSource,
        *_: Any,
        **__: Any,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


class Program:
    """The variables and flags of one program."""

    def __init__(
        self,
        name: str,
        model: type[BaseSettings],
        parse: Callable[[Sequence[str], Any], object],
        errors: tuple[type[Exception], ...],
    ) -> None:
        self.name = name
        self.prefix = str(model.model_config.get("env_prefix"))
        """Prefix of variables, of which the program rejects unknown ones."""
        self._model = cast("type[BaseSettings]", type(model.__name__, (_Isolated, model), {}))
        self._parse = parse
        self._errors = errors

    def variable_problem(self, name: str, value: str) -> tuple[str, str] | None:
        """Return why the program does not start with a variable of its environment, and the remedy."""
        variable = name.upper()  # pydantic-settings ignores case
        fields = {self.prefix + field.upper() for field in self._model.model_fields}
        if variable.startswith(self.prefix) and variable not in fields:
            [*close] = difflib.get_close_matches(variable, fields, n=1)
            return f"{name} is not a setting of the {self.name}", f"use {close[0]}" if close else "remove it"
        if error := self._error(variable, value):
            shown = "invalid" if "@" in value else repr(value)  # A URL may contain a password.
            return f"{name} is {shown}, so the {self.name} does not start: {error[0]}", error[1]
        return None

    def argument_problems(self, arguments: Sequence[str]) -> Problems:
        """Yield why the program does not start with its arguments; a malformed reference is reported elsewhere."""
        found = False
        for flag, name, value in flags(arguments):
            if name in self._model.model_fields and (error := self._error(f"{self.prefix}{name.upper()}", value)):
                found = True
                yield f"{flag} is {value!r}, so the {self.name} does not start: {error[0]}", error[1], "kserve-llm"
        if found:
            return
        try:
            self._parse(arguments, self._model)
        except InvalidReference:
            return
        except self._errors as error:
            yield f"the {self.name} rejects its arguments: {str(error).rstrip('.')}", "correct `args`", "kserve-llm"
        except SystemExit:
            yield f"the {self.name} prints its help and exits", "remove --help from `args`", "kserve-llm"

    def option_problem(self, name: str, value: object) -> tuple[str, str] | None:
        """Return why the program does not start with a setting that is given by name, and the remedy."""
        if name not in self._model.model_fields:
            [*close] = difflib.get_close_matches(name, self._model.model_fields, n=1)
            return f"{name} is not a setting of the {self.name}", f"use {close[0]}" if close else "remove it"
        if error := self._value_error({name: value}):
            return f"{name} is {value!r}, so the {self.name} does not start: {error[0]}", error[1]
        return None

    def read(self, variables: Mapping[str, str]) -> BaseSettings | None:
        """Return the settings of an environment; None if a value is invalid."""
        try:
            return self._model(**self._values(variables))
        except (SettingsError, ValidationError):
            return None

    def _values(self, variables: Mapping[str, str]) -> dict[str, Any]:
        if self._model.model_config.get("env_ignore_empty"):
            variables = {name: value for name, value in variables.items() if value}
        source = EnvSettingsSource(self._model)
        source.env_vars = {name.lower(): value for name, value in variables.items()}
        return source()

    @cache  # noqa: B019, the programs live as long as the process
    def _error(self, variable: str, value: str) -> tuple[str, str] | None:
        """Return the error of one variable and its remedy; containers and overlays have most variables in common."""
        try:
            return self._value_error(self._values({variable: value}))
        except SettingsError as error:
            return str(error), "write it as JSON"

    def _value_error(self, values: Mapping[str, Any]) -> tuple[str, str] | None:
        """Return the error of one value and its remedy; relations between settings are not checked."""
        try:
            self._model(**values)
        except ValidationError as error:
            first = next((error for error in error.errors(include_url=False) if error["loc"]), None)
            if first is None:
                return None
            message = first["msg"][:1].lower() + first["msg"][1:]
            words = [word for word in _WORD.findall(str(first.get("ctx", {}).get("expected", ""))) if word != "or"]
            [*close] = difflib.get_close_matches(str(first["input"]).lower(), words, n=1, cutoff=_SIMILAR)
            return message, f"use {close[0]}" if close else "correct it, or remove it for the default"
        return None


def api_keys_problem(text: str, source: str) -> tuple[str, str] | None:
    """Return why the predictor does not accept a file of API keys, and the remedy; neither has a part of a key."""
    try:
        parse_api_keys(text, source)
    except InvalidSettings as error:
        return _problem(error)
    return None


def ray_problem(variables: Mapping[str, str]) -> tuple[str, str] | None:
    """Return why settings do not fit together on Ray Serve, and the remedy; None if a value itself is invalid."""
    parsed = PREDICTOR_ON_RAY.read(variables)
    try:
        if isinstance(parsed, ray_settings.RaySettings):
            ray_settings.check(parsed)
    except InvalidSettings as error:
        return _problem(error)
    return None


def _problem(error: InvalidSettings) -> tuple[str, str]:
    problem, _, remedy = str(error).rstrip(".").partition(". ")
    return problem, remedy[:1].lower() + remedy[1:]


PREDICTOR = Program("predictor", predictor_settings.Settings, predictor_settings.parse, (InvalidSettings,))
PREDICTOR_ON_RAY = Program("predictor", ray_settings.RaySettings, predictor_settings.parse, (InvalidSettings,))
STORAGE_INITIALIZER = Program(
    "storage initializer",
    initializer_settings.Settings,
    lambda arguments, _: initializer_arguments.parse(arguments),
    (InvalidUsage,),
)
