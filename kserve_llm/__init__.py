"""The command `kserve-llm`: the programs under one name, and a model served on this machine by one command."""
