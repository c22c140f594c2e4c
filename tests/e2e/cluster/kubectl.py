"""kubectl on one cluster, and waiting for what it reports."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

POLL_SECONDS = 1.0

Manifest = dict[str, Any]


class ClusterError(Exception):
    """The test cannot go on; the message is one sentence for the user."""


class Kubectl:
    """Runs kubectl with the context of a kubeconfig that is written into a folder.

    Args:
        folder: for a kubeconfig of its own, which `undeploy.sh` uses as well.
        kubeconfig: the user's; None: `KUBECONFIG` or kubectl's default.
        context: one of its contexts; None: the current one.
    """

    def __init__(self, folder: Path, kubeconfig: Path | None = None, context: str | None = None) -> None:
        given = {"KUBECONFIG": str(kubeconfig)} if kubeconfig else {}
        self.environment = {**os.environ, **given}
        selected = ["--context", context] if context else []
        config = self.run("config", "view", "--raw", "--flatten", "--minify", *selected)
        path = folder / "kubeconfig"
        path.touch(mode=0o600)
        path.write_text(config)
        self.environment["KUBECONFIG"] = str(path)

    def run(self, *arguments: str, text: str | None = None) -> str:
        """Return the output of a command, with `text` on its standard input.

        Raises:
            ClusterError: it failed.
        """
        return self.start(["kubectl", *arguments], text)

    def start(self, command: Sequence[str], text: str | None = None) -> str:
        """Return the output of any program that uses kubectl.

        Raises:
            ClusterError: it failed.
        """
        done = subprocess.run(command, env=self.environment, input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ClusterError(f"{' '.join(command)} failed: {done.stderr.strip()}")
        return done.stdout

    def create(self, *objects: Manifest) -> None:
        """Create objects."""
        manifests = {"apiVersion": "v1", "kind": "List", "items": objects}
        self.run("create", "--filename", "-", text=json.dumps(manifests))

    def get(self, kind: str, name: str, namespace: str | None = None) -> Manifest | None:
        """Return an object; None if there is none."""
        place = ["--namespace", namespace] if namespace else []
        text = self.run("get", kind, name, *place, "--ignore-not-found", "--output", "json")
        return json.loads(text) if text else None

    def all(self, kind: str, namespace: str, selector: str = "") -> list[Manifest]:
        """Return the objects of a kind that a selector matches."""
        selected = ["--selector", selector] if selector else []
        text = self.run("get", kind, "--namespace", namespace, *selected, "--output", "json")
        items: list[Manifest] = json.loads(text)["items"]
        return items


def wait(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Poll until a condition is true.

    Raises:
        ClusterError: it is not true in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"{what}: not within {seconds:.0f} s")
        time.sleep(POLL_SECONDS)


def has_condition(manifest: Manifest | None, name: str) -> bool:
    """Return whether a condition of an object's status is true."""
    conditions = (manifest or {}).get("status", {}).get("conditions", [])
    return any(condition["type"] == name and condition["status"] == "True" for condition in conditions)
