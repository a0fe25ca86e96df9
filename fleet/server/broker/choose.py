"""Which broker a fleet has: somebody else's, Mosquitto, or the embedded one; how it is started, told and stopped."""

import sys
from collections.abc import Callable, Iterable
from typing import Final

from fleet.server.broker import mosquitto
from fleet.server.broker.child import BrokerError, Child
from fleet.server.home import Address, Config, Home

LISTS: Final = "issuers.crl"


class Broker:
    """The fleet's broker.

    Attributes:
        name: `mosquitto`, `embedded` or `external`.
        address: where the server reaches it.
        remembers: whether it keeps messages and sessions over its own restart.
    """

    def __init__(
        self, name: str, bind: Address, program: list[str] | None, home: Home, lists: Callable[[], bytes]
    ) -> None:
        """A broker at `bind`; `program` is what is run for it, None where somebody else does."""
        here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind.host, bind.host)  # noqa: S104 - where it is asked, not bound
        self.name = name
        self.address = bind if program is None else Address(here, bind.port)
        self.remembers = name != "embedded"
        self._bind = bind
        self._child = None if program is None else Child(name, program, self.address)
        self._home = home
        self._lists = lists

    @classmethod
    def choose(cls, config: Config, home: Home, lists: Callable[[], bytes]) -> "Broker":
        """The broker that the configuration and this machine allow.

        `lists` gives the revocation lists of the accepted issuers: certificates of others are refused.

        Raises:
            BrokerError: the embedded one would serve more than development on one machine, or Mosquitto is missing.
        """
        external = config.external_broker
        if external is not None:
            return cls("external", external, None, home, lists)
        bind = Address.parse(config.mqtt, "mqtt")
        program = mosquitto.find() if config.broker in {"auto", "mosquitto"} else None
        if program is None and config.broker == "mosquitto":
            raise BrokerError("mosquitto is not installed: apt install mosquitto, or name another with --broker")
        if program is None and (config.production or not bind.loopback):
            raise BrokerError(
                "the embedded broker is for development on one machine: "
                "install mosquitto, or name one with --broker mqtts://HOST:PORT"
            )
        if program is not None:
            return cls("mosquitto", bind, [str(program), "-c", str(home.broker / mosquitto.FILE)], home, lists)
        files = (home.ca / "ca.pem", home.tls / "server.pem", home.tls / "server.key")
        command = [sys.executable, "-m", "fleet.server.broker.embedded", bind.host, str(bind.port)]
        command += [str(path) for path in (*files, home.broker / "revoked", home.broker / LISTS)]
        return cls("embedded", bind, command, home, lists)

    @property
    def pid(self) -> int | None:
        """Of the process that was started here; None for none."""
        return None if self._child is None else self._child.pid

    async def start(self, revoked: Iterable[str]) -> None:
        """Start it and return when it listens; raises `BrokerError`."""
        if self._child is not None:
            self._write(revoked)
            if self.name == "mosquitto":
                self._configure()
            await self._child.start()

    def shut_out(self, revoked: Iterable[str]) -> None:
        """These boards may not speak any more; certificates on disk are read again too."""
        if self._child is not None:
            self._write(revoked)
            self._child.reload()

    async def start_again(self, revoked: Iterable[str]) -> None:
        """End it and start it anew, so that connections which count no more end; raises `BrokerError`."""
        await self.stop()
        await self.start(revoked)

    async def stop(self) -> None:
        """End it."""
        if self._child is not None:
            await self._child.stop()

    def _configure(self) -> None:
        tls, lists = self._home.tls, self._home.broker / LISTS
        mosquitto.configure(
            self._home.broker,
            address=self._bind,
            ca=self._home.ca / "ca.pem",
            certificate=tls / "server.pem",
            key=tls / "server.key",
            lists=lists if lists.stat().st_size else None,
        )

    def _write(self, revoked: Iterable[str]) -> None:
        names = sorted(revoked)
        (self._home.broker / LISTS).write_bytes(self._lists())
        if self.name == "mosquitto":
            mosquitto.write_acl(self._home.broker, names)
        else:
            (self._home.broker / "revoked").write_text("\n".join(names), encoding="utf-8")
