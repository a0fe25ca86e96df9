"""Arguments of the commands on a device: a mistyped command is one line, with the command like it."""

import argparse
import difflib
import sys
from collections.abc import Collection, Sequence


def parse(
    parser: argparse.ArgumentParser, known: Collection[str], arguments: Sequence[str] | None
) -> argparse.Namespace:
    """Parse arguments, of which the first is one of the `known` commands; end the process where it is none."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words and words[0] not in known and not words[0].startswith("-"):
        near = difflib.get_close_matches(words[0], known, 1)
        guess = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}."
        parser.exit(2, f"{parser.prog}: no such command {words[0]!r}; {guess} See '{parser.prog} --help'\n")
    return parser.parse_args(words)
