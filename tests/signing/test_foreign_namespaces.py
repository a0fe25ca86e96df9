"""Another team's namespace that expired or is withheld: blocks no fix, stop or revocation of others."""

from datetime import timedelta

import pytest

from fleet.protocol.codes import RejectCode
from signing.errors import Rejected
from tests.signing.verdicts import code_of
from tests.simulator.repository import Device, Repository


@pytest.mark.parametrize("how", ["expired", "missing"])
def test_an_expired_or_withheld_foreign_namespace_blocks_no_fix_and_no_stop(how: str) -> None:
    """The owner of a namespace must not be able to block another team's fix, or anyone's stop."""
    repo = Repository(("main", "other"))
    foreign, bad = repo.publish("1.0.0", name="stale", space="other"), repo.publish("1.0.0", name="fix")
    device = Device(repo)
    before = device.run(repo.assign(foreign, bad))
    if how == "missing":
        repo.on_fetch = lambda name, data: None if name.endswith(".other.json") else data
        device = Device(repo, state=device.state)  # a new process with an empty cache
    else:
        repo.now += timedelta(days=364)
        for role in ("targets", "main"):
            repo.rewrite(role, lambda signed: setattr(signed, "expires", repo.now + timedelta(days=30)))
        repo.now += timedelta(days=2)

    # A fix; stops of the foreign component, of the own one, and of everything; a revocation of a running component.
    fix = repo.publish("1.0.1", name="fix")
    accepted = device.accept(repo.assign(foreign, fix))
    assert device.resolve(fix).release.name.version == "1.0.1"
    assert device.resolve(foreign, committed=before[0]).release == before[0].release
    assert [item.instance for item in accepted.assignment.items] == ["stale", "fix"]
    assert [item.instance for item in device.accept(repo.assign(fix)).assignment.items] == ["fix"]
    assert device.accept(repo.assign(stop_all=True)).assignment.items == ()
    repo.revoke("1.0.0", name="fix")
    device.accept(repo.assign(foreign, bad))
    with pytest.raises(Rejected) as verdict:
        device.resolve(bad, committed=before[1])
    assert code_of(verdict) is RejectCode.REVOKED
