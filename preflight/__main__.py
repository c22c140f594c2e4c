"""`python -m preflight OVERLAY`: renders, checks, and says what it found in one line each."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from preflight import offline, rendering
from preflight.checks import knative, references, resources, schema, settings
from preflight.cluster import checks
from preflight.cluster.client import Connection
from preflight.deployment import Deployment
from preflight.findings import CannotLook, Finding

BASE = Path(__file__).resolve().parents[1] / "kustomize/base"
"""Beside this package in a checkout; its *.env files say which settings there are."""
MODEL_CONFIG = "model-config.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks.

    Returns:
        0 where no finding is an error, 1 where one is, 2 where nothing could be checked.
    """
    arguments = _arguments(argv)
    try:
        deployment = rendering.render(arguments.overlay)
        findings = _findings(deployment, arguments)
    except CannotLook as error:
        print(f"preflight: {error}", file=sys.stderr)
        return 2
    needs = _needs(deployment)
    if arguments.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings], "needs": needs}, indent=2))
    else:
        print(*findings, _summary(arguments.overlay, findings, needs), sep="\n")
    return int(any(finding.severity == "error" for finding in findings))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m preflight",
        description="Look over a kustomize overlay before the cluster sees it.",
        epilog="exit codes: 0 nothing wrong, 1 something is, 2 could not look",
    )
    add = parser.add_argument
    add("overlay", type=Path, help="a folder with a kustomization.yaml")
    add("--crds", type=Path, metavar="DIR", help="CustomResourceDefinitions; by default those of the cluster")
    add("--context", metavar="NAME", help="ask the cluster of this context of the kubeconfig, too")
    add("--model-config", type=Path, metavar="FILE", help=f"the model's config.json; by default OVERLAY/{MODEL_CONFIG}")
    add("--json", action="store_true", help="findings and needs as one JSON object")
    return parser.parse_args(argv)


def _findings(deployment: Deployment, arguments: argparse.Namespace) -> list[Finding]:
    connection = Connection(arguments.context) if arguments.context else None
    if arguments.crds:
        definitions = schema.definitions_in(arguments.crds)
    else:
        definitions = connection.definitions if connection else []
    beside = arguments.overlay / MODEL_CONFIG
    config = arguments.model_config or (beside if beside.exists() else None)
    findings = offline.check(
        deployment,
        schema.Schemas(definitions),
        known_settings=settings.known_keys(BASE),
        model=resources.read(config) if config else None,
        max_timeout_seconds=checks.max_timeout_seconds(connection) if connection else knative.MAX_TIMEOUT_SECONDS,
    )
    if connection and deployment.service:
        findings += checks.check(deployment, connection)
    return findings


def _needs(deployment: Deployment) -> dict[str, list[str]]:
    """What the overlay takes for granted: Knative's flags, and Secrets that somebody must make."""
    if not deployment.service:
        return {"knative_flags": [], "secrets": []}
    secrets = [each for each in references.secrets(deployment) if not each.optional]
    return {
        "knative_flags": sorted(knative.flags(deployment)),
        "secrets": [f"{each.name}/{each.key}" if each.key else each.name for each in secrets],
    }


def _summary(overlay: Path, findings: Sequence[Finding], needs: dict[str, list[str]]) -> str:
    errors = sum(finding.severity == "error" for finding in findings)
    needed = "; ".join(f"{name.replace('_', ' ')} {', '.join(values)}" for name, values in needs.items() if values)
    counted = f"errors: {errors}, warnings: {len(findings) - errors}"
    return f"{overlay}: {counted}; needs: {needed or 'nothing special'}"


if __name__ == "__main__":
    sys.exit(main())
