"""Protocol of `fleet-host dev`: JSON lines. A request for each version of a component to run; events come back."""

from typing import Final

import msgspec

from fleet.protocol.bounds import Count
from fleet.protocol.component_check import Step
from fleet.protocol.manifest import Manifest

LINE_MAX_BYTES: Final = 1 << 20


class DevRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Run this component in place of the one before it, as a swap on a device does.

    Attributes:
        file: path of the component.
        manifest: its manifest, whose grants all hold.
        config: values of its configuration.
        secrets: values of its secrets.
    """

    file: str
    manifest: Manifest
    config: dict[str, str] = {}
    secrets: dict[str, str] = {}


class Compiling(msgspec.Struct, frozen=True, tag="compiling"):
    """A component of `size_bytes` is being compiled, since `elapsed_s`; said at its begin, and every ten seconds."""

    size_bytes: Count
    elapsed_s: Count = 0


class Serving(msgspec.Struct, frozen=True, kw_only=True, tag="serving"):
    """The component takes calls.

    Attributes:
        url: where HTTP requests reach it; empty where no trigger of it is `http`.
        generation: counts the versions that have run, from 1.
        swapped: whether a version before it answered until now.
        compile_ms, start_ms: time that compiling and the start, with the swap, took.
        image_bytes: size of the compiled component.
    """

    url: str
    generation: Count
    swapped: bool
    compile_ms: Count
    start_ms: Count
    image_bytes: Count


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """A device would refuse this component; the version before it, if there is one, answers as before.

    Attributes:
        step, code, problem: as in `ComponentCheckReply`.
        log: last lines of its log.
    """

    step: Step
    code: str
    problem: str
    log: tuple[str, ...] = ()


class Logged(msgspec.Struct, frozen=True, tag="log"):
    """Line of the component's log."""

    line: str


class Called(msgspec.Struct, frozen=True, tag="calls"):
    """Calls since the last event of this kind, by outcome; `p99_us` of all of them."""

    calls: dict[str, Count]
    p99_us: Count


class Fault(msgspec.Struct, frozen=True, tag="fault"):
    """A call trapped or used up a limit, or the instance changed its state for the worse."""

    code: str
    message: str


class HostSaid(msgspec.Struct, frozen=True, tag="host"):
    """Line of the host's own log."""

    line: str


Event = Compiling | Serving | Refused | Logged | Called | Fault | HostSaid
EVENTS: Final[msgspec.json.Decoder[Event]] = msgspec.json.Decoder(Event)
