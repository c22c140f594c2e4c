"""Test overlay dev on a cluster, in Knative and Standard mode: protocols, scale to zero, changes under load, deletion.

The exit code is 0 if everything works and no request was lost, 1 if not, 2 if the test could not run. After an error
that ends the test, everything is left on the cluster for inspection.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from devtools.paths import ROOT
from tests.e2e.cluster import objects
from tests.e2e.cluster.kubectl import ClusterError, Kubectl, Manifest, has_condition, wait
from tests.e2e.cluster.objects import NAMESPACE, REPOSITORIES, SERVICE, TOOLS, Images
from tests.e2e.cluster.report import Phase, Report

PODS = f"serving.kserve.io/inferenceservice={SERVICE}"
DOWNLOAD_SECONDS, READY_SECONDS, ZERO_SECONDS, POD_SECONDS = 600, 900, 900, 1800


@dataclass(frozen=True, slots=True)
class Load:
    """Requests while the deployment changes."""

    requests: int
    seconds: float


class ModeTest:
    """The test in one deployment mode."""

    def __init__(self, mode: str, kubectl: Kubectl, overlay: Path, images: Images, report: Report) -> None:
        self._mode = mode
        self._kubectl = kubectl
        self._overlay = overlay
        self._images = images
        self._report = report

    def run(self, load: Load) -> None:
        """Run all phases.

        Raises:
            ClusterError: one of them cannot end.
        """
        self._deploy()
        self._ask()
        if self._mode == "knative":
            self._scale_to_zero_and_back()
        else:
            self._check_autoscaler()
        self._change_under_load(load)
        with self._report.phase(self._mode, "delete"):
            self._kubectl.start(["bash", str(ROOT / "kustomize/undeploy.sh"), str(self._overlay), "delete"])
            if self._kubectl.get("namespace", NAMESPACE):
                raise ClusterError(f"namespace {NAMESPACE} still exists")

    def _deploy(self) -> None:
        with self._report.phase(self._mode, "apply"):
            self._apply(REPOSITORIES[0])
        with self._report.phase(self._mode, "download"):
            self._wait_for_jobs()
        with self._report.phase(self._mode, "ready"):
            wait(self._is_ready, "the InferenceService is ready", READY_SECONDS)

    def _apply(self, repository: str) -> None:
        objects.write_overlay(self._overlay, self._mode, self._images, repository)
        self._kubectl.run("apply", "--kustomize", str(self._overlay))

    def _wait_for_jobs(self) -> None:
        def complete() -> bool:
            jobs = self._kubectl.all("jobs", NAMESPACE)
            failed = [job["metadata"]["name"] for job in jobs if has_condition(job, "Failed")]
            if failed:
                raise ClusterError(f"Job {failed[0]} failed; its pod's log has the reason")
            return bool(jobs) and all(has_condition(job, "Complete") for job in jobs)

        wait(complete, "all Jobs are complete", DOWNLOAD_SECONDS)

    def _is_ready(self) -> bool:
        service = self._kubectl.get("inferenceservice", SERVICE, NAMESPACE)
        if service is None or not has_condition(service, "Ready"):
            return False
        generation = service["metadata"].get("generation")
        return bool(service["status"].get("observedGeneration", generation) == generation)

    def _ask(self, *protocols: str, name: str = "") -> None:
        for result in self._run_client("ask", *protocols):
            errors = [result["error"]] if result["error"] else []
            self._report.add(Phase(self._mode, name or result["protocol"], result["seconds"], errors))

    def _scale_to_zero_and_back(self) -> None:
        with self._report.phase(self._mode, "to zero"):
            wait(lambda: not self._pods(), "no pod is left", ZERO_SECONDS)
        self._ask("OpenAI chat", name="answer from zero")

    def _check_autoscaler(self) -> None:
        with self._report.phase(self._mode, "autoscaler") as phase:
            found = len(self._kubectl.all("horizontalpodautoscalers", NAMESPACE))
            if found != 1:
                phase.errors.append(f"{found} HorizontalPodAutoscalers instead of one")

    def _change_under_load(self, load: Load) -> None:
        name = "load"
        arguments = (name, str(load.requests), str(load.seconds))
        self._kubectl.create(objects.client(name, self._images.storage_initializer, *arguments))
        wait(lambda: self._phase_of(name) != "Pending", "the client starts", POD_SECONDS)
        for change, act in (
            ("rollout", self._roll_out),
            ("deleted pod", self._delete_pod),
            ("changed reference", self._change_reference),
        ):
            with self._report.phase(self._mode, change) as phase:
                act()
                if self._phase_of(name) != "Running":
                    phase.errors.append("the load ended before; raise --load-seconds")
        with self._report.phase(self._mode, "load") as phase:
            [result] = self._results(name)
            phase.note = (
                f"{result['sent']} requests, {result['streams']} of them streams: {result['lost']} lost; "
                f"the longest took {result['longest_seconds']:.1f} s"
            )
            phase.errors += result["errors"]

    def _roll_out(self) -> None:
        def act() -> None:
            patch = {"spec": {"predictor": {"labels": {"kserve-llm/rollout": "1"}}}}
            arguments = ["--type", "merge", "--patch", json.dumps(patch)]
            self._kubectl.run("patch", "inferenceservice", SERVICE, "--namespace", NAMESPACE, *arguments)

        self._replace_pods(act)

    def _delete_pod(self) -> None:
        name = self._ready_pods()[-1]
        count = len(self._ready_pods())
        self._kubectl.run("delete", "pod", name, "--namespace", NAMESPACE, "--wait=false")
        wait(lambda: self._kubectl.get("pod", name, NAMESPACE) is None, f"pod {name} ends", READY_SECONDS)
        wait(lambda: len(self._ready_pods()) >= count, "another pod is ready", READY_SECONDS)

    def _change_reference(self) -> None:
        self._replace_pods(lambda: self._apply(REPOSITORIES[1]))
        self._wait_for_jobs()

    def _replace_pods(self, act: Callable[[], None]) -> None:
        """Change the deployment, and wait until new pods serve. Knative keeps the old ones for a while."""
        old = set(self._ready_pods())
        act()

        def replaced() -> bool:
            ready = set(self._ready_pods())
            is_old_gone = self._mode == "knative" or not ready & old
            return bool(ready - old) and is_old_gone and self._is_ready()

        wait(replaced, "new pods are ready", READY_SECONDS)

    def _pods(self) -> list[Manifest]:
        return self._kubectl.all("pods", NAMESPACE, PODS)

    def _ready_pods(self) -> list[str]:
        """Return the names of the pods that serve, the newest last."""
        pods = sorted(self._pods(), key=lambda pod: pod["metadata"].get("creationTimestamp", ""))
        return [
            pod["metadata"]["name"]
            for pod in pods
            if has_condition(pod, "Ready") and "deletionTimestamp" not in pod["metadata"]
        ]

    def _run_client(self, *arguments: str) -> list[Manifest]:
        self._kubectl.create(objects.client("client", self._images.storage_initializer, *arguments))
        return self._results("client")

    def _results(self, name: str) -> list[Manifest]:
        """Wait for the end of a client, return what it has printed, and delete it."""
        wait(lambda: self._phase_of(name) in ("Succeeded", "Failed"), "the client ends", POD_SECONDS)
        log = self._kubectl.run("logs", name, "--namespace", TOOLS)
        if self._phase_of(name) == "Failed":
            raise ClusterError(f"the client failed: {log.strip()}")
        self._kubectl.run("delete", "pod", name, "--namespace", TOOLS)
        return [json.loads(line) for line in log.splitlines()]

    def _phase_of(self, name: str) -> str:
        pod = self._kubectl.get("pod", name, TOOLS) or {}
        return str(pod.get("status", {}).get("phase", "Pending"))


def check_modes(arguments: argparse.Namespace, folder: Path, report: Report) -> None:
    """Test the requested modes one after the other.

    Raises:
        ClusterError: the test cannot go on.
    """
    kubectl = Kubectl(folder, arguments.kubeconfig, arguments.context)
    images = Images(arguments.predictor_image, arguments.storage_initializer_image)
    for namespace in (NAMESPACE, TOOLS):
        if kubectl.get("namespace", namespace):
            raise ClusterError(f"namespace {namespace} exists already: delete it first")
    overlay = folder / "overlay"
    overlay.mkdir()
    with report.phase("", "hub"):
        kubectl.create(*objects.tools(images.storage_initializer))
        wait(lambda: has_condition(kubectl.get("pod", "hub", TOOLS), "Ready"), "the hub is ready", POD_SECONDS)
    for mode in ("knative", "standard") if arguments.mode == "both" else (arguments.mode,):
        load = Load(arguments.requests, arguments.load_seconds)
        ModeTest(mode, kubectl, overlay, images, report).run(load)
    kubectl.run("delete", "namespace", TOOLS)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="tests/e2e/cluster.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("mode", nargs="?", choices=("knative", "standard", "both"), default="both")
    parser.add_argument("--kubeconfig", type=Path, help="default: KUBECONFIG, or kubectl's own default")
    parser.add_argument("--context", help="default: the current one")
    parser.add_argument("--predictor-image", default="kserve-llm-predictor:dev", metavar="NAME")
    parser.add_argument("--storage-initializer-image", default="kserve-llm-storage-initializer:dev", metavar="NAME")
    parser.add_argument("--requests", type=int, default=1000, help="sent while the deployment changes (default: 1000)")
    parser.add_argument("--load-seconds", type=float, default=300, help="duration of these requests (default: 300)")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the test and return the exit code."""
    arguments = parser().parse_args(words)
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        try:
            check_modes(arguments, Path(folder), report)
        except ClusterError as error:
            print(f"e2e: {error}", file=sys.stderr)
            return 1 if report.phases else 2
    print("failed" if report.failed else "passed")
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
