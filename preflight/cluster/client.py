"""Read objects of a cluster through the Kubernetes client."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, cast

import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException, ForbiddenException, NotFoundException

from preflight.deployment import Manifest
from preflight.findings import CheckError

KNATIVE_NAMESPACE = "knative-serving"
KSERVE_NAMESPACE = "kserve"


class PermissionDenied(CheckError):
    """The account may not read an object."""


class Connection:
    """One cluster; every method reads when it is called.

    Methods raise PermissionDenied, or CheckError if the cluster does not respond or rejects the credentials.
    """

    def __init__(self, context: str | None = None) -> None:
        """Use a context of the kubeconfig, by default the current one.

        Raises:
            CheckError: the context does not exist.
        """
        try:
            api = config.new_client_from_config(context=context)
        except (config.ConfigException, OSError) as error:
            raise CheckError(f"No cluster configured: {error}. See `kubectl config get-contexts`.") from None
        api.configuration.retries = False
        self._core, self._version = client.CoreV1Api(api), client.VersionApi(api)
        self._custom = client.CustomObjectsApi(api)

    def versions(self) -> dict[str, str]:
        """Return the versions of Kubernetes, Knative and KServe, of those that are installed."""
        version = _read(self._version.get_code)
        versions = {"Kubernetes": f"{version.major}.{version.minor}"}
        knative = _read(self._core.read_namespaced_config_map, "config-features", KNATIVE_NAMESPACE)
        if knative is not None:
            versions["Knative"] = (knative.metadata.labels or {}).get("app.kubernetes.io/version", "")
        deployments = ("apps", "v1", KSERVE_NAMESPACE, "deployments", "kserve-controller-manager")
        controller = _read(self._custom.get_namespaced_custom_object, *deployments)
        if controller is not None:
            images = [container["image"] for container in controller["spec"]["template"]["spec"]["containers"]]
            versions["KServe"] = next((i.rpartition(":")[2] for i in images if "kserve-controller" in i), "")
        return versions

    @cached_property
    def definitions(self) -> list[Manifest]:
        """All CustomResourceDefinitions."""
        return self._list("apiextensions.k8s.io", "v1", "customresourcedefinitions")

    def storage_classes(self) -> list[Manifest]:
        """Return all StorageClasses."""
        return self._list("storage.k8s.io", "v1", "storageclasses")

    def namespace(self, name: str) -> Any | None:
        """Return a namespace, as the client's V1Namespace; None if it does not exist."""
        return _read(self._core.read_namespace, name)

    def nodes(self) -> list[Any]:
        """Return all nodes, as the client's V1Node."""
        return list(_read(self._core.list_node).items)

    def knative_config(self, name: str) -> dict[str, str]:
        """Return the data of a ConfigMap of Knative; empty if it does not exist."""
        config_map = _read(self._core.read_namespaced_config_map, name, KNATIVE_NAMESPACE)
        return (config_map.data or {}) if config_map else {}

    def secret(self, name: str, namespace: str) -> dict[str, str] | None:
        """Return the values of a Secret in base64, by key; None if it does not exist."""
        secret = _read(self._core.read_namespaced_secret, name, namespace)
        return (secret.data or {}) if secret else None

    def service(self, name: str, namespace: str) -> Manifest | None:
        """Return the InferenceService of a name; None if it does not exist."""
        kind = ("serving.kserve.io", "v1beta1", namespace, "inferenceservices", name)
        return cast("Manifest | None", _read(self._custom.get_namespaced_custom_object, *kind))

    def _list(self, group: str, version: str, plural: str) -> list[Manifest]:
        listed = _read(self._custom.list_cluster_custom_object, group, version, plural) or {}
        return list(listed.get("items", []))


def _read(method: Callable[..., Any], *arguments: str) -> Any:
    """Call a method of the client; None if the object does not exist."""
    try:
        return method(*arguments)
    except NotFoundException:
        return None
    except ForbiddenException:
        target = " ".join(arguments) or method.__name__.replace("_", " ")
        raise PermissionDenied(f"Permission denied: {target}. Use an account that may read it.") from None
    except (ApiException, urllib3.exceptions.HTTPError) as error:
        reason = error.reason if isinstance(error, ApiException) else type(error).__name__
        raise CheckError(f"The cluster does not respond: {reason}. Test the connection: `kubectl version`.") from None
