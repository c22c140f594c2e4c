"""Reference pages of the documentation, made from the code while the site is built; see `mkdocs.yml`."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from prometheus_client import REGISTRY
from pydantic import AliasChoices
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from devtools.paths import ROOT
from predictor import errors as predictor_errors
from predictor.entrypoints.http.app import create_app
from predictor.entrypoints.ray_settings import RaySettings
from predictor.generation.service import LLMService
from predictor.observability import metrics
from predictor.settings import Settings as PredictorSettings
from storage_initializer import errors as initializer_errors
from storage_initializer.settings import Settings as InitializerSettings

COMPONENTS = ROOT / "kustomize" / "components"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages; MkDocs calls this hook."""
    for name, make in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=make()))
    return files


def settings_page() -> str:
    """Return the flags and variables of the programs."""
    own_to_ray = {
        name: field for name, field in RaySettings.model_fields.items() if name not in PredictorSettings.model_fields
    }
    return "\n\n".join(
        [
            "# Settings",
            "Made from the programs' own models. A flag wins over its variable; unknown ones are refused.",
            "## Predictor",
            "`python -m predictor --help` lists them as well.",
            _settings_table(PredictorSettings, PredictorSettings.model_fields.items(), has_flags=True),
            "## Predictor on Ray Serve",
            "Arguments of the application, in addition to the predictor's.",
            _settings_table(RaySettings, own_to_ray.items(), has_flags=False),
            "## Storage initializer",
            _settings_table(InitializerSettings, InitializerSettings.model_fields.items(), has_flags=False),
        ]
    )


def metrics_page() -> str:
    """Return the predictor's metrics."""
    rows = [
        (f"`{family.name}`", family.type, family.documentation)
        for family in sorted(REGISTRY.collect(), key=lambda family: family.name)
        if family.name.startswith(metrics.PREFIX)
    ]
    rows += [
        (f"`{metrics.PREFIX}{name}`", "counter or gauge", text)
        for name, text in metrics.CallbackCollector.texts.items()
        if not any(f"`{metrics.PREFIX}{name}`" == row[0] for row in rows)
    ]
    text = "At `/metrics`, with the label `model_name`. Counters have the suffix `_total`."
    return f"# Metrics\n\n{text}\n\n{_table(('Metric', 'Type', 'Meaning'), sorted(rows))}"


def errors_page() -> str:
    """Return exit codes and HTTP statuses."""
    startup = [
        (f"`{error.__name__}`", str(error.exit_code), _summary(error))
        for error in _subclasses(predictor_errors, predictor_errors.StartupError)
    ]
    requests = [
        (f"`{error.__name__}`", str(error.status), _summary(error))
        for error in _subclasses(predictor_errors, predictor_errors.RequestError)
    ]
    initializer = [
        (f"`{error.__name__}`", str(error.exit_code), _summary(error))
        for error in _subclasses(initializer_errors, initializer_errors.InitializerError)
    ]
    return "\n\n".join(
        [
            "# Errors and exit codes",
            "Every message names the problem and the fix.",
            "## Requests",
            _table(("Error", "HTTP status", "Meaning"), sorted(requests, key=lambda row: row[1])),
            "## Start of the predictor",
            _table(("Error", "Exit code", "Meaning"), startup),
            "## Storage initializer",
            "The last line on stderr is the reason. 1: worth a retry; 2: pointless to retry.",
            _table(("Error", "Exit code", "Meaning"), initializer),
        ]
    )


def routes_page() -> str:
    """Return the routes of the OpenAPI document."""
    parsed = PredictorSettings(model_dir=Path("unused"))
    document = create_app(LLMService(parsed), parsed).openapi()
    rows = [
        (f"`{path}`", method.upper(), str(operation.get("summary", "")))
        for path, operations in sorted(document["paths"].items())
        for method, operation in operations.items()
        if method != "parameters"
    ]
    text = "The server's own document is at `/openapi.json`, with the bodies."
    return f"# Routes\n\n{text}\n\n{_table(('Path', 'Method', 'Operation'), rows)}"


def components_page() -> str:
    """Return the kustomize components, with the comments at their top."""
    rows = []
    for file in sorted(COMPONENTS.glob("*/kustomization.yaml")):
        comment = " ".join(line.removeprefix("#").strip() for line in _leading_comment(file))
        rows.append((f"`{file.parent.name}`", comment))
    text = "Listed in `components` of an overlay's `kustomization.yaml`."
    return f"# Components\n\n{text}\n\n{_table(('Component', 'Purpose'), rows)}"


PAGES: dict[str, Callable[[], str]] = {
    "settings": settings_page,
    "metrics": metrics_page,
    "errors": errors_page,
    "routes": routes_page,
    "components": components_page,
}


def _settings_table(model: type[BaseSettings], fields: Iterable[tuple[str, FieldInfo]], *, has_flags: bool) -> str:
    rows = []
    for name, field in fields:
        flag = (f"`--{name}`",) if has_flags else ()
        rows.append(
            (*flag, f"`{_variable(model, name, field)}`", _default(field), _type(field), field.description or "")
        )
    return _table((*(("Flag",) if has_flags else ()), "Variable", "Default", "Values", "Meaning"), rows)


def _variable(model: type[BaseSettings], name: str, field: FieldInfo) -> str:
    prefix = str(model.model_config.get("env_prefix", ""))
    alias = field.validation_alias
    if isinstance(alias, AliasChoices):
        return "`, `".join(str(choice) for choice in alias.choices if str(choice).isupper())
    return str(alias) if alias else f"{prefix}{name}".upper()


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True) if not field.is_required() else "required"
    if default in (None, "", (), []):
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _type(field: FieldInfo) -> str:
    annotation: Any = field.annotation
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    names = [getattr(part, "__name__", str(part)) for part in get_args(annotation) or (annotation,)]
    words = {"bool": "true or false", "int": "integer", "float": "number", "str": "text", "Path": "path"}
    return " or ".join(words.get(name, name) for name in names if name not in ("NoneType", "...", "Ellipsis"))


def _subclasses(module: ModuleType, base: type) -> Iterator[Any]:
    for _, value in inspect.getmembers(module, inspect.isclass):
        if issubclass(value, base) and value.__module__ == module.__name__:
            yield value


def _summary(value: Any) -> str:
    return (inspect.getdoc(value) or "").partition("\n\n")[0].replace("\n", " ")


def _leading_comment(file: Path) -> Iterator[str]:
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            return
        yield line


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
