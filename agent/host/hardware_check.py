"""Hardware that the device owner's policy names, and the host's service keeps closed: for `fleet-host check`.

`fleet-host.service` has `DevicePolicy=closed`. Its owner opens a node by a drop-in, which is printed here.
"""

import fnmatch
import os
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from fleet.protocol import hardware

CONFIG: Final = Path("/etc/wasmfleet/agent.toml")
_UNIT: Final = "fleet-host.service"
_DROP_IN: Final = f"/etc/systemd/system/{_UNIT}.d/hardware.conf"
_ASK_S: Final = 10.0


def report(config: Path, devices: Path = Path("/dev")) -> list[str]:
    """Return lines about the nodes that policy names: which `devices` lacks, and which the service keeps closed."""
    try:
        nodes = _nodes(_policy(config), devices)
    except (OSError, ValueError) as error:
        return [f"hardware     cannot read the policy: {error}"]
    missing = [node for node in nodes if not node.exists()]
    found = [f"hardware     {_policy_of(node)} names {node}, and this device has no such node" for node in missing]
    there = [node for node in nodes if node not in missing]
    unit = _unit()
    if unit is None:
        refused = [node for node in there if not os.access(node, os.R_OK | os.W_OK)]
        found += [f"hardware     this user may not open {node}: give it the node's group" for node in refused]
    else:
        found += _drop_in([node for node in there if not _opens(unit, node)])
    return found or [f"hardware     {node} is open to the host" for node in there]


def _drop_in(closed: list[Path]) -> list[str]:
    """Return lines that name what the service keeps closed, and the drop-in that opens it; none where nothing is."""
    if not closed:
        return []
    return [
        *(f"hardware     {_policy_of(node)} names {node}, which {_UNIT} keeps closed" for node in closed),
        f"             to open what is closed, save as {_DROP_IN}:",
        "",
        "[Service]",
        *(f"DeviceAllow={node} rw" for node in closed),
        "",
        "             then: systemctl daemon-reload && systemctl restart fleet-host",
    ]


def _policy(config: Path) -> Mapping[str, Any]:
    """Read the owner's policy, as the agent merges its files. Raises `OSError`, `ValueError`."""
    merged: dict[str, Any] = {}
    for path in (config, *sorted((config.parent / "config.d").glob("*.toml"))):
        if path.is_file():
            policy = tomllib.loads(path.read_text(encoding="utf-8")).get("policy", {})
            merged.update(policy if isinstance(policy, dict) else {})
    return merged


def _nodes(policy: Mapping[str, Any], devices: Path) -> list[Path]:
    """Return the nodes that a policy names, each once. Raises `ValueError`."""
    lines = policy.get("gpio", [])
    if not isinstance(lines, list) or not all(isinstance(each, str) for each in lines):
        raise ValueError("policy.gpio is no list of texts")
    ports = policy.get("serial", {})
    if not isinstance(ports, dict) or not all(isinstance(each, str) for each in ports.values()):
        raise ValueError("policy.serial is no table of texts")
    nodes = [devices / hardware.parse_lines(each).chip for each in lines]
    return list(dict.fromkeys([*nodes, *map(Path, ports.values())]))


def _policy_of(node: Path) -> str:
    return "policy.gpio" if node.name.startswith("gpiochip") else "policy.serial"


def _unit() -> dict[str, list[str]] | None:
    """Return what systemd says of the service's devices; None where it has no such service."""
    command = ["systemctl", "show", _UNIT, "--property=LoadState,DevicePolicy,DeviceAllow"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_ASK_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition("=")
        found.setdefault(name, []).append(value)
    return found if found.get("LoadState") == ["loaded"] else None


def _opens(unit: Mapping[str, list[str]], node: Path) -> bool:
    allowed = list(_allowed(unit))
    if unit.get("DevicePolicy") == ["auto"] and not allowed:
        return True
    return any(fnmatch.fnmatchcase(str(node), each) for each in allowed)


def _allowed(unit: Mapping[str, list[str]]) -> Iterator[str]:
    """Yield the paths that may be read and written; a class of devices, such as char-gpio, by its nodes' names."""
    for entry in unit.get("DeviceAllow", ()):
        what, _, access = entry.partition(" ")
        if "r" in access and "w" in access:
            yield f"/dev/{what.removeprefix('char-')}*" if what.startswith("char-") else what
