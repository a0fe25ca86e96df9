"""Where the demo's components lie: beside this file in an installed package, in `components/demo` of a source tree."""

from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
_PLACES: Final = (HERE / "components", HERE.parents[1] / "components" / "demo")


class NoFixtureError(Exception):
    """The demo's components are not there; the message says where they were looked for."""


def fixture(name: str) -> Path:
    """The path of one component, such as `v1.wasm`; its manifest lies beside it as `v1.toml`.

    Raises:
        NoFixtureError: neither place has it.
    """
    for place in _PLACES:
        if (place / name).is_file():
            return place / name
    raise NoFixtureError(f"{name} is neither in {' nor in '.join(map(str, _PLACES))}; install wasmfleet anew")
