"""Interfaces that the host serves by functions of its own: one module each.

A new one: write its module, add it to `PACKAGES`, list its versions in `components/wit/versions.toml` and in
`fleet.component.wasi` and `served`, put its WIT into `components/wit/deps`, and run `python -m
agent.host.interfaces.page`, which says what does not agree.
"""

from typing import Final

from agent.host.engine.host_interface import Interfaces
from agent.host.interfaces import config, gpio, keyvalue, logging, messaging, metrics, serial
from agent.host.interfaces.package import Package

PACKAGES: Final[tuple[Package, ...]] = (
    config.PACKAGE,
    gpio.PACKAGE,
    keyvalue.PACKAGE,
    logging.PACKAGE,
    messaging.PACKAGE,
    metrics.PACKAGE,
    serial.PACKAGE,
)

INTERFACES: Final[Interfaces] = {each.name: each for package in PACKAGES for each in package.interfaces}
