"""Scripts of (request, answer) pairs: drive `TrustedMetadata` with a list of files, and compare its state."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from signing.errors import Rejected
from signing.state import VerifierState
from signing.trusted_metadata import FileRequest, TrustedMetadata
from tests.simulator.repository import Repository


class Pair(NamedTuple):
    """Request for a file, and the answer; None if the repository has no such file."""

    request: FileRequest
    answer: bytes | None


class Recorded(NamedTuple):
    """Recorded requests and answers, the refused answer last, and the refusal."""

    pairs: list[Pair]
    refusal: Rejected | None


def request_next(trusted: TrustedMetadata, paths: Iterable[str]) -> FileRequest | None:
    """Return the request for the next file of the update, and then of the search for each target."""
    request = trusted.next()
    found = iter(paths)
    while request is None and (path := next(found, None)) is not None:
        answer = trusted.find(path)
        request = answer if isinstance(answer, FileRequest) else None
    return request


def record(repo: Repository, trusted: TrustedMetadata, paths: Sequence[str]) -> Recorded:
    """Answer every request with what a repository shows, without a cache, up to the first refusal."""
    pairs: list[Pair] = []
    try:
        while (request := request_next(trusted, paths)) is not None:
            pairs.append(Pair(request, repo.on_fetch(request.name, repo.files.get(request.name))))
            trusted.accept(*pairs[-1])
    except Rejected as refusal:
        return Recorded(pairs, refusal)
    return Recorded(pairs, None)


def replay(pairs: Iterable[Pair], trusted: TrustedMetadata, paths: Sequence[str]) -> VerifierState:
    """Replay a script and return the state after it, refused or not; the requests must be those of the script."""
    for pair in pairs:
        assert request_next(trusted, paths) == pair.request
        try:
            trusted.accept(*pair)
        except Rejected:
            break
    return trusted.state


def check_grown(before: VerifierState, after: VerifierState) -> None:
    """Check that no remembered version fell, except those dropped with old timestamp or snapshot keys."""
    assert after.root >= before.root
    kept = ("assignment", "command", "epochs", "secrets", "floor")
    assert [getattr(after, name) for name in kept] == [getattr(before, name) for name in kept]
    if after.online != before.online:
        return
    for name, version in before.meta.items():
        assert after.meta[name] >= version, name
    for name, seen in before.roles.items():
        now = after.roles[name]
        if now.keys == seen.keys:
            assert now.version >= seen.version, name
            assert now.version > seen.version or now.sha256 == seen.sha256, name
