"""For every test."""

import sys

# kserve parses argv when it is imported, and would take pytest's flags for abbreviations of its own.
del sys.argv[1:]
