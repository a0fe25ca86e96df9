"""Judge a component before it is published: by this machine's host where it is installed, else by a table.

`fleet-host check-component` compiles, links and starts it as a device does. It comes with `wasmfleet[agent]`;
without it the table of interfaces that devices serve is asked, which knows neither types nor memories. Devices of
another architecture or version are judged by what they reported.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec

from fleet.component import component_toml, reader, served
from fleet.component.reader import Component
from fleet.protocol import wire
from fleet.protocol.codes import RejectCode
from fleet.protocol.component_check import ComponentCheckReply, ComponentCheckRequest
from fleet.protocol.files import create_exclusive
from fleet.protocol.manifest import BadManifestError, Grants, Manifest
from fleet.protocol.operator_api import DeviceRow, Excluded

_NEEDS: Final = ("agent", "wasmtime", "httptools")
_HOST_S: Final = 900
TABLE: Final = "the table of interfaces that devices serve"


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """Findings about a component before any device has it.

    Attributes:
        checked_by: the host of this machine with its engine, or the table and why it had to do.
        problems: why no device could run it; empty for nothing.
        notes: what its author may want to know.
        excluded: devices that could not run it.
        suggestion: a sufficient `component.toml`, where it needs one; else empty.
        component, manifest: None where the file is no component, or its manifest is not complete.
        engine, machine: version of Wasmtime and architecture of the host; empty where the table judged.
    """

    checked_by: str
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    excluded: tuple[Excluded, ...] = ()
    suggestion: str = ""
    component: Component | None = None
    manifest: Manifest | None = None
    engine: str = ""
    machine: str = ""

    def view(self) -> dict[str, object]:
        """Return what programs are told."""
        names = ("checked_by", "problems", "notes", "excluded", "engine", "machine")
        return {name: getattr(self, name) for name in names} | {"component_toml": self.suggestion}


def examine(file: Path, data: bytes, text: str | None, *, adapted: bool = False) -> Examined:
    """Judge a component file and its manifest.

    Args:
        file: the component's.
        data: its bytes.
        text: of its `component.toml`; None where there is none.
        adapted: the file has other bytes, which were adapted.

    Raises:
        BadManifestError: the text is not a manifest, or contradicts the component.
    """
    try:
        component = reader.read(data, file_name=file.name)
    except reader.NotAComponentError as error:
        return Examined(checked_by="reading its bytes", problems=(str(error),))
    suggestion = ""
    try:
        manifest = component_toml.describe(component, text, file_name=file.name)
    except component_toml.NeedsTomlError as error:
        problem, suggestion = str(error), error.suggestion
    except component_toml.UnservedError as error:
        problem = str(error)
    except BadManifestError as error:
        if text is not None:
            raise
        problem = str(error)  # nothing to call, or no name
    else:
        return judge(file, component, manifest, adapted=data if adapted else None)
    judged = judge(file, component, None, adapted=data if adapted else None)
    same = judged.problems if suggestion else ()  # otherwise they would say the same again
    return replace(judged, problems=(problem, *same), suggestion=suggestion)


def judge(file: Path, component: Component, manifest: Manifest | None, *, adapted: bytes | None = None) -> Examined:
    """Judge a component by this machine's host, else by the table.

    Args:
        file: the component's.
        component: as read.
        manifest: None where it has none that is complete, so that everything that devices serve is granted.
        adapted: the component, where the file is what it was adapted from.
    """
    problems = served.problems(component, manifest, file_name=file.name)
    notes = served.notes(component, Grants() if manifest is None else manifest.grants)
    if manifest is not None and (waits := served.serial(manifest)):
        notes = (*notes, waits)
    with _as_file(file, adapted) as path:
        reply, why = _ask_host(path, file.name, manifest)
    seen = Examined(
        checked_by=f"{TABLE}: {why}", problems=problems, notes=notes, component=component, manifest=manifest
    )
    if reply is None:
        return seen
    return replace(
        seen,
        checked_by=f"this machine's host: wasmtime {reply.engine}, {reply.machine}",
        problems=problems or ((reply.problem,) if reply.problem else ()),
        engine=reply.engine,
        machine=reply.machine,
    )


@contextlib.contextmanager
def _as_file(file: Path, adapted: bytes | None) -> Iterator[Path]:
    """Return a file with the component's bytes: its own, or one for as long as it is asked about."""
    if adapted is None:
        yield file
        return
    with tempfile.TemporaryDirectory() as directory:
        other = Path(directory, "component.wasm")
        create_exclusive(other, adapted, mode=0o600)
        yield other


def is_host_installed() -> bool:
    """Tell whether this machine has the host of devices: it comes with `wasmfleet[agent]`."""
    return all(importlib.util.find_spec(name) is not None for name in _NEEDS)


def host_command(*arguments: str) -> list[str]:
    """Return the command line of this machine's host."""
    return [sys.executable, "-P", "-m", "agent.host.cli", *arguments]


def _ask_host(file: Path, name: str, manifest: Manifest | None) -> tuple[ComponentCheckReply | None, str]:
    """Return what this machine's host says, or None and why it cannot be asked."""
    if not is_host_installed():
        return None, "wasmfleet[agent] is not installed here, so types, memory and start were not tried"
    request = ComponentCheckRequest(file=str(file.resolve()), manifest=manifest, name=name)
    try:
        done = subprocess.run(
            host_command("check-component"),
            input=msgspec.json.encode(request) + b"\n",
            capture_output=True,
            check=False,
            timeout=_HOST_S,
            env=os.environ | {"PYTHONSAFEPATH": "1"},
        )
        reply = msgspec.json.decode(done.stdout, type=ComponentCheckReply)
    except subprocess.TimeoutExpired:
        return None, f"this machine's host did not answer within {_HOST_S} s"
    except wire.JSON_ERRORS:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        return None, f"this machine's host does not start: {words[-1] if words else done.returncode}"
    if reply.code in {RejectCode.NO_ENGINE, RejectCode.INTERNAL, RejectCode.CONTAINMENT}:
        return None, f"this machine's host could not try it: {reply.problem}"
    return reply, ""


def on_devices(seen: Examined, devices: Sequence[DeviceRow]) -> Examined:
    """Add what devices reported: those that could not run it, and kinds of devices for which it was not compiled."""
    component, manifest = seen.component, seen.manifest
    if component is None or manifest is None or not devices:
        return seen
    excluded = tuple(found for row in devices if (found := unfit(row, component, manifest)) is not None)
    nobody = ("none of these devices could run it",) if len(excluded) == len(devices) else ()
    return replace(
        seen,
        excluded=excluded,
        problems=(*seen.problems, *nobody),
        notes=(*seen.notes, *_not_compiled_for(devices, seen)),
    )


def unfit(device: DeviceRow, component: Component | None, manifest: Manifest) -> Excluded | None:
    """Explain by what a device reported why it could not run a component; None when nothing speaks against it.

    `component`: None where its bytes are not here.
    """
    said = ""
    if device.revoked:
        said = "it is revoked"
    elif manifest.arch and device.machine and device.machine not in manifest.arch:
        said = f"it is {device.machine}, the component is for {', '.join(manifest.arch)}"
    elif device.versions.host and not device.versions.engine:
        said = "it has no engine"
    elif reported := device.versions.interfaces:
        lacking = () if component is None else served.unserved(component, device=reported)
        uncalled = served.uncalled(component, manifest, reported)
        said = f"its host does not serve {lacking[0].name}: upgrade its agent" if lacking else ""
        said = said or (f"its host is too old, {uncalled}: upgrade its agent" if uncalled else "")
        said = said or served.not_offered(manifest.grants, reported)
    said = said or served.too_large(manifest, device.memory_bytes)
    return Excluded(device=device.id, reason=said) if said else None


def _not_compiled_for(devices: Sequence[DeviceRow], seen: Examined) -> tuple[str, ...]:
    """Name the engines and architectures of devices for which this machine's host says nothing certain."""
    if not seen.engine:
        return ()
    others: dict[str, int] = {}
    for device in devices:
        machine, engine = device.machine, device.versions.engine
        if machine and engine and (machine, engine) != (seen.machine, seen.engine):
            kind = f"{machine} with wasmtime {engine}"
            others[kind] = others.get(kind, 0) + 1
    return tuple(
        f"not compiled for {kind} (devices: {count}): judged by what they reported"
        for kind, count in sorted(others.items())
    )
