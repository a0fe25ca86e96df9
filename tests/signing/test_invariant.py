"""Invariants under publishing, rotations, rollbacks, restored servers, attacks and power cuts in any order.

Safety, after every step: whatever the device accepts was published by its publisher, was not revoked as far as the
device knows, is not below the committed epoch, and comes from an assignment not older than the last. Liveness: as soon
as attacks stop, an honest assignment is accepted.
"""

from datetime import timedelta
from typing import Any

import msgspec
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fleet.protocol.assignment import Item
from signing import director
from signing.errors import Rejected
from signing.state import VerifierState
from signing.updater import MemoryCache
from tests.simulator.repository import Device, Repository, signer


class Fleet(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.repo = Repository(("main", "other"))
        self.published: dict[str, Item] = {}
        self.revoked: set[str] = set()
        self.heard: set[str] = set()
        self.envelopes: list[bytes] = []
        self.deployed: list[Item] = []
        self.seen: list[tuple[str, bytes]] = []
        self.cache = MemoryCache()
        self.device = Device(self.repo, cache=self.cache)
        self.epochs = {"main": 0, "other": 0}
        self.accepted = 0
        self.number = 0
        self.publish(0, "main")

    # -- honest people

    @rule(epoch=st.integers(0, 2), space=st.sampled_from(["main", "other"]))
    def publish(self, epoch: int, space: str) -> None:
        self._keep()
        self.number += 1
        item = self.repo.publish(f"1.0.{self.number}", space=space, security_epoch=epoch)
        self.published[item.target] = item

    @precondition(lambda self: len(self.published) > len(self.revoked) + 1)
    @rule(data=st.data())
    def revoke(self, data: st.DataObject) -> None:
        target = data.draw(st.sampled_from(sorted(set(self.published) - self.revoked)))
        self._keep()
        _, _, space, name, file = ("", *target.split("/"))
        self.repo.revoke(file.removesuffix(".wasm"), name=name, space=space)
        self.revoked.add(target)

    @rule(role=st.sampled_from(["root", "targets", "snapshot", "timestamp", "director", "main", "other"]))
    def rotate(self, role: str) -> None:
        self._keep()
        if role in {"director", "main", "other"}:
            self.repo.rotate_delegation(role)
            # From now on, documents of the old director are refused, and its versions are forgotten.
            self.accepted = 0 if role == "director" else self.accepted
        else:
            self.repo.rotate(role)
        self.repo.online()

    @rule(hours=st.integers(1, 30))
    def time_passes(self, hours: int) -> None:
        self._keep()
        self.repo.now += timedelta(hours=hours)
        self.repo.online()

    @rule(data=st.data())
    def deploy(self, data: st.DataObject) -> None:
        self._deploy(self.published[data.draw(st.sampled_from(sorted(self.published)))])

    @precondition(lambda self: len(self.deployed) > 1)
    @rule()
    def undo(self) -> None:
        """Deploy the release before in a new assignment: older releases are accepted, older assignments are not."""
        self._deploy(self.deployed[-2])

    @precondition(lambda self: bool(self.envelopes))
    @rule(data=st.data())
    def restore_the_server(self, data: st.DataObject) -> None:
        """Restore an older database of the server, until it learns from the device what that has accepted."""
        self.repo.assignments = data.draw(st.integers(0, self.repo.assignments))
        if self.repo.assignments + 1 < self.accepted:
            item = self.published[data.draw(st.sampled_from(sorted(self.published)))]
            assert not self._offer(self.repo.assign(item))
        known = self.device.state.assignment
        self.repo.assignments = max(self.repo.assignments, 0 if known is None else known.version)

    def _deploy(self, item: Item) -> None:
        envelope = self.repo.assign(item)
        self.envelopes.append(envelope)
        self.deployed.append(item)
        space = item.target.split("/")[1]
        manifest = self.repo.signed(space).targets[item.target].custom["manifest"]
        allowed = item.target not in self.revoked and manifest["security_epoch"] >= self.epochs[space]
        assert self._offer(envelope) is allowed

    # -- attackers

    @precondition(lambda self: bool(self.envelopes))
    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        # The last but one is the most likely to be accepted.
        self._offer(data.draw(st.sampled_from(self.envelopes)))
        self._offer(self.envelopes[-2:][0])

    @rule(data=st.data(), kind=st.sampled_from(["forged", "altered", "damaged"]))
    def forge(self, data: st.DataObject, kind: str) -> None:
        item = self.published[data.draw(st.sampled_from(sorted(self.published)))]
        evil = msgspec.structs.replace(item, sha256="ab" * 32)
        if kind == "forged":
            envelope = director.sign_assignment(self.repo.assignment(item), signer())
        elif kind == "altered":
            envelope = self.repo.assign(evil)
            self.envelopes.append(envelope)
        else:
            damaged = bytearray(self.repo.assign(item))
            damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 0x40
            envelope = bytes(damaged)
        self._offer(envelope)

    @precondition(lambda self: bool(self.seen))
    @rule(data=st.data())
    def show_an_old_file(self, data: st.DataObject) -> None:
        name, old = data.draw(st.sampled_from(self.seen))
        honest = self.repo.files[name]
        self.repo.files[name] = old
        if self.envelopes:
            self._offer(self.envelopes[-1], meddled=True)
        self.repo.files[name] = honest

    @rule(data=st.data())
    def withhold_a_file(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.repo.files)))
        honest = self.repo.files.pop(name)
        if self.envelopes:
            self._offer(self.envelopes[-1], meddled=True)
        self.repo.files[name] = honest

    @rule(data=st.data())
    def tear_the_cache(self, data: st.DataObject) -> None:
        for name in data.draw(st.lists(st.sampled_from([*sorted(self.cache.files), "none"]))):
            if name in self.cache.files:
                self.cache.files[name] = self.cache.files[name][: data.draw(st.integers(0, 400))]

    @rule()
    def restart_the_device(self) -> None:
        self.device = Device(self.repo, state=VerifierState.decode(self.device.state.encode()), cache=self.cache)

    # -- invariants

    def _offer(self, envelope: bytes, *, meddled: bool = False) -> bool:
        if not meddled:
            self.heard = set(self.revoked)
        before = self.device.state
        try:
            resolved: list[Any] = self.device.run(envelope)
        except Rejected:
            return False
        finally:
            after = self.device.state
            assert after.root >= before.root
            assert after.floor >= before.floor
        assert after.assignment is not None
        assert after.assignment.version >= self.accepted
        self.accepted = after.assignment.version
        for each in resolved:
            published = self.published[each.item.target]
            assert (each.sha256, each.length) == (published.sha256, published.length)
            assert each.item.target not in self.heard
            space = each.release.name.namespace
            assert each.manifest.security_epoch >= self.epochs[space]
            self.epochs[space] = each.manifest.security_epoch
            self.device.commit(each.release.name.component, each.manifest.security_epoch)
        return True

    @invariant()
    def the_committed_epoch_is_remembered(self) -> None:
        if hasattr(self, "epochs"):
            for space, epoch in self.epochs.items():
                assert self.device.state.epochs.get(f"{space}/hello", 0) == epoch

    def _keep(self) -> None:
        """Keep a copy of every file ever served, for the attacker."""
        self.seen += [(name, self.repo.files[name]) for name in ("timestamp.json",)]


TestFleet = Fleet.TestCase
TestFleet.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow],
    phases=(Phase.explicit, Phase.generate),  # no shrinking of failures: it takes minutes
)
