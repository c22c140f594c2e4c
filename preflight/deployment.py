"""The objects of one overlay, and the predictor's pod: merged from runtime and service, or a worker of Ray."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

Manifest = dict[str, Any]

KSERVE_CONTAINER = "kserve-container"
SERVICES = ("InferenceService", "RayService")
"""Kinds of which an overlay has exactly one object."""
MODELS = "/mnt/models"
"""Directory of the claim: the mount path of KServe's `storageUri`, and the default of the predictor."""
MODEL_FIELDS = {"modelFormat", "runtime", "runtimeVersion", "protocolVersion", "storageUri", "storage", "confidential"}
"""KServe's fields of `model`; the others are fields of a container."""
SERVICE_FIELDS = {
    *("model", "minReplicas", "maxReplicas", "scaleTarget", "scaleMetric", "scaleMetricType", "autoScaling"),
    *("containerConcurrency", "timeout", "canaryTrafficPercent", "logger", "batcher", "labels", "annotations"),
    *("deploymentStrategy", "storageUris", "storageContainerName", "workerSpec", "name"),
}
"""KServe's fields of `spec.predictor`; the others are fields of a pod."""
RUNTIME_POD_FIELDS = {"containers", "volumes", "nodeSelector", "affinity", "tolerations", "imagePullSecrets"}
"""Fields of a ServingRuntime's spec that KServe merges into the pod."""
_KEYS = {"env": "name", "volumeMounts": "mountPath", "volumes": "name", "ports": "containerPort"}
"""Merge keys of lists: entries with the same key replace each other."""
_VARIABLE = re.compile(r"\$\((\w+)\)")


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod's spec, and the object that defines it."""

    where: str
    spec: Manifest

    @property
    def containers(self) -> list[Manifest]:
        """Init containers and containers."""
        return [*self.spec.get("initContainers", []), *self.spec.get("containers", [])]

    @property
    def claims(self) -> list[str]:
        """Names of the mounted PersistentVolumeClaims."""
        sources = [volume.get("persistentVolumeClaim") for volume in self.spec.get("volumes", [])]
        return [source["claimName"] for source in sources if source]


@dataclass(frozen=True)
class Deployment:
    """The objects of one rendered overlay."""

    objects: tuple[Manifest, ...]

    def all(self, kind: str) -> list[Manifest]:
        """Return every object of a kind."""
        return [manifest for manifest in self.objects if manifest.get("kind") == kind]

    def find(self, kind: str, name: str | None) -> Manifest | None:
        """Return the object of a kind and name; None if there is none."""
        return next((manifest for manifest in self.all(kind) if manifest["metadata"]["name"] == name), None)

    @cached_property
    def service(self) -> Manifest:
        """The InferenceService or RayService; empty unless there is exactly one."""
        services = [manifest for kind in SERVICES for manifest in self.all(kind)]
        return services[0] if len(services) == 1 else {}

    @property
    def is_ray(self) -> bool:
        """Whether the service is a RayService."""
        return self.service.get("kind") == "RayService"

    @property
    def where(self) -> str:
        """The service as Kind/name, for findings."""
        return name_of(self.service) if self.service else "InferenceService"

    @property
    def name(self) -> str:
        """The name of the service."""
        return str(self.service["metadata"]["name"])

    @property
    def namespace(self) -> str:
        """The namespace of the service."""
        return str(self.service["metadata"].get("namespace", "default"))

    @property
    def annotations(self) -> dict[str, str]:
        """Annotations of the service."""
        return self.service["metadata"].get("annotations") or {}

    @property
    def predictor(self) -> Manifest:
        """`spec.predictor`."""
        predictor: Manifest = self.service["spec"].get("predictor") or {}
        return predictor

    @property
    def model(self) -> Manifest:
        """`spec.predictor.model`."""
        return self.predictor.get("model") or {}

    @property
    def claim(self) -> str | None:
        """The PersistentVolumeClaim of a `pvc://` storageUri; of Ray's workers, the one that is mounted for models."""
        if self.is_ray:
            volumes = {volume["name"]: volume for volume in self.predictor_pod.spec.get("volumes", [])}
            mounts = {mount["mountPath"].rstrip("/"): mount["name"] for mount in self.server.get("volumeMounts", [])}
            source = volumes.get(mounts.get(MODELS, ""), {}).get("persistentVolumeClaim") or {}
            return source.get("claimName")
        uri = self.model.get("storageUri", "")
        return uri.removeprefix("pvc://").partition("/")[0] if uri.startswith("pvc://") else None

    @property
    def is_knative(self) -> bool:
        """Whether the mode is Knative, which is the usual default of a cluster."""
        mode = self.annotations.get("serving.kserve.io/deploymentMode", "Knative")
        return not self.is_ray and mode in ("Knative", "Serverless")

    @property
    def runtime(self) -> Manifest | None:
        """The ServingRuntime of the InferenceService; None if the overlay has none of that name."""
        return self.find("ServingRuntime", self.model.get("runtime"))

    @cached_property
    def predictor_pod(self) -> Pod:
        """The merged pod of runtime and InferenceService, or that of Ray's first worker group.

        Of templates, only `{{.Name}}` is substituted.
        """
        if self.is_ray:
            return self.ray_pods[min(1, len(self.ray_pods) - 1)]
        runtime = (self.runtime or {}).get("spec", {})
        own = {key: value for key, value in self.predictor.items() if key not in SERVICE_FIELDS}
        spec = _merge({key: value for key, value in runtime.items() if key in RUNTIME_POD_FIELDS}, own)
        model = {key: value for key, value in self.model.items() if key not in MODEL_FIELDS | {"name"}}
        spec["containers"] = [
            _merge(container, model) if container["name"] == KSERVE_CONTAINER else container
            for container in runtime.get("containers", [])
        ] or ([{"name": KSERVE_CONTAINER, **model}] if model else [])
        spec["containers"] += own.get("containers", [])
        return Pod(self.where, _substitute_name(spec, self.name))

    @property
    def server(self) -> Manifest:
        """The container kserve-container, or the first one of Ray's pod; empty if there is none."""
        containers = self.predictor_pod.spec["containers"]
        if self.is_ray:
            return containers[0] if containers else {}
        return next((container for container in containers if container["name"] == KSERVE_CONTAINER), {})

    @property
    def server_name(self) -> str:
        """The name of that container."""
        return str(self.server.get("name", KSERVE_CONTAINER))

    @property
    def jobs(self) -> list[Pod]:
        """The pods of Jobs."""
        return [Pod(name_of(job), job["spec"]["template"]["spec"]) for job in self.all("Job")]

    @cached_property
    def ray_pods(self) -> list[Pod]:
        """The pods of a RayService: the head's, and one of each worker group."""
        config = self.service["spec"]["rayClusterConfig"]
        groups = [config["headGroupSpec"], *(config.get("workerGroupSpecs") or [])]
        return [Pod(name_of(self.service), group["template"]["spec"]) for group in groups]

    @property
    def serving_pods(self) -> list[Pod]:
        """The pods of the service."""
        return self.ray_pods if self.is_ray else [self.predictor_pod]

    @property
    def pods(self) -> list[Pod]:
        """The pods of the service, of Jobs and of Deployments."""
        templates = [Pod(name_of(owner), owner["spec"]["template"]["spec"]) for owner in self.all("Deployment")]
        return [*self.serving_pods, *self.jobs, *templates]

    @property
    def downloads(self) -> list[tuple[Pod, Manifest]]:
        """Containers that download the model: those with MODEL_REFERENCE in their arguments."""
        return [
            (pod, container)
            for pod in self.pods
            for container in pod.containers
            if any("MODEL_REFERENCE" in str(argument) for argument in container.get("args", []))
        ]

    def variables(self, container: Manifest) -> Iterator[tuple[str, str, str | None]]:
        """Yield a container's variables from literals and the overlay's ConfigMaps: name, value, name of the ConfigMap.

        Of variables with the same name, the last one is in effect. `$(NAME)` is not expanded.
        """
        for source in container.get("envFrom", []):
            config = source.get("configMapRef", {}).get("name")
            for name, value in self._settings(config).items():
                yield f"{source.get('prefix', '')}{name}", str(value), config
        for variable in container.get("env", []):
            key = variable.get("valueFrom", {}).get("configMapKeyRef", {})
            if "value" in variable:
                yield variable["name"], str(variable["value"]), None
            elif key.get("key") in (settings := self._settings(key.get("name"))):
                yield variable["name"], str(settings[key["key"]]), key["name"]

    def environment(self, container: Manifest) -> dict[str, str]:
        """Return a container's environment from literals and the overlay's ConfigMaps."""
        return {name: value for name, value, _ in self.variables(container)}

    def arguments(self, container: Manifest) -> list[str]:
        """Return a container's arguments; `$(NAME)` is expanded from the variables that the overlay contains."""
        environment = self.environment(container)
        return [
            _VARIABLE.sub(lambda match: environment.get(match[1], match[0]), str(argument))
            for argument in container.get("args", [])
        ]

    @property
    def settings(self) -> dict[str, str]:
        """The predictor's settings, by variable: the environment of kserve-container, and flags, which override it."""
        given = {f"PREDICTOR_{name.upper()}": value for _, name, value in flags(self.arguments(self.server))}
        return self.environment(self.server) | given

    def _settings(self, name: str | None) -> dict[str, str]:
        return (self.find("ConfigMap", name) or {}).get("data") or {}


def flags(arguments: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return each flag that has a value: as written, as a setting's name, and the value."""
    found = []
    for argument, following in pairwise([*arguments, "--"]):
        flag, equals, value = argument.partition("=")
        if flag.startswith("--") and (equals or not following.startswith("--")):
            found.append((flag, flag.removeprefix("--").replace("-", "_"), value if equals else following))
    return found


def name_of(manifest: Manifest) -> str:
    """Return Kind/name of an object."""
    return f"{manifest.get('kind')}/{manifest.get('metadata', {}).get('name')}"


def _merge(below: Manifest, above: Manifest) -> Manifest:
    """Merge `above` over `below`: maps by key, lists of named entries by name, args by concatenation."""
    merged = dict(below)
    for key, value in above.items():
        old = below.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = _merge(old, value)
        elif isinstance(old, list) and key == "args":
            merged[key] = [*old, *value]
        elif isinstance(old, list) and key in _KEYS:
            entries = {entry.get(_KEYS[key]): entry for entry in [*old, *value]}
            merged[key] = list(entries.values())
        elif key != "containers":
            merged[key] = value
    return merged


def _substitute_name(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: _substitute_name(inner, name) for key, inner in value.items()}
    if isinstance(value, list):
        return [_substitute_name(inner, name) for inner in value]
    return re.sub(r"\{\{\s*\.Name\s*\}\}", name, value) if isinstance(value, str) else value
