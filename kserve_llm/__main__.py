"""`python -m kserve_llm`, where the console script is not on the path."""

import sys

from kserve_llm.cli import main

sys.exit(main())
