"""The command line: the only part of mechlens that prints."""

from mechlens.cli.parser import COMMANDS, main, read

__all__ = ["COMMANDS", "main", "read"]
