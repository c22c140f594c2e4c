"""Command line: `python -m preflight OVERLAY` renders, checks and prints one line per finding."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from preflight import offline, rendering
from preflight.checks import knative, references, resources, schema
from preflight.cluster import checks
from preflight.cluster.client import Connection
from preflight.deployment import Deployment
from preflight.findings import CheckError, Finding

MODEL_CONFIG = "model-config.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks.

    Returns:
        0 if no finding is an error, 1 if one is, 2 if the checks could not run.
    """
    arguments = _arguments(argv)
    try:
        deployment = rendering.render(arguments.overlay)
        findings = _findings(deployment, arguments)
    except CheckError as error:
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
        description="Check a kustomize overlay before it is applied to a cluster.",
        epilog="exit codes: 0 no errors, 1 errors found, 2 checks could not run",
    )
    add = parser.add_argument
    add("overlay", type=Path, help="folder with a kustomization.yaml")
    add("--crds", type=Path, metavar="DIR", help="folder of CustomResourceDefinitions. Default: those of the cluster")
    add("--context", metavar="NAME", help="kubeconfig context of a cluster to check against. Default: no cluster")
    add("--model-config", type=Path, metavar="FILE", help=f"the model's config.json. Default: OVERLAY/{MODEL_CONFIG}")
    add("--json", action="store_true", help="print findings and needs as one JSON object")
    return parser.parse_args(argv)


def _findings(deployment: Deployment, arguments: argparse.Namespace) -> list[Finding]:
    connection = Connection(arguments.context) if arguments.context else None
    if arguments.crds:
        definitions = schema.definitions_in(arguments.crds)
    else:
        definitions = connection.definitions if connection else []
    default = arguments.overlay / MODEL_CONFIG
    config = arguments.model_config or (default if default.exists() else None)
    findings = offline.check(
        deployment,
        schema.Schemas(definitions),
        model=resources.read(config) if config else None,
        max_timeout_seconds=checks.max_timeout_seconds(connection) if connection else knative.MAX_TIMEOUT_SECONDS,
    )
    if connection and deployment.service:
        findings += checks.check(deployment, connection)
    return findings


def _needs(deployment: Deployment) -> dict[str, list[str]]:
    """Return the overlay's prerequisites: what all replicas request during a rollout, Knative's flags, and Secrets."""
    if not deployment.service:
        return {"rollout": [], "knative_flags": [], "secrets": []}
    secrets = [secret for secret in references.secrets(deployment) if not secret.optional]
    names = [f"{secret.name}/{secret.key}" if secret.key else secret.name for secret in secrets]
    return {
        "rollout": resources.rollout_sum(deployment),
        "knative_flags": sorted(knative.flags(deployment)),
        "secrets": list(dict.fromkeys(names)),
    }


def _summary(overlay: Path, findings: Sequence[Finding], needs: dict[str, list[str]]) -> str:
    errors = sum(finding.severity == "error" for finding in findings)
    needed = "; ".join(f"{name.replace('_', ' ')} {', '.join(values)}" for name, values in needs.items() if values)
    return f"{overlay}: errors: {errors}, warnings: {len(findings) - errors}; needs: {needed or 'nothing special'}"


if __name__ == "__main__":
    sys.exit(main())
