"""Measure what structured output costs: `python -m benchmarks.structured_output --model_dir DIR`.

One predictor completes the same prompts freely and held to a JSON schema, all rows of a batch at a time. The schema is
an array that is longer than the completion, so that both have the same number of tokens.
"""

import argparse
import asyncio
import random
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks import servers
from devtools.processes import DemoError
from kserve_llm import bench
from kserve_llm.bench import Load
from kserve_llm.errors import BenchmarkError

SCHEMA = {
    "type": "array",
    "minItems": 10_000,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "count": {"type": "integer"}, "kind": {"enum": ["a", "b"]}},
        "required": ["name", "count", "kind"],
        "additionalProperties": False,
    },
}


def main() -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True, help="a directory of `benchmarks.make_model`")
    parser.add_argument("--quantization", default="8bit", help="of the predictor (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=32, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=4, help="runs of each kind (default: %(default)s)")
    arguments = parser.parse_args()
    load = Load(
        input_tokens=64,
        output_tokens=64,
        requests=arguments.concurrency,
        repetitions=arguments.repetitions,
        seed=random.randrange(2**32),
    )
    flags = ["--quantization", arguments.quantization, "--max_num_seqs", str(arguments.concurrency)]
    try:
        with servers.predictor("free", arguments.model_dir, flags) as free:
            fields = {"ignore_eos": None, "structured_outputs": {"json": SCHEMA}}
            structured = replace(free, name="structured", fields=fields)
            levels = [arguments.concurrency]
            measurements = asyncio.run(bench.compare([free, structured], load, levels, levels))
    except (BenchmarkError, DemoError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(bench.table(measurements))
    return 0


if __name__ == "__main__":
    sys.exit(main())
