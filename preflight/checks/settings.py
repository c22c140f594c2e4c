"""Check settings: keys and values, one pinned model reference, and a device that matches the resources."""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from preflight import quantities
from preflight.checks import resources
from preflight.deployment import Deployment, name_of
from preflight.findings import Finding
from snapshot_format.reference import HubReference, MalformedReference, parse

PREFIXES = ("PREDICTOR_", "STORAGE_INITIALIZER_")
"""Prefixes whose unknown keys the programs reject."""
_KEY = re.compile(r"^#?([A-Z][A-Z0-9_]*)=(.*)$", re.MULTILINE)
_NUMBER = re.compile(r"\d+(\.\d+)?")
_MOUNT = "/mnt/models"
"""Mount path of `storageUri`, which is fixed in KServe."""


def known_keys(base: Path) -> dict[str, str]:
    """Read every setting of base's *.env files with its default, which is empty for unset keys."""
    return {key: value for path in base.glob("*.env") for key, value in _KEY.findall(path.read_text())}


def check(deployment: Deployment, known: dict[str, str]) -> Iterator[Finding]:
    """Yield unknown keys, invalid values, missing, unpinned or differing references, and wrong devices.

    Args:
        deployment: the rendered overlay.
        known: every setting's key with its default; if empty, keys are not checked.
    """
    for config in deployment.all("ConfigMap"):
        for key, value in sorted((config.get("data") or {}).items()):
            if _NUMBER.fullmatch(default := known.get(key, "")) and not _NUMBER.fullmatch(value):
                yield Finding(
                    name_of(config),
                    f"{key} is {value!r}, which is not a number",
                    f"set a number, for example {default}",
                )
            if default in ("true", "false") and value.lower() not in quantities.TRUE_WORDS | quantities.FALSE_WORDS:
                yield Finding(name_of(config), f"{key} is {value!r}", "set true or false")
            if known and key.startswith(PREFIXES) and key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                yield Finding(
                    name_of(config),
                    f"{key} is not a setting, so the program does not start",
                    f"use {close[0]}" if close else "remove it",
                )
    directory = deployment.settings.get("PREDICTOR_MODEL_DIR", _MOUNT)
    if deployment.claim and directory != _MOUNT:
        yield Finding(
            deployment.where,
            f"PREDICTOR_MODEL_DIR is {directory}, and KServe mounts the claim at {_MOUNT}",
            f"set {_MOUNT}, since MODEL_REFERENCE selects the directory below it",
        )
    yield from _reference(deployment)
    yield from _device(deployment)


def _reference(deployment: Deployment) -> Iterator[Finding]:
    reference = deployment.settings.get("MODEL_REFERENCE")
    if not reference:
        yield Finding(
            deployment.where,
            "MODEL_REFERENCE of the predictor is not set",
            "add it to the ConfigMap model-download with a configMapGenerator of `behavior: merge`",
        )
        return
    try:
        parsed = parse(reference)
    except MalformedReference:
        parsed = None
        yield Finding(deployment.where, f"MODEL_REFERENCE is {reference!r}", "use hf://owner/model:<commit>")
    if isinstance(parsed, HubReference) and not parsed.is_commit:
        yield Finding(
            deployment.where,
            f"MODEL_REFERENCE {reference} is not pinned, so two replicas may serve different weights",
            "pin a commit, hf://owner/model:<40 hex digits>",
        )
    downloaded = {deployment.environment(container).get("MODEL_REFERENCE") for _, container in deployment.downloads}
    if downloaded != {reference}:
        others = ", ".join(sorted(str(other) for other in downloaded - {reference})) or "nothing"
        yield Finding(
            deployment.where,
            f"the predictor serves {reference} and the Job downloads {others}",
            "set MODEL_REFERENCE once, in the ConfigMap model-download",
        )


def _device(deployment: Deployment) -> Iterator[Finding]:
    device = deployment.settings.get("PREDICTOR_DEVICE", "auto")
    if resources.gpus(deployment) and device != "cuda":
        yield Finding(
            deployment.where,
            f"a GPU is requested and PREDICTOR_DEVICE is {device}, so a pod without a usable GPU serves from its CPU",
            "set PREDICTOR_DEVICE=cuda",
        )
    if device == "cuda" and not resources.gpus(deployment):
        yield Finding(deployment.where, "PREDICTOR_DEVICE is cuda and no GPU is requested", "add component gpu")
