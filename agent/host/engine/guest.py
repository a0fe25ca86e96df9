"""Guest and WasiHttpGuest: store, linker, calls.

A guest of wasi:http inside its adapter, called like any other: by default a fresh instance for each request.

Fresh, because that is what such guests are built for, and because a store's standard input, which carries the request's
body, is fixed when the store is made. A manifest may allow an instance more requests; those with a body get one of
their own all the same. The linker is made once, and the instance that shows at the start that the component can be
instantiated serves the first request without a body.

The engine keeps an unfinished line of standard output in a buffer of the process. The adapter flushes it at the end of
an exchange; after one that did not end well, the next store's adapter is asked to, and what comes is thrown away.
"""

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final, NamedTuple, Protocol

from wasmtime import ExitTrap, Store, WasiConfig, WasmtimeError
from wasmtime import component as wc
from wasmtime.component import Func

from agent.host.engine import adapter_abi, denied, refusals
from agent.host.engine.adapter_abi import Denials, DenyOutgoing, Requests, utf8
from agent.host.engine.codec import Answer, StockCodec, exchange, give_bytes, set_stdin, take_bytes
from agent.host.engine.host_interface import NOTHING_SERVED, Served, Surroundings
from agent.host.engine.runtime import (
    CALL_TIME,
    COMMAND,
    HANDLER,
    HEALTH,
    OPTIONAL,
    RECEIVER,
    START_TIME,
    STATE,
    STATE_TIME,
    TASK,
    TICK_MS,
    Engine,
    EngineError,
    GuestError,
    Image,
    Log,
    first_lines,
    guest_error,
)
from fleet.component import compose
from fleet.component.compose import BRIDGE
from fleet.component.reader import bare
from fleet.component.wasi import CONFIG, ENVIRONMENT, HTTP_TYPES, OUTGOING_HANDLER
from fleet.protocol.codes import CallOutcome, RejectCode
from fleet.protocol.manifest import Grants, Limits

_FOREVER: Final = 2**62

_MAX_LINE_CHARS: Final = 4096
_HTTP: Final = (HTTP_TYPES, OUTGOING_HANDLER)  # imported only where no adapter is around the guest

PROGRAM: Final = "component"
"""First of a command's arguments."""

DATA: Final = "/data"  # where a guest that may have files finds its own


class CancelledCallError(GuestError):
    """A call ended before its guest did: its client is gone, or the router. The guest is not at fault."""

    def __init__(self) -> None:
        super().__init__(CallOutcome.GUEST_TRAP, "cancelled")


class ResponseSink(Protocol):
    """Where an answer goes that a guest writes to its standard output; the worker hands one in for each request."""

    problem: str
    failed: bool
    said: bytes  # by the adapter at the end of the call
    notes_problems: bool  # in the log of the instance; otherwise others do

    @property
    def request_trailers(self) -> bytes:
        """Trailer fields of the request, as lines."""

    @property
    def begun(self) -> bool:
        """True once a part of the answer has gone out, so that no other can replace it."""

    def end_answer(self, said: bytes) -> None:
        """Take what the adapter says at the end of the answer, if that comes before the end of the call."""

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
        served: Served = NOTHING_SERVED,
    ) -> None:
        """Instantiate, within `limits.start_ms`. `served`: what the host serves by functions of its own.

        `log`: a `Denials` counts what is denied for want of a grant, too.

        Raises:
            EngineError: GRANT_DENIED, or START_FAILED where the linker has no such interface, or an export that would
                be called, or an import that the host serves itself, is of another type.
            GuestError: it trapped or took too long in its start.
        """
        missing = image.not_granted(grants)
        if missing:
            raise EngineError(RejectCode.GRANT_DENIED, f"it imports {', '.join(missing)}, which is not granted")
        for interface, function in (*self._entries, *OPTIONAL):
            image.export(interface, function)  # before any of its code runs
        image.check_imports(served.interfaces)
        self._image = image
        self._limits = limits
        self._data = data
        self._readable = served.readable
        self._config = config
        self._log = log
        denials = log if isinstance(log, Denials) else Denials(log)
        self._http = any(bare(name) in _HTTP for name in image.imports)
        self._sockets = image.sockets
        self._environment = grants.allows(ENVIRONMENT) and any(bare(name) == ENVIRONMENT for name in image.imports)
        self._outgoing = served.outgoing or DenyOutgoing(denials)
        self._wrote: Callable[[int], None] | None = None
        self._parts = served.parts
        ours = _Ours(served, config, denials)
        self._linker, self._wasi = _linker(image, ours, self._outgoing, meter=self._meter, answered=self._answered)
        self._start_budget_ms, self._call_budget_ms = limits.start_ms, limits.call_ms
        self._armed: Callable[[], None] = lambda: None
        self.ended = False
        """True once a call from a channel has ended in a trap or a limit: the instance takes no further call."""
        self._open()
        if self.kinds == {COMMAND}:
            self._store.close()  # made to see that the guest can be started; each run has an instance of its own

    def _open(self, stdin: bytes | None = None) -> None:
        """Make the store and the instance. With `stdin`, its standard output is the process's own."""
        self._served = 0
        for part in self._parts.values():
            part.reset()
        if self._sockets:
            self._outgoing.renew()
        self._store = self._new_store(lambda: self._streams(stdin))
        self._arm(self._start_budget_ms)
        self._armed()
        self._instance = self._instantiate(self._store)
        self._handle = self._function(*self._entries[0])
        self._check = self._function(HEALTH, "check")
        self._run = self._function(TASK, "run")
        self._save = self._function(STATE, "save-state")
        self._load = self._function(STATE, "load-state")
        self._receive = self._function(RECEIVER, "handle")

    def _new_store(self, streams: Callable[[], WasiConfig]) -> Store:
        store = Store(self._image.engine.raw)
        store.set_limits(
            memory_size=self._limits.memory_bytes,
            table_elements=self._limits.table_elements,
            instances=self._limits.core_instances,
            tables=self._limits.core_instances,
            memories=self._limits.core_instances,
        )
        if self._wasi:
            store.set_wasi(streams())
            if self._http:
                store.set_wasi_http()
        return store

    def _instantiate(self, store: Store) -> Any:
        """Make an instance in a store whose time is set. Raises as the constructor does."""
        try:
            return self._linker.instantiate(store, self._image.component)
        except WasmtimeError as error:
            text = str(error)
            if "wasm trap" in text or "wasm backtrace" in text:
                raise self._error(error, START_TIME if self._start_budget_ms else CALL_TIME) from error
            said = refusals.unlinked(text, self._limits)
            raise EngineError(RejectCode.START_FAILED, said or first_lines(text)) from error

    def _error(self, error: WasmtimeError, time: str = CALL_TIME) -> GuestError:
        return guest_error(str(error), self._limits, time=time, grows_tables=self._image.grows_tables)

    _entries: ClassVar[tuple[tuple[str, str], ...]] = ((HANDLER, "handle"),)
    """Exports that a guest needs: first the one by which requests come, then those that go with it."""

    def _streams(self, stdin: bytes | None) -> WasiConfig:
        wasi = WasiConfig()
        wasi.stderr_custom = _Lines(self._log)
        if stdin is None:
            wasi.stdout_custom = _Lines(self._log)
        else:
            wasi.inherit_stdout()
            if stdin:
                set_stdin(wasi, stdin)
        self._give(wasi)
        return wasi

    def _give(self, wasi: WasiConfig) -> None:
        """Put in what is granted: configuration as variables, the data directory, those that may be read."""
        if self._environment:
            wasi.env = list(self._config.items())
        if self._data:
            wasi.preopen_dir(self._data, DATA)
        for place, path in self._readable.items():
            wasi.preopen_dir(path, place, fs_mutable=False)

    def _function(self, interface: str, name: str) -> Func | None:
        index = self._image.export(interface, name)
        return None if index is None else self._instance.get_func(self._store, index)

    def _arm(self, budget_ms: int) -> None:
        self._allow(self._store, budget_ms, self._limits.fuel)

    def _allow(self, store: Store, budget_ms: int, fuel: int) -> None:
        store.set_epoch_deadline(budget_ms // TICK_MS + 1)
        if self._image.engine.fuel:
            store.set_fuel(fuel or _FOREVER)

    @property
    def configured(self) -> bool:
        """True where the guest can read its configuration, or has no import for that."""
        names = {bare(name) for name, functions in self._image.imports.items() if functions}
        return self._environment or ENVIRONMENT not in names or bool(names & set(CONFIG))

    @property
    def kinds(self) -> frozenset[str]:
        """Exports of the guest among HANDLER, HEALTH, TASK, STATE, RECEIVER and COMMAND."""
        state = self._save if self._load is not None else None
        found = (
            (HANDLER, self._handle),
            (HEALTH, self._check),
            (TASK, self._run),
            (STATE, state),
            (RECEIVER, self._receive),
        )
        command = {COMMAND} if self._image.export(COMMAND, "run") is not None else set()
        return frozenset(command | {name for name, function in found if function is not None})

    def handle(
        self, method: bytes, target: bytes, headers: bytes, body: bytes, way: ResponseSink | None = None
    ) -> Answer:
        """Run an HTTP exchange: status, header fields and body. Raises `GuestError`.

        `way`: how the answer may get to its client while the guest still writes it, where a guest can do that.
        """
        del way
        if self._served == self._limits.requests_per_instance > 0:
            self._store.close()
            self._open()
        self._served += 1
        assert self._handle is not None
        self._arm(self._call_budget_ms)
        self._armed()
        try:
            return self._image.engine.codec.call(self._store, self._handle, method, utf8(target), utf8(headers), body)
        except WasmtimeError as error:
            raise self._error(error) from error

    def exchange(self, head: bytes) -> bytes:
        """Run an exchange through the adapter and return the answer's head. Raises `GuestError`."""
        assert self._handle is not None
        self._arm(self._limits.call_ms)
        try:
            return exchange(self._store, self._handle, head)
        except WasmtimeError as error:
            raise self._error(error) from error

    def meter(self, wrote: Callable[[int], None]) -> None:
        """Let `wrote` be called when a call of a channel begins (0), and before so many bytes go to the channel."""
        self._wrote = wrote

    def _meter(self, size: int) -> None:
        if self._wrote is not None:
            self._wrote(size)

    def _answered(self, said: str) -> None:
        """Take the end of an answer whose guest may go on, where that does not go over a channel."""

    def await_interrupts(self, armed: Callable[[], None]) -> None:
        """Let the next epoch end a request, or the start of a next instance: none comes but to interrupt it.

        `armed` is called each time that a deadline was set: an epoch that passed before would end nothing.
        """
        self._start_budget_ms = self._call_budget_ms = 0
        self._armed = armed

    def renew(self) -> None:
        """Replace the instance.

        Raises:
            EngineError: START_FAILED: it trapped in its start, or was interrupted.
        """
        self._store.close()
        try:
            self._open()
        except GuestError as error:
            raise EngineError(RejectCode.START_FAILED, str(error)) from error
        self.ended = False

    def check(self) -> str | None:
        """Ask its health export: None for well, else its sentence. Raises `GuestError`."""
        return None if self._check is None else self._call(self._check)

    def run(self, scheduled_ms: int) -> str | None:
        """Run its task: None for done, else its sentence. Raises `GuestError`."""
        assert self._run is not None
        return self._call(self._run, scheduled_ms)

    def receive(self, message: Any) -> str | None:
        """Run its message handler with a message that the host has: None for handled, else why not.

        Raises:
            GuestError: it trapped or took too long.
        """
        assert self._receive is not None
        self._arm(self._limits.call_ms)
        try:
            result = self._receive(self._store, message)
        except WasmtimeError as error:
            raise self._error(error) from error
        if result is None:
            return None
        tag, payload = getattr(result, "tag", result), getattr(result, "payload", None)
        return str(tag) if payload is None else f"{tag}: {payload}"

    def command(self, arguments: Sequence[str], begins: Callable[[], None] | None = None) -> int:
        """Run `wasi:cli/run` in an instance of its own, and return the exit code.

        Standard output is logged as `info`, standard error as `warn`; in the adapter of wasi:http both are one stream.

        Args:
            arguments: after the program's name.
            begins: of a service, called once it has been started: from then on it has standard input, and no limit of
                time but the next epoch. None for a command with the limits of a call.

        Raises:
            EngineError, GuestError: it could not be started, or trapped, or took too long.
        """
        index = self._image.export(COMMAND, "run")
        assert index is not None
        lines = _Lines(self._log, "info "), _Lines(self._log, "info " if self._image.adapted else "warn ")

        def streams() -> WasiConfig:
            wasi = WasiConfig()
            wasi.argv = [PROGRAM, *arguments]
            wasi.stdout_custom, wasi.stderr_custom = lines
            if begins is not None:
                wasi.inherit_stdin()
            self._give(wasi)
            return wasi

        store = self._new_store(streams)
        try:
            self._allow(store, self._limits.start_ms, self._limits.fuel)
            function = self._instantiate(store).get_func(store, index)
            if begins is None:
                self._allow(store, self._limits.call_ms, self._limits.fuel)
            else:
                self._allow(store, 0, 0)
                begins()
            return 0 if function(store).tag == "ok" else 1
        except ExitTrap as error:
            return int(error.code)
        except WasmtimeError as error:
            raise self._error(error) from error
        finally:
            for each in lines:
                each.flush()
            store.close()
            if self._sockets:
                self._outgoing.renew()

    def save_state(self) -> tuple[bytes, str | None]:
        """Return its state, or empty and its sentence why there is none. Raises `GuestError`."""
        assert self._save is not None
        self._arm(self._limits.start_ms)
        try:
            return give_bytes(self._store, self._save)
        except WasmtimeError as error:
            raise self._error(error, STATE_TIME) from error

    def load_state(self, state: bytes) -> str | None:
        """Have it take a state: None for loaded, else its sentence. Raises `GuestError`."""
        assert self._load is not None
        self._arm(self._limits.start_ms)
        try:
            return take_bytes(self._store, self._load, state)
        except WasmtimeError as error:
            raise self._error(error, STATE_TIME) from error

    def _call(self, function: Func, *arguments: Any) -> str | None:
        self._arm(self._limits.call_ms)
        try:
            result = function(self._store, *arguments)
        except WasmtimeError as error:
            raise self._error(error) from error
        return result if result is None else str(result)

    def close(self) -> None:
        """Give its memory back at once."""
        self._store.close()
        if self._sockets:
            self._outgoing.renew()


_OUTGOING: Final = (
    *("begin", "room", "write", "send", "start", "finish", "abort", "head", "read", "poll", "close", "reset"),
)
"""Functions of the adapter's interface `host` that are methods of `Requests`."""
ADAPTERS_OWN: Final = (*_OUTGOING, "answered", "cancelled", "wrote")
"""Names of every function of the adapter's interface `host`."""


class _Ours(NamedTuple):
    """Functions that the host serves itself, and what these need; see `Surroundings`."""

    served: Served
    config: Mapping[str, str]
    log: Denials

    def define(self, instance: wc.LinkerInstance, name: str) -> None:
        """Define the functions and resources of an import."""
        interface = self.served.interfaces[bare(name)]
        functions = interface.make(Surroundings(self.config, self.log, name, self.served.parts))
        for resource, number in interface.resources.items():
            instance.add_resource(resource, wc.ResourceType.host(number), functions[f"[drop]{resource}"])
        for function in interface.functions:
            instance.add_func(function, functions[function])


def _linker(
    image: Image, ours: _Ours, outgoing: Requests, *, meter: Callable[[int], None], answered: Callable[[str], None]
) -> tuple[wc.Linker, bool]:
    """Return a linker with what the component imports, and nothing else; and whether WASI is in it."""
    linker = wc.Linker(image.engine.raw)
    names = [name for name, functions in image.imports.items() if functions]
    own = [name for name in names if bare(name) in compose.HOST_INTERFACES or bare(name) in ours.served.interfaces]
    wasi = bool(set(names) - set(own))
    if wasi:
        linker.add_wasip2()
        if any(bare(name) in _HTTP for name in names):
            linker.add_wasi_http()
        denied.define(linker, image, ours.log)
    with linker.root() as root:
        for name in own:
            with root.add_instance(name) as instance:
                if bare(name) == compose.SOCKETS_HOST:
                    instance.add_func("ask", _asking(outgoing.ask))
                elif bare(name) == compose.HOST:
                    for function in _OUTGOING:
                        instance.add_func(function, _asking(getattr(outgoing, function)))
                    instance.add_func("cancelled", _cancelled)
                    instance.add_func("answered", _asking(answered))
                    instance.add_func("wrote", _asking(meter))
                else:
                    ours.define(instance, name)
    return linker, wasi


def _asking(answer: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function for the linker, which hands in the store first."""
    return lambda _store, *arguments: answer(*arguments)


def _cancelled(_store: object) -> None:
    raise CancelledCallError


class _Lines:
    """Cuts what a guest writes to its standard streams into log lines."""

    def __init__(self, log: Log, level: str = "") -> None:
        """`level`: begin of each line."""
        self._log = log
        self._level = level
        self._rest = b""

    def __call__(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE_CHARS:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            self._log(self._level + line.decode(errors="replace"))

    def flush(self) -> None:
        """Log a last line that has no end."""
        rest, self._rest = self._rest, b""
        if rest:
            self._log(self._level + rest.decode(errors="replace"))


def use_stock_codec(engine: Engine) -> None:
    """Fall back to the bindings' own codec, after a self-test that failed."""
    engine.codec = StockCodec()


class WholeResponse:
    """Sink that keeps an answer until the call is over; for callers without a client."""

    begun = False
    request_trailers = b""
    notes_problems = True

    def __init__(self) -> None:
        self.problem, self.failed, self.said = "", False, b""

    def end_answer(self, said: bytes) -> None:
        """See `ResponseSink.end_answer`."""

    def rest(self) -> bytes:
        """See `ResponseSink.rest`."""
        return adapter_abi.drain_stdout()


def start(
    image: Image,
    *,
    limits: Limits,
    grants: Grants,
    config: dict[str, str],
    log: Log,
    data: str = "",
    served: Served = NOTHING_SERVED,
) -> Guest:
    """Instantiate a guest of either world; raises what `Guest` raises."""
    kind = WasiHttpGuest if image.adapted else Guest
    return kind(image, limits=limits, grants=grants, config=config, log=log, data=data, served=served)


class WasiHttpGuest(Guest):
    """A guest of wasi:http. The process's standard output must have been caught (`adapter_abi.catch_stdout`)."""

    _entries: ClassVar[tuple[tuple[str, str], ...]] = ((BRIDGE, "handle"), (BRIDGE, "flush"))
    _left = 0  # number of requests that this instance may answer
    _way: ResponseSink | None = None  # of the exchange in hand
    # False while an earlier store that ended in a trap may have left something unwritten, whoever's store it was.
    _clean: ClassVar[bool] = False

    def _open(self, stdin: bytes | None = None) -> None:
        super()._open(stdin or b"")
        # A rest of a body that the guest left unread would be the next request's.
        self._left = 1 if stdin else self._limits.requests_per_instance or 1
        self._flush()

    def _flush(self) -> None:
        if not WasiHttpGuest._clean:
            flush = self._function(BRIDGE, "flush")
            assert flush is not None
            self._call(flush)
            adapter_abi.drain_stdout()
            WasiHttpGuest._clean = True

    def _answered(self, said: str) -> None:
        if self._way is not None:
            self._way.end_answer(said.encode())

    def handle(
        self, method: bytes, target: bytes, headers: bytes, body: bytes, way: ResponseSink | None = None
    ) -> Answer:
        """See `Guest.handle`."""
        way = WholeResponse() if way is None else way
        if body or not self._left:
            self._store.close()
            self._open(body)
        else:
            self._flush()
        left, self._left, WasiHttpGuest._clean = self._left - 1, 0, False
        self._way = way
        try:
            said = way.said = self.exchange(adapter_abi.request_head(method, target, headers, way.request_trailers))
        finally:
            self._way = None
            answer = way.rest()
            self._outgoing.reset()
            if self._sockets and not left:
                self._outgoing.renew()
        head = adapter_abi.answer_head(said)
        WasiHttpGuest._clean = True
        if head.problem is not None:
            if way.notes_problems:
                self._log(f"host: {head.problem}")
            way.problem, way.failed = way.problem or head.problem, True
            return head.status, b"content-type: text/plain\r\n", head.problem.encode() + b"\n"
        self._left = left
        if way.begun:
            return 0, b"", b""
        if head.status:
            return head.status, head.headers, answer[2:]  # behind an empty line: it was begun before the head was known
        try:
            return adapter_abi.split_head(answer)
        except ValueError as error:
            way.problem = way.problem or str(error)
            return 0, b"", b""


_LOWER_HALF: Final = 2**32 - 1


class Turn(enum.IntEnum):
    """Reason why a guest's loop returned; numbers of `serve` in components/adapter/wit/adapter.wit."""

    SERVED = 0  # as many calls as were asked for
    CHANNEL_ENDED = 1
    LEAVE = 2  # the router asks for the loop to be left, between two calls
    MISPLACED = 3  # the next instance needs a token to find its place in the channel


class ChannelGuest(Guest):
    """A guest of wasi:http that serves calls in a loop: the process's standard input and output are its channel.

    The adapter reads calls as frames (`agent.host.ipc.frames`), so nothing happens here for each of them, unless each
    gets an instance of its own. The store's deadline is the next epoch; none comes but to interrupt the call.
    """

    _entries: ClassVar[tuple[tuple[str, str], ...]] = ((BRIDGE, "handle"), (BRIDGE, "serve"))
    last_call = 0
    """Number of the last call that this instance has answered."""
    _STEP: Final = 256
    """Calls after which the loop returns, so that processor time is counted now and then; metered, after each."""

    def _streams(self, stdin: bytes | None) -> WasiConfig:
        wasi = super()._streams(stdin)
        wasi.inherit_stdin()
        return wasi

    def _open(self, stdin: bytes | None = None) -> None:
        super()._open(stdin or b"")
        self.last_call = 0
        self._serve = self._function(BRIDGE, "serve")
        self._left = 1 if self._limits.fuel else self._limits.requests_per_instance or 1

    def serve(self, token: str) -> Turn:
        """Serve calls until the loop has a reason to return; `await_interrupts` first.

        `token`: discard what the channel has before it. Renew the instance after `MISPLACED`, and once it is `spent` or
        has `ended`. Where there are several workers, the router is told of each guest's return at once: the next call
        could go to another.

        Raises:
            GuestError: the call in flight ended in a trap or a limit; a `CancelledCallError` is no fault of the guest.
        """
        assert self._serve is not None
        calls = min(self._left, self._STEP if self._wrote is None else 1)
        self._arm(0)
        self._armed()
        try:
            metered, prompt = self._wrote is not None, self._limits.concurrency > 1
            said: int = self._serve(self._store, calls, calls == self._left, metered, prompt, token)
        except WasmtimeError as error:
            self.ended = True
            raise self._error(error) from error
        except CancelledCallError:
            self.ended = True
            raise
        self._left -= (said & _LOWER_HALF) >> 2
        self.last_call = said >> 32
        return Turn(said & 3)

    @property
    def spent(self) -> bool:
        """True once this instance has served as many calls as it may."""
        return not self._left
