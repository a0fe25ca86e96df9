"""Another team's namespace expires, or its file is withheld: nobody else's fix, stop or revocation waits for it."""

from datetime import timedelta

import pytest

from fleet.protocol.codes import RejectCode
from signing.errors import Rejected
from tests.signing.verdicts import code_of
from tests.simulator.repository import Board, Repository


@pytest.mark.parametrize("how", ["expired", "missing"])
def test_a_foreign_namespace_that_expired_or_is_withheld_holds_up_no_fix_and_no_stop(how: str) -> None:
    """Whoever runs, or has lost, one namespace must not keep another team from its fix, or anybody from a stop."""
    repo = Repository(("main", "other"))
    foreign, bad = repo.publish("1.0.0", name="stale", space="other"), repo.publish("1.0.0", name="fix")
    board = Board(repo)
    before = board.run(repo.assign(foreign, bad))
    if how == "missing":
        repo.on_fetch = lambda name, data: None if name.endswith(".other.json") else data
        board = Board(repo, state=board.state)  # a new process, whose cache was lost besides
    else:
        repo.now += timedelta(days=364)
        for role in ("targets", "main"):
            repo.rewrite(role, lambda signed: setattr(signed, "expires", repo.now + timedelta(days=30)))
        repo.now += timedelta(days=2)

    # A fix beside it; a stop of the foreign one, of its own, and of everything; a revocation of what runs.
    fix = repo.publish("1.0.1", name="fix")
    accepted = board.accept(repo.assign(foreign, fix))
    assert board.resolve(fix).release.name.version == "1.0.1"
    assert board.resolve(foreign, committed=before[0]).release == before[0].release
    assert [item.instance for item in accepted.assignment.items] == ["stale", "fix"]
    assert [item.instance for item in board.accept(repo.assign(fix)).assignment.items] == ["fix"]
    assert board.accept(repo.assign(stop_all=True)).assignment.items == ()
    repo.revoke("1.0.0", name="fix")
    board.accept(repo.assign(foreign, bad))
    with pytest.raises(Rejected) as verdict:
        board.resolve(bad, committed=before[1])
    assert code_of(verdict) is RejectCode.REVOKED
