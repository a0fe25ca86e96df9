"""Names of WASI interfaces, without their versions."""

from typing import Final

HTTP_HANDLER: Final = "wasi:http/incoming-handler"
HTTP_TYPES: Final = "wasi:http/types"
OUTGOING_HANDLER: Final = "wasi:http/outgoing-handler"
RUN: Final = "wasi:cli/run"
ENVIRONMENT: Final = "wasi:cli/environment"
MESSAGING_HANDLER: Final = "wasi:messaging/incoming-handler"
LOGGING: Final = "wasi:logging/logging"

IO: Final = frozenset({"wasi:io/error", "wasi:io/poll", "wasi:io/streams"})
STDIO: Final = frozenset({"wasi:cli/stdin", "wasi:cli/stdout", "wasi:cli/stderr"})

CONFIG: Final = ("wasi:config/store", "wasi:config/runtime")
"""The interface, and its name in an earlier draft."""

SERVED: Final = (
    "wasi:cli@0.2",
    "wasi:clocks@0.2",
    "wasi:config@*",
    "wasi:filesystem@0.2",
    "wasi:http@0.2",
    "wasi:io@0.2",
    "wasi:logging@*",
    "wasi:random@0.2",
    "wasi:sockets@0.2",
)
"""Packages of which a host serves interfaces, as it reports them; `fleet.component.served` has the interfaces."""
