"""Inventory and resources of the device, read from /proc and /sys."""

import contextlib
import os
import platform
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Final

from agent.clock import boot_clock, clock_synchronised
from fleet.protocol import bounds
from fleet.protocol.assignment import COMMANDS
from fleet.protocol.messages import DeviceResources, Versions

_METADATA: Final = "wasmfleet-*.dist-info"
"""Directory of an installed package; `importlib.metadata`, which finds it too, takes 1.5 MB."""


@cache
def _os_name() -> str:
    with contextlib.suppress(OSError):
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    return ""


@cache
def agent_version() -> str:
    """Return the agent's version; empty if it runs from a source tree that is not installed."""
    for place in sys.path:
        for found in sorted(Path(place).glob(_METADATA)):
            return found.name.removesuffix(".dist-info").partition("-")[2]
    return ""


def versions(*, host: str = "", engine: str = "", interfaces: tuple[str, ...] = ()) -> Versions:
    """Return the versions of the device's software; the arguments are as the host reports them."""
    return Versions(
        agent=agent_version(),
        host=host,
        engine=engine,
        python=platform.python_version(),
        kernel=platform.release(),
        os=_os_name(),
        machine=platform.machine(),
        interfaces=interfaces[: bounds.INTERFACES_MAX],
        commands=COMMANDS,
    )


def _memory() -> tuple[int, int]:
    total = available = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == "MemTotal":
                total = int(rest.split()[0]) * 1024
            elif name == "MemAvailable":
                available = int(rest.split()[0]) * 1024
    return total, available


def temperature_c(zones: Path = Path("/sys/class/thermal")) -> float | None:
    """Return the temperature of the warmest thermal zone in degrees Celsius; None without a sensor."""
    found = []
    for path in zones.glob("thermal_zone*/temp"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(path.read_text()) / 1000)
    return max(found, default=None)


def written_bytes() -> int:
    """Return the bytes that this process has written to disk since it started."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/io").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "write_bytes":
                return int(value)
    return 0


def device_resources(state: Path, *, host_written_bytes: int = 0) -> DeviceResources:
    """Return the device's resources now.

    Args:
        state: directory on the file system whose space is reported.
        host_written_bytes: bytes that the host has written, added to the agent's own.
    """
    total, available = _memory()
    disk_total = disk_free = 0
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(state)
        disk_total, disk_free = usage.total, usage.free
    return DeviceResources(
        uptime_s=int(boot_clock()),
        load=round(os.getloadavg()[0], 2),
        cpus=os.cpu_count() or 0,
        memory_total_bytes=total,
        memory_available_bytes=available,
        disk_total_bytes=disk_total,
        disk_free_bytes=disk_free,
        temperature_c=temperature_c(),
        clock_synchronised=clock_synchronised(),
        written_bytes=min(written_bytes() + host_written_bytes, bounds.NUMBER_MAX),
    )
