"""Check a RayService: its applications against the worker groups, times, the head and the mounted weights.

Settings are checked by checks/settings.py, once for each application.
"""

from collections import Counter
from collections.abc import Iterator

from preflight import ray
from preflight.checks.containers import ports
from preflight.checks.timeouts import KUBERNETES_GRACE_SECONDS
from preflight.deployment import MODELS, Deployment, Manifest, name_of
from preflight.findings import Finding, Problems
from preflight.programs import PREDICTOR_ON_RAY, ray_problem

LONGEST_NAME = 47
"""KubeRay's limit: it derives names of Services and pods."""
DELETION_DELAY_SECONDS = 60
"""KubeRay's default of rayClusterDeletionDelaySeconds."""


def check(deployment: Deployment) -> Iterator[Finding]:
    """Yield findings on the RayService and each of its applications."""
    where = name_of(deployment.service)
    try:
        config = ray.serve_config(deployment)
    except ValueError as error:
        yield Finding(where, f"serveConfigV2: {error}", "write it as manifests/ray/ray-service.yaml does", "kserve-llm")
        return
    for problem, remedy, source in [*_cluster(deployment), *_head(deployment), *_unique(config)]:
        yield Finding(where, problem, remedy, source)
    for group in ray.groups(deployment):
        for problem, remedy, source in _weights(group):
            yield Finding(where, problem, remedy, source)
    for application in ray.applications(deployment):
        problems = [*_builder(application), *_size(application), *_number(application), *_metrics(application)]
        for problem, remedy, source in [*problems, *_times(application, config), *_termination(application)]:
            yield Finding(application.where, problem, remedy, source)


def _cluster(deployment: Deployment) -> Problems:
    if len(deployment.name) > LONGEST_NAME:
        yield (
            f"its name has {len(deployment.name)} characters, and KubeRay allows {LONGEST_NAME}",
            "use a shorter one",
            "kserve-llm",
        )
    spec = deployment.service["spec"]
    delay = spec.get("rayClusterDeletionDelaySeconds", DELETION_DELAY_SECONDS)
    request = max((_number_of(view, "REQUEST_TIMEOUT") for view in ray.applications(deployment)), default=0)
    if (spec.get("upgradeStrategy") or {}).get("type", "NewCluster") != "None" and delay < request:
        yield (
            f"rayClusterDeletionDelaySeconds is {delay} and PREDICTOR_REQUEST_TIMEOUT_SECONDS {request:g}, so an "
            "upgrade ends requests of the old cluster",
            "set the first above the second",
            "kserve-llm",
        )


def _head(deployment: Deployment) -> Problems:
    """Check that the head runs no replica, and that it does not report to Ray's vendor."""
    config = deployment.service["spec"]["rayClusterConfig"]
    head, pod = config["headGroupSpec"], deployment.ray_pods[0]
    if str((head.get("rayStartParams") or {}).get("num-cpus")) != "0":
        yield (
            "the head accepts replicas, whose load and memory can end the whole cluster",
            'set headGroupSpec.rayStartParams.num-cpus: "0"',
            "kserve-llm",
        )
    if config.get("enableInTreeAutoscaling") and pod.spec.get("automountServiceAccountToken") is False:
        yield (
            "enableInTreeAutoscaling is true and the head has no service-account token, so no worker is added",
            "set automountServiceAccountToken: true on the head",
            "kserve-llm",
        )
    if deployment.environment(pod.spec["containers"][0]).get("RAY_USAGE_STATS_ENABLED") != "0":
        yield "Ray reports its use to its vendor", "set RAY_USAGE_STATS_ENABLED=0 on the head", "kserve-llm"


def _unique(config: Manifest) -> Problems:
    for key, default in (("name", "default"), ("route_prefix", "/")):
        values = Counter(str(entry.get(key, default)) for entry in config["applications"])
        for value in [value for value, count in values.items() if count > 1]:
            yield f"two applications have {key} {value!r}", "use different ones", "kserve-llm"


def _weights(group: ray.Group) -> Problems:
    """Check that a worker mounts the claim, read-only."""
    container, claims = group.container, set(group.pod.claims)
    volumes = {
        volume["name"]: volume["persistentVolumeClaim"]
        for volume in group.pod.spec.get("volumes", [])
        if "persistentVolumeClaim" in volume
    }
    mounts = [mount for mount in container.get("volumeMounts", []) if mount["mountPath"].rstrip("/") == MODELS]
    if not claims or not any(mount["name"] in volumes for mount in mounts):
        yield f"container {container['name']} mounts no claim at {MODELS}", "mount the claim models there", "kserve-llm"
    for mount in mounts:
        source = volumes.get(mount["name"], {})
        if source and not mount.get("readOnly") and not source.get("readOnly"):
            yield (
                f"container {container['name']} mounts the weights writable",
                "set readOnly: true on the mount",
                "kserve-llm",
            )


def _builder(application: ray.Application) -> Problems:
    """Check what the application's builder gets."""
    path = application.written.get("import_path")
    if path != ray.IMPORT_PATH:
        yield f"import_path is {path!r}", f"use {ray.IMPORT_PATH}", "kserve-llm"
        return
    for name, value in application.arguments_of_builder.items():
        if found := PREDICTOR_ON_RAY.option_problem(name, value):
            yield *found, "kserve-llm"
    for entry in application.written.get("deployments") or []:
        if entry.get("name") != ray.DEPLOYMENT:
            yield (
                f"deployments has {entry.get('name')!r}, and the application's only one is {ray.DEPLOYMENT!r}",
                "correct the name, or set its options in args",
                "kserve-llm",
            )
    if found := ray_problem(application.settings):
        yield *found, "kserve-llm"


def _size(application: ray.Application) -> Problems:
    """Check that a replica fits in a pod of a worker group."""
    cpus, count = application.option("num_cpus"), application.option("num_gpus")
    if not application.groups:
        groups = application.all_groups
        offered = ", ".join(f"{group.name}: {group.cpus:g} and {group.gpus:g}" for group in groups) or "none"
        yield (
            f"a replica needs {cpus:g} CPUs and {count:g} GPUs, which no pod of a worker group has ({offered})",
            "lower num_cpus or num_gpus, or raise the limits of a worker group",
            "kserve-llm",
        )
        return
    group = application.groups[0]
    fitting = group.replicas(cpus, count)
    if fitting > 1:
        yield (
            f"{fitting} replicas fit in a pod of worker group {group.name}, and share its memory limit",
            f"set num_cpus to {group.cpus:g}, so that a pod has one",
            "kserve-llm",
        )


def _number(application: ray.Application) -> Problems:
    """Check that the worker groups may have the pods that the largest number of replicas needs."""
    size = application.option("num_cpus"), application.option("num_gpus")
    room = sum(group.max_replicas * group.replicas(*size) for group in application.groups)
    if application.groups and application.max_replicas > room:
        names = " and ".join(group.name for group in application.groups)
        yield (
            f"it has up to {application.max_replicas} replicas, and worker group {names} has room for {room}",
            "raise maxReplicas of the worker group, or lower max_replicas",
            "kserve-llm",
        )
    least = application.option("min_replicas")
    if application.option("max_replicas") and least > application.option("max_replicas"):
        yield f"min_replicas is {least:g} and max_replicas {application.max_replicas}", "lower the first", "kserve-llm"


def _metrics(application: ray.Application) -> Problems:
    port = application.settings.get("PREDICTOR_METRICS_PORT", "")
    for group in application.groups if port.isdigit() else []:
        if int(port) not in ports(group.container):
            yield (
                f"metrics_port is {port}, which container {group.container['name']} does not open",
                "add it to ports, so that a PodMonitor finds it",
                "kserve-llm",
            )


def _times(application: ray.Application, config: Manifest) -> Problems:
    """Check that a replica that is removed, and the proxy, give a request its time."""
    request, grace = (_number_of(application, name) for name in ("REQUEST_TIMEOUT", "SHUTDOWN_GRACE"))
    written = application.deployment_config.get("graceful_shutdown_timeout_s")
    if written is not None and float(written) < request:
        yield (
            f"graceful_shutdown_timeout_s is {written} and PREDICTOR_REQUEST_TIMEOUT_SECONDS {request:g}, so Serve "
            "kills replicas with running requests",
            "remove it: it follows from PREDICTOR_SHUTDOWN_GRACE_SECONDS",
            "kserve-llm",
        )
    elif written is None and grace < request:
        yield (
            f"PREDICTOR_SHUTDOWN_GRACE_SECONDS is {grace:g} and PREDICTOR_REQUEST_TIMEOUT_SECONDS {request:g}, so "
            "Serve kills replicas with running requests",
            "set the first above the second",
            "kserve-llm",
        )
    proxy = (config.get("http_options") or {}).get("request_timeout_s")
    if proxy is not None and float(proxy) <= request:
        yield (
            f"http_options.request_timeout_s is {proxy} and PREDICTOR_REQUEST_TIMEOUT_SECONDS {request:g}, so Serve's "
            "proxy times out first",
            "set the first above the second, or remove it",
            "kserve-llm",
        )


def _termination(application: ray.Application) -> Problems:
    """Check that a worker's pod that is deleted drains its node, and has the time for it."""
    grace = _number_of(application, "SHUTDOWN_GRACE")
    for group in application.groups[:1]:
        name, lifecycle = group.container["name"], group.container.get("lifecycle") or {}
        period = group.pod.spec.get("terminationGracePeriodSeconds", KUBERNETES_GRACE_SECONDS)
        if "preStop" not in lifecycle:
            yield (
                f"container {name} has no preStop that drains the node, so a deleted pod ends its running requests",
                "copy it from manifests/ray/ray-service.yaml",
                "kserve-llm",
            )
        elif period < grace:
            yield (
                f"terminationGracePeriodSeconds of worker group {group.name} is {period} and "
                f"PREDICTOR_SHUTDOWN_GRACE_SECONDS {grace:g}, so a deleted pod may end running requests",
                "set the first above the second",
                "kubelet",
            )


def _number_of(deployment: Deployment, name: str) -> float:
    """Return a setting in seconds; 0 if it is not a number, which checks/settings.py reports."""
    try:
        return float(deployment.settings.get(f"PREDICTOR_{name}_SECONDS", 0))
    except ValueError:
        return 0
