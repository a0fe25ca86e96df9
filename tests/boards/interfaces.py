"""Components that use each interface once on a board, with their manifests, and the program that asks them there.

`ASKS` runs on the board and needs nothing but Python; tests/agent/host/test_interfaces_of_boards.py runs the same on
this machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from wasmtime import wat2wasm

from tests import packed
from tests.agent.host import pairs_guest, support

PORT = 8080  # of the board's shared ingress
KEPT = "kept-by-a-command"


@dataclass(frozen=True)
class Guest:
    """A component and its manifest."""

    data: bytes
    manifest: str


def guests(port: int = PORT) -> Mapping[str, Guest]:
    """The components by name; `port`: of the ingress to which one of them connects."""
    head = 'version = "1.0.0"\n[health]\nprobation = "2s"\n[grants]\n'
    return {
        "pairs": Guest(bytes(wat2wasm(pairs_guest.guest())), f'name = "pairs"\n{head}interfaces = ["wasi:keyvalue"]\n'),
        "publishes": Guest(
            bytes(wat2wasm((support.GUESTS / "publishes.wat").read_text())),
            f'name = "publishes"\n{head}interfaces = ["wasi:messaging"]\npublish = ["plant/#"]\n',
        ),
        "dial": Guest(packed.guest("dial"), f'name = "dial"\n{head}outbound = ["tcp://127.0.0.1:{port}"]\n'),
        "command": Guest(
            support.wasm("probe1"),
            f'name = "command"\n{head}interfaces = ["wasi:filesystem"]\n[trigger]\ntype = "schedule"\nevery = "1s"\n'
            f'args = ["open 3 1 1 1 66 {KEPT}", "write 4 line"]\n',
        ),
    }


def saved(name: str, guest: Guest, directory: Path) -> Path:
    """Write a component, and its manifest beside it."""
    file = directory / f"{name}.wasm"
    file.write_bytes(guest.data)
    file.with_suffix(".toml").write_text(guest.manifest)
    return file


ASKS = """
import struct, sys, urllib.request
PORT = int(sys.argv[1])

def ask(path, body):
    answer = urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", body), timeout=60)
    return answer.status, answer.read()

def pairs(op, value=b""):
    return ask("/pairs/", op + struct.pack("<I", 0) + struct.pack("<I", 5) + b"total" + value)[1]

one = struct.pack("<q", 1)
totals = [struct.unpack_from("<q", pairs(b"i", one), 8)[0] for _ in range(2)]
print("keyvalue", totals[1] - totals[0])
print("messaging", ask("/publishes/plant/boiler", b"21.5")[0])
request = b"GET /nothing-here/ HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n".hex()
steps = f"t 0 4\\nc 0 127.0.0.1 {PORT}\\nh 0 {request}\\nH 0 12\\nd 0"
print("sockets", ask("/dial/", steps.encode())[1].decode().split("\\n")[3])
"""
"""Prints `SAID`: key-value pairs counted on, a message kept, an answer read from a socket."""

SAID = ["keyvalue 1", "messaging 200", f"sockets {b'HTTP/1.1 404'.hex()}"]
