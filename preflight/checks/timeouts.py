"""Times that must fit into each other. All in seconds.

request timeout < timeout                               the caller reads our error, not the gateway's
step timeout + liveness probe <= request timeout        a stuck replica is replaced before its callers give up
shutdown grace <= timeout <= Knative's cap              Knative kills the pod `timeout` after SIGTERM
snapshot wait + timeout <= startup probe                waiting for the Job, then loading
startup probe <= progress deadline                      Knative must not give up first
preStop + shutdown grace <= termination grace           Standard mode, where it is said
timeout <= the Ingress' read timeout                    Standard mode
scaleTarget <= containerConcurrency = max_num_seqs      Knative sends a replica what its batch holds
"""

from collections.abc import Iterator

from preflight import quantities
from preflight.checks.knative import MAX_TIMEOUT_SECONDS
from preflight.deployment import Deployment, Manifest, name_of
from preflight.findings import Clauses, Finding

KNATIVE_PROGRESS_DEADLINE = "600s"
KUBERNETES_GRACE_SECONDS = 30
NGINX_TIMEOUT_SECONDS = 60
NGINX_TIMEOUT = "nginx.ingress.kubernetes.io/proxy-read-timeout"


def check(deployment: Deployment, max_timeout_seconds: float = MAX_TIMEOUT_SECONDS) -> Iterator[Finding]:
    """Every inequality that does not hold.

    Args:
        deployment: what is rendered.
        max_timeout_seconds: the cluster's max-revision-timeout-seconds.
    """
    for problem, remedy in _inequalities(deployment, max_timeout_seconds):
        yield Finding(deployment.where, problem, remedy)
    if not deployment.is_knative:
        yield from _ingress(deployment)


def _inequalities(deployment: Deployment, max_timeout_seconds: float) -> Clauses:
    timeout = _timeout(deployment)
    told = deployment.settings
    request = _number(told, "PREDICTOR_REQUEST_TIMEOUT_SECONDS")
    grace = _number(told, "PREDICTOR_SHUTDOWN_GRACE_SECONDS")
    step = _number(told, "PREDICTOR_STEP_TIMEOUT_SECONDS")
    wait = _number(told, "PREDICTOR_SNAPSHOT_WAIT_SECONDS")
    startup, liveness = (_budget(deployment.server.get(kind)) for kind in ("startupProbe", "livenessProbe"))
    if request >= timeout:
        yield (
            f"PREDICTOR_REQUEST_TIMEOUT_SECONDS is {request:g} and timeout {timeout:g}: the gateway gives up first",
            "lower the first below the second",
        )
    if step + liveness > request:
        yield (
            f"a stuck predictor is restarted after {step:g} s (PREDICTOR_STEP_TIMEOUT_SECONDS) and {liveness:g} s "
            f"(livenessProbe), longer than the {request:g} s of a request",
            "shorten one of both",
        )
    if wait + timeout > startup:
        yield (
            f"waiting for a snapshot ({wait:g} s) and loading ({timeout:g} s) exceed the {startup:g} s of startupProbe",
            "raise its failureThreshold or lower PREDICTOR_SNAPSHOT_WAIT_SECONDS",
        )
    if deployment.is_knative:
        yield from _knative(deployment, timeout, max_timeout_seconds, grace, startup)
    else:
        given = deployment.predictor.get("terminationGracePeriodSeconds", KUBERNETES_GRACE_SECONDS)
        sleep = deployment.server.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        if sleep + grace > given:
            yield (
                f"preStop ({sleep:g} s) and PREDICTOR_SHUTDOWN_GRACE_SECONDS ({grace:g} s) do not fit into "
                f"terminationGracePeriodSeconds ({given:g} s)",
                "raise the last",
            )


def _knative(deployment: Deployment, timeout: float, cap: float, grace: float, startup: float) -> Clauses:
    annotation = deployment.annotations.get("serving.knative.dev/progress-deadline", KNATIVE_PROGRESS_DEADLINE)
    if timeout > cap:
        yield (
            f"timeout is {timeout:g} s, over the {cap:g} s that Knative allows (max-revision-timeout-seconds)",
            "lower it, or raise the cap as manifests/cluster shows",
        )
    if grace > timeout:
        yield (
            f"PREDICTOR_SHUTDOWN_GRACE_SECONDS is {grace:g} and the pod is killed after {timeout:g} s (timeout)",
            "lower the first to the second",
        )
    try:
        deadline = quantities.seconds(annotation)
    except ValueError:
        return  # A question of Knative's admission.
    if startup > deadline:
        yield (
            f"the startupProbe waits {startup:g} s and Knative gives up after {deadline:g} s (progress-deadline)",
            "raise serving.knative.dev/progress-deadline",
        )
    running = _number(deployment.settings, "PREDICTOR_MAX_NUM_SEQS")
    limit, target = (deployment.predictor.get(field) for field in ("containerConcurrency", "scaleTarget"))
    if limit != running:
        yield (
            f"containerConcurrency is {limit or 'not set'} and PREDICTOR_MAX_NUM_SEQS {running:g}",
            "make them equal, so that Knative sends a replica what its batch holds",
        )
    if deployment.predictor.get("scaleMetric", "concurrency") == "concurrency" and not 0 < (target or 100) <= running:
        yield (
            f"scaleTarget is {target or '100 by default'}, and a replica runs {running:g}, so no other one starts",
            "lower it to PREDICTOR_MAX_NUM_SEQS",
        )


def _ingress(deployment: Deployment) -> Iterator[Finding]:
    timeout = _timeout(deployment)
    for ingress in deployment.all("Ingress"):
        if ingress["spec"].get("ingressClassName") != "nginx":
            continue
        allowed = float(ingress["metadata"].get("annotations", {}).get(NGINX_TIMEOUT, NGINX_TIMEOUT_SECONDS))
        if allowed < timeout:
            yield Finding(
                name_of(ingress),
                f"it cuts requests off after {allowed:g} s, and they may take {timeout:g} s (timeout)",
                f"raise {NGINX_TIMEOUT}",
            )


def _timeout(deployment: Deployment) -> float:
    """Of a request; Knative's own where the InferenceService says nothing."""
    return float(deployment.predictor.get("timeout", 300))


def _number(settings: dict[str, str], key: str) -> float:
    """A setting; 0 where it is not said or no number, which is a question of the configuration."""
    try:
        return float(settings.get(key, 0))
    except ValueError:
        return 0


def _budget(probe: Manifest | None) -> float:
    """How long a probe may fail until the container is restarted; Kubernetes' defaults where it says nothing."""
    if probe is None:
        return 0
    delay, period = probe.get("initialDelaySeconds", 0), probe.get("periodSeconds", 10)
    return float(delay + period * probe.get("failureThreshold", 3))
