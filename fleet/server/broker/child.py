"""A broker as a child process: started, watched, started again, stopped. Its words go to the server's log."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final

from fleet.server.home import Address

log = logging.getLogger(__name__)
_READY_S: Final = 60.0
_STOP_S: Final = 5.0
_BACKOFF_MAX_S: Final = 10.0


class BrokerError(Exception):
    """The broker cannot be run; one line for people."""


class Child:
    """One broker process, kept running until `stop`.

    Args:
        name: for the log.
        command: program (absolute path) and arguments.
        address: where it will listen.
    """

    def __init__(self, name: str, command: Sequence[str], address: Address) -> None:
        self.name = name
        self._command = command
        self._address = address
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._last_words = ""

    @property
    def pid(self) -> int | None:
        """Of the running process; None while there is none."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    async def start(self) -> None:
        """Start it and return when it listens.

        Raises:
            BrokerError: it ended, or did not listen in time.
        """
        await self._spawn()
        try:
            async with asyncio.timeout(_READY_S):
                await self._listening()
        except TimeoutError:
            await self.stop()
            raise BrokerError(f"{self.name} does not listen at {self._address}: {self._last_words}") from None
        self._task = asyncio.create_task(self._watch(), name=f"{self.name} watch")

    async def stop(self) -> None:
        """End it: SIGTERM, and SIGKILL when that is not enough."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), _STOP_S)
            except TimeoutError:
                process.kill()
                await process.wait()

    def reload(self) -> None:
        """Have it read its configuration again (SIGHUP)."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGHUP)

    async def _spawn(self) -> None:
        tether = (sys.executable, "-m", "fleet.server.broker.tether", str(os.getpid()))
        self._process = await asyncio.create_subprocess_exec(
            *tether,
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the server; it ends its broker in order
        )
        self._reader = asyncio.create_task(self._listen_to(self._process))

    async def _listen_to(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        with contextlib.suppress(ValueError):
            while line := await process.stdout.readline():
                self._last_words = line.decode(errors="replace").strip()[-300:]
                log.info("%s: %s", self.name, self._last_words)

    async def _listening(self) -> None:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._address.host, self._address.host)  # noqa: S104
        while True:
            assert self._process is not None
            if self._process.returncode is not None:
                await self._reader
                raise BrokerError(f"{self.name} ended at once: {self._last_words or 'it said nothing'}")
            try:
                _, writer = await asyncio.open_connection(host, self._address.port)
            except OSError:
                await asyncio.sleep(0.05)
                continue
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            return

    async def _watch(self) -> None:
        backoff = 0.2
        while True:
            assert self._process is not None
            code = await self._process.wait()
            log.error("%s ended (%s): %s; it is started again", self.name, code, self._last_words)
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, _BACKOFF_MAX_S)
            started = asyncio.get_running_loop().time()
            await self._spawn()
            with contextlib.suppress(BrokerError, TimeoutError):
                await asyncio.wait_for(self._listening(), _READY_S)
                if asyncio.get_running_loop().time() - started < _READY_S:
                    backoff = 0.2
