"""The names that docs/stability.md promises: `python -m devtools.stable_interface` adds new ones to the list.

A release comes after it. A name leaves the list by hand, after its deprecation.
"""

import argparse
import json
import sys
from pathlib import Path

from prometheus_client import REGISTRY

from devtools.paths import ROOT
from kserve_llm.cli import COMMANDS
from predictor.entrypoints.http.app import create_app
from predictor.generation.service import LLMService
from predictor.observability import metrics
from predictor.settings import Settings as PredictorSettings
from storage_initializer.settings import Settings as InitializerSettings

FILE = ROOT / "tests" / "documents" / "stable_interface.json"


def current() -> dict[str, set[str]]:
    """Return the names of this commit, by kind."""
    return {
        "commands": {*COMMANDS, "completion"},
        "components": _folders("components"),
        "metrics": _metrics(),
        "overlays": _folders("overlays"),
        "routes": _routes(),
        "settings of the predictor": set(PredictorSettings.model_fields),
        "settings of the storage initializer": set(InitializerSettings.model_fields),
    }


def promised() -> dict[str, set[str]]:
    """Return the names of the list, by kind."""
    content: dict[str, list[str]] = json.loads(FILE.read_text()) if FILE.is_file() else {}
    return {kind: set(names) for kind, names in content.items()}


def main() -> int:
    """Add the names of this commit to the list."""
    argparse.ArgumentParser(prog="python -m devtools.stable_interface", description=__doc__).parse_args()
    names, before = current(), promised()
    content = {kind: sorted(names[kind] | before.get(kind, set())) for kind in sorted(names)}
    FILE.write_text(json.dumps(content, indent=2) + "\n")
    return 0


def _folders(kind: str) -> set[str]:
    return {file.parent.name for file in (ROOT / "kustomize" / kind).glob("*/kustomization.yaml")}


def _metrics() -> set[str]:
    families = {family.name for family in REGISTRY.collect() if family.name.startswith(metrics.PREFIX)}
    return families | {f"{metrics.PREFIX}{name}" for name in metrics.CallbackCollector.texts}


def _routes() -> set[str]:
    settings = PredictorSettings(model_dir=Path("unused"))
    document = create_app(LLMService(settings), settings).openapi()
    return {
        f"{method.upper()} {path}"
        for path, operations in document["paths"].items()
        for method in operations
        if method != "parameters"
    }


if __name__ == "__main__":
    sys.exit(main())
