"""Check the file of API keys: its volume, and its lines where a Secret of the overlay or the cluster has them."""

import base64
import posixpath
from collections.abc import Iterator, Mapping

from preflight.deployment import Deployment, Manifest
from preflight.findings import Finding
from preflight.programs import api_keys_problem

SETTING = "PREDICTOR_API_KEYS_FILE"


def check(deployment: Deployment) -> Iterator[Finding]:
    """Yield a file that is not mounted as a Secret that may change, and a malformed line of the overlay's Secret."""
    mount = _mount(deployment)
    if mount is None:
        if file := deployment.settings.get(SETTING):
            yield Finding(
                deployment.where,
                f"{SETTING} is {file}, and no volume is mounted there, so the predictor does not start",
                "add component api-keys, or mount a Secret",
                "kserve-llm",
            )
        return
    if "subPath" in mount:
        yield Finding(
            deployment.where,
            "the file of API keys is mounted with subPath, so a changed Secret takes effect after a restart only",
            "mount the directory, as component api-keys does",
            "kserve-llm",
            "warning",
        )
    if config := _volume(deployment, mount).get("configMap"):
        yield Finding(
            deployment.where,
            f"the file of API keys is in ConfigMap {config.get('name')}",
            "move it to a Secret, as component api-keys shows",
            "kserve-llm",
        )
    if source := secret(deployment):
        name, key = source
        manifest = deployment.find("Secret", name) or {}
        yield from check_lines(deployment, manifest.get("data") or {})
        if text := (manifest.get("stringData") or {}).get(key):
            yield from _lines(deployment, f"Secret {name}, key {key}", text)


def secret(deployment: Deployment) -> tuple[str, str] | None:
    """Return the Secret and its key that are mounted as the file of API keys; None if there is no such file."""
    mount = _mount(deployment)
    source = _volume(deployment, mount).get("secret") if mount else None
    if mount is None or source is None:
        return None
    file = mount.get("subPath") or posixpath.relpath(deployment.settings[SETTING], mount["mountPath"])
    keys = {item["path"]: item["key"] for item in source.get("items") or []}
    return str(source["secretName"]), str(keys.get(file, file))


def check_lines(deployment: Deployment, data: Mapping[str, str]) -> Iterator[Finding]:
    """Yield the first malformed line of the file in a Secret's `data`, which is in base64."""
    if (source := secret(deployment)) and source[1] in data:
        text = base64.b64decode(data[source[1]]).decode(errors="replace")
        yield from _lines(deployment, f"Secret {source[0]}, key {source[1]}", text)


def _lines(deployment: Deployment, name: str, text: str) -> Iterator[Finding]:
    if found := api_keys_problem(text, name):
        problem, remedy = found
        yield Finding(deployment.where, f"{problem}, so the predictor does not start", remedy, "kserve-llm")


def _mount(deployment: Deployment) -> Manifest | None:
    """Return the server's mount of the file; None without a file or without a volume."""
    path = deployment.settings.get(SETTING, "")
    mounts = deployment.server.get("volumeMounts", []) if path else []
    covering = [mount for mount in mounts if f"{path}/".startswith(f"{mount['mountPath'].rstrip('/')}/")]
    return max(covering, key=lambda mount: len(mount["mountPath"]), default=None)


def _volume(deployment: Deployment, mount: Manifest) -> Manifest:
    volumes = deployment.predictor_pod.spec.get("volumes", [])
    return next((volume for volume in volumes if volume["name"] == mount["name"]), {})
