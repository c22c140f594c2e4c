"""Errors of the command; each message is a sentence for the user."""


class CommandError(Exception):
    """A command cannot run."""

    exit_code = 2


class BenchmarkError(CommandError):
    """A measurement is not possible."""

    exit_code = 1
