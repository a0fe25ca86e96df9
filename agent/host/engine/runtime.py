"""Engine, Image, memory plan, engine errors.

The one door to wasmtime: how components are compiled, loaded, and given nothing but what was granted.

Compiling happens in `agent.host.compiler` alone; workers load images and call them. `parallel_compilation` is
off, so that a process which made an engine (the zygote) still has one thread and may be forked. The engine's memory
plan depends on the device's address space and is part of what an image is compiled for: `describe()` names everything
that is.

Raises `EngineError` for what cannot be loaded or offered, `GuestError` for what a guest did
(`agent.host.engine.runtime`).

The device's address space, and how linear memories lie in it.

Sv39 and 39-bit Arm give far less of it than a desktop does: what is there is tried, and the plan follows. Nothing here
knows wasmtime.

What can go wrong with a component, and how it is told to people: by its cause, with the backtrace below.

`EngineError` is for what cannot be compiled, loaded or offered; `GuestError` for what a guest did.
"""

import functools
import hashlib
import mmap
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import wasmtime
from wasmtime import Config, WasmtimeError
from wasmtime import _ffi as ffi
from wasmtime import component as wc

from agent.host.engine import codec, image_file, memory_in_use, refusals
from agent.host.engine.codec import Codec, FastCodec, Signature
from agent.host.engine.host_interface import NO_INTERFACES, Interfaces
from fleet.component import compose, wasi
from fleet.component.reader import Fault, NotAComponentError, bare, read
from fleet.component.toml_fields import format_size
from fleet.protocol.bounds import MIB
from fleet.protocol.codes import CallOutcome, RejectCode
from fleet.protocol.manifest import CORE_INSTANCES_MAX, NATIVE_ANSWER_MAX_BYTES, TABLE_ELEMENTS_MAX, Grants, Limits

_GIB: Final = 1024 * MIB
_GUARD_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Place of linear memories in the address space: bytes reserved and guarded for each.

    A full reservation lets the hardware check bounds; a small one costs an instruction for each access.
    """

    reservation_bytes: int
    guard_bytes: int


FULL: Final = MemoryPlan(4 * _GIB, 2 * _GIB)
SIZED: Final = MemoryPlan(64 * MIB, _GUARD_BYTES)
NONE: Final = MemoryPlan(0, _GUARD_BYTES)


def reservable_bytes() -> int:
    """Return the largest power of two, at most 64 TiB, that this process can reserve in one piece."""
    for bits in range(46, 30, -1):
        try:
            mmap.mmap(-1, 1 << bits, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, prot=0).close()
        except (OSError, ValueError, OverflowError):
            continue
        return 1 << bits
    return 0


def memory_plan(reservable: int) -> MemoryPlan:
    """Return the plan for an address space in which `reservable` bytes fit in one piece.

    From 8 TiB on a thousand memories fit in full; Sv39 and 39-bit Arm give 128 to 256 GiB, where about 27 would.
    """
    if reservable >= 8 * 1024 * _GIB:
        return FULL
    return SIZED if reservable >= 32 * _GIB else NONE


TICK_MS: Final = 10

_POOLED_MEMORIES: Final = 16
_KEPT_BYTES: Final = 32 * 1024

HANDLER: Final = "wasmfleet:http/handler"
HEALTH: Final = "wasmfleet:http/health"
TASK: Final = "wasmfleet:schedule/task"
STATE: Final = "wasmfleet:state/state"
COMMAND: Final = wasi.RUN
RECEIVER: Final = wasi.MESSAGING_HANDLER

# Exports that the host calls: `agent.host.engine.codec` lays values out by these types.
SIGNATURES: Final[dict[tuple[str, str], Signature]] = {
    (HANDLER, "handle"): codec.HANDLE,
    (HEALTH, "check"): codec.CHECK,
    (TASK, "run"): codec.RUN,
    (STATE, "save-state"): codec.SAVE_STATE,
    (STATE, "load-state"): codec.LOAD_STATE,
    (COMMAND, "run"): codec.COMMAND,
    (RECEIVER, "handle"): codec.RECEIVE,
    (compose.BRIDGE, "handle"): codec.EXCHANGE,
    (compose.BRIDGE, "flush"): codec.FLUSH,
    (compose.BRIDGE, "serve"): codec.SERVE,
}
OPTIONAL: Final = (
    *((HEALTH, "check"), (TASK, "run"), (STATE, "save-state"), (STATE, "load-state")),
    (COMMAND, "run"),
    (RECEIVER, "handle"),
)

Log = Callable[[str], None]


@functools.cache
def adapter() -> bytes:
    """Read the adapter, once: the compiler does before its sandbox closes, and nobody else needs it."""
    return compose.load_adapter()


def version() -> str:
    """Wasmtime's version, as the package says it."""
    from importlib import metadata  # noqa: PLC0415 - zygotes and workers ask nothing of it

    return metadata.version("wasmtime")


def cpu_flags() -> str:
    """List the CPU's features as the kernel does: an image compiled for one CPU may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in {"flags", "Features", "isa"}:
            return " ".join(sorted(value.split()))
    return ""


def describe(*, fuel: bool = False) -> dict[str, str]:
    """Everything that an image is compiled for; two devices with equal answers could share one."""
    plan = memory_plan(reservable_bytes())
    facts = {
        "engine": version(),
        "triple": f"{platform.machine()}-linux",
        "cpu": hashlib.sha256(cpu_flags().encode()).hexdigest()[:16],
        "memory": f"{plan.reservation_bytes}+{plan.guard_bytes}",
        "fuel": str(fuel).lower(),
        "adapter": compose.adapter_digest()[:16],
    }
    facts["config"] = hashlib.sha256("\n".join(f"{k}={v}" for k, v in sorted(facts.items())).encode()).hexdigest()
    return facts


class Image:
    """A compiled component, mapped and ready to be instantiated."""

    def __init__(self, engine: "Engine", component: wc.Component, *, grows_tables: bool = False) -> None:
        self.engine = engine
        self.component = component
        self.grows_tables = grows_tables
        kind = component.type
        self._imported = kind.imports(engine.raw)
        self.imports = {
            # A type at the top level is equal to one of an interface, or the linker has nothing for it.
            name: not isinstance(extern.ty, wc.ResourceType) and _functions(engine.raw, extern)
            for name, extern in self._imported.items()
        }
        self.exports = kind.exports(engine.raw)
        self._found: dict[tuple[str, str], wc.ExportIndex | None] = {}

    def export(self, interface: str, function: str) -> wc.ExportIndex | None:
        """Where `interface` (without version) exports `function`; None if it does not.

        Raises:
            EngineError: START_FAILED: what stands there is not of the type in `SIGNATURES`.
        """
        if (interface, function) not in self._found:
            self._found[interface, function] = self._find(interface, function)
        return self._found[interface, function]

    def _find(self, interface: str, function: str) -> wc.ExportIndex | None:
        name = next((name for name in self.exports if bare(name) == interface), None)
        outer = None if name is None else self.component.get_export_index(name)
        found = None if outer is None else self.component.get_export_index(function, outer)
        if name is None or found is None:
            return None
        _check_type("exports", name, function, _member(self.engine.raw, self.exports[name], function))
        return found

    def check_imports(self, interfaces: Interfaces = NO_INTERFACES) -> None:
        """Compare what the host serves by functions of its own with what the component takes it for.

        Raises:
            EngineError: START_FAILED: a function is imported with another type.
        """
        for name, extern in self._imported.items():
            for interface, function in SIGNATURES:
                item = _member(self.engine.raw, extern, function) if bare(name) == interface else None
                if item is not None:
                    _check_type("imports", name, function, item)
            served = interfaces.get(bare(name))
            for function, expected in served.types(name).items() if served is not None else ():
                item = _member(self.engine.raw, extern, function)
                if item is not None:
                    _check_type("imports", name, function, item, expected)

    def functions(self, interface: str) -> dict[str, Any]:
        """Return the functions of an import, by its name with version, each with its type."""
        found = self._imported[interface].ty
        if not isinstance(found, wc.ComponentInstanceType):
            return {}
        members = {name: extern.ty for name, extern in found.exports(self.engine.raw).items()}
        return {name: kind for name, kind in members.items() if isinstance(kind, wc.FuncType)}

    @property
    def adapted(self) -> bool:
        """True for a guest of wasi:http in its adapter."""
        return any(bare(name) == compose.BRIDGE for name in self.exports)

    @property
    def sockets(self) -> bool:
        """True for a guest whose sockets are the adapter's."""
        return any(bare(name) == compose.SOCKETS_HOST for name in self.imports)

    @property
    def loops(self) -> bool:
        """True for a guest of wasi:http whose adapter can serve calls from a channel."""
        return self.adapted and self.export(compose.BRIDGE, "serve") is not None

    @property
    def commands(self) -> bool:
        """True for a guest that exports `wasi:cli/run`, each run of which has an instance of its own."""
        return self.export(COMMAND, "run") is not None

    def not_granted(self, grants: Grants) -> tuple[str, ...]:
        """Return the imports that need a grant and have none. An interface of types alone needs none."""
        free = wasi.UNGRANTED | (compose.HOST_INTERFACES if self.adapted or self.sockets else frozenset())
        wanted = [name for name, functions in self.imports.items() if functions and bare(name) not in free]
        return tuple(name for name in wanted if not grants.allows(name))


def _member(engine: wasmtime.Engine, extern: Any, function: str) -> Any:
    """Find what an interface has under a name; None for nothing."""
    instance = extern.ty
    if not isinstance(instance, wc.ComponentInstanceType):
        return None
    found = instance.exports(engine).get(function)
    return None if found is None else found.ty


def _check_type(verb: str, interface: str, function: str, item: Any, expected: Signature | None = None) -> None:
    expected = expected or SIGNATURES[bare(interface), function]
    said = expected.unlike(item)
    if said is None:
        return
    raise EngineError(
        RejectCode.START_FAILED,
        f"it {verb} {interface} with another type of {function}: expected {expected}, found {said}; "
        "build it against the WIT of that interface",
    )


def _functions(engine: wasmtime.Engine, extern: Any) -> bool:
    """Tell whether an import brings anything but plain types."""
    item = extern.ty
    if isinstance(item, wc.ComponentInstanceType):
        return any(_functions(engine, inner) for inner in item.exports(engine).values())
    return not isinstance(item, wc.ValType)


def _pool(config: Config) -> None:
    """Keep the room of instances, and some of its pages, for the next: a fresh instance then costs half.

    A worker has one instance at a time, and a second while one takes over. Rooms are as large as the memory plan has
    them, so this is for devices whose address space is ample.
    """
    pool = ffi.wasmtime_pooling_allocation_config_new()
    for name, value in (
        ("total_component_instances", 2),
        ("total_core_instances", 2 * CORE_INSTANCES_MAX),
        ("max_core_instances_per_component", CORE_INSTANCES_MAX),
        ("total_memories", 2 * _POOLED_MEMORIES),
        ("max_memories_per_component", _POOLED_MEMORIES),
        ("max_memories_per_module", _POOLED_MEMORIES),
        ("total_tables", 2 * CORE_INSTANCES_MAX),
        ("max_tables_per_component", CORE_INSTANCES_MAX),
        ("max_tables_per_module", CORE_INSTANCES_MAX),
        ("table_elements", TABLE_ELEMENTS_MAX),
        ("max_memory_size", FULL.reservation_bytes),
        ("linear_memory_keep_resident", _KEPT_BYTES),
        ("table_keep_resident", _KEPT_BYTES),
    ):
        getattr(ffi, f"wasmtime_pooling_allocation_config_{name}_set")(pool, value)
    ffi.wasmtime_pooling_allocation_strategy_set(config.ptr(), pool)
    ffi.wasmtime_pooling_allocation_config_delete(pool)


class Engine:
    """An engine and its codec. Make one before forking workers; enter wasm only in workers."""

    def __init__(self, *, fuel: bool = False, plan: MemoryPlan | None = None, pooled: bool = False) -> None:
        """`pooled`: keep the room of instances for the next, where the plan is `FULL`. Images are the same."""
        plan = plan or memory_plan(reservable_bytes())
        config = Config()
        config.parallel_compilation = False
        config.epoch_interruption = True
        config.wasm_component_model = True
        config.wasm_threads = False
        config.memory_reservation = plan.reservation_bytes
        config.memory_guard_size = plan.guard_bytes
        config.memory_reservation_for_growth = 0 if plan is NONE else plan.guard_bytes
        if fuel:
            config.consume_fuel = True
        if pooled and plan is FULL:
            _pool(config)
        self.fuel = fuel
        self.plan = plan
        self.raw = wasmtime.Engine(config)
        self.codec: Codec = FastCodec()

    def compile(self, artifact: bytes | str, *, sockets: bool = False) -> bytes:
        """Compile a component (or its text form) to an image; a guest of wasi:http is put into its adapter.

        With `sockets`, any guest that imports them is: its grants name where they may lead.

        Raises:
            EngineError: NOT_A_COMPONENT or COMPILE_FAILED, with the engine's reason.
        """
        artifact = _adapted(artifact, sockets=sockets)
        try:
            return bytes(wc.Component(self.raw, artifact).serialize())
        except WasmtimeError as error:
            said = refusals.uncompiled(str(error))
            raise EngineError(RejectCode.COMPILE_FAILED, said or first_lines(str(error))) from error

    def read(self, text: str) -> Image:
        """Compile a component's text and keep it here: for a process that will not be forked."""
        return Image(self, wc.Component(self.raw, text))

    def load(self, path: str) -> Image:
        """Map an image; it must come from this device's compiler, since loading one is running it.

        Raises:
            EngineError: IMAGE_DAMAGED: made for another engine, or no image at all; START_FAILED: it asks for more
                memory or tables than any component gets.
        """
        try:
            component = wc.Component.deserialize_file(self.raw, path)
        except WasmtimeError as error:
            why = refusals.unloaded(str(error)) or first_lines(str(error))
            code = RejectCode.START_FAILED if "exceeds the" in str(error) else RejectCode.IMAGE_DAMAGED
            raise EngineError(code, why) from error
        return Image(self, component, grows_tables=image_file.grows_tables(path))

    def tick(self) -> None:
        """Let one epoch (`TICK_MS`) pass for the call in flight. The only method for another thread."""
        self.raw.increment_epoch()


def _adapted(artifact: bytes | str, *, sockets: bool) -> bytes | str:
    if isinstance(artifact, str):
        return artifact
    try:
        found = read(artifact)
        sockets = sockets and compose.has_sockets(found)
        if not sockets and not compose.needs_adapter(found):
            return artifact
        return compose.compose(adapter(), artifact, sockets=sockets)
    except NotAComponentError as error:
        if error.fault in {Fault.WASI_0_3, Fault.WASI_DRAFT}:  # the engine would compile it, and could not link it
            raise EngineError(RejectCode.NOT_A_COMPONENT, str(error)) from error
        return artifact  # the engine says better what is wrong with it
    except compose.ComposeError as error:
        raise EngineError(RejectCode.COMPILE_FAILED, str(error)) from error


_MAX_BACKTRACE_CHARS: Final = 4096


class EngineError(Exception):
    """Something cannot be compiled, loaded or offered; `code` says which."""

    def __init__(self, code: RejectCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class GuestError(Exception):
    """A call of the guest ended in a trap or a limit; its store is gone."""

    def __init__(self, outcome: CallOutcome, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome


_ALLOCATION_FAILED: Final = re.compile(
    r"\b(handle_alloc_error|__rust_alloc_error_handler|rust_oom|__rg_oom|out_?of_?memory)\b", re.IGNORECASE
)
"""Functions of toolchains that end a guest when an allocation fails.

The engine does not say that a memory could not grow, since a guest may go on without.
"""


CALL_TIME: Final = "one call (limits.call)"
START_TIME: Final = "its start (limits.start)"
STATE_TIME: Final = "its state (limits.start)"


def guest_error(text: str, limits: Limits, *, time: str = CALL_TIME, grows_tables: bool = False) -> GuestError:
    """Say what a failed call was: a limit of time or fuel, or a trap with its wasm backtrace.

    Args:
        text: what the engine says.
        limits: of the guest.
        time: which it had, one of `CALL_TIME`, `START_TIME` and `STATE_TIME`.
        grows_tables: the guest has code that grows tables.
    """
    outcome, why = CallOutcome.GUEST_TRAP, _reason(text)
    if "wasm trap: interrupt" in text:
        outcome, why = CallOutcome.GUEST_TIMEOUT, f"it used up its time for {time}"
    elif "all fuel consumed" in text:
        outcome, why = CallOutcome.GUEST_TIMEOUT, "it used up its fuel for one call (limits.fuel)"
    elif "too much data is being copied" in text:
        why = (
            f"its answer is larger than {NATIVE_ANSWER_MAX_BYTES} bytes, all that fits in one of wasmfleet:http; "
            "one of wasi:http/incoming-handler has no such limit"
        )
    elif any(_ALLOCATION_FAILED.search(line.partition("!")[2]) for line in text.splitlines()):
        why = f"an allocation failed, so that it has used up its memory (limits.memory): {why}"
    elif "`unreachable`" in text:
        why = (_memory() or (_tables(limits) if grows_tables else "")) + why
    return GuestError(outcome, f"{why}\n{text}"[:_MAX_BACKTRACE_CHARS])


def _memory() -> str:
    """Say how much memory the guest of this process has, where it is almost all that it may have."""
    for memory in memory_in_use.watched:
        if found := memory.almost_all():
            most = format_size(memory.limit_bytes)
            return f"it had {found // 1024} KiB of the {most} that limits.memory allows: "
    return ""


def _tables(limits: Limits) -> str:
    """Say which limit may be the cause of a trap: the engine tells nobody but the guest that a table did not grow."""
    return f"it grows tables, of which each has at most {limits.table_elements} elements (limits.table_elements): "


def _reason(text: str) -> str:
    """Return the cause alone: it stands last, below a backtrace that may be cut off."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it failed without saying why"


def first_lines(text: str) -> str:
    """Return what the engine says, in one line."""
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())[:1000]
