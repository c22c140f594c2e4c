"""The command `kserve-llm`: the programs under one name, and a model served on this machine by one command."""

from importlib.metadata import version

__version__ = version("kserve-llm")
