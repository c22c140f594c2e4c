"""The objects of one overlay, and the questions that checks ask of them.

Reads only. What it puts together is what KServe puts together: the predictor's pod out of the ServingRuntime and the
InferenceService.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Manifest = dict[str, Any]

KSERVE_CONTAINER = "kserve-container"
MODEL_FIELDS = {"modelFormat", "runtime", "runtimeVersion", "protocolVersion", "storageUri", "storage", "confidential"}
"""Fields of `model` that are KServe's; the others are a container's."""
SERVICE_FIELDS = {
    *("model", "minReplicas", "maxReplicas", "scaleTarget", "scaleMetric", "scaleMetricType", "autoScaling"),
    *("containerConcurrency", "timeout", "canaryTrafficPercent", "logger", "batcher", "labels", "annotations"),
    *("deploymentStrategy", "storageUris", "storageContainerName", "workerSpec", "name"),
}
"""Fields of `spec.predictor` that are KServe's; the others are a pod's."""
RUNTIME_POD_FIELDS = {"containers", "volumes", "nodeSelector", "affinity", "tolerations", "imagePullSecrets"}
"""Fields of a ServingRuntime's spec that KServe merges into the pod."""
_KEYS = {"env": "name", "volumeMounts": "mountPath", "volumes": "name", "ports": "containerPort"}
"""By what the entries of a list are told apart where one list is merged over another."""


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that will run: its spec, and where it is described."""

    where: str
    spec: Manifest

    @property
    def containers(self) -> list[Manifest]:
        """Init containers and containers."""
        return [*self.spec.get("initContainers", []), *self.spec.get("containers", [])]

    @property
    def claims(self) -> list[str]:
        """Names of the PersistentVolumeClaims that it mounts."""
        sources = [volume.get("persistentVolumeClaim") for volume in self.spec.get("volumes", [])]
        return [source["claimName"] for source in sources if source]


@dataclass(frozen=True)
class Deployment:
    """What one overlay puts on a cluster."""

    objects: tuple[Manifest, ...]

    def all(self, kind: str) -> list[Manifest]:
        """Every object of a kind."""
        return [manifest for manifest in self.objects if manifest.get("kind") == kind]

    def find(self, kind: str, name: str | None) -> Manifest | None:
        """The object of that kind and name."""
        return next((each for each in self.all(kind) if each["metadata"]["name"] == name), None)

    @cached_property
    def service(self) -> Manifest:
        """The InferenceService; empty where there is not exactly one."""
        services = self.all("InferenceService")
        return services[0] if len(services) == 1 else {}

    @property
    def where(self) -> str:
        """The InferenceService, as findings name it."""
        return name_of(self.service) if self.service else "InferenceService"

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.service["metadata"]["name"])

    @property
    def namespace(self) -> str:
        """Where it is put."""
        return str(self.service["metadata"].get("namespace", "default"))

    @property
    def annotations(self) -> dict[str, str]:
        """Its annotations."""
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
        """The PersistentVolumeClaim that `storageUri` names, if it names one."""
        uri = self.model.get("storageUri", "")
        return uri.removeprefix("pvc://").partition("/")[0] if uri.startswith("pvc://") else None

    @property
    def is_knative(self) -> bool:
        """Whether Knative runs it. Where no mode is said, the cluster decides, and most decide so."""
        return self.annotations.get("serving.kserve.io/deploymentMode", "Knative") in ("Knative", "Serverless")

    @property
    def runtime(self) -> Manifest | None:
        """The ServingRuntime that the InferenceService names, if it is here."""
        return self.find("ServingRuntime", self.model.get("runtime"))

    @cached_property
    def predictor_pod(self) -> Pod:
        """What KServe makes of runtime and InferenceService; `{{.Name}}` is filled in, other templates are not."""
        runtime = (self.runtime or {}).get("spec", {})
        own = {key: value for key, value in self.predictor.items() if key not in SERVICE_FIELDS}
        spec = _merge({key: value for key, value in runtime.items() if key in RUNTIME_POD_FIELDS}, own)
        model = {key: value for key, value in self.model.items() if key not in MODEL_FIELDS | {"name"}}
        spec["containers"] = [
            _merge(container, model) if container["name"] == KSERVE_CONTAINER else container
            for container in runtime.get("containers", [])
        ] or ([{"name": KSERVE_CONTAINER, **model}] if model else [])
        spec["containers"] += own.get("containers", [])
        return Pod(self.where, _filled_in(spec, self.name))

    @property
    def server(self) -> Manifest:
        """The container that serves; empty where there is none."""
        containers = self.predictor_pod.spec["containers"]
        return next((each for each in containers if each["name"] == KSERVE_CONTAINER), {})

    @property
    def jobs(self) -> list[Pod]:
        """The pods of Jobs."""
        return [Pod(name_of(job), job["spec"]["template"]["spec"]) for job in self.all("Job")]

    @property
    def pods(self) -> list[Pod]:
        """Every pod that this overlay makes run."""
        beside = [Pod(name_of(each), each["spec"]["template"]["spec"]) for each in self.all("Deployment")]
        return [self.predictor_pod, *self.jobs, *beside]

    @property
    def downloads(self) -> list[tuple[Pod, Manifest]]:
        """Containers that fetch the model: those that are told which, and do not serve it."""
        return [
            (pod, container)
            for pod in self.pods
            for container in pod.containers
            if any("MODEL_REFERENCE" in str(argument) for argument in container.get("args", []))
        ]

    def environment(self, container: Manifest) -> dict[str, str]:
        """What the process sees of it: literals and what the overlay's own ConfigMaps say; later ones win."""
        seen: dict[str, str] = {}
        for source in container.get("envFrom", []):
            seen |= self._settings(source.get("configMapRef", {}).get("name"))
        for variable in container.get("env", []):
            key = variable.get("valueFrom", {}).get("configMapKeyRef", {})
            if "value" in variable:
                seen[variable["name"]] = str(variable["value"])
            elif key.get("key") in (settings := self._settings(key.get("name"))):
                seen[variable["name"]] = settings[key["key"]]
        return seen

    @property
    def settings(self) -> dict[str, str]:
        """The environment of the container that serves."""
        return self.environment(self.server)

    def _settings(self, name: str | None) -> dict[str, str]:
        return (self.find("ConfigMap", name) or {}).get("data") or {}


def name_of(manifest: Manifest) -> str:
    """Kind/name."""
    return f"{manifest.get('kind')}/{manifest.get('metadata', {}).get('name')}"


def _merge(below: Manifest, above: Manifest) -> Manifest:
    """`above` over `below`: maps key by key, lists of named entries entry by entry, args one after the other."""
    merged = dict(below)
    for key, value in above.items():
        old = below.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = _merge(old, value)
        elif isinstance(old, list) and key == "args":
            merged[key] = [*old, *value]
        elif isinstance(old, list) and key in _KEYS:
            entries = {each.get(_KEYS[key]): each for each in [*old, *value]}
            merged[key] = list(entries.values())
        elif key != "containers":
            merged[key] = value
    return merged


def _filled_in(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: _filled_in(inner, name) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled_in(inner, name) for inner in value]
    return re.sub(r"\{\{\s*\.Name\s*\}\}", name, value) if isinstance(value, str) else value
