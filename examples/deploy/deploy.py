"""Deploy an overlay with KServe's Python client, wait until it is ready, and complete a prompt over v2.

    python examples/deploy/deploy.py kustomize/overlays/dev "The capital of France is" --gateway http://localhost:8080

Does the same as `kubectl apply -k`, `kubectl wait` and curl. Needs kubectl, to render, and the extras `predictor` and
`preflight`. A second run updates the objects of the first.
"""

import argparse
import asyncio
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kserve import InferenceRESTClient, KServeClient, RESTConfig
from kubernetes import config
from kubernetes.dynamic import DynamicClient

from preflight.deployment import Deployment, Manifest
from preflight.findings import CheckError
from preflight.rendering import render

FIELD_MANAGER = "kserve-llm-examples"


class Service(dict[str, Any]):
    """An InferenceService for both KServeClient and the Kubernetes client.

    KServeClient reads attributes. The Kubernetes client, from version 37 on, would serialize the SDK's classes in snake
    case.
    """

    @property
    def api_version(self) -> str:
        """API group and version."""
        return str(self["apiVersion"])


def apply(objects: Iterable[Manifest], cluster: DynamicClient) -> None:
    """Apply objects with server-side apply, in order: kustomize puts namespaces first."""
    for manifest in objects:
        kind = cluster.resources.get(api_version=manifest["apiVersion"], kind=manifest["kind"])
        cluster.server_side_apply(kind, body=manifest, field_manager=FIELD_MANAGER, force_conflicts=True)


def deploy(deployment: Deployment, kserve: KServeClient) -> int:
    """Create the InferenceService, or patch an existing one.

    Returns:
        The generation to wait for; before it is observed, readiness is that of an older revision.
    """
    existing = kserve.get(namespace=deployment.namespace)["items"]
    service = Service(deployment.service)
    if any(item["metadata"]["name"] == deployment.name for item in existing):
        applied = kserve.patch(deployment.name, service, namespace=deployment.namespace)
    else:
        applied = kserve.create(service, namespace=deployment.namespace)
    return int(applied["metadata"]["generation"])


async def complete(url: str, gateway: str | None, model: str, prompt: str, timeout_seconds: float) -> str:
    """Return the completion of a prompt.

    Args:
        url: from the InferenceService's status.
        gateway: URL to connect to if the host of `url` does not resolve.
        model: model name in the path, the name of the InferenceService.
        prompt: text to complete.
        timeout_seconds: the InferenceService's `timeout`, which allows for a start from zero.
    """
    client = InferenceRESTClient(RESTConfig(protocol="v2", timeout=timeout_seconds))
    tensor = {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": [prompt]}
    request = {"inputs": [tensor], "parameters": {"max_tokens": 64, "temperature": 0}}
    try:
        response = await client.infer(gateway or url, request, model_name=model, headers={"Host": urlsplit(url).netloc})
    finally:
        await client.close()
    outputs = response["outputs"] if isinstance(response, dict) else response.to_dict()["outputs"]
    return str(outputs[0]["data"][0])


def main(argv: Sequence[str] | None = None, polling_seconds: float = 10) -> int:
    """Run the example and return the exit code."""
    parser = argparse.ArgumentParser(description="Deploy an overlay, wait until it is ready, complete a prompt.")
    parser.add_argument("overlay", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--gateway", metavar="URL", help="URL to send the request to (default: the service's URL)")
    parser.add_argument("--context", metavar="NAME", help="kubeconfig context (default: the current one)")
    parser.add_argument(
        "--wait", type=int, default=1800, metavar="SECONDS", help="longest wait for readiness, download included"
    )
    arguments = parser.parse_args(argv)
    try:
        deployment = render(arguments.overlay)
    except CheckError as error:
        print(f"deploy: {error}", file=sys.stderr)
        return 2
    others = [manifest for manifest in deployment.objects if manifest is not deployment.service]
    apply(others, DynamicClient(config.new_client_from_config(context=arguments.context)))
    kserve = KServeClient(context=arguments.context)
    generation = deploy(deployment, kserve)
    print(f"applied; waiting for {deployment.namespace}/{deployment.name} to be ready")
    kserve.wait_isvc_ready(
        deployment.name,
        namespace=deployment.namespace,
        timeout_seconds=arguments.wait,
        polling_interval=polling_seconds,
        expected_generation=generation,
    )
    url = kserve.get(deployment.name, namespace=deployment.namespace)["status"]["url"]
    timeout = deployment.predictor["timeout"]
    print(asyncio.run(complete(url, arguments.gateway, deployment.name, arguments.prompt, timeout)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
