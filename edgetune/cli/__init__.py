"""The command line. The parser is imported when it is used, because the process that trains imports from here too."""

from __future__ import annotations


def main() -> None:
    """Run the command line of the process; always ends in SystemExit."""
    from edgetune.cli import verbs

    verbs.main()
