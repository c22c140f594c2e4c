"""Check documented commands: for every program a function that raises AssertionError with what is wrong."""

import argparse
import ast
import contextlib
import importlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from unittest import mock

import yaml
from packaging.requirements import InvalidRequirement, Requirement

from devtools.paths import ROOT
from kserve_llm import bench_command, cli
from predictor import settings as predictor_settings
from predictor.entrypoints import ray_settings
from predictor.errors import InvalidSettings
from snapshot_format.reference import MalformedReference
from storage_initializer import settings as initializer_settings
from storage_initializer.cli import arguments as initializer_arguments
from storage_initializer.errors import InitializerError
from tests.documents import manifests
from tests.documents.shell import Call

EXTERNAL = {
    "apt-get": "installs packages of the system",
    "argocd": "needs Argo CD",
    "cosign": "needs a registry",
    "docker": "needs a daemon; the Dockerfiles have tests of their own",
    "flux": "needs Flux",
    "gh": "needs GitHub",
    "git": "needs a remote repository; a clone is this checkout",
    "guidellm": "in .venv-guidellm; tests/examples runs it",
    "helm": "needs a cluster",
    "install": "needs root",
    "k3d": "makes a cluster",
    "kill": "ends what a block has started",
    "kind": "makes a cluster",
    "less": "shows text",
    "lm_eval": "in .venv-clients; tests/clients runs it",
    "minikube": "makes a cluster",
    "nohup": "runs another program, which is checked",
    "nvidia-smi": "needs a GPU",
    "open": "opens a browser",
    "podman": "as docker",
    "pre-commit": "changes the hooks of a checkout",
    "promtool": "tests/monitoring runs it",
    "rm": "removes files",
    "sleep": "takes time",
    "sudo": "runs another program, which is checked",
    "tar": "packs what another program has written",
    "watch": "runs another program, which is checked",
}
"""Programs that are not run, with the reason; the files of this repository that they are given must exist."""
FILES = re.compile(r"(kustomize|manifests|examples|demo|devtools|benchmarks|images|tests)/[\w./-]+")
STANDARD_MODULES = {"venv", "json.tool", "http.server"}
SHORT_KINDS = {
    *("cm", "cr", "crd", "crds", "deploy", "ev", "hpa", "ing", "isvc", "ksvc", "netpol", "no", "ns", "pdb", "po", "pv"),
    *("pvc", "rev", "rs", "sa", "sc", "sts", "svc", "all"),
}
KINDS = {
    *("clusterservingruntime", "clusterstoragecontainer", "inferenceservice", "servingruntime"),
    *("configuration", "knativeserving", "revision", "route"),
    *("configmap", "cronjob", "customresourcedefinition", "deployment", "endpointslice", "event", "ingress", "job"),
    *("namespace", "networkpolicy", "node", "persistentvolume", "persistentvolumeclaim", "pod", "replicaset"),
    *("secret", "service", "serviceaccount", "statefulset", "storageclass"),
    *("horizontalpodautoscaler", "poddisruptionbudget"),
    *("validatingadmissionpolicy", "validatingadmissionpolicybinding"),
    *("application", "certificate", "gateway", "gitrepository", "httproute", "inferencepool", "kustomization"),
    *("podmonitor", "prometheusrule", "raycluster", "rayservice", "scaledobject", "servicemonitor"),
}
"""Kinds of objects that kubectl is given, in the singular."""
NAMED_POD = {"attach", "cp", "debug", "exec", "logs", "port-forward"}
"""Verbs whose first argument is a pod without its kind, or KIND/NAME."""
OF_KINDS = {
    *("annotate", "delete", "describe", "edit", "explain", "get", "label", "patch", "rollout", "scale", "top", "wait"),
}
"""Verbs whose first argument is one or several kinds, or KIND/NAME."""


def check(call: Call) -> None:
    """Check a command.

    Raises:
        AssertionError: it cannot work, with the reason.
    """
    for word in call.arguments:
        assert "…" not in word, "write a placeholder as an UPPER CASE word"
    with _explained():
        CHECKS.get(call.program, _external)(call)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Convert the errors of programs and parsers."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(io.StringIO()):
            yield
    except SystemExit as done:
        if done.code:
            raise AssertionError(output.getvalue() or str(done.code)) from done
    except (InvalidSettings, InitializerError, MalformedReference, InvalidRequirement, SyntaxError) as error:
        raise AssertionError(str(error)) from error


def _external(call: Call) -> None:
    assert call.program in EXTERNAL, "a program without a check"
    for word in call.arguments:
        if FILES.fullmatch(word):
            assert (call.folder / word).exists(), f"{word} does not exist"


def _curl(call: Call) -> None:
    """Its request was sent while the block ran, and a response that is not 2xx ended the block."""


def _make(call: Call) -> None:
    words = [word for word in call.arguments if not re.fullmatch(r"-j\d*", word)]
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        if name := re.match(r"(\w+)=", word):
            assert f"$({name[1]})" in makefile, f"the Makefile has no variable {name[1]}"
    _dry_run(tuple(words))


@cache
def _dry_run(words: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["make", "--dry-run", "BUILDER=docker", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def _python(call: Call) -> None:
    match call.arguments:
        case ["-m", module, *arguments]:
            _module(call, module, arguments)
        case ["-c", code, *_]:
            ast.parse(code)
        case ["-"] | []:
            ast.parse(call.input)
        case [script, *_]:
            file = call.folder / script
            assert file.is_file(), f"{script} does not exist"
            ast.parse(file.read_text())


def _module(call: Call, module: str, arguments: list[str]) -> None:
    if module == "pip":
        _pip_words(call, arguments)
    elif module == "pytest":
        for word in arguments:
            assert "/" not in word or (call.folder / word.partition("::")[0]).exists(), f"{word} does not exist"
    elif module in PROGRAMS:
        with mock.patch.dict(os.environ, call.variables):
            PROGRAMS[module](call, arguments)
    elif module not in STANDARD_MODULES:
        _arguments_of(module, arguments)


def _predictor(_: Call, arguments: Sequence[str]) -> None:
    predictor_settings.read(arguments)


def _storage_initializer(_: Call, arguments: Sequence[str]) -> None:
    initializer_arguments.parse(arguments)
    initializer_settings.load({})


def _preflight(call: Call, arguments: Sequence[str]) -> None:
    for word in arguments:
        if word.startswith("kustomize/"):
            assert (call.folder / word / "kustomization.yaml").is_file(), f"{word} is not an overlay"
    _arguments_of("preflight", arguments)


def _kserve_llm(call: Call, words: Sequence[str]) -> None:
    arguments, flags = cli.make_parser().parse_known_args(words)
    match arguments.command:
        case "serve":
            # A folder may be the output of an earlier command.
            if not arguments.model.startswith(("/", "./")) and not (call.folder / arguments.model).is_dir():
                cli.parse_model(arguments.model)
            _predictor(call, flags)
        case "bench" if not bench_command.is_url(arguments.target):
            if not (call.folder / arguments.target).is_dir():
                cli.parse_model(arguments.target)
            _predictor(call, flags)
        case "fetch":
            _storage_initializer(call, [*flags, str(cli.parse_model(arguments.model)), "/cache"])
        case "verify":
            _storage_initializer(call, ["verify", "/cache/model", *flags])
        case "list" | "gc":
            _storage_initializer(call, [arguments.command, "/cache", *flags])
        case "check":
            _preflight(call, [arguments.overlay, *flags])
        case _:
            assert not flags, f"unknown flags: {flags}"


PROGRAMS: dict[str, Callable[[Call, Sequence[str]], None]] = {
    "kserve_llm": _kserve_llm,
    "predictor": _predictor,
    "preflight": _preflight,
    "storage_initializer": _storage_initializer,
}
"""Our programs, whose settings come from flags and variables."""


class _ParsedError(Exception):
    """A program's own parser has accepted its arguments."""


def _arguments_of(module: str, arguments: Sequence[str]) -> None:
    """Parse the arguments of a module of this repository with its own parser, and run nothing else of it."""
    found = importlib.util.find_spec(module)
    assert found, f"there is no module {module}"
    name = f"{module}.__main__" if found.submodule_search_locations else module
    source = importlib.util.find_spec(name)
    text = Path(source.origin).read_text() if source and source.origin else ""
    assert "parse_args(" in text, f"{name} has no parser"
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> None:
        parse(parser, words)
        raise _ParsedError

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_only),
        mock.patch.object(sys, "argv", [name, *arguments]),
        contextlib.suppress(_ParsedError),
    ):
        importlib.import_module(name).main()


def _console_script(call: Call) -> None:
    with mock.patch.dict(os.environ, call.variables):
        _kserve_llm(call, call.arguments)


def _pip(call: Call) -> None:
    _pip_words(call, call.arguments)


def _pip_words(call: Call, words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="pip")
    parser.add_argument("command", choices=("install", "download", "wheel"))
    parser.add_argument("requirements", nargs="*")
    parser.add_argument("-e", "--editable", action="append", default=[])
    for option in ("-r", "--requirement", "-c", "--constraint"):
        parser.add_argument(option, action="append", default=[], dest="files")
    for option in ("--index-url", "--extra-index-url", "--find-links", "--python", "--dest", "--wheel-dir"):
        parser.add_argument(option)
    for option in ("--upgrade", "--quiet", "--require-hashes", "--no-deps", "--no-index"):
        parser.add_argument(option, action="store_true")
    arguments = parser.parse_intermixed_args(words)
    for file in arguments.files:
        assert (call.folder / file).is_file(), f"{file} does not exist"
    for requirement in [*arguments.requirements, *arguments.editable]:
        _requirement(requirement)


def _requirement(text: str) -> None:
    path, extras = re.fullmatch(r"(.*?)(?:\[([^\]]*)\])?", text).groups()  # type: ignore[union-attr] # It matches any text.
    if path == "." or path.endswith(".whl"):
        names = {name.strip() for name in extras.split(",")} if extras else set()
    else:
        requirement = Requirement(text)
        names = requirement.extras if requirement.name == "kserve-llm" else set()
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert names <= known.keys(), f"the package has no extra {', '.join(sorted(names - known.keys()))}"


def _uv(call: Call) -> None:
    match call.arguments:
        case ["pip", *words]:
            _pip_words(call, words)
        case ["venv", *_]:
            pass
        case _:
            raise AssertionError("a command of uv without a check")


def _serve(call: Call) -> None:
    """Check a command of Ray Serve."""
    match call.arguments:
        case ["run", "predictor.entrypoints.ray_serve:app", *words]:
            values = dict(word.split("=", 1) for word in words if not word.startswith("-"))
            ray_settings.check(predictor_settings.from_arguments(values, ray_settings.RaySettings))
        case ["deploy" | "status" | "delete" | "shutdown", *_]:
            pass
        case _:
            raise AssertionError("a command of Ray Serve without a check")


def _kubectl(call: Call) -> None:
    words = list(call.arguments)
    if "--" in words:
        words = words[: words.index("--")]
    flags, positional = _parse_kubectl(tuple(words))
    verb, *objects = positional
    for folder in flags.get("kustomize", []):
        manifests.render(call.folder, folder)
    for file in flags.get("filename", []):
        _check_file(call, file)
    if verb == "create" and "filename" not in flags and "kustomize" not in flags:
        _create(call.folder, words)
    elif verb in NAMED_POD:
        kinds = [name.partition("/")[0] for name in objects[:1] if "/" in name]
        _require_kinds(kinds)
    elif verb in OF_KINDS and not flags.keys() & {"filename", "kustomize"}:
        first = 1 if verb == "rollout" else 0
        _require_kinds([name.partition("/")[0] for name in objects[first : first + 1]])


@cache
def _parse_kubectl(words: tuple[str, ...]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the flags with their values and the other words; kubectl itself rejects unknown verbs and flags."""
    help_text = _kubectl_output((*words, "--help")) + _kubectl_output(("options",))
    options = re.findall(r"^    (?:(-\w), )?--([\w-]+)=(.*):$", help_text, re.MULTILINE)
    names = {short or f"--{name}": name for short, name, _ in options} | {f"--{name}": name for _, name, _ in options}
    switches = {name for _, name, default in options if default in ("true", "false")}
    flags: dict[str, list[str]] = {}
    positional = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("-") or word == "-":
            positional.append(word)
            continue
        given, equals, value = word.partition("=")
        name = names.get(given) or names.get(given[:2], given)
        if not equals and name not in switches:
            value = word[2:] if given not in names else next(rest, "")
        flags.setdefault(name, []).append(value)
    assert positional, "kubectl needs a verb"
    return flags, positional


@cache
def _kubectl_output(words: tuple[str, ...]) -> str:
    done = subprocess.run(["kubectl", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _check_file(call: Call, file: str) -> None:
    if file.startswith("https://"):
        return
    text = call.input if file == "-" else (call.folder / file).read_text()
    for manifest in yaml.safe_load_all(text):
        if manifest:
            assert isinstance(manifest, dict), f"not an object: {manifest}"
            manifests.validate(manifest)


def _create(folder: Path, words: list[str]) -> None:
    """Create an object without a cluster, so that its flags and files are checked."""
    plain = [word for word in words if not word.startswith("--dry-run") and word not in ("-o", "yaml")]
    done = subprocess.run(
        ["kubectl", *plain, "--dry-run=client", "-o", "name"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def _require_kinds(texts: Sequence[str]) -> None:
    for text in ",".join(texts).split(","):
        kind = text.lower().partition(".")[0]
        singular = {kind, kind.removesuffix("s"), kind.removesuffix("es"), re.sub("ies$", "y", kind)}
        assert not text or kind in SHORT_KINDS or singular & KINDS, f"kubectl is given an unknown kind: {text}"


CHECKS: dict[str, Callable[[Call], None]] = {
    "curl": _curl,
    "kserve-llm": _console_script,
    "kubectl": _kubectl,
    "make": _make,
    "pip": _pip,
    "pipx": _pip,
    "python": _python,
    "python3": _python,
    "serve": _serve,
    "uv": _uv,
}
PROGRAM_NAMES = (*CHECKS, *EXTERNAL)
"""Every program that a document may use, other than those that run as they are."""
