"""Devices as selectors see them, from what the store knows."""

from collections.abc import Iterable

from fleet.protocol import wire
from fleet.protocol.messages import Health
from fleet.protocol.names import BadNameError, TargetName
from fleet.protocol.operator_api import Refusal
from fleet.rollout.selector import BadSelectorError, Device, Selector, Value, parse
from fleet.store.rows import DeviceRow
from fleet.store.store import Store

_FROM_HEALTH = frozenset({"cpus", "memory", "disk", "healthy", "runs"})


def read_selector(text: str, field: str = "where", *, lasting: bool = False) -> Selector:
    """Read a selector that a request has in a field.

    Raises:
        Refusal: it cannot be read.
    """
    try:
        return parse(text, lasting=lasting)
    except BadSelectorError as error:
        example = "write for example: arch=riscv64 and memory>=512MiB and site in (berlin, paris)"
        raise Refusal(400, "bad-request", f"{field}: {error}", action=example) from None


def chosen(store: Store, selector: Selector, rows: Iterable[DeviceRow]) -> set[str]:
    """Return the ids of those devices that a selector takes, as they are now."""
    devices = list(rows)
    groups = store.devices.groups_of_each(devices) if "group" in selector.names else {}
    found = set()
    for row in devices:
        facts = facts_of(row, with_health=bool(_FROM_HEALTH & selector.names))
        facts["group"] = tuple(each.name for each in groups.get(row.id, ()))
        if selector.takes(Device(row.labels, facts)):
            found.add(row.id)
    return found


def facts_of(row: DeviceRow, *, with_health: bool = True) -> dict[str, Value]:
    """Return what is known of a device by the names of selectors, its groups left out; unknown ones are missing."""
    facts: dict[str, Value] = {
        "id": row.id,
        "name": row.name,
        "arch": row.versions.machine or row.machine,
        "online": row.online and not row.revoked,
        "agent": row.versions.agent,
        "host": row.versions.host,
        "engine": row.versions.engine,
        "kernel": row.versions.kernel,
        "os": row.versions.os,
    }
    health = health_of(row) if with_health else None
    if health is not None:
        facts |= {
            "cpus": health.resources.cpus,
            "memory": health.resources.memory_total_bytes,
            "disk": health.resources.disk_total_bytes,
            "healthy": not health.problems and not any(each.error for each in health.instances),
            "runs": tuple(name for each in health.instances for name in _names(each.target)),
        }
    return {name: value for name, value in facts.items() if isinstance(value, bool | tuple) or value}


def health_of(row: DeviceRow) -> Health | None:
    """Return a device's newest health; None for none, or one that is no longer valid (stored by an older server)."""
    if row.health is None:
        return None
    try:
        return wire.decode(Health, row.health)
    except wire.WireError:
        return None


def _names(target: str) -> tuple[str, ...]:
    """Return the ways in which people write the component of a target path."""
    try:
        name = TargetName.from_path(target)
    except BadNameError:
        return ()
    return name.name, f"{name.name}@{name.version}", name.component, str(name)
