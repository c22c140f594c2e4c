"""Check inequalities between timeouts, and between batch size and scaling. Times are in seconds.

request timeout < timeout                                       the caller gets the predictor's error, not the gateway's
hold while loading < request timeout                            a request that was held has time left for its answer
step timeout + liveness probe <= request timeout                a stuck replica restarts before its requests time out
shutdown delay + shutdown grace <= timeout <= Knative's cap     Knative kills the pod `timeout` after SIGTERM
snapshot wait + timeout <= startup probe                        a start waits for the Job, then loads
startup probe <= progress deadline                              Knative must not fail the revision first
startup probe - snapshot wait <= 600                            Standard mode: KServe fixes progressDeadlineSeconds
10 <= shutdown delay                                            Standard mode: proxies have removed a rejecting pod
preStop + shutdown delay + shutdown grace <= termination grace  Standard mode
timeout <= the Ingress' read timeout                            Standard mode
scaleTarget <= containerConcurrency = max_num_seqs              a replica gets as many requests as fit in its batch
"""

from collections.abc import Iterator

from preflight import quantities
from preflight.checks.knative import MAX_TIMEOUT_SECONDS
from preflight.deployment import Deployment, Manifest, name_of
from preflight.findings import Finding, Problems

KNATIVE_PROGRESS_DEADLINE = "600s"
KUBERNETES_GRACE_SECONDS = 30
REMOVAL_SECONDS = 10
"""Time until nodes and proxies send no more requests to a deleted pod; usually less."""
STANDARD_PROGRESS_DEADLINE_SECONDS = 600
"""progressDeadlineSeconds of KServe's Deployment, which no field of the InferenceService changes."""
NGINX_TIMEOUT_SECONDS = 60
NGINX_TIMEOUT = "nginx.ingress.kubernetes.io/proxy-read-timeout"


def check(deployment: Deployment, max_timeout_seconds: float = MAX_TIMEOUT_SECONDS) -> Iterator[Finding]:
    """Yield violated inequalities.

    Args:
        deployment: the rendered overlay.
        max_timeout_seconds: max-revision-timeout-seconds of the cluster.
    """
    for problem, remedy, source in _inequalities(deployment, max_timeout_seconds):
        yield Finding(deployment.where, problem, remedy, source)
    if not deployment.is_knative:
        yield from _ingress(deployment)
        yield from _progress(deployment)
        yield from _removal(deployment)


def _inequalities(deployment: Deployment, max_timeout_seconds: float) -> Problems:
    timeout = _timeout(deployment)
    settings = deployment.settings
    request = _number(settings, "PREDICTOR_REQUEST_TIMEOUT_SECONDS")
    delay, grace = (_number(settings, f"PREDICTOR_SHUTDOWN_{name}_SECONDS") for name in ("DELAY", "GRACE"))
    step = _number(settings, "PREDICTOR_STEP_TIMEOUT_SECONDS")
    wait = _number(settings, "PREDICTOR_SNAPSHOT_WAIT_SECONDS")
    startup, liveness = (_budget(deployment.server.get(kind)) for kind in ("startupProbe", "livenessProbe"))
    if request >= timeout:
        yield (
            f"PREDICTOR_REQUEST_TIMEOUT_SECONDS is {request:g} and timeout {timeout:g}, so the gateway times out first",
            "set the first below the second",
            "kserve-llm",
        )
    hold = _number(settings, "PREDICTOR_HOLD_WHILE_LOADING")
    if hold and hold >= request:
        yield (
            f"PREDICTOR_HOLD_WHILE_LOADING is {hold:g} and PREDICTOR_REQUEST_TIMEOUT_SECONDS {request:g}, so a held "
            "request times out",
            "set the first below the second",
            "kserve-llm",
        )
    if step + liveness > request:
        yield (
            f"a stuck predictor restarts after {step:g} s (PREDICTOR_STEP_TIMEOUT_SECONDS) plus {liveness:g} s "
            f"(livenessProbe), more than the request timeout of {request:g} s",
            "lower either",
            "kserve-llm",
        )
    if wait + timeout > startup:
        yield (
            f"waiting for a snapshot ({wait:g} s) and loading ({timeout:g} s) exceed the {startup:g} s of startupProbe",
            "raise its failureThreshold or lower PREDICTOR_SNAPSHOT_WAIT_SECONDS",
            "kserve-llm",
        )
    if deployment.is_knative:
        yield from _knative(deployment, timeout, max_timeout_seconds, delay + grace, startup)
    else:
        yield from _termination(deployment, delay, grace)


def _termination(deployment: Deployment, delay: float, grace: float) -> Problems:
    termination = deployment.predictor.get("terminationGracePeriodSeconds", KUBERNETES_GRACE_SECONDS)
    sleep = deployment.server.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    if sleep + delay + grace > termination:
        yield (
            f"preStop ({sleep:g} s) plus PREDICTOR_SHUTDOWN_DELAY_SECONDS ({delay:g} s) plus "
            f"PREDICTOR_SHUTDOWN_GRACE_SECONDS ({grace:g} s) exceeds terminationGracePeriodSeconds ({termination:g} s)",
            "raise the last",
            "kubelet",
        )


def _knative(deployment: Deployment, timeout: float, cap: float, shutdown: float, startup: float) -> Problems:
    annotations = deployment.annotations | (deployment.predictor.get("annotations") or {})
    annotation = annotations.get("serving.knative.dev/progress-deadline", KNATIVE_PROGRESS_DEADLINE)
    if timeout > cap:
        yield (
            f"timeout is {timeout:g} s, more than Knative's maximum of {cap:g} s (max-revision-timeout-seconds)",
            "lower it, or raise the maximum as manifests/cluster shows",
            "Knative's webhook",
        )
    if shutdown > timeout:
        yield (
            f"PREDICTOR_SHUTDOWN_DELAY_SECONDS and PREDICTOR_SHUTDOWN_GRACE_SECONDS are {shutdown:g} together and the "
            f"pod is killed after {timeout:g} s (timeout)",
            "lower the latter",
            "kubelet",
        )
    try:
        deadline = quantities.seconds(annotation)
    except ValueError:
        return  # checks/knative.py reports it.
    if startup > deadline:
        yield (
            f"startupProbe waits {startup:g} s and Knative fails the revision after {deadline:g} s (progress-deadline)",
            "raise serving.knative.dev/progress-deadline",
            "kserve-llm",
        )
    batch = _number(deployment.settings, "PREDICTOR_MAX_NUM_SEQS")
    limit, target = (deployment.predictor.get(field) for field in ("containerConcurrency", "scaleTarget"))
    if limit != batch:
        yield (
            f"containerConcurrency is {limit or 'not set'} and PREDICTOR_MAX_NUM_SEQS is {batch:g}",
            "make them equal, so that a replica gets as many requests as fit in its batch",
            "kserve-llm",
        )
    if deployment.predictor.get("scaleMetric", "concurrency") == "concurrency" and not 0 < (target or 100) <= batch:
        yield (
            f"scaleTarget is {target or '100 by default'} and PREDICTOR_MAX_NUM_SEQS is {batch:g}, "
            "so no second replica starts",
            "lower scaleTarget to PREDICTOR_MAX_NUM_SEQS",
            "kserve-llm",
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
                f"it ends requests after {allowed:g} s, and timeout is {timeout:g} s",
                f"raise {NGINX_TIMEOUT}",
                "kserve-llm",
            )


def _progress(deployment: Deployment) -> Iterator[Finding]:
    """Check the time to load. A wait for the download is not counted: a Deployment recovers when its pod is ready."""
    startup = _budget(deployment.server.get("startupProbe"))
    load = startup - _number(deployment.settings, "PREDICTOR_SNAPSHOT_WAIT_SECONDS")
    if load > STANDARD_PROGRESS_DEADLINE_SECONDS:
        yield Finding(
            deployment.where,
            f"startupProbe leaves {load:g} s to load, and the Deployment reports ProgressDeadlineExceeded after "
            f"{STANDARD_PROGRESS_DEADLINE_SECONDS} s, which KServe fixes",
            "expect `kubectl rollout status` to fail while the model loads, or lower failureThreshold",
            "KServe's controller",
            "warning",
        )


def _removal(deployment: Deployment) -> Iterator[Finding]:
    delay = _number(deployment.settings, "PREDICTOR_SHUTDOWN_DELAY_SECONDS")
    if delay < REMOVAL_SECONDS:
        yield Finding(
            deployment.where,
            f"PREDICTOR_SHUTDOWN_DELAY_SECONDS is {delay:g}, and a deleted pod, which then rejects requests, may still "
            f"get some for {REMOVAL_SECONDS} s",
            "set it to 15, as component standard-mode does",
            "kserve-llm",
            "warning",
        )


def _timeout(deployment: Deployment) -> float:
    """Return `timeout` of the InferenceService, by default that of Knative."""
    return float(deployment.predictor.get("timeout", 300))


def _number(settings: dict[str, str], key: str) -> float:
    """Return a setting; 0 if it is not set or not a number, which checks/settings.py reports."""
    try:
        return float(settings.get(key, 0))
    except ValueError:
        return 0


def _budget(probe: Manifest | None) -> float:
    """Return the seconds until a failing probe restarts the container, with Kubernetes' defaults."""
    if probe is None:
        return 0
    delay, period = probe.get("initialDelaySeconds", 0), probe.get("periodSeconds", 10)
    return float(delay + period * probe.get("failureThreshold", 3))
