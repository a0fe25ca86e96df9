"""Which broker a fleet has: somebody else's, Mosquitto, or the embedded one; how it is started, told and stopped."""

import sys
from collections.abc import Iterable

from fleet.server.broker import mosquitto
from fleet.server.broker.child import BrokerError, Child
from fleet.server.home import Address, Config, Home


class Broker:
    """The fleet's broker.

    Attributes:
        name: `mosquitto`, `embedded` or `external`.
        address: where the server reaches it.
        remembers: whether it keeps messages and sessions over its own restart.
    """

    def __init__(self, name: str, address: Address, child: Child | None, home: Home) -> None:
        self.name = name
        self.address = address
        self.remembers = name != "embedded"
        self._child = child
        self._home = home

    @classmethod
    def choose(cls, config: Config, home: Home) -> "Broker":
        """The broker that the configuration and this machine allow.

        Raises:
            BrokerError: the embedded one would serve more than development on one machine, or Mosquitto is missing.
        """
        external = config.external_broker
        if external is not None:
            return cls("external", external, None, home)
        bind = Address.parse(config.mqtt, "mqtt")
        program = mosquitto.find() if config.broker in {"auto", "mosquitto"} else None
        if program is None and config.broker == "mosquitto":
            raise BrokerError("mosquitto is not installed: apt install mosquitto, or name another with --broker")
        if program is None and (config.production or not bind.loopback):
            raise BrokerError(
                "the embedded broker is for development on one machine: "
                "install mosquitto, or name one with --broker mqtts://HOST:PORT"
            )
        files = {"ca": home.ca / "ca.pem", "certificate": home.tls / "server.pem", "key": home.tls / "server.key"}
        if program is not None:
            path = mosquitto.configure(home.broker, address=bind, **files)
            name, command = "mosquitto", [str(program), "-c", str(path)]
        else:
            name, command = (
                "embedded",
                [sys.executable, "-m", "fleet.server.broker.embedded", bind.host, str(bind.port)],
            )
            command += [str(path) for path in (*files.values(), home.broker / "revoked")]
        here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind.host, bind.host)  # noqa: S104 - where it is asked, not bound
        return cls(name, Address(here, bind.port), Child(name, command, Address(here, bind.port)), home)

    @property
    def pid(self) -> int | None:
        """Of the process that was started here; None for none."""
        return None if self._child is None else self._child.pid

    async def start(self, revoked: Iterable[str]) -> None:
        """Start it and return when it listens; raises `BrokerError`."""
        if self._child is not None:
            self._write(revoked)
            await self._child.start()

    def shut_out(self, revoked: Iterable[str]) -> None:
        """These boards may not speak any more; certificates on disk are read again too."""
        if self._child is not None:
            self._write(revoked)
            self._child.reload()

    async def stop(self) -> None:
        """End it."""
        if self._child is not None:
            await self._child.stop()

    def _write(self, revoked: Iterable[str]) -> None:
        names = sorted(revoked)
        if self.name == "mosquitto":
            mosquitto.write_acl(self._home.broker, names)
        else:
            (self._home.broker / "revoked").write_text("\n".join(names), encoding="utf-8")
