"""Renders an overlay with kubectl's own kustomize."""

import re
import shutil
import subprocess
from pathlib import Path

import yaml

from preflight.deployment import Deployment
from preflight.findings import CannotLook

_LOGGED = re.compile(r'err="(.*)"$')
"""How kubectl writes some errors: as a log line."""


def render(overlay: Path) -> Deployment:
    """The objects that `kubectl apply -k OVERLAY` would send.

    Raises:
        CannotLook: there is no kubectl, or the overlay does not render.
    """
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise CannotLook("kubectl is not installed; put version 1.27 or newer on the PATH.")
    done = subprocess.run([kubectl, "kustomize", str(overlay)], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        logged = _LOGGED.search(last)
        said = logged[1] if logged else last.removeprefix("error: ")
        raise CannotLook(f"{overlay} does not render ({said}); `kubectl kustomize {overlay}` shows all of it.")
    return Deployment(tuple(each for each in yaml.load_all(done.stdout, yaml.CSafeLoader) if each))
