"""Which instance a request on the shared port is for: by path (`/<instance>/...`) or by host (`<instance>.<anything>`).

Pure over the head of a request. The host wins, since whoever sends `Host: meter.board` means it; a path's first segment
is taken off, and told to the instance in `x-forwarded-prefix`.
"""

import re
from dataclasses import dataclass
from typing import Final

_IPV4: Final = re.compile(rb"\d+\.\d+\.\d+\.\d+(:\d+)?")
_LISTED_MAX: Final = 100


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes: an instance and its target there, or a status with a sentence."""

    instance: str = ""
    target: bytes = b""
    prefix: bytes = b""
    status: int = 0
    why: str = ""


class Routes:
    """The instances behind the shared port: name -> whether it answers at present."""

    def __init__(self) -> None:
        self.up: dict[str, bool] = {}

    def find(self, host: bytes, target: bytes) -> Route:
        """Where a request with this Host and request target goes."""
        target = _origin_form(target)
        label, dot, _ = host.partition(b".")
        name = label.decode("latin-1").lower()
        if dot and name in self.up and _IPV4.fullmatch(host) is None:
            return self._to(name, target, b"")
        path, query_mark, query = target.partition(b"?")
        first, slash, rest = path[1:].partition(b"/")
        name = first.decode("latin-1")
        if path.startswith(b"/") and name in self.up:
            return self._to(name, b"/" + rest + query_mark + query, b"/" + first)
        del slash
        return Route(status=404, why=self._listing(name))

    def _to(self, name: str, target: bytes, prefix: bytes) -> Route:
        if not self.up[name]:
            return Route(status=503, why=f"{name} is not answering at present; try again in a little while")
        return Route(instance=name, target=target, prefix=prefix)

    def _listing(self, name: str) -> str:
        what = f"no instance {name!r} runs on this board" if name else "name an instance in the path"
        known = sorted(self.up)[:_LISTED_MAX]
        return f"{what}; here are: {', '.join(f'/{each}/' for each in known)}" if known else f"{what}; there are none"


def _origin_form(target: bytes) -> bytes:
    """RFC 9112, section 3.2: the absolute form names scheme and host before the path."""
    for scheme in (b"http://", b"https://"):
        if target.lower().startswith(scheme):
            _, slash, path = target[len(scheme) :].partition(b"/")
            return slash + path if slash else b"/"
    return target or b"/"
