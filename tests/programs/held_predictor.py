"""Run the predictor with a model whose forward passes block or fail on order; see `tests/predictor/servers.py`.

The last argument is the file with the order, the others are flags of the predictor.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from predictor.__main__ import main

order = Path(sys.argv.pop())
flags, sys.argv[1:] = sys.argv[1:], []

from tests.predictor import held_model  # noqa: E402, KServe parses sys.argv when it is imported

held_model.install(order)
sys.argv[1:] = flags
sys.exit(main())
