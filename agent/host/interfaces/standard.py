"""Packages of WASI 0.2 that the engine or the adapter serves: what they do on a device. Loaded for the page alone."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from agent.host.interfaces.package import Package

_RELEASES: Final = ("0.2",)


def _standard(
    name: str,
    about: str,
    grant: str,
    *,
    limits: Mapping[str, str] = MappingProxyType({}),
    counters: Mapping[str, str] = MappingProxyType({}),
) -> Package:
    return Package(name, about, grant, limits, counters, versions={name: _RELEASES})


PACKAGES: Final[tuple[Package, ...]] = (
    _standard(
        "wasi:cli",
        "Standard streams, exit, terminal and environment. Standard output and error are lines of the instance's log.",
        'None for the streams. Without `interfaces = ["wasi:cli/environment"]` there are no variables; with it '
        "configuration and secrets are variables.",
        counters={"log lines dropped": "of both streams, over `limits.log_lines_per_minute`"},
    ),
    _standard("wasi:clocks", "Monotonic clock, and the time of day in UTC.", "None."),
    _standard(
        "wasi:filesystem",
        "The instance's own directory, `/data`: kept across restarts, swaps and rollbacks. Another `data_schema` gets "
        "a copy of its own ([component.toml](component-toml.md)). Beside it, directories of the device to be read.",
        '`interfaces = ["wasi:filesystem"]` for `/data`; `directories` for those of the device, which its owner names '
        "in `policy.directories`. Without either there are none.",
        limits={
            "size": "`limits.storage`",
            "bytes written a day": "`limits.daily_written`, of all workers of the instance together",
        },
        counters={"written today": "bytes, in UTC"},
    ),
    _standard(
        "wasi:http",
        "Requests in ([wasi:http](wasi-http.md)) and out. The adapter, inside the sandbox, defines the types.",
        'None for requests that arrive. To send: `interfaces = ["wasi:http/outgoing-handler"]` and destinations in '
        "`outbound`, or neighbours in `instances`.",
        limits={"requests at once": "16", "body": "`limits.request`"},
        counters={"outgoing": "requests sent", "denials": "requests that no grant covers"},
    ),
    _standard("wasi:io", "Streams, pollables and errors of the other packages.", "None."),
    _standard("wasi:random", "Random bytes of the kernel.", "None."),
    _standard(
        "wasi:sockets",
        "TCP clients, UDP and look-ups of names, through the process that opens connections for components "
        "([component.toml](component-toml.md#grants)). No component serves: `listen`, and binding to an address or a "
        "port, are refused with `access-denied`. Without a grant every socket and every look-up is.",
        'Destinations in `outbound`: `"tcp://10.1.0.5:502"`, `"udp://[fd00::1]:123"`, `"tcp://meter.local:502"`.',
        limits={
            "sockets at once": "16 connections, each peer of a UDP socket counted as one; 256 such peers of all "
            "instances together",
            "waiting for one socket": "four fifths of `limits.idle`, then it fails with `timeout`",
            "datagrams": "65,507 bytes each, 1,000 a second with one peer, each way; what is beyond is dropped",
            "names": "of those a socket may lead to; private addresses only where an entry names them",
        },
        counters={"outgoing": "connections, and peers of UDP sockets", "denials": "calls that no grant covers"},
    ),
)
