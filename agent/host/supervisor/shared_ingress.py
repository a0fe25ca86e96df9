"""Shared ingress as the device's owner configures it: the rules, the router, and the TLS terminators.

The file is read at the start, and again on SIGHUP (`systemctl reload fleet-host`). A file or certificate that is not
valid keeps the host from starting; on a reload what was in effect stays, and the host says why on standard error.
"""

import asyncio
import contextlib
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from agent.host.http import ingress_config
from agent.host.http.ingress_config import READY, IngressConfig, IngressError, Tls
from agent.host.ipc import framing, host_api
from agent.host.supervisor.helpers import HelperProcess, RouterHandle, fork_child
from fleet.protocol import bounds, files

_READY_S: Final = 10.0
_DRAIN_S: Final = 5.0

Open = Callable[[str, int], socket.socket]
"""Opens a listening socket; raises `IngressError`."""


def load(path: Path | None) -> IngressConfig:
    """Read the owner's file; without a path the usual one, if there is one. Raises `IngressError`."""
    if path is None:
        path = Path(ingress_config.DEFAULT_FILE)
        if not path.exists():
            return IngressConfig()
    try:
        return ingress_config.read(files.read_text(path, max_bytes=bounds.MIB), file=str(path))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise IngressError(f"cannot read {path}: {why}") from error


class TerminatorHandle(HelperProcess):
    """Handle of a TLS terminator; one that is retired ends with its last client."""

    def __init__(self, listener: socket.socket, to_router: socket.socket, tls: Tls) -> None:
        """Fork a terminator for the listening socket; await `ready` before relying on it."""
        super().__init__("TLS terminator")
        self._listener = listener
        self._to_router = to_router
        self._tls = tls
        self._answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._fork()

    def _spawn(self) -> tuple[int, socket.socket]:
        def run(sock: socket.socket) -> None:
            from agent.host.http.tls import run_terminator  # noqa: PLC0415 - this process needs no TLS, and holds no key

            run_terminator(self._listener, sock, self._to_router, self._tls.certificates)

        return fork_child("TLS terminator", run)

    def _tell_everything(self) -> None:
        """See `HelperProcess`: its certificates are read by the process itself."""

    def _is_needed(self) -> bool:
        return True

    def _readable(self) -> None:
        data = b""
        with contextlib.suppress(framing.GoneError, BlockingIOError):
            assert self._sock is not None
            data = framing.receive_packet(self._sock)[0]
        if not self._answered.done():
            self._answered.set_result(data)
        elif data not in {b"", READY}:  # in place of one that ended; its files have changed meanwhile
            _say(f"the TLS terminator cannot start: {data.decode(errors='replace')}")
        super()._readable()

    async def ready(self) -> None:
        """Wait until it accepts clients. Raises `IngressError`: it cannot; there is no process any more."""
        try:
            async with asyncio.timeout(_READY_S):
                said = await self._answered
        except TimeoutError:
            said = b"it does not start"
        if said != READY:
            self.close()
            raise IngressError(said.decode(errors="replace") or "the TLS terminator ended")

    def retire(self) -> None:
        """Have it accept no more, and end with its last client."""
        self._closing = True
        self._hang_up()

    async def drain(self) -> None:
        """Retire it, and wait a moment for its clients."""
        self.retire()
        if self.running:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DRAIN_S):
                    await asyncio.shield(self._gone)

    def close(self) -> None:
        """Kill the process."""
        self._kill()


class SharedIngress:
    """The shared port: router, rules and TLS."""

    def __init__(self, path: Path | None, open_listener: Open) -> None:
        """Read the file at `path`, see `load`. Raises `IngressError`."""
        self.config = load(path)
        self._path = path
        self._open = open_listener
        self._to_router, self._decrypted = framing.socket_pair()
        self._listener: socket.socket | None = None
        self._terminator: TerminatorHandle | None = None
        self._retired: list[TerminatorHandle] = []
        self._reloading = asyncio.Lock()
        self.router: RouterHandle | None = None

    async def start(self, listener: socket.socket) -> RouterHandle:
        """Start the router on the plain port, and TLS if there is any. Raises `IngressError`."""
        self.router = RouterHandle(listener, decrypted=self._decrypted, rules=self.config.rules)
        try:
            await self._serve_tls(self.config.tls, None)
        except IngressError:
            self.router.close()
            raise
        return self.router

    async def reload(self) -> None:
        """Read file and certificates again; where they are not valid, what is in effect stays."""
        if self.router is None:
            return
        async with self._reloading:
            try:
                config = load(self._path)
                await self._serve_tls(config.tls, self.config.tls)
            except IngressError as error:
                _say(f"the ingress goes on as before: {error}")
                return
            await self.router.configure(config.rules)
            self.config = config
            _say("the ingress was read again")

    async def _serve_tls(self, tls: Tls | None, before: Tls | None) -> None:
        """Start a terminator with these certificates beside the one there is, then retire that."""
        self._retired = [each for each in self._retired if each.running]
        listener = self._listener
        if tls is not None and (before is None or before.listen != tls.listen):
            listener = self._open(*ingress_config.address(tls.listen))
        made = None
        if tls is not None:
            assert listener is not None
            made = TerminatorHandle(listener, self._to_router, tls)
            try:
                await made.ready()
            except IngressError:
                if listener is not self._listener:
                    listener.close()
                raise
        if self._terminator is not None:
            self._terminator.retire()
            self._retired.append(self._terminator)
        if self._listener is not None and (tls is None or listener is not self._listener):
            self._listener.close()
        self._terminator, self._listener = made, listener if tls is not None else None

    def routes(self) -> tuple[host_api.RouteView, ...]:
        """List what answers where on the shared port, in the order in which it is looked for."""
        assert self.router is not None
        up, rules = self.router.up(), self.config.rules
        owners = [
            host_api.RouteView(
                instance=rule.instance,
                host=rule.host,
                path=rule.path or "/",
                strip=rule.strip,
                request_bytes=rule.request_bytes,
                head_bytes=rule.head_bytes,
                answers=up.get(rule.instance),
            )
            for rule in sorted(rules.rules, key=lambda rule: (not rule.host, rule.host, -len(rule.path)))
        ]
        if not rules.by_name:
            return tuple(owners)
        named = [
            host_api.RouteView(instance=name, path=f"/{name}/", strip=True, by_name=True, answers=up[name])
            for name in sorted(up)
        ]
        last = [each for each in owners if not each.host and each.path == "/"]
        return (*(each for each in owners if each not in last), *named, *last)

    async def drain(self) -> None:
        """Stop accepting, and wait a moment until what was asked is answered."""
        if self._listener is not None:
            self._listener.close()
        if self.router is not None:
            terminators = [*self._retired, *([] if self._terminator is None else [self._terminator])]
            await asyncio.gather(self.router.drain(), *(each.drain() for each in terminators))

    def close(self) -> None:
        """Kill every process of it."""
        for each in [*self._retired, self._terminator, self.router]:
            if each is not None:
                each.close()


def _say(text: str) -> None:
    sys.stderr.write(f"host: {text}\n")
    sys.stderr.flush()
