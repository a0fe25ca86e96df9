"""Names of WASI interfaces, without their versions."""

from typing import Final

HTTP_HANDLER: Final = "wasi:http/incoming-handler"
HTTP_TYPES: Final = "wasi:http/types"
OUTGOING_HANDLER: Final = "wasi:http/outgoing-handler"
RUN: Final = "wasi:cli/run"
ENVIRONMENT: Final = "wasi:cli/environment"
MESSAGING_HANDLER: Final = "wasi:messaging/incoming-handler"
MESSAGING_TYPES: Final = "wasi:messaging/types"
MESSAGING_PRODUCER: Final = "wasi:messaging/producer"
LOGGING: Final = "wasi:logging/logging"
METRICS: Final = "wasmfleet:metrics/metrics"

PREOPENS: Final = "wasi:filesystem/preopens"
SOCKETS: Final = "wasi:sockets"

IO: Final = frozenset({"wasi:io/error", "wasi:io/poll", "wasi:io/streams"})
STDIO: Final = frozenset({"wasi:cli/stdin", "wasi:cli/stdout", "wasi:cli/stderr"})

ALWAYS: Final = (
    IO
    | STDIO
    | {"wasi:cli/exit"}
    | {f"wasi:cli/terminal-{name}" for name in ("input", "output", "stdin", "stdout", "stderr")}
    | {"wasi:clocks/monotonic-clock", "wasi:clocks/wall-clock"}
    | {f"wasi:random/{name}" for name in ("random", "insecure", "insecure-seed")}
)
"""Interfaces that every component has: they reach no data, no device and no network."""

EMPTY: Final = frozenset({ENVIRONMENT, PREOPENS, "wasi:filesystem/types"})
"""Interfaces that every component has, and that hold nothing without a grant: no variable, no directory."""

DENIED: Final = frozenset(
    {HTTP_TYPES, OUTGOING_HANDLER}
    | {f"{SOCKETS}/{name}" for name in ("network", "instance-network", "ip-name-lookup")}
    | {f"{SOCKETS}/{kind}" for kind in ("tcp", "tcp-create-socket", "udp", "udp-create-socket")}
)
"""Interfaces that every component has, and that deny each call by an error code: outgoing requests without a grant,
sockets where no grant names any."""

UNGRANTED: Final = ALWAYS | EMPTY | DENIED
"""Imports that need no grant: the standard library of some toolchain always has them, whatever its program does."""

CONFIG: Final = ("wasi:config/store", "wasi:config/runtime")
"""The interface, and its name in an earlier draft."""

KEYVALUE: Final = "wasi:keyvalue"
KEYVALUE_STORE: Final = "wasi:keyvalue/store"
KEYVALUE_ATOMICS: Final = "wasi:keyvalue/atomics"
KEYVALUE_BATCH: Final = "wasi:keyvalue/batch"

GPIO: Final = "wasi:gpio/digital"
GPIO_TYPES: Final = "wasi:gpio/general"
SERIAL: Final = "wasmfleet:serial/port"

SERVED: Final = (
    "wasi:cli@0.2",
    "wasi:clocks@0.2",
    "wasi:config@*",
    "wasi:filesystem@0.2",
    "wasi:gpio@*",
    "wasi:http@0.2",
    "wasi:io@0.2",
    "wasi:keyvalue@*",
    "wasi:logging@*",
    "wasi:messaging@*",
    "wasi:random@0.2",
    "wasi:sockets@0.2",
    "wasmfleet:metrics@*",
    "wasmfleet:serial@*",
)
"""Packages of which a host serves interfaces, as it reports them; `fleet.component.served` has the interfaces."""

SEVERAL_TRIGGERS: Final = "wasmfleet:triggers@1"

RUNS: Final = f"{RUN}@0.2"

REPLACES: Final = "wasmfleet:swap-by-replacement@1"

SOCKETS_BY_GRANT: Final = "wasmfleet:sockets@1"

DATA_PACKAGES: Final = "wasmfleet:data@1"

DIRECTORIES: Final = "wasmfleet:directories@1"

BUCKETS: Final = "wasmfleet:buckets@1"

BUS: Final = "wasmfleet:bus@1"

GATES: Final = "wasmfleet:metric-gates@1"

CALLED: Final = (SEVERAL_TRIGGERS, RUNS, REPLACES, SOCKETS_BY_GRANT, DIRECTORIES, BUS, GATES, BUCKETS, DATA_PACKAGES)
"""Reported besides by a host of this version: ways to call components that hosts before it do not have."""


def offered_directory(name: str) -> str:
    """Return how a device reports that its owner offers a directory of this name."""
    return f"wasmfleet:directory/{name}@1"
