"""Run every check that needs no cluster."""

from collections.abc import Callable, Iterable
from functools import partial

from preflight.checks import (
    api_keys,
    api_server,
    containers,
    knative,
    kserve,
    references,
    resources,
    schema,
    security,
    settings,
    tensor_parallel,
    timeouts,
    volumes,
)
from preflight.checks.resources import Model
from preflight.checks.schema import Schemas
from preflight.deployment import Deployment
from preflight.findings import Finding


def check(
    deployment: Deployment,
    schemas: Schemas,
    model: Model | None = None,
    max_timeout_seconds: float = knative.MAX_TIMEOUT_SECONDS,
) -> list[Finding]:
    """Return the findings of all checks, schema first.

    Args:
        deployment: the rendered overlay.
        schemas: schemas of the custom kinds; those of core kinds are built in.
        model: the model's dimensions; without them, memory is not checked.
        max_timeout_seconds: Knative's maximum of `timeout`.
    """
    findings = list(schema.check(deployment, schemas))
    services = deployment.all("InferenceService")
    if len(services) != 1:
        problem = f"the overlay has {len(services)} of them"
        return [*findings, Finding("InferenceService", problem, "deploy exactly one with each overlay", "kserve-llm")]
    if missing := _findings(references.runtime, deployment):
        return [*findings, *missing]
    for check_ in (
        api_server.check,
        kserve.check,
        knative.check,
        references.check,
        containers.check,
        security.check,
        api_keys.check,
        partial(settings.check, model=model),
        partial(timeouts.check, max_timeout_seconds=max_timeout_seconds),
        partial(resources.check, model=model),
        partial(tensor_parallel.check, model=model),
        partial(volumes.check, model=model),
    ):
        findings += _findings(check_, deployment)
    # One wrong value may stop several checks.
    return list(dict.fromkeys(findings))


def _findings(check_: Callable[[Deployment], Iterable[Finding]], deployment: Deployment) -> list[Finding]:
    """Return the findings of one check up to a value of a wrong type, which is a finding too."""
    findings = []
    try:
        for finding in check_(deployment):
            findings.append(finding)  # noqa: PERF402 - keeps those before an error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # A number in place of a map, for example; the schema names the field if a CRD is available.
        problem = f"a value has the wrong type ({type(error).__name__}: {error})"
        findings.append(Finding(deployment.where, problem, "correct it; --crds names the field", "API server"))
    return findings
