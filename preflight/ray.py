"""The applications of a RayService, each a deployment of its own for the checks of settings and resources."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml

from preflight import gpus, quantities
from preflight.deployment import Deployment, Manifest, Pod, name_of

IMPORT_PATH = "predictor.entrypoints.ray_serve:app"
DEPLOYMENT = "predictor"
"""Name of the application's only deployment."""
OPTIONS = {"num_cpus": 1.0, "num_gpus": 0.0, "min_replicas": 1.0, "max_replicas": 0.0, "num_replicas": 0.0}
"""Ray's options of a replica with their defaults; 0 replicas: not set."""


@dataclass(frozen=True, slots=True)
class Group:
    """A worker group."""

    name: str
    pod: Pod
    cpus: float
    gpus: float
    max_replicas: int

    @property
    def container(self) -> Manifest:
        """Ray's container, which is the first one."""
        container: Manifest = self.pod.spec["containers"][0]
        return container

    def replicas(self, cpus: float, gpu_count: float) -> int:
        """Return how many replicas of this size fit in one pod."""
        shares = [self.cpus / cpus if cpus else math.inf, self.gpus / gpu_count if gpu_count else math.inf]
        return int(min(*shares, 1000))


@dataclass(frozen=True)
class Application(Deployment):
    """One application of serveConfigV2, with the pod of the worker group in which its replicas run."""

    written: Manifest = field(default_factory=dict)
    """The entry of serveConfigV2."""

    @property
    def where(self) -> str:
        """The object and the application, for findings."""
        return f"{name_of(self.service)}, application {self.written.get('name', 'default')}"

    @property
    def predictor(self) -> Manifest:
        """The replicas in the words of an InferenceService."""
        return {"maxReplicas": self.max_replicas}

    @property
    def arguments_of_builder(self) -> dict[str, Any]:
        """`args`: settings and Ray's options, by name."""
        return self.written.get("args") or {}

    @cached_property
    def deployment_config(self) -> Manifest:
        """The entry of `deployments` that overrides what follows from the arguments; empty without one."""
        entries = self.written.get("deployments") or []
        return next((entry for entry in entries if entry.get("name") == DEPLOYMENT), {})

    def option(self, name: str) -> float:
        """Return one of `OPTIONS`: from `deployments`, `args` or the environment of the workers."""
        config = self.deployment_config
        nested = (config.get("ray_actor_options") or {}) | (config.get("autoscaling_config") or {})
        variables = [self.environment(group.container).get(f"PREDICTOR_{name.upper()}") for group in self.all_groups]
        given = [config.get(name), nested.get(name), self.arguments_of_builder.get(name), *variables]
        try:
            return float(next((value for value in given if value is not None), OPTIONS[name]))
        except (TypeError, ValueError):
            return OPTIONS[name]  # checks/ray.py reports the value.

    @property
    def max_replicas(self) -> int:
        """The largest number of replicas."""
        return int(self.option("max_replicas") or self.option("num_replicas") or 1)

    @cached_property
    def all_groups(self) -> list[Group]:
        """Every worker group."""
        return groups(self)

    @cached_property
    def groups(self) -> list[Group]:
        """The worker groups with room for a replica; those with GPUs last for a replica without."""
        size = self.option("num_cpus"), self.option("num_gpus")
        fitting = [group for group in self.all_groups if group.replicas(*size)]
        return sorted(fitting, key=lambda group: group.gpus > 0 and not size[1])

    @cached_property
    def predictor_pod(self) -> Pod:
        """The pod of the worker group that the replicas use, or of the first group if none has room."""
        pods = [group.pod for group in self.groups or self.all_groups] or self.ray_pods
        return Pod(self.where, pods[0].spec)

    @property
    def server(self) -> Manifest:
        """Ray's container with the GPUs of one replica."""
        container = super().server
        limits = (container.get("resources") or {}).get("limits") or {}
        count = self.option("num_gpus")
        own = {name: limit for name, limit in limits.items() if not name.startswith("nvidia.com/") or count}
        if gpus.GPU in own and count:
            own[gpus.GPU] = f"{min(count, quantities.number(own[gpus.GPU])):g}"
        return container | {"resources": (container.get("resources") or {}) | {"limits": own}}

    @property
    def settings(self) -> dict[str, str]:
        """The predictor's settings, by variable: the environment of the workers, and `args`, which override it."""
        given = {f"PREDICTOR_{name.upper()}": _text(value) for name, value in self.arguments_of_builder.items()}
        return self.environment(self.server) | given


def serve_config(deployment: Deployment) -> Manifest:
    """Return serveConfigV2, parsed.

    Raises:
        ValueError: it is not a YAML map.
    """
    try:
        config = yaml.safe_load(deployment.service["spec"].get("serveConfigV2") or "")
    except yaml.YAMLError as error:
        raise ValueError(f"it is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict) or not config.get("applications"):
        raise ValueError("it has no applications")
    return config


def applications(deployment: Deployment) -> list[Application]:
    """Return the applications; none if serveConfigV2 is malformed."""
    try:
        entries = serve_config(deployment)["applications"]
    except ValueError:
        return []
    return [Application(deployment.objects, entry) for entry in entries]


def groups(deployment: Deployment) -> list[Group]:
    """Return the worker groups."""
    found = []
    specs = deployment.service["spec"]["rayClusterConfig"].get("workerGroupSpecs") or []
    for spec, pod in zip(specs, deployment.ray_pods[1:], strict=True):
        limits = (pod.spec["containers"][0].get("resources") or {}).get("limits") or {}
        parameters, own = spec.get("rayStartParams") or {}, spec.get("resources") or {}
        # KubeRay's order; it rounds CPUs up.
        cpus = own.get("CPU") or parameters.get("num-cpus") or math.ceil(quantities.number(limits.get("cpu", 0)))
        devices = sum(quantities.number(limit) for name, limit in limits.items() if name.startswith("nvidia.com/"))
        count = own.get("GPU") or parameters.get("num-gpus") or devices
        found.append(Group(spec["groupName"], pod, float(cpus), float(count), spec.get("maxReplicas", 2**31 - 1)))
    return found


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
