"""Command line: `kserve-llm COMMAND`. A command runs one of the programs; `serve` runs two.

Flags that a command does not know are passed on to its program.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kserve_llm import local_server
from snapshot_format import layout
from snapshot_format import reference as references
from snapshot_format.layout import SnapshotLocation
from snapshot_format.reference import MalformedReference, ModelReference

CACHE_VARIABLE = "KSERVE_LLM_CACHE"
COMMANDS = {
    "serve": ("predictor", "fetch a model, verify it and serve it on this machine"),
    "fetch": ("storage_initializer", "fetch a model into the cache and verify it"),
    "verify": ("storage_initializer", "check a fetched model against its record"),
    "list": ("storage_initializer", "list the models in the cache"),
    "gc": ("storage_initializer", "remove old models from the cache"),
    "check": ("preflight", "check a kustomize overlay before it is applied to a cluster"),
}
"""Program and purpose of each command."""
REQUIREMENTS = {"predictor": "torch", "preflight": "jsonschema"}
"""A package without which the extra of a program's name is not installed."""


class CommandError(Exception):
    """A command cannot run; the message is a sentence for the user."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; all but `serve` and `completion` replace this process."""
    arguments, flags = make_parser().parse_known_args(argv)
    try:
        return _run(arguments, flags)
    except (CommandError, MalformedReference) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def make_parser(*, with_settings: bool = False) -> argparse.ArgumentParser:
    """Return the parser of all commands.

    Args:
        with_settings: `serve` has the predictor's flags, too, for completion; else they are passed on.
    """
    parser = argparse.ArgumentParser(
        prog="kserve-llm", description="Serve language models on this machine, and prepare them for a cluster."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (program, purpose) in COMMANDS.items():
        text = f"{purpose[0].upper()}{purpose[1:]}. Other flags are those of `python -m {program}`; see its --help."
        command = commands.add_parser(name, help=purpose, description=text, allow_abbrev=False)
        if name in ("serve", "fetch", "verify"):
            command.add_argument("model", metavar="MODEL", help="[hf://]owner/model[:revision], or a directory")
        if name == "check":
            command.add_argument("overlay", metavar="OVERLAY", help="folder with a kustomization.yaml")
        else:
            command.add_argument(
                "--cache",
                type=Path,
                default=default_cache(),
                metavar="DIR",
                help=f"volume of the fetched models (default: ${CACHE_VARIABLE}, or %(default)s)",
            )
    serve = commands.choices["serve"]
    serve.add_argument("--port", type=int, default=8080, help="HTTP port (default: %(default)s)")
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
    name: str = arguments.command
    if name == "completion":
        try:
            import shtab
        except ImportError:
            raise CommandError(
                "kserve-llm completion needs more packages. Run: pip install 'kserve-llm[completion]'"
            ) from None
        print(shtab.complete(make_parser(with_settings=True), arguments.shell))
        return 0
    program = COMMANDS[name][0]
    _require(name, program)
    if name == "check":
        _replace_process(program, arguments.overlay, *flags)
    cache: Path = arguments.cache.absolute()
    if name in ("list", "gc"):
        _replace_process(program, name, str(cache), *flags)
    directory = Path(arguments.model).absolute() if Path(arguments.model).is_dir() else None
    if name == "serve":
        source = directory or parse_model(arguments.model)
        return local_server.serve(source, cache, arguments.port, flags)
    if name == "verify":
        _replace_process(program, name, str(directory or _snapshot(cache, parse_model(arguments.model))), *flags)
    reference = directory.as_uri() if directory else str(parse_model(arguments.model))
    cache.mkdir(parents=True, exist_ok=True)
    _replace_process(program, *flags, reference, str(cache))
    raise AssertionError("exec returned")


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


def _replace_process(program: str, *words: str) -> None:
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", program, *words])
