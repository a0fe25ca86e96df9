"""wasi:config: configuration and secrets of the instance, by name."""

from collections.abc import Mapping
from typing import Final

from agent.host.engine.codec import Signature
from agent.host.engine.host_interface import Function, HostInterface, Surroundings
from agent.host.interfaces.package import Package
from fleet.component import wasi

_ERROR: Final = "variant { upstream(string), io(string) }"
_GET: Final = Signature((("key", "string"),), f"result<option<string>, {_ERROR}>")
_GET_ALL: Final = Signature((), f"result<list<tuple<string, string>>, {_ERROR}>")


def _make(around: Surroundings) -> Mapping[str, Function]:
    config = around.config
    return {"get": lambda _store, key: config.get(key), "get-all": lambda _store: list(config.items())}


_STORE, _RUNTIME = wasi.CONFIG
_FUNCTIONS: Final = {"get": _GET, "get-all": _GET_ALL}

PACKAGE: Final = Package(
    name="wasi:config",
    about="""\
Configuration and secrets of the instance, by name, as texts. The manifest declares
[the keys](component-toml.md#configuration) with their types, and [the secrets](component-toml.md#secrets); operators
set them. A key with `restart = false` changes while the component runs: read it when it is needed, not once.""",
    grant='`interfaces = ["wasi:config/store"]`. Only keys and secrets that the manifest declares are there.',
    limits={"size": "that of the values an operator may set, see [component.toml](component-toml.md#configuration)"},
    rust="""\
let every = wasi::config::store::get("every").unwrap().unwrap_or("60".into());""",
    python="""\
from wit_world.imports import store

every = store.get("every") or "60\"""",
    interfaces=(
        HostInterface(_STORE, ("0.2.0-rc.1", "0.2.0-draft"), _FUNCTIONS, _make),
        HostInterface(_RUNTIME, ("0.2.0-draft",), _FUNCTIONS, _make),
    ),
)
