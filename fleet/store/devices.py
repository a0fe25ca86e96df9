"""Devices, what they last reported, groups and their members, events."""

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import msgspec

from fleet.protocol.codes import AlertKind
from fleet.protocol.messages import Health, Hello, State, Versions
from fleet.protocol.operator_api import GroupPlan
from fleet.store.rows import AlertRow, DeviceRow, EventRow, GroupRow, read
from fleet.store.sqlite import Database, text

NEAR_MAX: Final = 500


class DeviceCount(NamedTuple):
    """Number of devices that are not revoked, and of those online."""

    total: int
    online: int


class Devices:
    """Devices, groups and events of the fleet."""

    def __init__(self, db: Database) -> None:
        self._db = db

    # -- devices ------------------------------------------------------------------------------------------------------

    def add(
        self, *, device: str, name: str, machine: str, sealing_key: str, key_sha256: str, group: str, now: float
    ) -> bool:
        """Add a device; return False where its key, and therefore its id, is known already."""
        with self._db.atomic():
            if self._db.value("SELECT 1 FROM devices WHERE id = ? OR key_sha256 = ?", device, key_sha256):
                return False
            self._db.insert(
                "devices",
                {
                    "id": device,
                    "name": name,
                    "machine": machine,
                    "sealing_key": sealing_key,
                    "key_sha256": key_sha256,
                    "enrolled_at": now,
                },
            )
            if group:
                self.ensure_group(group, now=now)
                self.join(group, [device])
        return True

    def get(self, device: str) -> DeviceRow | None:
        """Return a device."""
        row = self._db.row("SELECT * FROM devices WHERE id = ?", device)
        return None if row is None else read(DeviceRow, row)

    def ids_near(self, text: str) -> list[str]:
        """Return ids that begin as `text` does, without revoked devices; no more than can be compared at once."""
        sql = "SELECT id FROM devices WHERE NOT revoked AND substr(id, 1, ?) = ? ORDER BY id LIMIT ?"
        for length in (len(text), 1):
            if found := [row["id"] for row in self._db.rows(sql, length, text[:length], NEAR_MAX)]:
                return found
        return []

    def some(self, devices: Iterable[str]) -> list[DeviceRow]:
        """Return devices by id."""
        sql = "SELECT * FROM devices WHERE id IN (SELECT value FROM json_each(?)) ORDER BY id"
        return [read(DeviceRow, row) for row in self._db.rows(sql, text(sorted(devices)))]

    def all(self) -> list[DeviceRow]:
        """Return every device, sorted by id."""
        return [read(DeviceRow, row) for row in self._db.rows("SELECT * FROM devices ORDER BY id")]

    def online(self, devices: Iterable[str]) -> dict[str, bool]:
        """Return which of the devices are online, without revoked ones."""
        rows = self._db.rows(
            "SELECT id, online FROM devices WHERE NOT revoked AND id IN (SELECT value FROM json_each(?))",
            text(sorted(devices)),
        )
        return {row["id"]: bool(row["online"]) for row in rows}

    def connected(self) -> set[str]:
        """Return the devices that are online, without revoked ones."""
        return {device for (device,) in self._db.tuples("SELECT id FROM devices WHERE online AND NOT revoked")}

    def count(self) -> DeviceCount:
        """Return the number of devices, and of those online."""
        row = self._db.row("SELECT count(*) AS n, coalesce(sum(online), 0) AS up FROM devices WHERE NOT revoked")
        assert row is not None
        return DeviceCount(row["n"], row["up"])

    def hear_hello(self, hello: Hello, now: float) -> None:
        """Record a device's hello."""
        self._db.run(
            "UPDATE devices SET online = 1, seen_at = ?, boot_id = ?, accepted = ?, deployed = ?, committed = ?, "
            "versions = ? WHERE id = ?",
            *(now, hello.boot_id, hello.accepted, hello.deployed, hello.committed),
            *(text(hello.versions), hello.device),
        )

    def hear_state(self, state: State, now: float) -> bool:
        """Record whether a device is online; return True where that changed."""
        was = self._db.value("SELECT online FROM devices WHERE id = ?", state.device)
        if was is None:
            return False
        if state.online:
            self._db.run("UPDATE devices SET online = 1, seen_at = ? WHERE id = ?", now, state.device)
        else:
            self._db.run("UPDATE devices SET online = 0 WHERE id = ?", state.device)
        if state.versions != Versions():
            self._db.run("UPDATE devices SET versions = ? WHERE id = ?", text(state.versions), state.device)
        return bool(was) != state.online

    def hear_health(self, messages: Iterable[tuple[Health, bytes]], now: float) -> None:
        """Record the newest health of some devices, with the bytes as received."""
        self._db.many(
            "UPDATE devices SET health_at = ?, health = ?, seen_at = ?, accepted = max(accepted, ?), "
            "committed = ?, versions = ? WHERE id = ?",
            (
                (now, raw, now, health.accepted, health.committed, text(health.versions), health.device)
                for health, raw in messages
            ),
        )

    def signs(self, device: str) -> bool:
        """Tell whether a device has ever signed a report."""
        return bool(self._db.value("SELECT signs FROM devices WHERE id = ?", device))

    def set_signs(self, device: str) -> None:
        """Record that a device signs its reports: unsigned ones are refused from now on."""
        self._db.run("UPDATE devices SET signs = 1 WHERE id = ? AND NOT signs", device)

    def sealing_proof(self, device: str) -> str:
        """Return the device's proof of its sealing key; empty where it sent none."""
        return str(self._db.value("SELECT sealing_proof FROM devices WHERE id = ?", device) or "")

    def set_sealing_proof(self, device: str, proof: str) -> None:
        """Record the device's proof of its sealing key."""
        self._db.run("UPDATE devices SET sealing_proof = ? WHERE id = ?", proof, device)

    def touch(self, devices: Iterable[str], now: float) -> None:
        """Record the time at which devices were last heard from."""
        self._db.many("UPDATE devices SET seen_at = ? WHERE id = ?", ((now, device) for device in devices))

    def set_labels(self, device: str, labels: dict[str, str]) -> None:
        """Replace the labels of a device."""
        self._db.run("UPDATE devices SET labels = ? WHERE id = ?", text(labels), device)

    def revoke(self, device: str) -> None:
        """Revoke a device: its key is never trusted again."""
        with self._db.atomic():
            self._db.run("UPDATE devices SET revoked = 1, online = 0 WHERE id = ?", device)
            self._db.run("UPDATE certificates SET revoked = 1 WHERE device = ?", device)

    def next_command(self, device: str, *, at_least: int = 1) -> int:
        """Return the sequence of a device's next command; `at_least` keeps a restored store from repeating some."""
        with self._db.atomic():
            self._db.run("UPDATE devices SET commands = max(commands + 1, ?) WHERE id = ?", at_least, device)
            return int(self._db.value("SELECT commands FROM devices WHERE id = ?", device))

    # -- groups ------------------------------------------------------------------------------------------------------

    def ensure_group(self, name: str, *, now: float) -> bool:
        """Create a group with a list of members unless the name is taken; return True where it was created."""
        return bool(self._db.run("INSERT OR IGNORE INTO groups (name, created_at) VALUES (?, ?)", name, now))

    def change_group(self, name: str, *, priority: int | None, selector: dict[str, str] | None) -> None:
        """Change priority and selector of a group; None leaves a value as it is."""
        if priority is not None:
            self._db.run("UPDATE groups SET priority = ? WHERE name = ?", priority, name)
        if selector is not None:
            self._db.run("UPDATE groups SET selector = ? WHERE name = ?", text(selector), name)

    def set_policy(self, name: str, plan: GroupPlan | None) -> None:
        """Set the plan of a group, or clear it (None)."""
        self._db.run("UPDATE groups SET policy = ? WHERE name = ?", text(plan), name)

    def group(self, name: str) -> GroupRow | None:
        """Return a group."""
        row = self._db.row("SELECT * FROM groups WHERE name = ?", name)
        return None if row is None else read(GroupRow, row)

    def groups(self) -> list[GroupRow]:
        """Return every group, sorted by name."""
        return [read(GroupRow, row) for row in self._db.rows("SELECT * FROM groups ORDER BY name")]

    def join(self, group: str, devices: Iterable[str]) -> None:
        """Add devices to a group's list."""
        self._db.many('INSERT OR IGNORE INTO members ("group", device) VALUES (?, ?)', ((group, d) for d in devices))

    def leave(self, group: str, devices: Iterable[str]) -> None:
        """Remove devices from a group's list."""
        self._db.many('DELETE FROM members WHERE "group" = ? AND device = ?', ((group, d) for d in devices))

    def listed(self, group: str) -> list[str]:
        """Return the ids on a group's list."""
        return [row["device"] for row in self._db.rows('SELECT device FROM members WHERE "group" = ?', group)]

    def members(self, group: GroupRow) -> list[str]:
        """Return the members of a group, without revoked devices."""
        if group.selector:
            rows = self._db.rows("SELECT id, labels FROM devices WHERE NOT revoked ORDER BY id")
            return [row["id"] for row in rows if _chosen(group.selector, msgspec.json.decode(row["labels"]))]
        rows = self._db.rows(
            'SELECT id FROM devices JOIN members ON device = id WHERE "group" = ? AND NOT revoked ORDER BY id',
            group.name,
        )
        return [row["id"] for row in rows]

    def groups_of(self, device: DeviceRow) -> list[GroupRow]:
        """Return the groups of a device, sorted by name."""
        return self.groups_of_each([device])[device.id]

    def groups_of_each(self, devices: Sequence[DeviceRow]) -> dict[str, list[GroupRow]]:
        """Return the groups of each device, sorted by name."""
        groups = self.groups()
        listed: dict[str, set[str]] = {}
        sql = 'SELECT "group", device FROM members WHERE device IN (SELECT value FROM json_each(?))'
        for row in self._db.rows(sql, text(sorted(device.id for device in devices))):
            listed.setdefault(row["device"], set()).add(row["group"])
        return {
            device.id: [
                group
                for group in groups
                if (
                    _chosen(group.selector, device.labels)
                    if group.selector
                    else group.name in listed.get(device.id, ())
                )
            ]
            for device in devices
        }

    # -- events ------------------------------------------------------------------------------------------------------

    def note(self, device: str, kind: str, words: str, *, now: float, rollout: str = "", assignment: int = 0) -> None:
        """Write an event into the device's timeline."""
        self._db.insert(
            "events",
            {
                "device": device,
                "at": now,
                "kind": kind,
                "text": words,
                "rollout": rollout,
                "assignment": assignment,
            },
        )

    def events(self, device: str, limit: int) -> list[EventRow]:
        """Return the events of a device, newest first."""
        sql = "SELECT * FROM events WHERE device = ? ORDER BY at DESC, id DESC LIMIT ?"
        return [read(EventRow, row) for row in self._db.rows(sql, device, limit)]

    # -- alerts ------------------------------------------------------------------------------------------------------

    def alert(self, device: str, kind: AlertKind, words: str, *, now: float, until: float) -> bool:
        """Raise an alert, or show one for longer; true for a new one."""
        shown = self._db.value("SELECT 1 FROM alerts WHERE device = ? AND kind = ? AND until > ?", device, kind, now)
        since = "since" if shown else "excluded.since"
        self._db.run(
            "INSERT INTO alerts (device, kind, since, until, text) VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "  # noqa: S608 - ours
            f"since = {since}, until = excluded.until, text = excluded.text",
            *(device, kind, now, until, words),
        )
        return not shown

    def alerts(self, device: str = "", *, now: float = 0.0) -> list[AlertRow]:
        """Return the alerts that are shown at a time, of one device or of all, newest first."""
        sql = "SELECT * FROM alerts WHERE until > ? AND ? IN ('', device) ORDER BY since DESC, device"
        return [read(AlertRow, row) for row in self._db.rows(sql, now, device)]

    def suspended(self) -> list[str]:
        """Return the devices whose messages the broker refuses."""
        sql = "SELECT device FROM alerts WHERE kind = ? ORDER BY device"
        return [row["device"] for row in self._db.rows(sql, AlertKind.SUSPENDED)]

    def forget_alerts(self, *, before: float) -> None:
        """Drop the alerts whose time is over."""
        self._db.run("DELETE FROM alerts WHERE until <= ?", before)

    def forget_alert(self, device: str, kind: AlertKind) -> None:
        """Drop an alert, whenever it would end."""
        self._db.run("DELETE FROM alerts WHERE device = ? AND kind = ?", device, kind)


def _chosen(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.items())
