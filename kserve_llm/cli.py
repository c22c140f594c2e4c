"""Command line: `kserve-llm COMMAND`. A command runs one of the programs; `serve` runs two.

Flags that a command does not know are passed on to its program.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from kserve_llm import __version__, bench, bench_command, local_server
from kserve_llm.errors import CommandError
from kserve_llm.flags import value
from kserve_llm.local_server import LocalModel
from snapshot_format import layout
from snapshot_format import reference as references
from snapshot_format.layout import SnapshotLocation
from snapshot_format.reference import MalformedReference, ModelReference

CACHE_VARIABLE = "KSERVE_LLM_CACHE"
COMMANDS = {
    "serve": ("predictor", "fetch a model, verify it and serve it on this machine"),
    "bench": ("predictor", "measure tokens/s and latency of a running server, or of a model"),
    "fetch": ("storage_initializer", "fetch a model into the cache and verify it"),
    "verify": ("storage_initializer", "check a fetched model against its record"),
    "list": ("storage_initializer", "list the models in the cache"),
    "gc": ("storage_initializer", "remove old models from the cache"),
    "check": ("preflight", "check a kustomize overlay before it is applied to a cluster"),
}
"""Program and purpose of each command."""
_MODEL = "[hf://]owner/model[:revision], or a directory"
ARGUMENTS = {
    "serve": ("MODEL", _MODEL),
    "bench": ("TARGET", f"URL of a running OpenAI server, or a model to serve for the time: {_MODEL}"),
    "fetch": ("MODEL", _MODEL),
    "verify": ("MODEL", _MODEL),
    "check": ("OVERLAY", "folder with a kustomization.yaml"),
}
"""Placeholder and help of the argument of each command that has one."""
REQUIREMENTS = {"predictor": "torch", "preflight": "jsonschema"}
"""A package without which the extra of a program's name is not installed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; all but `serve`, `bench` and `completion` replace this process."""
    arguments, flags = make_parser().parse_known_args(argv)
    try:
        return _run(arguments, flags)
    except MalformedReference as error:
        # argparse takes the value of a flag that it does not know for the model, if that comes later.
        fix = f" Write the model before {flags[0]}." if flags else ""
        print(f"error: {error}{fix}", file=sys.stderr)
        return 2
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def make_parser(*, with_settings: bool = False) -> argparse.ArgumentParser:
    """Return the parser of all commands.

    Args:
        with_settings: `serve` has the predictor's flags, too, for completion; else they are passed on.
    """
    parser = argparse.ArgumentParser(
        prog="kserve-llm", description="Serve language models on this machine, and prepare them for a cluster."
    )
    parser.add_argument("--version", action="version", version=f"kserve-llm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (program, purpose) in COMMANDS.items():
        text = f"{purpose[0].upper()}{purpose[1:]}. Other flags are those of `python -m {program}`; see its --help."
        command = commands.add_parser(name, help=purpose, description=text, allow_abbrev=False)
        if argument := ARGUMENTS.get(name):
            metavar, meaning = argument
            command.add_argument(metavar.lower(), metavar=metavar, help=meaning)
            command.usage = f"%(prog)s {metavar} [FLAG ...]"
        if name != "check":
            command.add_argument(
                "--cache",
                type=Path,
                default=default_cache(),
                metavar="DIR",
                help=f"volume of the fetched models (default: ${CACHE_VARIABLE}, or %(default)s)",
            )
    serve = commands.choices["serve"]
    serve.add_argument("--port", type=_port, default=8080, help="HTTP port (default: %(default)s)")
    bench.add_load_flags(commands.choices["bench"], levels="1,8,32")
    if with_settings:
        from predictor.settings import Settings

        for name, field in Settings.model_fields.items():
            serve.add_argument(f"--{name}", help=(field.description or "").replace("%", "%%"))
    completion = commands.add_parser("completion", help="print a completion script for a shell")
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    return parser


def default_cache() -> Path:
    """Return the cache directory: of the variable, else below the user's."""
    if set_by_user := os.environ.get(CACHE_VARIABLE):
        return Path(set_by_user)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kserve-llm"


def _run(arguments: argparse.Namespace, flags: Sequence[str]) -> int:
    match arguments.command:
        case "completion":
            return _print_completion(arguments.shell)
        case "check":
            _require("check", "preflight")
            _replace_process("preflight", arguments.overlay, *flags)
        case "list" | "gc" as name:
            cache: Path = arguments.cache.absolute()
            if not cache.is_dir():
                raise CommandError(f"{cache} does not exist. Run `kserve-llm fetch OWNER/MODEL` first.")
            _replace_process("storage_initializer", name, str(cache), *flags)
        case "verify":
            _verify(arguments, flags)
        case "fetch":
            _fetch(arguments, flags)
        case "serve":
            _require("serve", "predictor")
            return local_server.serve(_local_model(arguments.model, arguments, flags), arguments.port)
        case "bench":
            return _bench(arguments, flags)
    raise AssertionError(arguments.command)


def _print_completion(shell: str) -> int:
    try:
        import shtab
    except ImportError:
        raise CommandError(
            "kserve-llm completion needs more packages. Run: pip install 'kserve-llm[completion]'"
        ) from None
    print(shtab.complete(make_parser(with_settings=True), shell))
    return 0


def _verify(arguments: argparse.Namespace, flags: Sequence[str]) -> NoReturn:
    directory = _directory(arguments.model) or _snapshot(arguments.cache.absolute(), parse_model(arguments.model))
    _replace_process("storage_initializer", "verify", str(directory), *flags)


def _fetch(arguments: argparse.Namespace, flags: Sequence[str]) -> NoReturn:
    directory, cache = _directory(arguments.model), arguments.cache.absolute()
    reference = directory.as_uri() if directory else str(parse_model(arguments.model))
    cache.mkdir(parents=True, exist_ok=True)
    _replace_process("storage_initializer", *flags, reference, str(cache))


def _bench(arguments: argparse.Namespace, flags: Sequence[str]) -> int:
    load = bench.parse_load(arguments)
    if not bench_command.is_url(arguments.target):
        _require("bench", "predictor")
        model = _local_model(arguments.target, arguments, flags)
        return bench_command.run_model(model, load, arguments.levels, arguments.json)
    if flags:
        raise CommandError(f"kserve-llm bench of a running server has no flag {flags[0]}. See kserve-llm bench --help.")
    return bench_command.run_server(arguments.target, load, arguments.levels, arguments.json)


def _local_model(text: str, arguments: argparse.Namespace, flags: Sequence[str]) -> LocalModel:
    if value(flags, "http_port") is not None:
        # It would win over the port at which the start is watched.
        fix = "Write --port instead." if arguments.command == "serve" else "Leave it out: any free port is used."
        raise CommandError(f"kserve-llm {arguments.command} has no flag --http_port. {fix}")
    return LocalModel(_directory(text) or parse_model(text), arguments.cache.absolute(), flags)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port, from 1 to 65535")
    return int(text)


def _directory(text: str) -> Path | None:
    """Return the absolute path of a model that is a directory."""
    return Path(text).absolute() if Path(text).is_dir() else None


def parse_model(text: str) -> ModelReference:
    """Parse a reference, in which `hf://` may be left out.

    Raises:
        MalformedReference: it is neither a reference nor a directory.
    """
    return references.parse(text if "://" in text else f"hf://{text}")


def _snapshot(cache: Path, reference: ModelReference) -> Path:
    """Return the directory of a fetched model."""
    try:
        commit = layout.read_ref(cache, reference.slug, reference.revision)
    except FileNotFoundError:
        raise CommandError(f"{reference} is not in {cache}. Run `kserve-llm fetch {reference}` first.") from None
    return SnapshotLocation(cache, reference.slug, commit).directory


def _require(command: str, program: str) -> None:
    package = REQUIREMENTS.get(program)
    if package and importlib.util.find_spec(package) is None:
        raise CommandError(f"kserve-llm {command} needs more packages. Run: pip install 'kserve-llm[{program}]'")


def _replace_process(program: str, *words: str) -> NoReturn:
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", program, *words])
