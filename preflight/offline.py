"""Every check that needs no cluster, one after the other."""

from functools import partial

from preflight.checks import knative, kserve, references, resources, schema, security, settings, timeouts
from preflight.checks.resources import Model
from preflight.checks.schema import Schemas
from preflight.deployment import Deployment
from preflight.findings import Finding


def check(
    deployment: Deployment,
    schemas: Schemas,
    known_settings: dict[str, str],
    model: Model | None = None,
    max_timeout_seconds: float = knative.MAX_TIMEOUT_SECONDS,
) -> list[Finding]:
    """What is wrong with the deployment, schema first.

    Args:
        deployment: what is rendered.
        schemas: of the custom kinds; those of core kinds are built in.
        known_settings: every key that is a setting, with its default.
        model: how large the model is, where that is known.
        max_timeout_seconds: Knative's cap on `timeout`.
    """
    findings = list(schema.check(deployment, schemas))
    services = deployment.all("InferenceService")
    if len(services) != 1:
        where = "InferenceService"
        return [*findings, Finding(where, f"the overlay has {len(services)} of them", "deploy one with each overlay")]
    for check_ in (
        kserve.check,
        knative.check,
        references.check,
        security.check,
        partial(settings.check, known=known_settings),
        partial(timeouts.check, max_timeout_seconds=max_timeout_seconds),
        partial(resources.check, model=model),
    ):
        try:
            findings += check_(deployment)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            # A number where a map belongs, and the like: what the schema names, where one is at hand.
            problem = f"a value is not of the kind that belongs there ({type(error).__name__}: {error})"
            findings.append(Finding(deployment.where, problem, "correct it; with --crds its place is named"))
    # One wrong value may stop several checks.
    return list(dict.fromkeys(findings))
