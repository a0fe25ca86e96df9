"""wasi:gpio: digital lines, by the label that a grant gives each.

The supervisor requests the lines, and the worker has a descriptor of each, through which the kernel reaches no other
line. A level is read or set by one call of the kernel, which waits for nothing. A pin's handle is its place among the
grants.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from agent.host.engine.codec import Failure, Signature
from agent.host.engine.host_interface import Function, HostInterface, Surroundings, Variant, own, record
from agent.host.interfaces.package import Package
from agent.host.ipc import gpio_abi
from fleet.component import wasi
from fleet.protocol.hardware import EACH_MAX, GpioLine

NAME: Final = "wasi:gpio"
HANDLES_MAX: Final = 64
"""Pins that an instance may have open at once."""

_OUT, _STATEFUL, _IN, _IN_OUT = "digital-out-pin", "stateful-digital-out-pin", "digital-in-pin", "digital-in-out-pin"
_RESOURCES: Final = {_OUT: 40, _STATEFUL: 41, _IN: 42, _IN_OUT: 43}
_DIRECTIONS: Final = {_OUT: "output", _STATEFUL: "output", _IN: "input", _IN_OUT: "both"}
_MODES: Final = {"output": "out", "input": "in"}
_OPPOSITES: Final = (
    {"active-high", "active-low"},
    {"pull-up", "pull-down"},
    {"active", "inactive"},
    {"input", "output"},
)
_FOREIGN: Final[dict[str, set[str]]] = {
    "output": {"input", "pull-up", "pull-down"},
    "input": {"output", "active", "inactive"},
    "both": set(),
}
"""Flags that are not for pins of a direction."""


class _RefusedError(Exception):
    """A call ends with this case of `gpio-error`."""

    def __init__(self, case: str, text: str | None = None) -> None:
        super().__init__(case)
        self.error = Variant(case, text)


class Pins:
    """Lines of one worker's instance, with the descriptor of each."""

    def __init__(self, lines: tuple[GpioLine, ...], fds: tuple[int, ...]) -> None:
        self.lines = lines
        self.fds = fds
        self._open = 0

    def reset(self) -> None:
        """Forget the pins of an instance that has ended; their levels stay."""
        self._open = 0

    def opened(self) -> None:
        """Count a pin that the guest gets. Raises `_RefusedError`: it has too many."""
        if self._open >= HANDLES_MAX:
            raise _RefusedError("other", f"{HANDLES_MAX} pins are open: drop some")
        self._open += 1

    def dropped(self) -> None:
        """Take note that the guest has dropped a pin."""
        self._open = max(0, self._open - 1)


_NO_PINS: Final = Pins((), ())


class _Calls:
    """Functions of one import of `wasi:gpio/digital` for one instance."""

    def __init__(self, around: Surroundings) -> None:
        part = around.parts.get(NAME)
        self._pins = part if isinstance(part, Pins) else _NO_PINS
        self._log = around.log

    def get(self, resource: str, _store: Any, label: str, flags: list[set[str]]) -> Any:
        """Open a pin of a kind."""
        wanted = set().union(*flags)
        at = self._find(resource, label, wanted)
        self._pins.opened()
        if _DIRECTIONS[resource] == "output" and wanted & {"active", "inactive"}:
            gpio_abi.set_active(self._pins.fds[at], active="active" in wanted)
        return own(at, _RESOURCES[resource])

    def _find(self, resource: str, label: str, wanted: set[str]) -> int:
        """Return the place of a granted line. Raises `_RefusedError`."""
        direction = _DIRECTIONS[resource]
        if any(pair <= wanted for pair in _OPPOSITES) or wanted & _FOREIGN[direction]:
            raise _RefusedError("invalid-flag")
        at = next((at for at, line in enumerate(self._pins.lines) if line.name == label), None)
        called = f"{wasi.GPIO}.{resource}.get of {label[:40]!r} is denied"
        if at is None:
            self._log.deny(wasi.GPIO, f"{called}: no entry of grants.gpio has this name")
            raise _RefusedError("pin-not-allowed")
        line = self._pins.lines[at]
        allowed = {"input", "output", "active", "inactive", f"active-{line.active}", f"pull-{line.pull}"}
        if line.direction != direction or not wanted <= allowed:
            granted = f"grants.gpio has it as {line.direction}, active {line.active}, pull {line.pull}"
            self._log.deny(wasi.GPIO, f"{called}: {granted}")
            raise _RefusedError("pin-mode-not-allowed")
        return at

    def drop(self, _store: Any, _at: int) -> None:
        """Take note that the guest has dropped a pin."""
        self._pins.dropped()

    def _fd(self, store: Any, pin: Any) -> int:
        return self._pins.fds[int(pin.to_host(store).rep)]

    def get_config(self, store: Any, pin: Any) -> Any:
        """Describe a pin."""
        line = self._pins.lines[int(pin.to_host(store).rep)]
        return record(
            label=line.name,
            pin_mode=_MODES[line.direction],
            active_level=f"active-{line.active}",
            pull_resistor=None if line.pull == "none" else f"pull-{line.pull}",
        )

    def is_ready(self, store: Any, pin: Any) -> bool:
        """Tell whether a pin can be used: its line was requested before the component began."""
        pin.drop(store)
        return True

    def set_state(self, store: Any, pin: Any, state: str) -> None:
        """Set an output."""
        gpio_abi.set_active(self._fd(store, pin), active=state == "active")

    def set_active(self, store: Any, pin: Any) -> None:
        """Set an output."""
        gpio_abi.set_active(self._fd(store, pin), active=True)

    def set_inactive(self, store: Any, pin: Any) -> None:
        """Set an output."""
        gpio_abi.set_active(self._fd(store, pin), active=False)

    def toggle(self, store: Any, pin: Any) -> None:
        """Set an output to what it is not."""
        fd = self._fd(store, pin)
        gpio_abi.set_active(fd, active=not gpio_abi.is_active(fd))

    def read(self, store: Any, pin: Any) -> str:
        """Read a level."""
        return "active" if gpio_abi.is_active(self._fd(store, pin)) else "inactive"

    def is_active(self, store: Any, pin: Any) -> bool:
        """Read a level."""
        return gpio_abi.is_active(self._fd(store, pin))

    def is_inactive(self, store: Any, pin: Any) -> bool:
        """Read a level."""
        return not gpio_abi.is_active(self._fd(store, pin))

    def watch(self, store: Any, pin: Any, *_state: str) -> None:
        """Refuse to watch a pin: pollables are the engine's, which has none for a line."""
        pin.drop(store)
        raise _RefusedError("operation-not-supported")


def _failing(call: Callable[..., Any]) -> Function:
    """Return a function for the linker whose errors are results."""

    def called(store: Any, *arguments: Any) -> Any:
        try:
            return call(store, *arguments)
        except _RefusedError as error:
            return Failure(error.error)
        except OSError:
            return Failure(Variant("hardware-fault"))

    return called


_ERROR: Final = (
    "variant { hardware-fault, already-in-use, pin-not-allowed, pin-mode-not-allowed, undefined-pin-label, "
    "pin-mode-not-available, would-block, operation-not-supported, invalid-flag, other(string) }"
)
_STATE: Final = "enum { active, inactive }"
_FLAGS: Final = "flags { active-high, active-low, pull-up, pull-down, active, inactive, input, output }"
_CONFIG: Final = (
    "record { label: string, pin-mode: enum { in, out, in-out }, active-level: enum { active-high, active-low }, "
    "pull-resistor: option<enum { pull-up, pull-down }> }"
)
_SELF: Final = ("self", "borrow")
_DONE: Final = Signature((_SELF,), f"result<_, {_ERROR}>")
_ASKED: Final = Signature((_SELF,), f"result<bool, {_ERROR}>")
_TOLD: Final = Signature((_SELF,), f"result<{_STATE}, {_ERROR}>")
_WATCHED: Final = Signature((_SELF,), f"result<own, {_ERROR}>")

_ANY: Final[dict[str, tuple[str, Signature]]] = {
    "get-config": ("get_config", Signature((_SELF,), _CONFIG)),
    "is-ready": ("is_ready", Signature((_SELF,), "bool")),
}
_SETS: Final[dict[str, tuple[str, Signature]]] = {
    "set-state": ("set_state", Signature((_SELF, ("state", _STATE)), f"result<_, {_ERROR}>")),
    "set-active": ("set_active", _DONE),
    "set-inactive": ("set_inactive", _DONE),
}
_REMEMBERS: Final[dict[str, tuple[str, Signature]]] = {
    "toggle": ("toggle", _DONE),
    "is-set-active": ("is_active", _ASKED),
    "is-set-inactive": ("is_inactive", _ASKED),
    "get-state": ("read", _TOLD),
}
_READS: Final[dict[str, tuple[str, Signature]]] = {
    "read": ("read", _TOLD),
    "is-active": ("is_active", _ASKED),
    "is-inactive": ("is_inactive", _ASKED),
    "watch-state": ("watch", Signature((_SELF, ("state", _STATE)), f"result<own, {_ERROR}>")),
    **{f"watch-{what}": ("watch", _WATCHED) for what in ("active", "inactive", "falling-edge", "rising-edge")},
}
_METHODS: Final = {
    _OUT: _ANY | _SETS,
    _STATEFUL: _ANY | _SETS | _REMEMBERS,
    _IN: _ANY | _READS,
    _IN_OUT: _ANY | _SETS | _READS,
}
"""By resource: its methods, which method of `_Calls` serves each, and its type."""

_GET: Final = Signature((("pin-label", "string"), ("flags", f"list<{_FLAGS}>")), f"result<own, {_ERROR}>")
_TYPES: Final = {f"[static]{resource}.get": _GET for resource in _RESOURCES} | {
    f"[method]{resource}.{name}": kind for resource, methods in _METHODS.items() for name, (_, kind) in methods.items()
}


def _make(around: Surroundings) -> Mapping[str, Function]:
    calls = _Calls(around)
    found: dict[str, Function] = {f"[drop]{resource}": calls.drop for resource in _RESOURCES}
    for resource, methods in _METHODS.items():
        found[f"[static]{resource}.get"] = _failing(partial(calls.get, resource))
        for name, (method, _) in methods.items():
            found[f"[method]{resource}.{name}"] = _failing(getattr(calls, method))
    return found


_VERSIONS: Final = ("0.2.0",)

PACKAGE: Final = Package(
    name=NAME,
    about="""\
Digital inputs and outputs of GPIO chips, by the label that a grant gives each line. The host requests a line and
keeps it for the instance: an output stays as the component left it across calls, swaps, rollbacks and crashes, and a
component that gets it again finds its level. It begins at its safe level, and goes back there when the instance is
stopped, removed or in quarantine, and when a version does not have it any more. Only the device's power or the end of
the host itself lets go of a line; a pull resistor on the board has to keep what is connected safe then.

`active` and `pull` are the grant's: flags of `get` may repeat them, and other ones are refused. Pins in both
directions, and the functions that watch a pin, are linked and refused (`operation-not-supported`): read the level in
a schedule or a service. `analog` and `delay` are not served.""",
    grant="""\
`interfaces = ["wasi:gpio"]`, and a table for each line ([component.toml](component-toml.md#hardware)). The device's \
owner lists lines in `policy.gpio`, none by default, and opens the chip for the host \
([hardware](host.md#hardware)).""",
    limits={
        "lines": f"{EACH_MAX}",
        "pins open at once": f"{HANDLES_MAX}",
        "rate": "as many calls as the processor time of its calls (`limits.call`) allows; none of them waits",
    },
    counters={"denials": "labels that no grant names, and pins that are granted in another way"},
    rust="""\
use wasi::gpio::digital::{DigitalInPin, StatefulDigitalOutPin};

let door = DigitalInPin::get("door", &[])?;
let relay = StatefulDigitalOutPin::get("relay", &[])?;
if door.is_active()? {
    relay.set_active()?;
}""",
    python="""\
from wit_world.imports.digital import DigitalInPin, StatefulDigitalOutPin

door = DigitalInPin.get("door", [])
relay = StatefulDigitalOutPin.get("relay", [])
if door.is_active():
    relay.set_active()""",
    interfaces=(
        HostInterface(wasi.GPIO, _VERSIONS, _TYPES, _make, resources=_RESOURCES),
        HostInterface(wasi.GPIO_TYPES, _VERSIONS, {}, lambda _around: {}),
    ),
)
