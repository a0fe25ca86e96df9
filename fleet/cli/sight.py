"""What this machine remembers of boards from first sight, held against what a server shows of them."""

from pathlib import Path

from fleet.cli.audit import BOARDS, Memory, remembered
from fleet.cli.audit import save as save_to
from fleet.cli.base import Exit, Fault
from signing.audit import Seen


def load(trust: Path) -> Memory:
    """Read it back; raises `Fault`."""
    return remembered(trust / BOARDS)


def save(trust: Path, memory: Memory) -> None:
    """Write it; raises `Fault`."""
    save_to(trust / BOARDS, memory)


def check(memory: Memory, device: str, fingerprint: str) -> None:
    """Hold a board's key against the one that was first seen, or remember it from now on.

    Raises:
        Fault: it is another.
    """
    seen = memory.boards.get(device)
    if seen is not None and seen.key and seen.key != fingerprint:
        raise Fault(
            f"the server shows another key for {device}",
            f"{fingerprint[:16]} and not {seen.key[:16]}, which was first seen",
            f"nothing was sealed; if the board was enrolled anew, 'fleet audit verify {device} --forget' takes its key",
            code=Exit.REFUSED,
        )
    if seen is None or not seen.key:
        memory.boards[device] = Seen(key=fingerprint)
