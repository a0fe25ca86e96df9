"""How this host starts its own programs: the same Python, finding modules the same way."""

import sys


def command(module: str) -> list[str]:
    """The command line of one of our modules; it looks into the current directory for modules only if this one does."""
    return [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m", module]
