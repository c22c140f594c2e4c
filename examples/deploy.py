"""Deploys an overlay with KServe's Python client, waits until it is ready, and asks it something over v2.

    python examples/deploy.py kustomize/overlays/dev "The capital of France is" --gateway http://localhost:8080

What `kubectl apply -k`, `kubectl wait` and curl do together, for those who deploy from Python. It needs kubectl, which
renders, and the extras `predictor` and `preflight`. Run it twice, and what is there already is brought up to date.
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
    """An InferenceService as KServeClient and the Kubernetes client both take it.

    The first asks for attributes; the second, from version 37 on, writes the SDK's own classes in snake case.
    """

    @property
    def api_version(self) -> str:
        """Group and version."""
        return str(self["apiVersion"])


def apply(objects: Iterable[Manifest], cluster: DynamicClient) -> None:
    """Apply objects on the server's side, in their order: kustomize puts namespaces first."""
    for manifest in objects:
        kind = cluster.resources.get(api_version=manifest["apiVersion"], kind=manifest["kind"])
        cluster.server_side_apply(kind, body=manifest, field_manager=FIELD_MANAGER, force_conflicts=True)


def deploy(deployment: Deployment, kserve: KServeClient) -> int:
    """Create the InferenceService, or patch the one that is there.

    Returns:
        The generation to wait for: until it is observed, an older revision is what is ready.
    """
    there = kserve.get(namespace=deployment.namespace)["items"]
    service = Service(deployment.service)
    if any(each["metadata"]["name"] == deployment.name for each in there):
        done = kserve.patch(deployment.name, service, namespace=deployment.namespace)
    else:
        done = kserve.create(service, namespace=deployment.namespace)
    return int(done["metadata"]["generation"])


async def ask(url: str, gateway: str | None, model: str, prompt: str, timeout_seconds: float) -> str:
    """The completion of a prompt.

    Args:
        url: the service's own, as its status says.
        gateway: where to connect to instead, when the host of `url` does not resolve from here.
        model: the name in the path, which is the InferenceService's.
        prompt: the text to go on with.
        timeout_seconds: long enough for a start from zero, the InferenceService's `timeout`.
    """
    client = InferenceRESTClient(RESTConfig(protocol="v2", timeout=timeout_seconds))
    tensor = {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": [prompt]}
    request = {"inputs": [tensor], "parameters": {"max_tokens": 64, "temperature": 0}}
    try:
        answer = await client.infer(gateway or url, request, model_name=model, headers={"Host": urlsplit(url).netloc})
    finally:
        await client.close()
    outputs = answer["outputs"] if isinstance(answer, dict) else answer.to_dict()["outputs"]
    return str(outputs[0]["data"][0])


def main(argv: Sequence[str] | None = None, polling_seconds: float = 10) -> int:
    """Deploy, wait, ask."""
    parser = argparse.ArgumentParser(description="Deploy an overlay, wait until it is ready, ask it something.")
    parser.add_argument("overlay", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--gateway", metavar="URL", help="where to send the question; by default the service's own URL")
    parser.add_argument("--context", metavar="NAME", help="a context of the kubeconfig; by default the current one")
    parser.add_argument(
        "--wait", type=int, default=1800, metavar="SECONDS", help="for it to be ready, download included"
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
    print(asyncio.run(ask(url, arguments.gateway, deployment.name, arguments.prompt, timeout)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
