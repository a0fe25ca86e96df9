"""Store as one object: six views of one database, audit log, change signal.

No module outside this package sees SQL. `Access` holds enrolment tokens and operators (their tokens hashed),
certificates and the audit log. Long polls wait at the `ChangeSignal` until something was written.
"""

import asyncio
import contextlib
import hashlib
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from fleet.rollout.model import Member
from fleet.store.consumers import ConsumerStore
from fleet.store.delivery import Boxes, BoxRow, Delivery
from fleet.store.devices import Devices
from fleet.store.readings import ReadingStore
from fleet.store.rollouts import Rollouts
from fleet.store.rows import (
    AssignmentRow,
    AuditRow,
    CertificateRow,
    DeviceRow,
    GroupRow,
    OperatorRow,
    RolloutRow,
    SettledRow,
    TokenRow,
    read,
)
from fleet.store.sqlite import Database


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """Facts that decide what a device should run, as they stood at one moment.

    Attributes:
        newest: its newest assignment; None for none.
        settled: values of its groups by the name of the group, and its pins under the empty name.
        unselected: ids of the rollouts whose selector left it out and that have settled a value.
        in_force: rollouts that have it, oldest first, with its progress.
        own: its own configuration keys by instance.
        attempts: that operators asked for, by instance.
        boxes: its newest ones by instance and name.
    """

    device: DeviceRow
    newest: AssignmentRow | None
    groups: list[GroupRow]
    settled: dict[str, list[SettledRow]]
    unselected: set[str]
    in_force: list[tuple[RolloutRow, Member]]
    own: dict[str, dict[str, str]]
    attempts: dict[str, int]
    boxes: dict[tuple[str, str], BoxRow]


class Store:
    """Devices, access, rollouts, delivery, secrets and readings in one database."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self.devices = Devices(db)
        self.access = Access(db)
        self.rollouts = Rollouts(db)
        self.delivery = Delivery(db)
        self.boxes = Boxes(db)
        self.readings = ReadingStore(db)
        self.consumers = ConsumerStore(db)

    @classmethod
    def open(cls, path: Path, *, fleet: str, create: bool = True) -> "Store":
        """Open a fleet's store. Raises the errors of `fleet.store.sqlite`."""
        return cls(Database.open(path, fleet=fleet, create=create))

    def atomic(self) -> AbstractContextManager[None]:
        """Run a block in one transaction, all or nothing."""
        return self._db.atomic()

    def savepoint(self) -> AbstractContextManager[None]:
        """Run a part of a transaction that is rolled back alone when it raises.

        Raises:
            RolledBackError: the whole transaction is gone.
        """
        return self._db.savepoint()

    def facts(self, devices: Sequence[DeviceRow]) -> dict[str, DeviceFacts]:
        """Return what decides over some devices, by id: as many queries for a hundred devices as for one."""
        ids = [device.id for device in devices]
        groups = self.devices.groups_of_each(devices)
        settled = self.rollouts.settled_in({group.name for each in groups.values() for group in each}, ids)
        newest, in_force = self.delivery.newest(ids), self.rollouts.overlays_of_each(ids)
        own, attempts = self.rollouts.own_keys_of_each(ids), self.delivery.attempts_of_each(ids)
        boxes, unselected = self.boxes.newest_of_each(ids), self.rollouts.unselected(ids)
        return {
            device.id: DeviceFacts(
                device=device,
                newest=newest.get(device.id),
                groups=groups[device.id],
                settled={
                    **{group.name: settled.get((group.name, ""), []) for group in groups[device.id]},
                    "": settled.get(("", device.id), []),
                },
                unselected=unselected.get(device.id, set()),
                in_force=in_force.get(device.id, []),
                own=own.get(device.id, {}),
                attempts=attempts.get(device.id, {}),
                boxes=boxes.get(device.id, {}),
            )
            for device in devices
        }

    def witness(self, *, before: float) -> float | None:
        """Newest time that is known to be past, unix seconds; None for none.

        Until one was stored, the newest certificate, report or act stamped before `before`: what a wrong clock stamped
        later than now proves nothing.
        """
        stored = self._db.value("SELECT value FROM meta WHERE key = 'witness'")
        if stored is not None:
            return float(stored)
        sql = (
            "SELECT max(at) FROM (SELECT max(issued_at) AS at FROM certificates WHERE issued_at <= ?1 UNION ALL "
            "SELECT max(at) FROM reports WHERE at <= ?1 UNION ALL SELECT max(at) FROM audit WHERE at <= ?1)"
        )
        found = self._db.value(sql, before)
        return None if found is None else float(found)

    def set_witness(self, at: float) -> None:
        """Store a time that is known to be past."""
        sql = (
            "INSERT INTO meta (key, value) VALUES ('witness', ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
        )
        self._db.run(sql, str(at))

    def backup(self, path: Path) -> None:
        """Write a consistent copy to a new file."""
        self._db.backup(path)

    def mark_restored(self) -> None:
        """Mark the database as one that may be older than its devices, as a backup is."""
        self._db.run("INSERT OR REPLACE INTO meta (key, value) VALUES ('restored', '')")

    def restored_at(self, *, now: float) -> float | None:
        """Return when a server first ran on this database after it was restored; None where it never was."""
        self._db.run("UPDATE meta SET value = ? WHERE key = 'restored' AND value = ''", str(now))
        found = self._db.value("SELECT value FROM meta WHERE key = 'restored'")
        return None if found is None else float(found)

    def close(self) -> None:
        """Close the database."""
        self._db.close()


def hashed(secret: str) -> str:
    """Hash a token for the store; one round of sha256 is enough for 256 random bits."""
    return hashlib.sha256(secret.encode()).hexdigest()


class Access:
    """Tokens, operators, certificates and the audit log."""

    def __init__(self, db: Database) -> None:
        self._db = db

    # -- enrolment tokens --------------------------------------------------------------------------------------------

    def add_token(self, secret: str, *, group: str, root_sha256: str, expires: float, by: str, now: float) -> None:
        """Add a token by its hash."""
        row = {"secret_sha256": hashed(secret), "group": group, "root_sha256": root_sha256}
        self._db.insert("tokens", {**row, "created_at": now, "expires": expires, "by": by})

    def token(self, secret: str) -> TokenRow | None:
        """Return the token with this secret; None for none."""
        row = self._db.row("SELECT * FROM tokens WHERE secret_sha256 = ?", hashed(secret))
        return None if row is None else read(TokenRow, row)

    def use_token(self, secret: str, *, device: str, now: float) -> bool:
        """Use up a token; return False where it was used before. Part of the transaction that adds the device."""
        sql = "UPDATE tokens SET used_at = ?, device = ? WHERE secret_sha256 = ? AND used_at IS NULL"
        return self._db.run(sql, now, device, hashed(secret)) == 1

    # -- operators ---------------------------------------------------------------------------------------------------

    def add_operator(self, name: str, token: str, *, role: str, now: float) -> bool:
        """Add an operator with a token; return False where the name is taken."""
        row = {"name": name, "token_sha256": hashed(token), "role": role, "created_at": now}
        try:
            self._db.insert("operators", row)
        except sqlite3.IntegrityError:
            return False
        return True

    def set_operator(self, name: str, token: str, *, role: str, now: float) -> None:
        """Add an operator, or give one another token and role."""
        self._db.run(
            "INSERT INTO operators (name, token_sha256, role, created_at) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (name) DO UPDATE SET token_sha256 = excluded.token_sha256, role = excluded.role",
            *(name, hashed(token), role, now),
        )

    def remove_operator(self, name: str) -> bool:
        """Remove an operator; return False where there is none."""
        return self._db.run("DELETE FROM operators WHERE name = ?", name) == 1

    def start_over(self, name: str, token: str, *, now: float) -> None:
        """Remove every operator and enrolment token, and add one admin with a new token."""
        with self._db.atomic():
            self._db.run("DELETE FROM operators")
            self._db.run("DELETE FROM tokens WHERE used_at IS NULL")
            self.set_operator(name, token, role="admin", now=now)

    def operators(self) -> list[OperatorRow]:
        """Return every operator, sorted by name."""
        rows = self._db.rows("SELECT name, role, created_at FROM operators ORDER BY name")
        return [read(OperatorRow, row) for row in rows]

    def role(self, name: str) -> str:
        """Return the role of an operator; empty for nobody."""
        return str(self._db.value("SELECT role FROM operators WHERE name = ?", name) or "")

    def operator(self, token: str) -> tuple[str, str] | None:
        """Return name and role of the operator with this token; None for none."""
        row = self._db.row("SELECT name, role FROM operators WHERE token_sha256 = ?", hashed(token))
        return None if row is None else (row["name"], row["role"])

    # -- certificates ------------------------------------------------------------------------------------------------

    def add_certificate(self, *, serial: str, device: str, not_after: float, pem: str, now: float) -> None:
        """Add a certificate that was issued."""
        row = {"serial": serial, "device": device, "not_after": not_after, "issued_at": now, "pem": pem}
        self._db.insert("certificates", row)

    def certificate(self, serial: str) -> CertificateRow | None:
        """Return a certificate by its serial number in hex."""
        row = self._db.row("SELECT * FROM certificates WHERE serial = ?", serial)
        return None if row is None else read(CertificateRow, row)

    def newest_certificate(self, device: str) -> CertificateRow | None:
        """Return the newest certificate of a device."""
        sql = "SELECT * FROM certificates WHERE device = ? ORDER BY issued_at DESC LIMIT 1"
        row = self._db.row(sql, device)
        return None if row is None else read(CertificateRow, row)

    def count_expiring(self, *, before: float) -> int:
        """Count the devices whose newest certificate ends before then, without revoked ones."""
        sql = (
            "SELECT count(*) AS n FROM (SELECT max(c.not_after) AS ends FROM certificates c "
            "JOIN devices d ON d.id = c.device WHERE NOT d.revoked GROUP BY c.device) WHERE ends < ?"
        )
        row = self._db.row(sql, before)
        assert row is not None
        return int(row["n"])

    def revoked(self) -> list[CertificateRow]:
        """Return every revoked certificate."""
        return [read(CertificateRow, row) for row in self._db.rows("SELECT * FROM certificates WHERE revoked")]

    # -- audit -------------------------------------------------------------------------------------------------------

    def audit(self, *, actor: str, act: str, subject: str, detail: str = "", now: float) -> None:
        """Append an act to the audit log, whose entries are never changed or removed."""
        row = {"at": now, "actor": actor, "act": act, "subject": subject, "detail": detail[:1000]}
        self._db.insert("audit", row)

    def acts(self, limit: int) -> list[AuditRow]:
        """Return acts, newest first."""
        return [read(AuditRow, row) for row in self._db.rows("SELECT * FROM audit ORDER BY number DESC LIMIT ?", limit)]


T = TypeVar("T")


class AuditLog:
    """Record of acts, with the server's time."""

    def __init__(self, store: Store, clock: Callable[[], datetime]) -> None:
        self._store, self._clock = store, clock

    def record(self, actor: str, act: str, subject: str, detail: str = "") -> None:
        """Append an act of an operator."""
        now = self._clock().timestamp()
        self._store.access.audit(actor=actor, act=act, subject=subject, detail=detail, now=now)


class ChangeSignal:
    """Signal that something changed: every waiter then checks whether the change concerns it."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._over = False

    def close(self) -> None:
        """End every wait, now and from now on: the server is about to stop."""
        self._over = True
        self.changed()

    def changed(self) -> None:
        """Wake every waiter."""
        self._event.set()
        self._event = asyncio.Event()

    async def until(self, look: Callable[[], T | None], *, timeout_s: float) -> T | None:
        """Return what `look` finds, as soon as it finds something; None after `timeout_s`, or `close`."""
        found = look()
        if found is not None or timeout_s <= 0 or self._over:
            return found
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while found is None and not self._over:
                    await self._event.wait()
                    found = look()
        return found
