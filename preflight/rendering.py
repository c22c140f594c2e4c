"""Render an overlay with kubectl's built-in kustomize."""

import re
import shutil
import subprocess
from pathlib import Path

import yaml

from preflight.deployment import Deployment
from preflight.findings import CheckError

_LOGGED = re.compile(r'err="(.*)"$')
"""Some errors of kubectl are formatted as a log line."""


def render(overlay: Path) -> Deployment:
    """Return the objects that `kubectl apply -k OVERLAY` would send.

    Raises:
        CheckError: kubectl is not installed, or the overlay does not render.
    """
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise CheckError("kubectl is not installed. Put version 1.27 or newer on the PATH.")
    done = subprocess.run([kubectl, "kustomize", str(overlay)], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        logged = _LOGGED.search(last)
        message = logged[1] if logged else last.removeprefix("error: ")
        raise CheckError(f"{overlay} does not render: {message}. Run `kubectl kustomize {overlay}` for all messages.")
    return Deployment(tuple(manifest for manifest in yaml.load_all(done.stdout, yaml.CSafeLoader) if manifest))
