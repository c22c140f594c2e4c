"""Run every check that needs no cluster."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from preflight import ray
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
from preflight.checks import ray as ray_checks
from preflight.checks.resources import Model
from preflight.checks.schema import Schemas
from preflight.deployment import SERVICES, Deployment, name_of
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
    if not deployment.service:
        number = sum(len(deployment.all(kind)) for kind in SERVICES)
        remedy = "deploy exactly one, or one RayService, with each overlay"
        return [*findings, Finding("InferenceService", f"the overlay has {number} of them", remedy, "kserve-llm")]
    if deployment.is_ray:
        return list(dict.fromkeys([*findings, *_ray(deployment, model)]))
    if missing := _findings(references.runtime, deployment):
        return [*findings, *missing]
    times = partial(timeouts.check, max_timeout_seconds=max_timeout_seconds)
    checks: list[Check] = [api_server.check, kserve.check, knative.check, *_OF_PODS, *_of_predictor(model), times]
    for check_ in checks:
        findings += _findings(check_, deployment)
    # One wrong value may stop several checks.
    return list(dict.fromkeys(findings))


Check = Callable[[Deployment], Iterable[Finding]]

_OF_PODS: tuple[Check, ...] = (references.check, containers.check, security.check)


def _of_predictor(model: Model | None) -> list[Check]:
    """Return the checks of the predictor's settings and resources."""
    with_model = (settings.check, resources.check, tensor_parallel.check, volumes.check)
    return [api_keys.check, *(partial(check_, model=model) for check_ in with_model)]


def _ray(deployment: Deployment, model: Model | None) -> Iterable[Finding]:
    of_cluster: list[Check] = [api_server.check, ray_checks.check, *_OF_PODS]
    for check_ in of_cluster:
        yield from _findings(check_, deployment)
    found = [list(_of_application(application, model)) for application in ray.applications(deployment)]
    # What all applications have in common is a finding of the RayService.
    common = set.intersection(*({finding for _, finding in pairs} for pairs in found)) if len(found) > 1 else set()
    for own, general in [pair for pairs in found for pair in pairs]:
        yield general if general in common else own


def _of_application(application: ray.Application, model: Model | None) -> Iterable[tuple[Finding, Finding]]:
    """Yield each finding of an application, and the same as a finding of the RayService."""
    for check_ in _of_predictor(model):
        for finding in _findings(check_, application):
            is_own = finding.where == application.where
            yield finding, replace(finding, where=name_of(application.service)) if is_own else finding


def _findings(check_: Check, deployment: Deployment) -> list[Finding]:
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
