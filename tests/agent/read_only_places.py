"""Command line for a process in a mount namespace of its own, in which directories are read-only."""

import shlex
import subprocess
from functools import cache
from pathlib import Path

TEMPORARY = ("/tmp", "/var/tmp", "/usr/tmp")
"""Directories in which Python and SQLite look for room for temporary files."""


@cache
def unshare():
    """Command line that enters a mount namespace, in a user namespace too where this user may not alone."""
    for line in (("unshare", "--mount"), ("unshare", "--user", "--map-root-user", "--mount")):
        if not subprocess.run([*line, "true"], capture_output=True, check=False).returncode:
            return line
    return ()


def read_only(*directories, writable=()):
    """Return a prefix for a command line: `directories` are read-only for it, except what lies below `writable`.

    The current directory is /, as a process looks there for room, too.
    """
    lines = ["set -e"]
    there = [each for each in map(str, directories) if Path(each).is_dir() and not Path(each).is_symlink()]
    lines += [f"mount --bind {shlex.quote(each)} {shlex.quote(each)}" for each in [*there, *map(str, writable)]]
    lines += [f"mount -o remount,bind,ro {shlex.quote(each)}" for each in there]
    return [*unshare(), "sh", "-c", "\n".join([*lines, 'exec "$@"']), "sh"]
