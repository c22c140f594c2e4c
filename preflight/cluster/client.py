"""Asks a cluster, through the Kubernetes client; reads only, and judges nothing."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, cast

import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException, ForbiddenException, NotFoundException

from preflight.deployment import Manifest
from preflight.findings import CannotLook

KNATIVE_NAMESPACE = "knative-serving"
KSERVE_NAMESPACE = "kserve"


class MayNotRead(CannotLook):
    """Whoever asks has no right to."""


class Connection:
    """One cluster; every question is asked when it comes up.

    Each raises MayNotRead, or CannotLook where the cluster does not answer or does not know who asks.
    """

    def __init__(self, context: str | None = None) -> None:
        """Take a context of the kubeconfig, by default the current one.

        Raises:
            CannotLook: there is no such context.
        """
        try:
            api = config.new_client_from_config(context=context)  # type: ignore[no-untyped-call]
        except (config.ConfigException, OSError) as error:
            raise CannotLook(f"no cluster to ask ({error}); see `kubectl config get-contexts`.") from None
        api.configuration.retries = False
        self._core, self._version = client.CoreV1Api(api), client.VersionApi(api)
        self._custom = client.CustomObjectsApi(api)

    def versions(self) -> dict[str, str]:
        """Of Kubernetes, KServe and Knative, as far as they can be told."""
        version = _ask(self._version.get_code)
        found = {"Kubernetes": f"{version.major}.{version.minor}"}
        knative = _ask(self._core.read_namespaced_config_map, "config-features", KNATIVE_NAMESPACE)
        if knative is not None:
            found["Knative"] = (knative.metadata.labels or {}).get("app.kubernetes.io/version", "")
        deployments = ("apps", "v1", KSERVE_NAMESPACE, "deployments", "kserve-controller-manager")
        controller = _ask(self._custom.get_namespaced_custom_object, *deployments)
        if controller is not None:
            images = [each["image"] for each in controller["spec"]["template"]["spec"]["containers"]]
            found["KServe"] = next((image.rpartition(":")[2] for image in images if "kserve-controller" in image), "")
        return found

    @cached_property
    def definitions(self) -> list[Manifest]:
        """All CustomResourceDefinitions."""
        return self._list("apiextensions.k8s.io", "v1", "customresourcedefinitions")

    def storage_classes(self) -> list[Manifest]:
        """All StorageClasses."""
        return self._list("storage.k8s.io", "v1", "storageclasses")

    def nodes(self) -> list[Any]:
        """All nodes, as the client's V1Node."""
        return list(_ask(self._core.list_node).items)

    def knative_config(self, name: str) -> dict[str, str]:
        """What a ConfigMap of Knative says; empty where there is none."""
        found = _ask(self._core.read_namespaced_config_map, name, KNATIVE_NAMESPACE)
        return (found.data or {}) if found else {}

    def secret_keys(self, name: str, namespace: str) -> set[str] | None:
        """The keys of a Secret; None where there is none."""
        found = _ask(self._core.read_namespaced_secret, name, namespace)
        return set(found.data or {}) if found else None

    def service(self, name: str, namespace: str) -> Manifest | None:
        """The InferenceService of that name, if it is there already."""
        kind = ("serving.kserve.io", "v1beta1", namespace, "inferenceservices", name)
        return cast("Manifest | None", _ask(self._custom.get_namespaced_custom_object, *kind))

    def _list(self, group: str, version: str, plural: str) -> list[Manifest]:
        listed = _ask(self._custom.list_cluster_custom_object, group, version, plural) or {}
        return list(listed.get("items", []))


def _ask(question: Callable[..., Any], *arguments: str) -> Any:
    """The answer; None where there is no such thing."""
    try:
        return question(*arguments)
    except NotFoundException:
        return None
    except ForbiddenException:
        what = " ".join(arguments) or question.__name__.replace("_", " ")
        raise MayNotRead(f"you may not read {what}; ask with an account that may.") from None
    except (ApiException, urllib3.exceptions.HTTPError) as error:
        said = error.reason if isinstance(error, ApiException) else type(error).__name__
        raise CannotLook(f"the cluster does not answer ({said}); `kubectl version` shows the same.") from None
