"""Protocol of `fleet-host check-component`: JSON lines, a reply to each request, in order."""

from enum import StrEnum
from typing import Final

import msgspec

from fleet.protocol.bounds import Count
from fleet.protocol.manifest import Manifest

LINE_MAX_BYTES: Final = 1 << 20


class Step(StrEnum):
    """Step of a check at which a component was refused, in the order of a device."""

    READ = "read"
    COMPILE = "compile"
    LINK = "link"
    START = "start"


class ComponentCheckRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Check of a component.

    Attributes:
        file: path of the component.
        manifest: its manifest; None to grant everything that a device serves.
        name: name of the file in sentences for people; empty for that of `file`.
    """

    file: str
    manifest: Manifest | None = None
    name: str = ""


class ComponentCheckReply(msgspec.Struct, frozen=True, kw_only=True):
    """Verdict of this machine's host on a component.

    Attributes:
        ok: a device of this kind could start it.
        step, code, problem: where it was refused, the device's code for that, and the sentence; empty where `ok`.
        exports: interfaces of the component that a device calls.
        engine, machine: version of Wasmtime and architecture with which it was checked; empty where there is no engine.
        image_bytes: size of the compiled component; 0 where it was not compiled.
    """

    file: str
    ok: bool
    step: Step | None = None
    code: str = ""
    problem: str = ""
    exports: tuple[str, ...] = ()
    engine: str = ""
    machine: str = ""
    image_bytes: Count = 0
