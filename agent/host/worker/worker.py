"""Process that runs calls of one instance, one at a time, or of several that share it.

A zygote forks a worker, which never returns. A worker of one instance waits for its `Setup`, maps the image, enters the
sandbox, instantiates the guest and says `Ready`. From then on it has its channel to the router, the supervisor's socket
and nothing else. When that socket closes, it ends.

The channel (decision 15): its standard input and output are one end of a socket to the router,
from which the guest itself reads calls as frames, in a loop on the main thread; for a native guest the worker does.

A worker that instances of one publisher share, because the device's owner lets them, begins with `OpenShared` instead.
It maps every image before it enters the sandbox, since nothing in a worker may map machine code afterwards; an instance
whose image is not here gets a slot in another worker. Each slot is a `Worker` with a control socket, an epoll set,
channel and figures of its own, and ends alone: by its socket's end, or by a trap, which takes its store and nothing
else. Calls go one at a time, whosever they are. A guest that hangs can only be ended with the process, and all slots
with it.

`Redactor` keeps the values of secrets out of what a worker says: log lines, traps, and what a guest says of its health.
It is meant for a guest's own carelessness: one that wants to tell its secret can always write it in another way. So a
value is found as it stands and in the forms in which programs print values by mistake, whole or by the line.
"""

import base64
import contextlib
import json
import mmap
import os
import re
import select
import socket
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Final, NoReturn

import msgspec

from agent.host.engine import adapter_abi, guest, host_interface, memory_in_use
from agent.host.engine.adapter_abi import Requests
from agent.host.engine.guest import Turn
from agent.host.engine.runtime import Engine, EngineError, GuestError, Image
from agent.host.interfaces import gpio, keyvalue, messaging, metrics, serial
from agent.host.ipc import frames, framing, gpio_abi, heads, serial_abi, worker_api
from agent.host.ipc.frames import Frame, Kind
from agent.host.ipc.stats_page import StatsPage
from agent.host.ipc.write_quota import QuotaPage, WriteMeter, open_counter
from agent.host.sandbox import sandbox
from agent.host.worker.control_thread import ControlThread
from agent.host.worker.native_channel import NativeChannel
from agent.host.worker.runner import NO_PARTS, GuestRunner
from agent.host.worker.service import ServiceControl, StdinPipe
from agent.host.worker.slot_channel import SlotChannel, SlotRequest, SlotResponse
from agent.host.worker.watchdog import LINE_MAX_CHARS, CallWatchdog
from fleet.protocol.codes import CallOutcome, RejectCode
from fleet.protocol.manifest import NATIVE_ANSWER_MAX_BYTES


class Worker:
    """An instance in this process: its control socket, its guest, its calls."""

    def __init__(self, sock: socket.socket, poll: select.epoll) -> None:
        """Prepare a worker on its control socket. The process waits for what is in `poll`."""
        self._sock = sock
        self._poll = poll
        self._secrets: dict[str, str] = {}
        self._redactor = Redactor(())
        self._outgoing: _MakeOutgoing | None = None
        self._pairs: socket.socket | None = None
        self.begun = False
        self._channel = False
        self._slot: SlotChannel | None = None  # of a slot in a shared worker
        self._orders: list[tuple[worker_api.ToWorker, tuple[int, ...]]] = []  # until its router lets it leave its calls
        self._owes_end = False
        self._looping = False
        self._holding = False  # the state was saved: no call before `Resume`
        self._stdin: StdinPipe | None = None  # of a service
        self._service: worker_api.RunService | None = None
        poll.register(sock, select.EPOLLIN)

    def say(self, message: worker_api.FromWorker) -> None:
        """Tell the supervisor; a line of log is dropped rather than waited for. No value of a secret leaves here."""
        message = self._redactor.message(message)
        try:
            if isinstance(message, worker_api.Line | worker_api.Busy | worker_api.Overdue):
                self._sock.sendmsg([worker_api.encode(message)], [], socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
            else:
                worker_api.send(self._sock, message)
        except BlockingIOError:
            pass
        except OSError as error:
            raise framing.GoneError(str(error)) from error

    def set_up(self, engine: Engine, setup: worker_api.Setup, fds: tuple[int, ...]) -> bool:
        """Become the worker of one instance alone, and enter the sandbox; False when that was refused."""
        image_fd, page_fd, *more = fds
        hardware = tuple(reversed([more.pop() for _ in range(setup.hardware)]))
        metrics_fd = more.pop() if setup.metrics else -1
        message_fd = more.pop() if setup.messages else -1
        channel_fd = more.pop() if setup.channel else -1
        if setup.secrets:
            self._secrets = _read_secrets(more.pop())
            self._redactor = Redactor(self._secrets.values())
        pairs_fd = more.pop() if setup.keyvalue else -1
        ask_fd = more.pop() if setup.egress else -1
        tally_fd = more.pop() if setup.data else -1
        kept = {
            image_fd,
            page_fd,
            *hardware,
            *(fd for fd in (ask_fd, pairs_fd, tally_fd, channel_fd, message_fd, metrics_fd) if fd >= 0),
        }
        sandbox.close_all_but({0, 1, 2, self._sock.fileno(), self._poll.fileno(), *kept})
        self._tick = engine.tick
        if setup.egress:
            self._outgoing = _outgoing(setup, ask_fd)
        self._pairs = socket.socket(fileno=pairs_fd) if setup.keyvalue else None
        try:
            image = engine.load(f"/proc/self/fd/{image_fd}")
            self._channel = setup.channel and (image.loops or not image.adapted)
            if self._channel:
                _plug_in(channel_fd)
            elif image.adapted:
                adapter_abi.catch_stdout()
            if setup.service:
                self._stdin = StdinPipe()
            memory_in_use.watch(setup.limits.memory_bytes, engine.plan.reservation_bytes)
            figures_fd, scheduling_fd = sandbox.memory_figures(), sandbox.scheduling()
            counter_fd = open_counter() if setup.data else None
            spec = sandbox.worker_spec(
                uid=setup.uid,
                memory_bytes=setup.limits.memory_bytes * (2 if image.commands else 1),  # a run has its own
                body_bytes=setup.limits.request_bytes + min(setup.limits.response_bytes, NATIVE_ANSWER_MAX_BYTES),
                storage_bytes=setup.limits.storage_bytes,
                data=setup.data,
                workers=setup.limits.concurrency,
                connects=setup.egress,
            )
            spec = sandbox.reading(spec, tuple(setup.directories.values()))
            files, packages = _mounts(setup)
            layers = sandbox.apply(sandbox.with_devices(sandbox.with_files(spec, files), _ioctls(setup)))
        except EngineError as error:
            return self._refuse(setup, error.code, error)
        except sandbox.SandboxError as error:
            return self._refuse(setup, RejectCode.CONTAINMENT, error)
        except sandbox.UnreadableError as error:
            return self._refuse(setup, RejectCode.INTERNAL, _unreadable(setup, error))
        os.close(image_fd)
        where = "" if not setup.data else sandbox.DATA if layers["mount"] else "."
        writes = None
        if setup.data:
            tally = QuotaPage(tally_fd)
            os.close(tally_fd)
            writes = WriteMeter(counter_fd, most=setup.limits.daily_written_bytes, tally=tally, place=setup.place)
        return self.begin(
            setup,
            image,
            page_fd,
            layers=layers,
            figures_fd=figures_fd,
            data=where,
            readable={**_readable(setup, mounted=layers["mount"]), **packages},
            scheduling_fd=scheduling_fd,
            writes=writes,
            slot=socket.socket(fileno=channel_fd) if setup.channel and not self._channel else None,
            messages=socket.socket(fileno=message_fd) if setup.messages else None,
            metrics_fd=metrics_fd if setup.metrics else None,
            hardware=hardware,
        )

    def begin(
        self,
        setup: worker_api.Setup,
        image: Image,
        page_fd: int,
        *,
        layers: dict[str, bool],
        figures_fd: int | None = None,
        data: str = "",
        readable: Mapping[str, str] = NO_PARTS,
        ticker: CallWatchdog | None = None,
        scheduling_fd: int | None = None,
        writes: WriteMeter | None = None,
        slot: socket.socket | None = None,
        messages: socket.socket | None = None,
        metrics_fd: int | None = None,
        hardware: tuple[int, ...] = (),
    ) -> bool:
        """Instantiate the guest and say `Ready`; False when that was refused. The descriptors are closed.

        `readable`: directories that it may read, by the path at which the guest sees each.

        `slot`: channel of a slot in a shared worker, or of an image whose adapter has no loop.
        """
        page = self._page = StatsPage(page_fd)
        os.close(page_fd)
        self._caller = GuestRunner(
            image,
            outgoing=None if self._outgoing is None else partial(self._outgoing, page.sent, self._nudge),
            limits=setup.limits,
            grants=setup.grants,
            config={**setup.config, **self._secrets},
            page=page,
            say=self.say,
            data=data,
            readable=readable,
            redact=self._redactor.text,
            ticker=ticker,
            scheduling_fd=scheduling_fd,
            writes=writes,
            channel=self._channel,
            parts=self._parts_of(setup, messages, page, metrics_fd=metrics_fd, hardware=hardware),
        )
        try:
            kinds = self._caller.start()
        except EngineError as error:
            return self._refuse(setup, error.code, error)
        except GuestError as error:
            return self._refuse(setup, RejectCode.START_FAILED, error)
        if slot is not None:
            self._output = _ChannelOutput(slot)
            self._slot = SlotChannel(slot, setup.limits.request_bytes, self._output.failed)
            self._poll.register(slot, select.EPOLLIN)
        ready = worker_api.Ready(
            kinds=tuple(sorted(kinds)),
            layers=layers,
            whole=slot is not None or not self._caller.streams,
            id=setup.id,
        )
        worker_api.send(self._sock, ready, *(() if figures_fd is None else (figures_fd,)))
        if figures_fd is not None:
            os.close(figures_fd)
        self.begun = True
        return True

    def _parts_of(
        self,
        setup: worker_api.Setup,
        messages: socket.socket | None,
        page: StatsPage,
        *,
        metrics_fd: int | None,
        hardware: tuple[int, ...],
    ) -> dict[str, host_interface.Part]:
        """Return what is set up for single interfaces."""
        parts: dict[str, host_interface.Part] = {
            messaging.NAME: messaging.Publisher(messages, setup.grants, setup.limits)
        }
        if metrics_fd is not None:
            parts[metrics.NAME] = metrics.Meter(metrics_fd, self._redactor.text)
        if self._pairs is not None:
            parts[keyvalue.NAME] = keyvalue.KeyValueClient(self._pairs, page.used_pairs, setup.grants.stores)
        devices = setup.grants.devices
        if devices.gpio:
            parts[gpio.NAME] = gpio.Pins(devices.gpio, hardware[: len(devices.gpio)])
        if devices.serial:
            parts[serial.NAME] = serial.Ports(devices.serial, hardware[len(devices.gpio) :], setup.limits)
        return parts

    def _nudge(self) -> None:
        """Wake a guest that waits in the engine for its channel. Nothing else is being written to that meanwhile."""
        with contextlib.suppress(OSError):  # without a router the guest wakes for the channel's end
            self._channel_sock.sendall(frames.encode(Frame(Kind.NUDGE, 0)))

    def _refuse(self, setup: worker_api.Setup, code: RejectCode, error: Exception) -> bool:
        self.say(worker_api.Refused(code=code, message=str(error), id=setup.id))
        return False

    def first(self) -> tuple[worker_api.Setup, tuple[int, ...]]:
        """Read the first message, of a slot in a shared worker. Raises `framing.GoneError`."""
        try:
            setup, fds = worker_api.receive_to_worker(self._sock)
        except framing.DescriptorsLostError as error:
            why = framing.no_descriptors("the shared worker")
            self.say(worker_api.Refused(code=RejectCode.INTERNAL, message=why, id=worker_api.setup_id(error.data)))
            raise
        if not isinstance(setup, worker_api.Setup):
            raise framing.GoneError("the first message is not a setup")
        return setup, fds

    @property
    def has_channel(self) -> bool:
        """True for a slot in a shared worker that has a channel."""
        return self._slot is not None

    def turn_of_slot(self) -> bool:
        """Do what there is to do, and at most one call; True if there is more."""
        assert self._slot is not None
        own = self._sock.fileno()
        for fd, _ in self._poll.poll(0):
            if fd == own:
                self._obey_as_slot(*worker_api.receive_to_worker(self._sock))
            else:
                self._slot.read()
        if not self._looping or self._holding:
            return False
        match self._slot.next():
            case None:
                return False
            case SlotRequest() as request:
                self._serve_slot(self._slot, request)
            case _:
                orders, self._orders = self._orders, []
                self._owes_end = True
                for order in orders:
                    self.obey(*order)
                self._end_orders()
        return True

    def _end_orders(self) -> None:
        """Tell the router that calls may come again, unless the state was saved."""
        if self._owes_end and not self._holding:
            self._owes_end = False
            self._output.write(Frame(Kind.END, 0))

    def _obey_as_slot(self, message: worker_api.ToWorker, fds: tuple[int, ...]) -> None:
        """Obey at once, or, while calls come, when the router says that none is on its way."""
        apart = isinstance(message, worker_api.Serve | worker_api.Interrupt | worker_api.Resume)
        if self._looping and not (apart or self._holding):
            self._orders.append((message, fds))
            return
        self.obey(message, fds)
        self._end_orders()

    def _serve_slot(self, slot: SlotChannel, request: SlotRequest) -> None:
        slot.begin(request.call)
        response = SlotResponse(slot.stream, request.call, request.trailers)
        streams = self._caller.streams
        try:
            head = heads.request_parts(request.head)
            answer = self._caller.handle(head, bytes(request.body), response if streams else None)
        except GuestError as error:
            outcome = CallOutcome.GUEST_TRAP if response.ended else error.outcome
            if not response.has_ended:
                slot.fail(outcome, str(error))
                return
            response.failure = (outcome, str(error))
        else:
            if not streams:
                response.native(*answer)
        slot.answer(response)

    def turn(self) -> None:
        """Obey what has come, without calls."""
        if self._poll.poll(0):
            self.obey(*worker_api.receive_to_worker(self._sock))

    def loop(self) -> NoReturn:
        """Serve until the supervisor's socket closes."""
        if self._slot is not None:
            has_more = False
            while True:
                self._poll.poll(0 if has_more else -1)
                has_more = self.turn_of_slot()
        while not self._looping or not self._channel:
            self.obey(*worker_api.receive_to_worker(self._sock))
            if self._service is not None:
                self._run_service(self._service)
        self._serve_channel()

    def _run_service(self, order: worker_api.RunService) -> NoReturn:
        """Run the service to its end, and end the process with it."""
        if self._stdin is None:
            raise framing.GoneError("a service in a worker that was not set up for one")
        control = ServiceControl(
            self._sock,
            self._stdin,
            tick=self._tick,
            look=self._caller.look,
            obey=lambda message: self.obey(message, ()),
            look_s=self._caller.look_s,
        )
        self._caller.restore()
        self.say(self._caller.serve_as_service(order.args, control))
        os._exit(0 if control.draining else worker_api.SERVICE_ENDED)

    def _serve_channel(self) -> NoReturn:
        """Serve calls of the channel until that ends, or the supervisor's socket closes."""
        control = ControlThread(self._sock, self._page, tick=self._tick)
        sock = self._channel_sock = socket.socket(fileno=1)
        output = _ChannelOutput(sock)
        native = None if self._caller.streams else NativeChannel(self._caller, control, sock)
        token = ""
        while True:
            try:
                turn = self._caller.serve(token, control) if native is None else native.serve(token)
            except GuestError as error:
                why = self._redactor.text(str(error))
                token = output.failed(error.outcome, why, returned=self._caller.last_returned)
                continue
            token = output.failed() if turn is Turn.MISPLACED else ""
            if turn is Turn.CHANNEL_ENDED:
                os._exit(worker_api.RENEW)
            if turn is Turn.LEAVE:
                for received in control.take():
                    self.obey(*received)
                while self._holding:
                    for received in control.wait():
                        self.obey(*received)
                self._caller.restore()
                output.write(Frame(Kind.END, 0))

    def close(self) -> None:
        """End this instance, and not the process."""
        if self.begun:
            self._caller.close()
        if self._slot is not None:
            self._slot.stream.sock.close()
        self._poll.close()
        self._sock.close()

    def obey(self, message: worker_api.ToWorker, fds: tuple[int, ...]) -> None:
        """Do what the supervisor says."""
        match message:
            case worker_api.Serve():
                self._serve(fds)
            case worker_api.Interrupt() | worker_api.Drain():
                pass  # the call has ended, the service has not begun
            case worker_api.Check(id=number):
                self.say(worker_api.Checked(id=number, problem=self._caller.check()))
            case worker_api.Task(id=number, scheduled_ms=scheduled_ms, args=args):
                problem = self._caller.run(scheduled_ms or int(time.time() * 1000), args)
                self.say(worker_api.Ran(id=number, problem=problem))
            case worker_api.Deliver(id=number):
                self.say(worker_api.Delivered(id=number, problem=self._caller.receive(message)))
            case worker_api.RunService():
                self._service = message
            case worker_api.Probe(id=number):
                self.say(worker_api.Probed(id=number))
            case worker_api.Configure(id=number, config=config):
                problem = self._caller.configure({**config, **self._secrets})
                self.say(worker_api.Configured(id=number, problem=problem))
            case worker_api.SaveState() | worker_api.LoadState() | worker_api.Resume():
                self._carry(message, fds)
            case _:
                raise framing.GoneError("set up twice")

    def _serve(self, fds: tuple[int, ...]) -> None:
        """Take calls from the channel from now on. Raises `framing.GoneError` for a listener, which none serves."""
        framing.close_all(fds)
        if fds:
            self.say(worker_api.Line(text="host: it is older than its workers, which get no clients: restart it"))
            raise framing.GoneError("a listener, which this worker cannot serve")
        self._looping = True

    def _carry(
        self, message: worker_api.SaveState | worker_api.LoadState | worker_api.Resume, fds: tuple[int, ...]
    ) -> None:
        match message:
            case worker_api.SaveState(id=number):
                with open_state(fds[0]) as room:
                    state, problem = self._caller.save_state(len(room))
                    room[: len(state)] = state
                self._holding = problem is None
                self.say(worker_api.StateSaved(length=len(state), problem=problem, id=number))
            case worker_api.LoadState(length=length, id=number):
                with open_state(fds[0]) as room:
                    state = bytes(room[:length])
                self.say(worker_api.StateLoaded(problem=self._caller.load_state(state), id=number))
            case worker_api.Resume():
                self._holding = False


def _readable(setup: worker_api.Setup, *, mounted: bool) -> dict[str, str]:
    """Return where this process finds the directories that it may read, by the path at which the guest sees each."""
    paths = enumerate(setup.directories.items())
    return {at: sandbox.directory_place(number, path, mounted=mounted) for number, (at, path) in paths}


def _unreadable(setup: worker_api.Setup, error: sandbox.UnreadableError) -> Exception:
    """Say which of the device's directories cannot be read, by the name that its grant has."""
    at = next(at for at, path in setup.directories.items() if path == error.path)
    name = setup.grants.mounts.get(at, at)
    return RuntimeError(f"its directory {name} ([policy.directories] of the device) cannot be read: {error}")


def _plug_in(channel_fd: int) -> None:
    """Make a channel the process's standard input and output. Nothing else in a worker uses those."""
    os.dup2(channel_fd, 0, inheritable=False)
    os.dup2(channel_fd, 1, inheritable=False)
    os.close(channel_fd)


class _ChannelOutput:
    """Writes of the worker itself to the channel, while no guest runs: each write of a guest's ends with a whole frame.

    Sent as to a socket, since the kernel counts bytes that are written as to a file, and a guest has a quota of those.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def failed(self, outcome: CallOutcome | None = None, why: str = "", *, returned: int = 0) -> str:
        """Tell the router that the store has ended early, and return the token behind which the next one reads on.

        `outcome`: of the call in flight, if that has failed; `why`: a text whose first line says so; `returned`: number
        of the last call from which a guest is known to have returned.
        """
        token = os.urandom(frames.TOKEN_BYTES // 2).hex()
        sentence = (why.splitlines() or [""])[0][:LINE_MAX_CHARS]
        text = f"{'' if outcome is None else outcome.value}\r\n{sentence}\r\n{token}"
        self.write(Frame(Kind.FAILED, returned, text.encode()))
        return token

    def write(self, frame: Frame) -> None:
        """Write a frame; without a router the worker ends."""
        try:
            self._sock.sendall(frames.encode(frame))
        except OSError:
            os._exit(worker_api.RENEW)


def _ioctls(setup: worker_api.Setup) -> tuple[int, ...]:
    """Return the calls that a worker may make on the hardware that it was given."""
    devices = setup.grants.devices
    return (gpio_abi.IOCTLS if devices.gpio else ()) + (serial_abi.IOCTLS if devices.serial else ())


def _read_secrets(fd: int) -> dict[str, str]:
    """Return the values by name; the workers of a generation share the descriptor, and so no place in it."""
    return msgspec.json.decode(os.pread(fd, os.fstat(fd).st_size, 0), type=dict[str, str])


_MakeOutgoing = Callable[[Callable[[bool], None], Callable[[], None], Callable[[str], None]], Requests]
"""Maker of an instance's requests, given where to count, what wakes the guest, and where to log."""


def _outgoing(setup: worker_api.Setup, ask_fd: int) -> _MakeOutgoing:
    """Return what makes this instance's `Outgoing`; what that takes is loaded now, while files can be read."""
    from agent.host.interfaces import outgoing_http  # noqa: PLC0415 - workers without such grants go without asyncio, ssl and http.client

    kind = outgoing_http.OutgoingHttp
    if setup.grants.sockets:
        from agent.host.interfaces import sockets  # noqa: PLC0415 - the same

        kind = sockets.Network
    encrypted = any(not each.startswith("http:") for each in setup.grants.requests)
    context = outgoing_http.trust() if encrypted else None
    sock = socket.socket(fileno=ask_fd)
    return lambda count, nudge, log: kind(
        sock, setup.grants, setup.limits, log=log, count=count, context=context, nudge=nudge
    )


@contextlib.contextmanager
def open_state(fd: int) -> Iterator[mmap.mmap | bytearray]:
    """Map the memfd's memory and close the descriptor."""
    try:
        size = os.fstat(fd).st_size
        if not size:
            yield bytearray()
            return
        with mmap.mmap(fd, size) as room:
            yield room
    finally:
        os.close(fd)


class SharedWorker:
    """The process of a shared worker."""

    def __init__(self, sock: socket.socket, engine: Engine) -> None:
        self._sock = sock
        self._engine = engine
        self._poll = select.epoll()
        self._poll.register(sock, select.EPOLLIN)
        self._images: dict[str, Image] = {}
        self._slots: dict[int, Worker] = {}
        self._layers: dict[str, bool] = {}
        self._due_s: dict[int, float] = {}  # slots that have something to do at a time

    def open(self, order: worker_api.OpenShared, fds: tuple[int, ...]) -> bool:
        """Map the images and enter the sandbox; False when that was refused."""
        sandbox.close_all_but({0, 1, 2, self._sock.fileno(), self._poll.fileno(), *fds})
        try:
            for key, fd in zip(order.images, fds, strict=True):
                self._images[key] = self._engine.load(f"/proc/self/fd/{fd}")
            adapted = any(image.adapted for image in self._images.values())
            if adapted:
                adapter_abi.catch_stdout()
            figures_fd, scheduling_fd = sandbox.memory_figures(), sandbox.scheduling()
            self._layers = sandbox.apply(
                sandbox.shared_worker_spec(
                    uid=order.uid,
                    slots=order.slots,
                    memory_bytes=order.limits.memory_bytes,
                    body_bytes=order.limits.request_bytes + min(order.limits.response_bytes, NATIVE_ANSWER_MAX_BYTES),
                )
            )
        except EngineError as error:
            worker_api.send(self._sock, worker_api.Refused(code=error.code, message=str(error), id=order.id))
            return False
        except sandbox.SandboxError as error:
            worker_api.send(
                self._sock, worker_api.Refused(code=RejectCode.CONTAINMENT, message=str(error), id=order.id)
            )
            return False
        for fd in fds:
            os.close(fd)
        self._ticker = CallWatchdog(self._engine.tick, waits=lambda: sandbox.waits(scheduling_fd))
        opened = worker_api.Opened(layers=self._layers, id=order.id)
        worker_api.send(self._sock, opened, *(() if figures_fd is None else (figures_fd,)))
        if figures_fd is not None:
            os.close(figures_fd)
        return True

    def loop(self) -> NoReturn:
        """Serve until the supervisor's socket closes."""
        own = self._sock.fileno()
        while True:
            wait_s = max(0.0, min(self._due_s.values()) - time.monotonic()) if self._due_s else -1.0
            for fd, _ in self._poll.poll(wait_s):
                if fd == own:
                    self._take_in()
                elif fd in self._slots:
                    self._turn(fd)
            if self._due_s:
                now_s = time.monotonic()
                for fd in [fd for fd, due_s in self._due_s.items() if due_s <= now_s]:
                    self._turn(fd)

    def _take_in(self) -> None:
        """Take in another instance."""
        try:
            message, fds = worker_api.receive_to_worker(self._sock)
        except framing.DescriptorsLostError:  # the slot that there is no room for has ended with its socket
            return
        if not isinstance(message, worker_api.AddSlot):
            raise framing.GoneError("not a slot")
        poll = select.epoll()
        self._poll.register(poll, select.EPOLLIN)
        self._slots[poll.fileno()] = Worker(socket.socket(fileno=fds[0]), poll)

    def _turn(self, fd: int) -> None:
        """Let a slot do what it has to do, and note when it wants to be looked after again."""
        slot = self._slots[fd]
        try:
            if not slot.begun:
                setup, fds = slot.first()
                image = self._images[setup.image]
                slot.begin(
                    setup,
                    image,
                    fds[0],
                    layers=self._layers,
                    ticker=self._ticker,
                    slot=socket.socket(fileno=fds[1]) if setup.channel else None,
                    metrics_fd=fds[-1] if setup.metrics else None,
                )
                if not slot.begun:
                    self._end(fd)
                    return
            if slot.has_channel:
                wait_s = 0.0 if slot.turn_of_slot() else -1.0
            else:
                slot.turn()
                wait_s = -1.0
        except framing.GoneError:
            self._end(fd)
            return
        if wait_s >= 0:
            self._due_s[fd] = time.monotonic() + wait_s
        else:
            self._due_s.pop(fd, None)

    def _end(self, fd: int) -> None:
        self._due_s.pop(fd, None)
        self._slots.pop(fd).close()


REDACTED: Final = "redacted"
LINE_MIN_CHARS: Final = 8
"""A shorter line of a value of several lines is as good as any word."""


class Redactor:
    """Replaces values in text."""

    def __init__(self, values: Iterable[str]) -> None:
        """`values` are looked for from now on; without any, text stays as it is."""
        found = {form for value in values for form in _forms(value)}
        longest_first = sorted(found, key=lambda form: (-len(form), form))
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if found else None

    def text(self, text: str) -> str:
        """Return the text without values."""
        return text if self._pattern is None else self._pattern.sub(REDACTED, text)

    def message(self, message: worker_api.FromWorker) -> worker_api.FromWorker:
        """Return what a worker is about to say, without values."""
        if self._pattern is None:
            return message
        match message:
            case worker_api.Line(text=text):
                return msgspec.structs.replace(message, text=self.text(text))
            case worker_api.ServiceEnded(how=text, fault=fault):
                return msgspec.structs.replace(message, how=self.text(text), fault=self.text(fault))
            case worker_api.Fault(message=text) | worker_api.Refused(message=text):
                return msgspec.structs.replace(message, message=self.text(text))
            case (
                worker_api.Checked(problem=str(text))
                | worker_api.Ran(problem=str(text))
                | worker_api.Delivered(problem=str(text))
                | worker_api.StateSaved(problem=str(text))
                | worker_api.StateLoaded(problem=str(text))
            ):
                return msgspec.structs.replace(message, problem=self.text(text))
            case _:
                return message


def _mounts(setup: worker_api.Setup) -> tuple[tuple[sandbox.ReadOnlyFile, ...], dict[str, str]]:
    """Return where data packages are mounted, and by the path at which the guest sees each their directories.

    Those in the directory of the instance's own files are mounted there, the others in directories of the root.
    """
    inside = {guest.DATA: sandbox.DATA} if setup.data else {}
    files = []
    for each in setup.packages:
        parent, _, name = each.path.rpartition("/")
        place = inside.setdefault(parent or "/", f"/package-{len(inside)}")
        files.append(sandbox.ReadOnlyFile(each.file, f"{place}/{name}", each.owner))
    return tuple(files), {path: place for path, place in inside.items() if place != sandbox.DATA}


def _forms(value: str) -> Iterator[str]:
    whole = value.strip() or value
    lines = [line.strip() for line in value.splitlines()]
    for each in (value, whole, *(line for line in lines if len(line) >= LINE_MIN_CHARS)):
        data = each.encode()
        yield each
        yield json.dumps(each)[1:-1]
        yield json.dumps(each, ensure_ascii=False)[1:-1]
        yield urllib.parse.quote(each, safe="")
        yield urllib.parse.quote_plus(each)
        yield from (base64.b64encode(data).decode().rstrip("="), base64.urlsafe_b64encode(data).decode().rstrip("="))
        yield from (data.hex(), data.hex().upper())
