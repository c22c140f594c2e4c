"""Run the `sh` blocks of a document in bash, with a recorder in the place of every program."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from devtools.paths import ROOT
from tests.documents.fences import Block

PROGRAMS = ROOT / "tests" / "programs"
HANG_SECONDS = 120
REAL = (
    *(
        "base64",
        "basename",
        "bash",
        "cat",
        "chmod",
        "cp",
        "cut",
        "date",
        "diff",
        "dirname",
        "env",
        "find",
        "grep",
        "head",
    ),
    *("jq", "ln", "ls", "mkdir", "mktemp", "mv", "openssl", "sed", "seq", "sort", "tail", "tee", "touch", "tr", "uniq"),
    *("wc", "xargs"),
)
"""Programs that run as they are, in the copy of the checkout."""
COPIED = ("examples", "kustomize", "manifests")
"""Folders that blocks may write to, as at the top; all others are linked."""
VARIABLES = {"HF_TOKEN": "hf_example", "API_KEY": "example"}
"""What a reader has in the environment."""
SCRIPT = r"""
set -euo pipefail
command_not_found_handle() { echo "unknown program: $1. Add it to tests/documents/commands.py" >&2; return 127; }
trap 'code=$?; [ $code = 0 ] || echo "line $BLOCK: exit code $code" >&2' EXIT
"""


@dataclass(frozen=True)
class Call:
    """A program that a block has started."""

    folder: Path
    line: int
    """Line of the block in its document."""
    input: str
    """Standard input, where it was a pipe or a file."""
    variables: Mapping[str, str]
    """Settings of our programs in its environment."""
    program: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"line {self.line}: {self.program} {' '.join(self.arguments)}"


class Checkout:
    """A copy of the checkout in which blocks run, with the recorder as every one of `programs`."""

    def __init__(self, folder: Path, programs: Sequence[str]) -> None:
        self.folder = folder
        folder.mkdir()
        for path in ROOT.iterdir():
            if path.name in COPIED:
                shutil.copytree(path, folder / path.name)
            elif path.is_file():
                shutil.copy2(path, folder)
            elif not path.name.startswith(".") and path.name not in ("build", "models"):
                (folder / path.name).symlink_to(path)
        recorders = folder / ".venv" / "bin"
        recorders.mkdir(parents=True)
        (recorders / "activate").touch()
        for program in programs:
            (recorders / program).symlink_to(PROGRAMS / "documented_command.sh")
        for name in (".venv-clients", ".venv-guidellm"):
            (folder / name).symlink_to(".venv")
        self._real = folder / ".real"
        self._real.mkdir()
        for program in REAL:
            if path_of := shutil.which(program):
                (self._real / program).symlink_to(path_of)
        for name in ("tls", "ca"):
            _make_certificate(folder / name)
        self._entries = sorted(folder.iterdir())
        self._copied_at_ns = max(path.lstat().st_mtime_ns for path in folder.rglob("*"))

    @property
    def is_changed(self) -> bool:
        """Whether a block has written a file."""
        paths = [path for name in COPIED for path in (self.folder / name).rglob("*")]
        return sorted(self.folder.iterdir()) != self._entries or any(
            path.lstat().st_mtime_ns > self._copied_at_ns for path in paths
        )

    def run(self, blocks: Sequence[Block], servers: Mapping[str, tuple[int, str]]) -> tuple[list[Call], str]:
        """Run all blocks in one shell.

        Returns:
            The calls, and why the shell ended early, or nothing.
        """
        calls = self.folder.with_suffix(".calls")
        calls.write_bytes(b"")
        environment = {
            "PATH": f"{self.folder}/.venv/bin:{self._real}",
            "HOME": str(self.folder / ".home"),
            "CALLS": str(calls),
            "CHECKOUT": str(self.folder),
            "CURL": str(PROGRAMS / "documented_curl.py"),
            "RECORDER_PYTHON": sys.executable,
            "REAL_CURL": shutil.which("curl") or "",
            "KUBECTL": shutil.which("kubectl") or "",
            "SERVERS": json.dumps(servers),
        }
        script = SCRIPT + "".join(f"export BLOCK={block.line}\n{block.text}\n" for block in blocks) + "wait\n"
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env=environment | VARIABLES,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=HANG_SECONDS,
            check=False,
        )
        return _read(calls), done.stderr if done.returncode else ""


def _read(file: Path) -> list[Call]:
    calls = []
    for record in file.read_text().split("\x1e\0")[:-1]:
        folder, line, given, *words, _ = record.split("\0")
        split = words.index("--")
        variables = dict(word.split("=", 1) for word in words[:split])
        program, *arguments = words[split + 1 :]
        calls.append(Call(Path(folder), int(line), given, variables, program, tuple(arguments)))
    return calls


def _make_certificate(path: Path) -> None:
    """Write `path` with suffixes .crt and .key, files that a reader has."""
    names = ["-keyout", str(path.with_suffix(".key")), "-out", str(path.with_suffix(".crt"))]
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-subj",
            "/CN=x",
            *names,
        ],
        capture_output=True,
        check=True,
    )
