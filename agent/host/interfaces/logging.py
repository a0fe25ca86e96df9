"""wasi:logging: lines of the instance's log, with a level and a context."""

from collections.abc import Mapping
from typing import Final

from agent.host.engine.codec import Signature
from agent.host.engine.host_interface import Function, HostInterface, Surroundings
from agent.host.interfaces.package import Package
from fleet.component import wasi

_LEVEL: Final = "enum { trace, debug, info, warn, error, critical }"
_LOG: Final = Signature((("level", _LEVEL), ("context", "string"), ("message", "string")))


def _make(around: Surroundings) -> Mapping[str, Function]:
    log = around.log
    return {"log": lambda _store, level, context, text: log(_line(level, context, text))}


def _line(level: str, context: str, text: str) -> str:
    return f"{level} {context}: {text}" if context else f"{level} {text}"


PACKAGE: Final = Package(
    name="wasi:logging",
    about="""\
Lines of the instance's log, with a level (`trace` to `critical`) and a context, which says where in the component.
Standard output and error become lines of the same log, without a grant.""",
    grant='`interfaces = ["wasi:logging"]`',
    limits={
        "lines a minute": "`limits.log_lines_per_minute`, 600 unless set; further ones are dropped and counted",
        "length of a line": "1,024 characters, the rest is cut off",
    },
    counters={"log lines dropped": "over the limit"},
    rust="""\
use wasi::logging::logging::{log, Level};

log(Level::Warn, "meter", "no answer from the meter");""",
    python="""\
from wit_world.imports import logging

logging.log(logging.Level.WARN, "meter", "no answer from the meter")""",
    interfaces=(HostInterface(wasi.LOGGING, ("0.1.0-draft",), {"log": _LOG}, _make),),
)
