"""The one door to wasmtime: how components are compiled, loaded, and given nothing but what was granted.

Compiling happens in `agent.host.compiler` alone; lanes load images and call them. `parallel_compilation` is off, so
that a process which made an engine (the zygote) still has one thread and may be forked. The engine's memory plan
depends on the board's address space and is part of what an image is compiled for: `describe()` names everything that
is.

Raises `EngineError` for what cannot be loaded or offered, `GuestError` for what a guest did (`agent.host.faults`).
"""

import hashlib
import importlib.metadata
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol

import wasmtime
from wasmtime import Config, Store, WasiConfig, WasmtimeError
from wasmtime import _ffi as ffi
from wasmtime import component as wc
from wasmtime.component import Func

from agent.host import codec
from agent.host.codec import Answer, Codec, Fast, Signature, Stock, exchange, give_bytes, set_stdin, take_bytes
from agent.host.faults import EngineError, first_lines, guest_error
from agent.host.heads import Nowhere, Requests, utf8
from agent.host.space import FULL, NONE, MemoryPlan, memory_plan, reservable_bytes
from fleet.protocol import adapter, compose
from fleet.protocol.codes import RejectCode
from fleet.protocol.component import Fault, NotAComponentError, bare, read
from fleet.protocol.manifest import CORE_INSTANCES_MAX, TABLE_ELEMENTS_MAX, Grants, Limits

TICK_MS: Final = 10
_FOREVER: Final = 2**62
_POOLED_MEMORIES: Final = 16
_KEPT_BYTES: Final = 128 * 1024
_MAX_LINE_CHARS: Final = 4096

HANDLER: Final = "wasmfleet:http/handler"
HEALTH: Final = "wasmfleet:http/health"
TASK: Final = "wasmfleet:schedule/task"
STATE: Final = "wasmfleet:state/state"
LOGGING: Final = "wasi:logging/logging"
CONFIG: Final = ("wasi:config/store", "wasi:config/runtime")
# What the host calls, and what it serves by functions of its own; `agent.host.codec` lays values out by these types.
SIGNATURES: Final[dict[tuple[str, str], Signature]] = {
    (HANDLER, "handle"): codec.HANDLE,
    (HEALTH, "check"): codec.CHECK,
    (TASK, "run"): codec.RUN,
    (STATE, "save-state"): codec.SAVE_STATE,
    (STATE, "load-state"): codec.LOAD_STATE,
    (compose.BRIDGE, "handle"): codec.EXCHANGE,
    (compose.BRIDGE, "flush"): codec.FLUSH,
    (LOGGING, "log"): codec.LOG,
    **{(config, "get"): codec.GET for config in CONFIG},
    **{(config, "get-all"): codec.GET_ALL for config in CONFIG},
}
_OPTIONAL: Final = ((HEALTH, "check"), (TASK, "run"), (STATE, "save-state"), (STATE, "load-state"))
DATA: Final = "/data"  # where a guest that may have files finds its own
# What the adapter itself imports: it comes with wasi:http and needs no grant.
_ADAPTERS_OWN: Final = frozenset(
    {compose.HOST, "wasi:io/error", "wasi:io/poll", "wasi:io/streams"}
    | {"wasi:cli/stdin", "wasi:cli/stdout", "wasi:cli/stderr"}
)
_ADAPTER: Final = adapter.load()  # read now: the compiler cannot open it from inside its cell

Log = Callable[[str], None]


def version() -> str:
    """Wasmtime's version, as the package says it."""
    return importlib.metadata.version("wasmtime")


def cpu_flags() -> str:
    """The CPU's features as the kernel lists them: an image compiled for one CPU may not run on another."""
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
    """Everything that an image is compiled for; two boards with equal answers could share one."""
    plan = memory_plan(reservable_bytes())
    facts = {
        "engine": version(),
        "triple": f"{platform.machine()}-linux",
        "cpu": hashlib.sha256(cpu_flags().encode()).hexdigest()[:16],
        "memory": f"{plan.reservation_bytes}+{plan.guard_bytes}",
        "fuel": str(fuel).lower(),
        "adapter": adapter.digest()[:16],
    }
    facts["config"] = hashlib.sha256("\n".join(f"{k}={v}" for k, v in sorted(facts.items())).encode()).hexdigest()
    return facts


class Image:
    """A compiled component, mapped and ready to be instantiated."""

    def __init__(self, engine: "Engine", component: wc.Component) -> None:
        self.engine = engine
        self.component = component
        kind = component.type
        self._imported = kind.imports(engine.raw)
        self.imports = {name: _functions(engine.raw, extern) for name, extern in self._imported.items()}
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

    def check_imports(self) -> None:
        """Compare what the host serves by functions of its own with what the component takes it for.

        Raises:
            EngineError: START_FAILED: a function is imported with another type.
        """
        for name, extern in self._imported.items():
            for interface, function in SIGNATURES:
                item = _member(self.engine.raw, extern, function) if bare(name) == interface else None
                if item is not None:
                    _check_type("imports", name, function, item)

    @property
    def adapted(self) -> bool:
        """Whether it is a guest of wasi:http in its adapter."""
        return any(bare(name) == compose.BRIDGE for name in self.exports)

    def not_granted(self, grants: Grants) -> tuple[str, ...]:
        """The imports that need a grant and have none. An interface of types alone needs none."""
        free = _ADAPTERS_OWN if self.adapted else frozenset()
        wanted = [name for name, functions in self.imports.items() if functions and bare(name) not in free]
        return tuple(name for name in wanted if not grants.allows(name))


def _member(engine: wasmtime.Engine, extern: Any, function: str) -> Any:
    """Find what an interface has under a name; None for nothing."""
    instance = extern.ty
    if not isinstance(instance, wc.ComponentInstanceType):
        return None
    found = instance.exports(engine).get(function)
    return None if found is None else found.ty


def _check_type(verb: str, interface: str, function: str, item: Any) -> None:
    expected = SIGNATURES[bare(interface), function]
    said = expected.unlike(item)
    if said is None:
        return
    raise EngineError(
        RejectCode.START_FAILED,
        f"it {verb} {interface} with another type of {function}: expected {expected}, found {said}; "
        "build it against the WIT of that interface",
    )


def _functions(engine: wasmtime.Engine, extern: Any) -> bool:
    """Whether an import brings anything but plain types."""
    item = extern.ty
    if isinstance(item, wc.ComponentInstanceType):
        return any(_functions(engine, inner) for inner in item.exports(engine).values())
    return not isinstance(item, wc.ValType)


def _pool(config: Config) -> None:
    """Keep the room of instances, and some of its pages, for the next: a fresh instance then costs half.

    A lane has one instance at a time, and a second while one takes over. Rooms are as large as the memory plan has
    them, so this is for boards whose address space is ample.
    """
    pool = ffi.wasmtime_pooling_allocation_config_new()
    for name, value in (
        ("total_component_instances", 2),
        ("total_core_instances", 2 * CORE_INSTANCES_MAX),
        ("max_core_instances_per_component", CORE_INSTANCES_MAX),
        ("total_memories", 2 * _POOLED_MEMORIES),
        ("max_memories_per_component", _POOLED_MEMORIES),
        ("total_tables", 2 * CORE_INSTANCES_MAX),
        ("max_tables_per_component", CORE_INSTANCES_MAX),
        ("table_elements", TABLE_ELEMENTS_MAX),
        ("max_memory_size", FULL.reservation_bytes),
        ("linear_memory_keep_resident", _KEPT_BYTES),
        ("table_keep_resident", _KEPT_BYTES),
    ):
        getattr(ffi, f"wasmtime_pooling_allocation_config_{name}_set")(pool, value)
    ffi.wasmtime_pooling_allocation_strategy_set(config.ptr(), pool)
    ffi.wasmtime_pooling_allocation_config_delete(pool)


class Engine:
    """An engine and its codec. Make one before forking lanes; enter wasm only in lanes."""

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
        self.raw = wasmtime.Engine(config)
        self.codec: Codec = Fast()

    def compile(self, artifact: bytes | str) -> bytes:
        """The image of a component (or of its text form); a guest of wasi:http is put into its adapter.

        Raises:
            EngineError: NOT_A_COMPONENT or COMPILE_FAILED, with the engine's reason.
        """
        artifact = _adapted(artifact)
        try:
            return bytes(wc.Component(self.raw, artifact).serialize())
        except WasmtimeError as error:
            raise EngineError(RejectCode.COMPILE_FAILED, first_lines(str(error))) from error

    def read(self, text: str) -> Image:
        """Compile a component's text and keep it here: for a process that will not be forked."""
        return Image(self, wc.Component(self.raw, text))

    def load(self, path: str) -> Image:
        """Map an image; it must come from this board's compiler, since loading one is running it.

        Raises:
            EngineError: IMAGE_DAMAGED: made for another engine, or no image at all; START_FAILED: it asks for more
                memory or tables than any component gets.
        """
        try:
            return Image(self, wc.Component.deserialize_file(self.raw, path))
        except WasmtimeError as error:
            why = first_lines(str(error))
            code = RejectCode.START_FAILED if "exceeds the" in why else RejectCode.IMAGE_DAMAGED
            raise EngineError(code, why) from error

    def tick(self) -> None:
        """Let one epoch (`TICK_MS`) pass for the call in flight. The only method for another thread."""
        self.raw.increment_epoch()


def _adapted(artifact: bytes | str) -> bytes | str:
    if isinstance(artifact, str):
        return artifact
    try:
        return compose.compose(_ADAPTER, artifact) if compose.needs_adapter(read(artifact)) else artifact
    except NotAComponentError as error:
        if error.fault is Fault.WASI_0_3:  # the engine would compile it, and could not link it
            raise EngineError(RejectCode.NOT_A_COMPONENT, str(error)) from error
        return artifact  # the engine says better what is wrong with it
    except compose.ComposeError as error:
        raise EngineError(RejectCode.COMPILE_FAILED, str(error)) from error


class ResponseSink(Protocol):
    """Where an answer goes that a guest writes to its standard output; the worker hands one in for each request."""

    problem: str
    failed: bool
    trailers: bytes

    @property
    def request_trailers(self) -> bytes:
        """Trailer fields of the request, as lines."""

    @property
    def begun(self) -> bool:
        """Whether a part of the answer has gone out, so that no other can replace it."""

    def rest(self) -> bytes:
        """Take what the guest has written and nobody has passed on, once the call is over."""


class Guest:
    """A live instance of an image in its own store. After a `GuestError` it is spent: make a new one."""

    def __init__(
        self,
        image: Image,
        *,
        limits: Limits,
        grants: Grants,
        config: dict[str, str],
        log: Log,
        data: str = "",
        outgoing: Requests | None = None,
    ) -> None:
        """Instantiate, within `limits.start_ms`. `outgoing`: what a guest of wasi:http sends requests by.

        Raises:
            EngineError: GRANT_DENIED, or START_FAILED where the linker has no such interface, or an export that would
                be called, or an import that the host serves itself, is of another type.
            GuestError: it trapped or took too long in its start.
        """
        missing = image.not_granted(grants)
        if missing:
            raise EngineError(RejectCode.GRANT_DENIED, f"it imports {', '.join(missing)}, which is not granted")
        for interface, function in (*self._entries, *_OPTIONAL):
            image.export(interface, function)  # before any of its code runs
        image.check_imports()
        self._image = image
        self._limits = limits
        self._data = data
        self._config = config
        self._log = log
        self._outgoing = outgoing or Nowhere(log)
        self._linker, self._wasi = _linker(image, config, log, self._outgoing)
        self._open()

    def _open(self, stdin: bytes | None = None) -> None:
        """Make the store and the instance. With `stdin`, its standard output is the process's own."""
        self._served = 0
        self._store = Store(self._image.engine.raw)
        self._store.set_limits(
            memory_size=self._limits.memory_bytes,
            table_elements=self._limits.table_elements,
            instances=self._limits.core_instances,
            tables=self._limits.core_instances,
            memories=self._limits.core_instances,
        )
        if self._wasi:
            self._store.set_wasi(self._streams(stdin))
        self._arm(self._limits.start_ms)
        try:
            self._instance = self._linker.instantiate(self._store, self._image.component)
        except WasmtimeError as error:
            text = str(error)
            if "wasm trap" in text or "wasm backtrace" in text:
                raise guest_error(str(error)) from error
            raise EngineError(RejectCode.START_FAILED, first_lines(text)) from error
        self._handle = self._function(*self._entries[0])
        self._check = self._function(HEALTH, "check")
        self._run = self._function(TASK, "run")
        self._save = self._function(STATE, "save-state")
        self._load = self._function(STATE, "load-state")

    _entries: ClassVar[tuple[tuple[str, str], ...]] = ((HANDLER, "handle"),)
    """What requests come by first, and what else goes with that."""

    def _streams(self, stdin: bytes | None) -> WasiConfig:
        wasi = WasiConfig()
        wasi.stderr_custom = _Lines(self._log)
        if stdin is None:
            wasi.stdout_custom = _Lines(self._log)
        else:
            wasi.inherit_stdout()
            if stdin:
                set_stdin(wasi, stdin)
        if any(name.startswith("wasi:cli/environment") for name in self._image.imports):
            wasi.env = list(self._config.items())
        if self._data:
            wasi.preopen_dir(self._data, DATA)
        return wasi

    def _function(self, interface: str, name: str) -> Func | None:
        index = self._image.export(interface, name)
        return None if index is None else self._instance.get_func(self._store, index)

    def _arm(self, budget_ms: int) -> None:
        self._store.set_epoch_deadline(budget_ms // TICK_MS + 1)
        if self._image.engine.fuel:
            self._store.set_fuel(self._limits.fuel or _FOREVER)

    @property
    def kinds(self) -> frozenset[str]:
        """Which of HANDLER, HEALTH, TASK and STATE it exports."""
        state = self._save if self._load is not None else None
        found = ((HANDLER, self._handle), (HEALTH, self._check), (TASK, self._run), (STATE, state))
        return frozenset(name for name, function in found if function is not None)

    def handle(
        self, method: bytes, target: bytes, headers: bytes, body: bytes, way: ResponseSink | None = None
    ) -> Answer:
        """One HTTP exchange: status, header fields and body. Raises `GuestError`.

        `way`: how the answer may get to its client while the guest still writes it, where a guest can do that.
        """
        del way
        if self._served == self._limits.requests_per_instance > 0:
            self._store.close()
            self._open()
        self._served += 1
        assert self._handle is not None
        self._arm(self._limits.call_ms)
        try:
            return self._image.engine.codec.call(self._store, self._handle, method, utf8(target), utf8(headers), body)
        except WasmtimeError as error:
            raise guest_error(str(error)) from error

    def exchange(self, head: bytes) -> bytes:
        """One exchange through the adapter: the answer's head. Raises `GuestError`."""
        assert self._handle is not None
        self._arm(self._limits.call_ms)
        try:
            return exchange(self._store, self._handle, head)
        except WasmtimeError as error:
            raise guest_error(str(error)) from error

    def check(self) -> str | None:
        """Ask its health export: None for well, else its sentence. Raises `GuestError`."""
        return None if self._check is None else self._call(self._check)

    def run(self, scheduled_ms: int) -> str | None:
        """Run its task: None for done, else its sentence. Raises `GuestError`."""
        assert self._run is not None
        return self._call(self._run, scheduled_ms)

    def save_state(self) -> tuple[bytes, str | None]:
        """Its state, or empty and its sentence why there is none. Raises `GuestError`."""
        assert self._save is not None
        self._arm(self._limits.start_ms)
        try:
            return give_bytes(self._store, self._save)
        except WasmtimeError as error:
            raise guest_error(str(error)) from error

    def load_state(self, state: bytes) -> str | None:
        """Have it take a state: None for loaded, else its sentence. Raises `GuestError`."""
        assert self._load is not None
        self._arm(self._limits.start_ms)
        try:
            return take_bytes(self._store, self._load, state)
        except WasmtimeError as error:
            raise guest_error(str(error)) from error

    def _call(self, function: Func, *arguments: Any) -> str | None:
        self._arm(self._limits.call_ms)
        try:
            result = function(self._store, *arguments)
        except WasmtimeError as error:
            raise guest_error(str(error)) from error
        return result if result is None else str(result)

    def close(self) -> None:
        """Give its memory back at once."""
        self._store.close()


def _linker(image: Image, config: dict[str, str], log: Log, outgoing: Requests) -> tuple[wc.Linker, bool]:
    """A linker with what the component imports and was granted, and nothing else; and whether that includes WASI."""
    linker = wc.Linker(image.engine.raw)
    names = [name for name, functions in image.imports.items() if functions]
    ours = [name for name in names if bare(name) in (LOGGING, compose.HOST, *CONFIG)]
    wasi = bool(set(names) - set(ours))
    if wasi:
        linker.add_wasip2()
    with linker.root() as root:
        for name in ours:
            with root.add_instance(name) as instance:
                if name.startswith(LOGGING):
                    instance.add_func("log", lambda _store, level, context, text: log(_line(level, context, text)))
                elif name.startswith(compose.HOST):
                    for function in ("begin", "write", "send", "head", "read", "close"):
                        instance.add_func(function, _asking(getattr(outgoing, function)))
                else:
                    instance.add_func("get", lambda _store, key: config.get(key))
                    instance.add_func("get-all", lambda _store: list(config.items()))
    return linker, wasi


def _asking(answer: Callable[..., Any]) -> Callable[..., Any]:
    """A function for the linker, which hands in the store first."""
    return lambda _store, *arguments: answer(*arguments)


def _line(level: str, context: str, text: str) -> str:
    return f"{level} {context}: {text}" if context else f"{level} {text}"


class _Lines:
    """Cuts what a guest writes to its standard streams into log lines."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._rest = b""

    def __call__(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE_CHARS:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            self._log(line.decode(errors="replace"))


def use_stock_codec(engine: Engine) -> None:
    """Fall back to the bindings' own codec, after a self-test that failed."""
    engine.codec = Stock()
