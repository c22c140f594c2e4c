"""What is deployed: overlay dev with the images of the node, and pods with a Hub and a client.

The pods run the image of the storage initializer, which has Python, so nothing is pulled. Their programs and the demo
model come from ConfigMaps, in parts, since one holds at most 1 MiB. So no further image is needed, and no `kubectl cp`,
which needs tar in the image and cannot fill a pod that starts again.
"""

import base64
import io
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devtools.local_hub import commit_of
from devtools.paths import DEMO_MODEL, ROOT

Manifest = dict[str, Any]

NAMESPACE = "kserve-llm-dev"
TOOLS = "kserve-llm-e2e"
"""Namespace of the Hub and the client."""
SERVICE = "llm"
URL = f"http://{SERVICE}-predictor.{NAMESPACE}.svc.cluster.local"
"""In Knative mode it is that of the cluster-local gateway."""
HUB_PORT = 8000
REPOSITORIES = ("demo/arithmetic", "demo/changed")
"""Two names of the demo model, so that a changed reference needs a new download and a new revision."""
PART_BYTES = 700 << 10
UNPACK = """\
import io, os, pathlib, sys, tarfile
parts, folder, program, *arguments = sys.argv[1:]
content = b"".join(part.read_bytes() for part in sorted(pathlib.Path(parts).glob("part-*")))
tarfile.open(fileobj=io.BytesIO(content)).extractall(folder, filter="data")
os.chdir(folder)
os.execv(sys.executable, [sys.executable, program, *arguments])
"""
"""Unpacks the parts into a folder and runs one of the programs there."""
LABELS = {
    "app.kubernetes.io/name": "e2e",
    "app.kubernetes.io/component": "test",
    "app.kubernetes.io/part-of": "kserve-llm",
}


@dataclass(frozen=True, slots=True)
class Images:
    """Names of images that the node has."""

    predictor: str
    storage_initializer: str


def reference(repository: str) -> str:
    """Return the pinned reference of the demo model under one of its names."""
    return f"hf://{repository}:{commit_of(DEMO_MODEL)}"


def write_overlay(folder: Path, mode: str, images: Images, repository: str) -> None:
    """Write the kustomization on top of overlay dev."""
    replaced = {
        "ServingRuntime": ("/spec/containers/0/image", images.predictor),
        "Job": ("/spec/template/spec/containers/0/image", images.storage_initializer),
    }
    patches = [
        {"target": {"kind": kind}, "patch": json.dumps([{"op": "replace", "path": path, "value": image}])}
        for kind, (path, image) in replaced.items()
    ]
    if mode == "standard":
        # One serves while the other one is replaced. Both run on the one node that mounts the volume.
        replicas = [
            {"op": "replace", "path": f"/spec/predictor/{field}", "value": 2}
            for field in ("minReplicas", "maxReplicas")
        ]
        patches.append({"target": {"kind": "InferenceService"}, "patch": json.dumps(replicas)})
    kustomize = Path(os.path.relpath(ROOT / "kustomize", folder.resolve()))
    literals = [
        f"MODEL_REFERENCE={reference(repository)}",
        f"HF_ENDPOINT=http://hub.{TOOLS}.svc:{HUB_PORT}",
        f"DOWNLOAD_IMAGE={images.storage_initializer}",
    ]
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": NAMESPACE,
        "resources": [str(kustomize / "overlays/dev")],
        "components": [str(kustomize / "components/standard-mode")] if mode == "standard" else [],
        "configMapGenerator": [{"name": "model-download", "behavior": "merge", "literals": literals}],
        "patches": patches,
    }
    # JSON is YAML.
    (folder / "kustomization.yaml").write_text(json.dumps(kustomization, indent=2))


def tools(image: str) -> list[Manifest]:
    """Return the namespace, the ConfigMaps and the Hub with its Service."""
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": TOOLS, "labels": LABELS}},
        *({**_named("ConfigMap", name), "binaryData": {name: part}} for name, part in _parts().items()),
        hub(image),
        {
            **_named("Service", "hub"),
            "spec": {"selector": {"app.kubernetes.io/instance": "hub"}, "ports": [{"port": HUB_PORT}]},
        },
    ]


def hub(image: str) -> Manifest:
    """Return the pod that serves the demo model over the Hub's API."""
    folders = [f"{repository}=model" for repository in REPOSITORIES]
    manifest = pod("hub", image, "local_hub.py", "--host", "0.0.0.0", "--port", str(HUB_PORT), *folders)
    [container] = manifest["spec"]["containers"]
    container["readinessProbe"] = {"tcpSocket": {"port": HUB_PORT}, "periodSeconds": 1}
    return manifest


def client(name: str, image: str, *arguments: str) -> Manifest:
    """Return a pod that runs the client once."""
    command, *rest = arguments
    return pod(name, image, "client.py", command, URL, SERVICE, *rest)


def pod(name: str, image: str, program: str, *arguments: str) -> Manifest:
    """Return a pod that runs one of the programs, under Pod Security `restricted`."""
    sources = [{"configMap": {"name": part}} for part in _parts()]
    container = {
        "name": "python",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-c", UNPACK, "/parts", "/work", program, *arguments],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "parts", "mountPath": "/parts"}, {"name": "work", "mountPath": "/work"}],
    }
    spec = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 1,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": [{"name": "parts", "projected": {"sources": sources}}, {"name": "work", "emptyDir": {}}],
    }
    manifest = _named("Pod", name)
    manifest["metadata"]["labels"] = {**LABELS, "app.kubernetes.io/instance": name}
    return {**manifest, "spec": spec}


def _named(kind: str, name: str) -> Manifest:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": TOOLS, "labels": LABELS}}


def _parts() -> dict[str, str]:
    """Return an archive of the programs and the demo model in parts, in base64, by the name of the ConfigMap."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz", compresslevel=1) as tar:
        tar.add(ROOT / "devtools/local_hub.py", "local_hub.py")
        tar.add(Path(__file__).with_name("client.py"), "client.py")
        tar.add(DEMO_MODEL, "model")
    content = archive.getvalue()
    starts = range(0, len(content), PART_BYTES)
    return {
        f"part-{number:02}": base64.b64encode(content[start : start + PART_BYTES]).decode()
        for number, start in enumerate(starts)
    }
