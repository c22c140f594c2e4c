"""Rules for the Dockerfiles: agreement with the manifests, and no code or secrets in the wrong layer."""

import json
import re
from typing import Any

import pytest
import yaml

from devtools.paths import ROOT

PROGRAMS = {
    "predictor": "manifests/serving/serving-runtime.yaml",
    "storage_initializer": "manifests/storage/download-job.yaml",
}

OTHER_TARGETS = {"predictor": [["serve", "run", "predictor.entrypoints.ray_serve:app"]], "storage_initializer": []}
"""Entrypoints of the targets before the default one."""


def _dockerfile(program: str) -> str:
    return (ROOT / "images" / program / "Dockerfile").read_text()


def _container(program: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The container that runs the image, and its pod."""
    spec = yaml.safe_load((ROOT / PROGRAMS[program]).read_text())["spec"]
    pod = spec.get("template", {}).get("spec", spec)
    return pod["containers"][0], pod


@pytest.mark.parametrize("program", PROGRAMS)
def test_dockerfile_user_equals_the_manifests(program: str) -> None:
    container, pod = _container(program)
    context = pod.get("securityContext", {}) | container["securityContext"]
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}\n" in _dockerfile(program)


@pytest.mark.parametrize("program", PROGRAMS)
def test_dockerfile_writable_paths_are_mounted(program: str) -> None:
    container, _ = _container(program)
    mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
    for variable in ("HOME", "HF_HOME"):
        [path] = re.findall(rf"^ +{variable}=(\S+)", _dockerfile(program), re.MULTILINE)
        assert any(path == mount or path.startswith(f"{mount}/") for mount in mounted)
        assert {"name": variable, "value": path} in container["env"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_dockerfile_entrypoint_is_the_program(program: str) -> None:
    text = _dockerfile(program)
    # The default target is the last stage.
    *others, entry = re.findall(r"^(?:ENTRYPOINT|CMD) (.+)", text, re.MULTILINE)
    assert json.loads(entry) == ["python", "-m", program]
    assert [json.loads(other) for other in others] == OTHER_TARGETS[program]
    assert "\nSTOPSIGNAL SIGTERM\n" in text
    # The cluster's probes decide.
    assert "HEALTHCHECK" not in text


@pytest.mark.parametrize("program", PROGRAMS)
def test_dockerfile_stages_start_from_the_base(program: str) -> None:
    text = _dockerfile(program)
    begins = re.findall(r"^FROM (\S+)(?: AS (\S+))?", text, re.MULTILINE)
    assert {source for source, _ in begins} <= {"${BASE}", *(stage for _, stage in begins)}
    assert re.search(r"^ARG BASE=python:3\.\d+-slim(@sha256:[0-9a-f]{64})?$", text, re.MULTILINE)


@pytest.mark.parametrize("program", PROGRAMS)
def test_dockerfile_installs_by_hash_before_code_is_copied(program: str) -> None:
    text = re.sub(r"^ *#.*\n", "", _dockerfile(program), flags=re.MULTILINE).replace("\\\n", "")
    stages = re.split(r"^(?=FROM )", text, flags=re.MULTILINE)
    fetched = 0
    for stage in stages:
        for line in stage.splitlines():
            for words in re.findall(r"\bpip [^&]*\binstall (?!.*--no-index)([^&]*)", line):
                fetched += 1
                assert "--require-hashes --no-deps" in words or '"torch==${TORCH_VERSION}"' in words
                assert "--mount=type=cache,target=/opt/.cache/pip" in line
                # A change of ours must not have it fetched again.
                assert "COPY" not in stage
    assert fetched >= 3


@pytest.mark.parametrize("program", PROGRAMS)
def test_dockerfile_compiler_stage_is_not_in_the_image(program: str) -> None:
    stages = re.findall(r"(?ms)^FROM (\S+)(?: AS (\S+))?\n(.*?)(?=^FROM |\Z)", _dockerfile(program))
    sources = {name: source for source, name, _ in stages}
    (compiler,) = (name for _, name, text in stages if "apt-get install" in text)
    assert all("COPY" not in text for _, name, text in stages if name == compiler)
    (image,) = (name for _, name, text in stages if "\nUSER " in text)
    while image in sources:
        assert image != compiler
        image = sources[image]


def test_dockerignore_allows_only_listed_paths() -> None:
    """Every path in the build context is listed here, so that an addition is deliberate."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert {line for line in lines if line.startswith("!")} == {
        "!LICENSE",
        "!README.md",
        "!hatch_build.py",
        "!predictor",
        "!pyproject.toml",
        "!images",
        "!snapshot_format",
        "!storage_initializer",
    }
