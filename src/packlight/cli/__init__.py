"""The command `packlight`. Nothing that `import packlight` imports imports this."""

from packlight.cli.command_line import Parser, main

__all__ = ["Parser", "main"]
