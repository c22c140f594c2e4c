"""Install the peers of `benchmarks.compare`, each in an environment of its own.

`python -m benchmarks.peers install vllm llamacpp openvino` needs 5 GB on disk.
llama.cpp needs cmake, ninja or make, and a C++ compiler.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.peers import environments
from kserve_llm.errors import BenchmarkError

PEERS_DIR = Path(".peers")


def main() -> int:
    """Install the peers that the command line names, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    install = commands.add_parser("install", help="create or complete the environments")
    install.add_argument("peers", nargs="+", choices=sorted(environments.INSTALL), metavar="PEER")
    install.add_argument("--peers_dir", type=Path, default=PEERS_DIR, help="folder (default: %(default)s)")
    install.add_argument("--jobs", type=int, default=1, help="compilers at a time (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        for peer in arguments.peers:
            print(f"==> installing {peer} into {arguments.peers_dir / peer}", file=sys.stderr)
            environments.INSTALL[peer](arguments.peers_dir, arguments.jobs)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
