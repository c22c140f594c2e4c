"""The settings: known keys, one reference, pinned; and threads and devices that agree with the resources."""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from preflight.deployment import Deployment, name_of
from preflight.findings import Finding
from snapshot_format.reference import HubReference, MalformedReference, parse

PREFIXES = ("PREDICTOR_", "STORAGE_INITIALIZER_")
"""Keys that the programs refuse where they do not know them."""
_KEY = re.compile(r"^#?([A-Z][A-Z0-9_]*)=(.*)$", re.MULTILINE)
_NUMBER = re.compile(r"\d+(\.\d+)?")
_MOUNT = "/mnt/models"
"""Where KServe mounts what `storageUri` names; nobody can tell it another place."""
_TRUTH = {"1", "0", "on", "off", "t", "f", "true", "false", "y", "n", "yes", "no"}


def known_keys(base: Path) -> dict[str, str]:
    """Every key of base's *.env files, which hold all settings, with its value there; empty where it is not set."""
    return {key: value for path in base.glob("*.env") for key, value in _KEY.findall(path.read_text())}


def check(deployment: Deployment, known: dict[str, str]) -> Iterator[Finding]:
    """Misspelt keys, values of another kind, a reference that is missing, moving or not the same everywhere, devices.

    Args:
        deployment: what is rendered.
        known: every key that is a setting, with its default; where it is empty, keys are not looked at.
    """
    for config in deployment.all("ConfigMap"):
        for key, value in sorted((config.get("data") or {}).items()):
            if _NUMBER.fullmatch(default := known.get(key, "")) and not _NUMBER.fullmatch(value):
                yield Finding(name_of(config), f"{key} is {value!r}, which is no number", f"write one, as in {default}")
            if default in ("true", "false") and value.lower() not in _TRUTH:
                yield Finding(name_of(config), f"{key} is {value!r}", "write true or false")
            if known and key.startswith(PREFIXES) and key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                yield Finding(
                    name_of(config),
                    f"{key} is not a setting, and the program refuses to start",
                    f"write {close[0]}" if close else "remove it",
                )
    directory = deployment.settings.get("PREDICTOR_MODEL_DIR", _MOUNT)
    if deployment.claim and directory != _MOUNT:
        yield Finding(
            deployment.where,
            f"PREDICTOR_MODEL_DIR is {directory}, and KServe mounts the claim at {_MOUNT}",
            f"leave it at {_MOUNT}; the directory below it follows from MODEL_REFERENCE",
        )
    yield from _reference(deployment)
    yield from _device(deployment)


def _reference(deployment: Deployment) -> Iterator[Finding]:
    reference = deployment.settings.get("MODEL_REFERENCE")
    if not reference:
        yield Finding(
            deployment.where,
            "the predictor is told no MODEL_REFERENCE",
            "add it to the ConfigMap model-download with a configMapGenerator of `behavior: merge`",
        )
        return
    try:
        parsed = parse(reference)
    except MalformedReference as error:
        parsed = None
        yield Finding(deployment.where, f"MODEL_REFERENCE: {error}", "write hf://owner/model:<commit>")
    if isinstance(parsed, HubReference) and not parsed.is_commit:
        yield Finding(
            deployment.where,
            f"MODEL_REFERENCE {reference} is not pinned, so two replicas may serve different weights",
            "pin a commit, hf://owner/model:<40 hex digits>",
        )
    fetched = {deployment.environment(container).get("MODEL_REFERENCE") for _, container in deployment.downloads}
    if fetched != {reference}:
        others = ", ".join(sorted(str(each) for each in fetched - {reference})) or "nothing"
        yield Finding(
            deployment.where,
            f"the predictor looks for {reference} and {others} is downloaded",
            "set MODEL_REFERENCE once, in the ConfigMap model-download",
        )


def _device(deployment: Deployment) -> Iterator[Finding]:
    settings, limits = deployment.settings, deployment.server.get("resources", {}).get("limits", {})
    gpus = [name for name in limits if name.startswith("nvidia.com/")]
    device = settings.get("PREDICTOR_DEVICE", "auto")
    if gpus and device != "cuda":
        yield Finding(
            deployment.where,
            f"a GPU is requested and PREDICTOR_DEVICE is {device}, so a pod that cannot use it serves from its CPU",
            "set PREDICTOR_DEVICE=cuda",
        )
    if device == "cuda" and not gpus:
        yield Finding(deployment.where, "PREDICTOR_DEVICE is cuda and no GPU is requested", "add component gpu")
