"""Base of the commands on a device: their arguments, their end at a closed pipe, their place in a container."""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Final, NoReturn

_FORWARDED: Final = frozenset(
    {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
)


_NOT_WRITTEN: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


def parse(
    parser: argparse.ArgumentParser, known: Collection[str], arguments: Sequence[str] | None
) -> argparse.Namespace:
    """Parse arguments, of which the first is one of the `known` commands; end the process where it is none."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words and words[0] not in known and not words[0].startswith("-"):
        import difflib  # noqa: PLC0415 - for the sentence about a mistake alone

        near = difflib.get_close_matches(words[0], known, 1)
        guess = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}."
        parser.exit(2, f"{parser.prog}: no such command {words[0]!r}; {guess} See '{parser.prog} --help'\n")
    return parser.parse_args(words)


def until_closed(command: Callable[[], int]) -> int:
    """Run a command and return its exit code; as after SIGPIPE where its output was closed, as by `| head`.

    An output that cannot be written, as on a full disk, is an error in a sentence.
    """
    try:
        try:
            return command()
        finally:
            if sys.stdout is not None:  # closed before the start
                sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is not None or error.errno not in _NOT_WRITTEN:
            raise
        _drop_output()
        if sys.stderr is not None:
            sys.stderr.write(f"{Path(sys.argv[0]).stem}: cannot write the output: {error.strerror or error}\n")
        return 1


def _drop_output() -> None:
    """Lose what is left of the output: Python writes it when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def leave_first_process() -> None:
    """Go on in a child where this is the first process of a container; the first one then only does its duties.

    The first process (PID 1) inherits every orphan and has to wait for it, lest zombies fill the table of processes.
    """
    if os.getpid() != 1:
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*_FORWARDED, signal.SIGCHLD})
    child = os.fork()
    if child:
        _be_first(child)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _be_first(child: int) -> NoReturn:
    """Forward signals to the child and wait for every orphan, until the child ends; end with its status."""
    while True:
        number = signal.sigwait({*_FORWARDED, signal.SIGCHLD})
        if number != signal.SIGCHLD:
            os.kill(child, number)
            continue
        while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            pid, status = ended
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                os._exit(code if code >= 0 else 128 - code)
