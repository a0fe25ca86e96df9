"""Router's and supervisor's ends of a real worker with a channel, forked by a zygote, in its sandbox: for tests."""

import os
import socket
import subprocess
import time
from collections import deque
from dataclasses import dataclass, field

import msgspec
import support

from agent.host.engine import adapter_abi
from agent.host.ipc import frames, framing, stats_page, worker_api
from agent.host.ipc.frames import FROM_GUEST, Frame, FrameDecoder, Kind
from agent.host.ipc.worker_api import ZygoteMessage
from agent.host.supervisor import worker_pool
from fleet.protocol.manifest import Grants, Limits

WAIT_S = 20
HTTP = Grants(interfaces=("wasi:http/outgoing-handler",))


class Zygote:
    """A zygote process, which ends with this object."""

    def __init__(self, *, fuel=False):
        self.sock, theirs = framing.socket_pair()
        self.sock.settimeout(WAIT_S)
        self.fuel = fuel
        with theirs:
            argv = [*worker_pool.python_argv("agent.host.worker.zygote"), str(theirs.fileno())]
            argv += ["--fuel"] if fuel else []
            self.process = subprocess.Popen(
                argv,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=worker_pool._environment(),
            )

    def fork(self) -> tuple[int, socket.socket]:
        """A worker's pid, and the supervisor's end of its control socket."""
        ours, theirs = framing.socket_pair()
        with theirs:
            framing.send_packet(self.sock, ZygoteMessage.fork().encode(), (theirs.fileno(),))
        while True:
            message, fds = self._next()
            framing.close_all(fds)
            if message.kind == worker_api.FORKED:
                return message.pid, ours

    def _next(self):
        data, fds = framing.receive_packet(self.sock)
        return ZygoteMessage.decode(data), fds

    def exit_status(self, pid) -> int:
        """The exit status of a worker, once it has ended."""
        while True:
            message, fds = self._next()
            framing.close_all(fds)
            if (message.kind, message.pid) == (worker_api.EXITED, pid):
                return message.status

    def close(self):
        self.sock.close()
        self.process.wait()


@dataclass
class Answer:
    """Frames that came for a call."""

    heads: list[bytes] = field(default_factory=list)
    body: bytes = b""
    pieces: int = 0
    end: bytes | None = None
    credits: list[int] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def head(self):
        return adapter_abi.answer_head(self.end)


class ChannelWorker:
    """A worker that serves; `calls` are numbered as the router numbers them."""

    def __init__(self, zygote, guest, *, limits=None, grants=HTTP, config=None, secrets=None, serve=True):
        self.zygote = zygote
        self.pid, self.control = zygote.fork()
        self.control.settimeout(WAIT_S)
        self.said = []
        self.number = 0
        self.decoder = FrameDecoder(FROM_GUEST)
        self.arrived: deque[Frame] = deque()
        self.channel, theirs = socket.socketpair()
        self.channel.settimeout(WAIT_S)
        page_fd = stats_page.create_page("test")
        self.page = stats_page.StatsPage(page_fd)
        fds = [support.sealed(support.compiled(guest, fuel=zygote.fuel)), page_fd]
        if secrets:
            fds.append(framing.constant_memfd("secrets", lambda fd: os.write(fd, msgspec.json.encode(secrets))))
        fds.append(theirs.detach())
        setup = worker_api.Setup(
            instance="test",
            grants=grants,
            limits=limits or Limits(),
            config=config or {},
            uid=1_879_200_000 if os.geteuid() == 0 else None,
            secrets=bool(secrets),
            channel=True,
            id=1,
        )
        worker_api.send(self.control, setup, *fds)
        framing.close_all(fds)
        self.ready = self.receive(worker_api.Ready)
        if serve:
            worker_api.send(self.control, worker_api.Serve())

    def receive(self, kind):
        """The next message of this kind; others are kept in `said`."""
        while True:
            message, fds = worker_api.receive_from_worker(self.control)
            framing.close_all(fds)
            if isinstance(message, kind):
                return message
            self.said.append(message)

    def ask(self, message, reply, *fds, leave=True):
        """A request of the supervisor, for which the router asks the worker to leave the loop."""
        worker_api.send(self.control, message, *fds)
        if leave:
            self.write(Frame(Kind.YIELD, 0))
        return self.receive(reply)

    def write(self, *sent):
        self.channel.sendall(b"".join(map(frames.encode, sent)))

    def frame(self) -> Frame | None:
        """The worker's next frame; None at the channel's end."""
        while not self.arrived:
            data = self.channel.recv(1 << 16)
            if not data:
                assert not self.decoder.within
                return None
            self.arrived.extend(self.decoder.feed(data))
        return self.arrived.popleft()

    def request(self, path, *, method=b"GET", headers=b"", body=None, trailers=b""):
        """The frames of a request."""
        self.number += 1
        head = adapter_abi.request_head(method, path.encode(), b"host: test\r\n" + headers)
        if body is None:
            return [Frame(Kind.WHOLE_REQUEST, self.number, head)]
        pieces = range(0, len(body), frames.PAYLOAD_MAX_BYTES)
        sent = [Frame(Kind.REQUEST, self.number, head)]
        sent += [Frame(Kind.BODY, self.number, body[at : at + frames.PAYLOAD_MAX_BYTES]) for at in pieces]
        return [*sent, Frame(Kind.END, self.number, trailers)]

    def send(self, path, **how) -> int:
        """Send a request whole, whose body fits in its credit, and return its number."""
        self.write(*self.request(path, **how))
        self.page.begin(time.monotonic_ns(), self.number)
        return self.number

    def answer(self, call, *, credit=True, upload=(), may=0) -> Answer:
        """Collect the frames of a call up to its end or its failure; give credit for what comes.

        `upload`: frames of the request's body that wait for credit; `may`: bytes of it that are left.
        """
        answer, owed = Answer(), 0
        while (frame := self.frame()) is not None:
            if frame.kind is Kind.NUDGE:
                self.write(frame)
                continue
            if frame.kind is Kind.FAILED:
                answer.failed = frame.payload.decode().split("\r\n")
                break
            if frame.kind is Kind.END and not frame.payload and frame.call < call:
                continue  # the guest of an answered call has returned
            assert frame.call == call
            if frame.kind is Kind.CREDIT:
                answer.credits.append(int.from_bytes(frame.payload, "little"))
                may = self.upload(upload, may + answer.credits[-1])
            if frame.kind is Kind.RESPONSE:
                answer.heads.append(frame.payload)
            elif frame.kind is Kind.BODY:
                answer.body += frame.payload
                answer.pieces += 1
                owed += len(frame.payload)
                if credit and owed >= frames.INITIAL_CREDIT_BYTES // 4:
                    self.write(Frame(Kind.CREDIT, call, owed.to_bytes(4, "little")))
                    owed = 0
            elif frame.kind in {Kind.END, Kind.ANSWERED}:
                answer.end = frame.payload
                break
        self.page.rest()
        return answer

    def upload(self, waiting: deque[Frame], may: int) -> int:
        """Send the frames of a body that `may` bytes cover; what is left of them."""
        while waiting and (waiting[0].kind is Kind.END or len(waiting[0].payload) <= may):
            may -= len(waiting[0].payload) if waiting[0].kind is Kind.BODY else 0
            self.write(waiting.popleft())
        return may

    def post(self, path, body, *, trailers=b"") -> Answer:
        """Send a request with a body of any length, within its credit."""
        head, *rest = self.request(path, method=b"POST", body=body, trailers=trailers)
        self.write(head)
        self.page.begin(time.monotonic_ns(), self.number)
        waiting = deque(rest)
        may = self.upload(waiting, frames.INITIAL_CREDIT_BYTES)
        return self.answer(self.number, upload=waiting, may=may)

    def get(self, path, **how) -> Answer:
        return self.answer(self.send(path, **how))

    def realign(self, answer):
        """Do as the router does when the store has ended early: what was sent since is void."""
        self.channel.sendall(answer.failed[-1].encode())

    def close(self):
        self.control.close()
        self.channel.close()
        self.page.close()
