"""Reference pages of the documentation, from the programs' own models, metrics, errors and routes."""

import ast
import inspect
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

import yaml
from fastapi import FastAPI
from prometheus_client import REGISTRY
from pydantic import AliasChoices
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings
from starlette.routing import Route

from devtools.documentation.messages import text_of
from devtools.documentation.tables import table
from devtools.paths import ROOT
from predictor import errors as predictor_errors
from predictor.entrypoints.http.app import create_app
from predictor.entrypoints.ray_settings import RaySettings
from predictor.generation.service import LLMService
from predictor.observability import metrics
from predictor.settings import Settings as PredictorSettings
from preflight.checks.schema import is_core
from storage_initializer import errors as initializer_errors
from storage_initializer.settings import Settings as InitializerSettings

COMPONENTS = ROOT / "kustomize" / "components"
BASE_GROUPS = ("kustomize.config.k8s.io", "serving.kserve.io")
"""Groups that every overlay uses."""
GROUPS = {
    "served_model_name": "Model and snapshot",
    "device": "Device, precision and quantization",
    "max_model_len": "Engine",
    "default_max_tokens": "Completions",
    "request_timeout_seconds": "Limits of requests",
    "step_timeout_seconds": "Health and shutdown",
    "api_keys_file": "Access and ports",
    "tracing": "Traces and logs",
}
"""First settings of groups of the predictor, in the order of its model."""
_REFUSING_ROUTES = ("reject", "explain", "predict_by_get")
"""Names of routes that exist to say what to use instead."""


def settings_page() -> str:
    """Return the flags and variables of the programs."""
    own_to_ray = [item for item in RaySettings.model_fields.items() if item[0] not in PredictorSettings.model_fields]
    parts = [
        "# Settings",
        "Every setting of the three programs, from their own models. Unknown flags and variables are refused.",
        "## Predictor",
        "A flag, `--http_port 8080` or `--http-port 8080`, wins over its variable. `--no-NAME` turns a switch off.",
    ]
    for title, fields in _groups():
        parts += [f"### {title}", _settings_table(PredictorSettings, fields, has_flags=True)]
    parts += [
        "## Predictor on Ray Serve",
        "Arguments of the application, in addition to the predictor's.",
        _settings_table(RaySettings, own_to_ray, has_flags=False),
        "## Storage initializer",
        "`python -m storage_initializer --help` lists the flags that some of them have.",
        _settings_table(InitializerSettings, InitializerSettings.model_fields.items(), has_flags=False),
    ]
    return "\n\n".join(parts)


def _groups() -> Iterator[tuple[str, list[tuple[str, FieldInfo]]]]:
    title, fields = "", list[tuple[str, FieldInfo]]()
    for name, field in PredictorSettings.model_fields.items():
        if name in GROUPS:
            if fields:
                yield title, fields
            title, fields = GROUPS[name], []
        fields.append((name, field))
    yield title, fields


def _settings_table(model: type[BaseSettings], fields: Iterable[tuple[str, FieldInfo]], *, has_flags: bool) -> str:
    rows = []
    for name, field in fields:
        variables = _variables(model, name, field)
        words = [f"`{word}`" for word in ([f"--{name}"] if has_flags else []) + variables]
        description = " ".join((field.description or _docstrings(model)[name]).split())
        rows.append(("<br>".join(words), _default(field), f"{description} {_values(field)}".strip()))
    return table(("Setting", "Default", "Meaning"), rows)


def _docstrings(model: type[BaseSettings]) -> dict[str, str]:
    """Return the texts below the fields of a model."""
    [body] = [node for node in ast.parse(inspect.getsource(model)).body if isinstance(node, ast.ClassDef)]
    return {
        node.target.id: str(text.value.value)
        for node, text in zip(body.body, body.body[1:], strict=False)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def _variables(model: type[BaseSettings], name: str, field: FieldInfo) -> list[str]:
    alias = field.validation_alias
    if isinstance(alias, AliasChoices):
        return [str(choice) for choice in alias.choices if str(choice).isupper()]
    return [str(alias) if alias else f"{model.model_config.get('env_prefix', '')}{name}".upper()]


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True) if not field.is_required() else "required"
    if default in (None, "", (), []):
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _values(field: FieldInfo) -> str:
    """Return the values of a setting that has a fixed set of them."""
    values = [value for part in (field.annotation, *get_args(field.annotation)) for value in _literals(part)]
    return f"One of {', '.join(f'`{value}`' for value in values)}." if len(values) > 1 else ""


def _literals(annotation: Any) -> tuple[object, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def metrics_page() -> str:
    """Return the predictor's metrics."""
    families = {family.name: family for family in [*metrics.CallbackCollector().collect(), *REGISTRY.collect()]}
    rows = [
        (f"`{name}{'_total' if family.type == 'counter' else ''}`", family.type, family.documentation)
        for name, family in sorted(families.items())
        if name.startswith(metrics.PREFIX)
    ]
    text = "What the predictor exports at `/metrics`, in addition to KServe's. All have the label `model_name`."
    return f"# Metrics\n\n{text}\n\n{table(('Metric', 'Type', 'Meaning'), rows)}"


def errors_page() -> str:
    """Return exit codes and HTTP statuses, with the messages, which name the fix."""
    requests = sorted(
        _subclasses(predictor_errors, predictor_errors.RequestError), key=lambda error: (error.status, error.__name__)
    )
    predictor, initializer = _messages("predictor"), _messages("storage_initializer")
    # Too many to list.
    predictor["InvalidRequest"] = ["Names the field, and what it accepts."]
    head = ("Error", "Meaning", "Messages, with what to do")
    return "\n\n".join(
        [
            "# Errors and exit codes",
            "How requests and programs fail, and what to do. Words in UPPER CASE stand for values.",
            "## Requests",
            "Errors with status 503 and 429 have `Retry-After`. A body has the form of its protocol.",
            table(("Status", *head), [(str(error.status), *_error(error, predictor)) for error in requests]),
            "## Exit codes of the predictor",
            "0: stopped by SIGTERM or Ctrl-C, after the drain.",
            table(("Code", *head), _exit_codes(predictor_errors, predictor_errors.StartupError, predictor)),
            "## Exit codes of the storage initializer",
            "0: done. 1: worth a retry. 2: pointless to retry. The last line on stderr is the reason.",
            table(("Code", *head), _exit_codes(initializer_errors, initializer_errors.InitializerError, initializer)),
            "## Exit codes of preflight",
            "0: no errors. 1: errors, listed with their [findings](findings.md). 2: the checks could not run.",
        ]
    )


def _exit_codes(module: ModuleType, base: type, messages: dict[str, list[str]]) -> list[tuple[str, ...]]:
    errors = sorted(_subclasses(module, base), key=lambda error: (error.exit_code, error.__name__))
    return [(str(error.exit_code), *_error(error, messages)) for error in errors]


def _error(error: type, messages: dict[str, list[str]]) -> tuple[str, str, str]:
    name = error.__name__
    summary = (inspect.getdoc(error) or "").partition("\n\n")[0].replace("\n", " ")
    return f"`{name}`", summary, "<br>".join(f"• {text}" for text in messages.get(name, []))


def _subclasses(module: ModuleType, base: type) -> Iterator[Any]:
    for _, value in inspect.getmembers(module, inspect.isclass):
        if issubclass(value, base) and value.__module__ == module.__name__:
            yield value


def _messages(package: str) -> dict[str, list[str]]:
    """Return the messages with which a package creates its errors, by class; those of one sentence are left out."""
    found: dict[str, dict[str, None]] = {}
    for file in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[message, *_]):
                    text = text_of(message)
                    if text and ". " in text:
                        found.setdefault(name, {})[text] = None
    return {name: list(texts) for name, texts in found.items()}


def routes_page() -> str:
    """Return the routes: those of the OpenAPI document, then those that it leaves out."""
    parsed = PredictorSettings(model_dir=Path("unused"))
    app = create_app(LLMService(parsed), parsed)
    rows = [
        (f"`{method.upper()} {path}`", str(operation.get("summary", "")), ", ".join(operation["responses"]))
        for path, operations in sorted(app.openapi()["paths"].items())
        for method, operation in operations.items()
        if method != "parameters"
    ]
    others = [(f"`GET {path}`", name.replace("_", " ").capitalize()) for path, name in _unlisted_routes(app)]
    return "\n\n".join(
        [
            "# Routes",
            "The HTTP interface. The server's own OpenAPI document, with all bodies, is at `/openapi.json`.",
            table(("Route", "Operation", "Statuses"), rows),
            "These are not in the document:",
            table(("Route", "Operation"), others),
        ]
    )


def _unlisted_routes(app: FastAPI) -> list[tuple[str, str]]:
    """Return paths and names of the routes that are not in the OpenAPI document, but for those that only refuse."""
    routers = [getattr(route, "original_router", None) for route in app.routes]
    routes = itertools.chain(app.routes, *(router.routes for router in routers if router is not None))
    return sorted(
        (route.path, route.name)
        for route in routes
        if isinstance(route, Route) and not route.include_in_schema and route.name not in _REFUSING_ROUTES
    )


def components_page() -> str:
    """Return the kustomize components: purpose, what they need, and with which others they are not combined."""
    rows = []
    for folder in sorted(path.parent for path in COMPONENTS.glob("*/kustomization.yaml")):
        readme = (folder / "README.md").read_text()
        readme = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", readme)
        purpose = " ".join(readme.split("\n\n")[1].split())
        excluded = " ".join(readme.partition("\nNot with:")[2].partition("\n\n")[0].split()).rstrip(".")
        link = f"[`{folder.name}`](../../kustomize/components/{folder.name}/README.md)"
        rows.append((link, purpose, ", ".join(_needs(folder)), excluded))
    text = (
        "What an overlay may list under `components` of its `kustomization.yaml`. "
        "A Secret is created by hand, an API is that of an operator."
    )
    return f"# Components\n\n{text}\n\n{table(('Component', 'Purpose', 'Needs', 'Not with'), rows)}"


def _needs(folder: Path) -> list[str]:
    """Return the Secrets, the APIs and the other components that a component uses."""
    needs: dict[str, None] = {}
    for document in [document for file in _files(folder) for document in yaml.safe_load_all(file.read_text())]:
        needs |= {f"Secret `{name}`": None for name in _secrets(document)}
        version = str(document.get("apiVersion", "v1")) if isinstance(document, dict) else "v1"
        group = version.partition("/")[0]
        if not is_core(version) and group not in BASE_GROUPS:
            needs[f"API `{group}`"] = None
    return sorted(needs)


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a kustomization, and of those that it includes."""
    yield from folder.glob("*.yaml")
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    for entry in [*kustomization.get("resources", []), *kustomization.get("components", [])]:
        path = folder / entry
        if path.is_dir():
            yield from _files(path.resolve())
        else:
            yield path


def _secrets(value: object) -> Iterator[str]:
    """Yield the names of Secrets in an object."""
    if isinstance(value, list):
        for item in value:
            yield from _secrets(item)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        match key, item:
            case "secretName", str(name):
                yield name
            case "secretKeyRef" | "secretRef", {"name": str(name)}:
                yield name
            case "imagePullSecrets", [{"name": str(name)}, *_]:
                yield name
            case _:
                yield from _secrets(item)
