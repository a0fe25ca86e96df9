"""The verifier: from the root pinned at enrolment to one item that may run, over bytes, a reference time and facts.

`refresh` is the client workflow of the TUF specification (`signing.trusted_metadata`), `accept` judges what the
director signed, `resolve` what publishers signed, each in the order in which an attacker would least like it. Nothing
here opens a file, a socket or a clock.

    trusted = TrustedSet(root=pinned, fetch=fetch, cache=DirectoryCache(path), production=True)
    facts = trusted.refresh(facts=facts, now=facts.time(wall_clock))
    accepted = trusted.accept(envelope, fleet=..., device=..., facts=facts, now=...)  # then store accepted.facts
    resolved = trusted.resolve(item, local=policy, arch="aarch64", committed=before)

The two together are what the Uptane Standard calls full verification (it asks to be cited by section names): first the
time, then what the director says, then what publishers say, and last that both mean the same bytes, the same manifest
and no older security epoch. One TUF repository serves both: the director's word is an envelope under a delegation.

After each call, also one that raised `Rejected`, `trusted.facts` is what is to be stored.
"""

from dataclasses import dataclass
from datetime import datetime

from fleet.protocol.assignment import Assignment, Command, Fresh, Item
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Grants, Manifest
from fleet.protocol.names import TargetName
from signing import director, metadata, policy
from signing.errors import Rejected
from signing.metadata import DIRECTOR, ceiling, is_revoked, profile
from signing.policy import Release, Resolved
from signing.state import VerifierState
from signing.trusted_metadata import Workflow


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """An assignment that stands: persist `facts` before doing anything about it.

    Attributes:
        assignment: complete desired state.
        sha256: of the payload, in hex; freshness statements and reports name it.
        facts: with the accepted version and a raised floor.
    """

    assignment: Assignment
    sha256: str
    facts: VerifierState


class Verifier(Workflow):
    """What one verifier trusts of one repository and its director. See `Workflow` for how it is made."""

    # -- the director: what this board should run ------------------------------------------------------------------

    def accept(
        self, envelope: bytes, *, fleet: str, device: str, facts: VerifierState, now: datetime, late: bool = False
    ) -> Accepted:
        """Judge an assignment, after a refresh.

        In this order: size, signature, fleet and device, version (an equal one must be the same payload), expiry, the
        oldest acceptable snapshot, emptiness.

        Args:
            envelope: as received.
            fleet: the board's own.
            device: the board's own id.
            facts: as stored by the caller, `refresh`'s included.
            now: the reference time; a freshness statement may have raised it since the refresh.
            late: timestamp and snapshot may have expired, as in the `refresh` before.

        Raises:
            Rejected: TOO_LARGE, MALFORMED, UNSIGNED, WRONG_FLEET, WRONG_DEVICE, ROLLBACK, EQUIVOCATION, EXPIRED,
                FREEZE, EMPTY.
        """
        self.facts = facts = facts.together(self.facts)
        self._check_current(fleet, now, late=late)
        accepted, sha256, self.facts = director.assignment(
            self._director(), envelope, fleet=fleet, device=device, facts=facts, now=now, clamp=self._clamp()
        )
        assert self._snapshot is not None
        if self._snapshot.version < accepted.snapshot:
            raise Rejected(
                RejectCode.FREEZE,
                f"the repository shows snapshot {self._snapshot.version}, the director knows {accepted.snapshot}",
            )
        return Accepted(assignment=accepted, sha256=sha256, facts=self.facts)

    def fresh(
        self, envelope: bytes, *, fleet: str, device: str, nonce: str, sha256: str, facts: VerifierState, now: datetime
    ) -> tuple[Fresh, VerifierState]:
        """Judge a freshness statement for the nonce of this connection and the accepted assignment's sha256.

        Raises:
            Rejected: as `accept`; REPLAY for another nonce, FREEZE when the director means another assignment.
        """
        self.facts = facts = facts.together(self.facts)
        self._check_current(fleet, None)
        statement, self.facts = director.fresh(
            self._director(),
            envelope,
            fleet=fleet,
            device=device,
            nonce=nonce,
            sha256=sha256,
            facts=facts,
            now=now,
            clamp=self._clamp(),
        )
        return statement, self.facts

    def command(
        self, envelope: bytes, *, fleet: str, device: str, facts: VerifierState, now: datetime
    ) -> tuple[Command, VerifierState]:
        """Judge a command. Store the facts before obeying: a command is obeyed at most once.

        Raises:
            Rejected: as `accept`; REPLAY for a sequence that is not higher than the last.
        """
        self.facts = facts = facts.together(self.facts)
        self._check_current(fleet, now)
        command, self.facts = director.command(
            self._director(), envelope, fleet=fleet, device=device, facts=facts, now=now
        )
        return command, self.facts

    def _check_current(self, fleet: str, now: datetime | None, *, late: bool = False) -> None:
        """The signed roles are still valid at `now` (None: not asked), and of this fleet."""
        root, targets = self.loaded()
        assert self._timestamp is not None
        assert self._snapshot is not None
        whose = profile(root).get("fleet", fleet)
        if whose != fleet:
            raise Rejected(RejectCode.WRONG_FLEET, f"the repository is of the fleet {whose!r}, not {fleet!r}")
        if now is not None:
            signed = (
                ("root", root),
                ("timestamp", self._timestamp),
                ("snapshot", self._snapshot),
                ("targets", targets),
            )
            for what, each in signed:
                if not late or what in {"root", "targets"}:
                    metadata.check_expiry(each, now, what)

    def _clamp(self) -> datetime:
        """No document raises the floor beyond the first expiry of what vouches for it."""
        root, targets = self.loaded()
        assert self._timestamp is not None
        assert self._snapshot is not None
        return min(root.expires, targets.expires, self._timestamp.expires, self._snapshot.expires)

    def _director(self) -> director.Director:
        _, targets = self.loaded()
        return director.Director(targets=targets, role=DIRECTOR, keys=metadata.key_set(targets, (DIRECTOR,)))

    # -- publishers: what an item is -------------------------------------------------------------------------------

    def resolve(
        self,
        item: Item,
        *,
        facts: VerifierState | None = None,
        local: Grants | None = None,
        arch: str = "",
        committed: Resolved | None = None,
    ) -> Resolved:
        """Find an item's target in the image repository and judge it for this board, after a refresh.

        An item that is the same as the committed one is not looked up again: it is held against revocations as far as
        the namespace can be read, its ceiling, the board's policy and epoch, so that another namespace's expiry or
        a missing file holds up nothing.

        Args:
            item: from an accepted assignment.
            facts: for the security epochs; None for those of the last call.
            local: the board owner's policy.
            arch: the board's CPU, see `policy.check_allowed`.
            committed: what the board runs under this instance name.

        Raises:
            Rejected: UNKNOWN_TARGET, REVOKED, TARGET_MISMATCH, WRONG_ARCH, SECURITY_EPOCH, GRANT_DENIED, MALFORMED,
                and those of `refresh` for the namespace's role.
        """
        self.facts = self.facts if facts is None else facts.together(self.facts)
        if committed is not None and item.same_as(committed.item):
            return self.reconfirm(item, committed.manifest, local=local, arch=arch)
        found = self.search(item.target)
        if found is None:
            raise Rejected(RejectCode.UNKNOWN_TARGET, f"nobody has published {item.target[:200]!r}")
        if found.revoked or found.target is None:
            raise Rejected(RejectCode.REVOKED, f"{item.target} was revoked by its publisher")
        release = policy.release_of(item.target, found.target)
        policy.check_same(item, release)
        grants = policy.check_allowed(item, release, facts=self.facts, ceilings=found.ceilings, local=local, arch=arch)
        return Resolved(item=item, release=release, grants=grants)

    def reconfirm(
        self,
        item: Item,
        manifest: Manifest,
        *,
        facts: VerifierState | None = None,
        local: Grants | None = None,
        arch: str = "",
    ) -> Resolved:
        """Hold what a board committed before against what has changed since, without looking it up again.

        Args:
            item: the same as the committed one, but for attempt and rollout.
            manifest: the publisher's, as it was resolved then.
            facts: see `resolve`.
            local: see `resolve`.
            arch: see `resolve`.

        Raises:
            Rejected: REVOKED, GRANT_DENIED, SECURITY_EPOCH; nothing of a namespace that expired or cannot be fetched.
        """
        self.facts = self.facts if facts is None else facts.together(self.facts)
        _, targets = self.loaded()
        release = Release(
            name=TargetName.from_path(item.target), manifest=manifest, length=item.length, sha256=item.sha256
        )
        ceilings: list[Grants] = []
        for name, _ in targets.delegations.get_roles_for_target(item.target) if targets.delegations else ():
            ceilings += ceiling(targets, name)
            try:
                role = self.load(name, targets, parent="targets", late=True)
            except Rejected:
                continue
            if is_revoked(role, item.target):
                raise Rejected(RejectCode.REVOKED, f"{item.target} was revoked by its publisher")
        grants = policy.check_allowed(item, release, facts=self.facts, ceilings=ceilings, local=local, arch=arch)
        return Resolved(item=item, release=release, grants=grants)

    def lookup(self, path: str) -> Release:
        """What publishers signed under a target path, whether or not this board may run it.

        Raises:
            Rejected: UNKNOWN_TARGET, REVOKED, MALFORMED, and those of `refresh` for the namespace's role.
        """
        found = self.search(path)
        if found is None:
            raise Rejected(RejectCode.UNKNOWN_TARGET, f"nobody has published {path[:200]!r}")
        if found.revoked or found.target is None:
            raise Rejected(RejectCode.REVOKED, f"{path} was revoked by its publisher")
        return policy.release_of(path, found.target)
