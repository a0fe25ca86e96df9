"""How the board is: its own figures, read from /proc and /sys, and None where it has no such sensor."""

import contextlib
import os
import platform
import shutil
from functools import cache
from importlib import metadata
from pathlib import Path

from agent.clock import boot_clock, clock_synchronised
from fleet.protocol import bounds
from fleet.protocol.messages import DeviceResources, Versions


@cache
def _os_name() -> str:
    with contextlib.suppress(OSError):
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    return ""


def agent_version() -> str:
    """This program's version; empty when it runs from a tree that was never installed."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("wasmfleet")
    return ""


def versions(*, host: str = "", engine: str = "") -> Versions:
    """What software this board runs; host and engine are the host's word."""
    return Versions(
        agent=agent_version(),
        host=host,
        engine=engine,
        python=platform.python_version(),
        kernel=platform.release(),
        os=_os_name(),
        machine=platform.machine(),
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
    """The warmest thermal zone in degrees Celsius; None where the board has no sensor."""
    found = []
    for path in zones.glob("thermal_zone*/temp"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(path.read_text()) / 1000)
    return max(found, default=None)


def written_bytes() -> int:
    """What this process has caused to be written to disk since it started."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/io").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "write_bytes":
                return int(value)
    return 0


def device_resources(state: Path, *, host_written_bytes: int = 0) -> DeviceResources:
    """The board's figures now; `state` names the file system that counts."""
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
