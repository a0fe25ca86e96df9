"""Demo components: behaviour when called through the engine."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from wasmtime import Engine, Store, Trap, WasmtimeError
from wasmtime import component as wc

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "components/demo"
HANDLER = "wasmfleet:http/handler@0.1.0"


class Guest:
    """An instance and its exported functions by `interface`, `function`."""

    def __init__(self, wasm, linker=lambda linker: None):
        engine = Engine()
        self.store = Store(engine)
        door = wc.Linker(engine)
        linker(door)
        self.instance = door.instantiate(self.store, wc.Component(engine, wasm))

    def call(self, interface, function, *args):
        index = self.instance.get_export_index(self.store, interface)
        assert index is not None, f"{interface} is not exported"
        func = self.instance.get_func(self.store, self.instance.get_export_index(self.store, function, index))
        answer = func(self.store, *args)
        func.post_return(self.store)
        return answer

    def request(self, method="GET", target="/", body=b""):
        request = wc.Record()
        request.method, request.target, request.headers, request.body = method, target, "host: board\r\n", body
        return self.call(HANDLER, "handle", request)


@pytest.mark.parametrize("version", ["1", "2", "3"])
def test_each_version_says_hello_and_which_it_is(version):
    answer = Guest((DEMO / f"v{version}.wasm").read_bytes()).request()
    assert (answer.status, bytes(answer.body)) == (200, f"hello from v{version}\n".encode())
    assert f"x-version: {version}\r\n" in answer.headers


@pytest.mark.parametrize("size", [0, 1, 70_000, 300_000])
def test_echo_gives_the_body_back_again_and_again(size):
    guest = Guest((DEMO / "v1.wasm").read_bytes())
    body = bytes(n % 251 for n in range(size))
    # Ten times the size must not need ten times the memory: the arena is emptied after each call.
    for _ in range(10):
        assert bytes(guest.request("POST", "/echo?again", body).body) == body


@pytest.mark.parametrize("version", ["1", "2", "3"])
def test_each_version_is_well_when_asked(version):
    assert Guest((DEMO / f"v{version}.wasm").read_bytes()).call("wasmfleet:http/health@0.1.0", "check") is None


def test_the_bad_release_is_well_for_twenty_requests_and_then_traps():
    guest = Guest((DEMO / "v3.wasm").read_bytes())
    for _ in range(20):
        assert guest.request().status == 200
    with pytest.raises((Trap, WasmtimeError), match="unreachable"):
        guest.request()


def test_the_ticker_writes_one_line_a_run():
    lines = []

    def serve(linker):
        with linker.root() as root, root.add_instance("wasi:logging/logging@0.1.0-draft") as logging:
            logging.add_func("log", lambda _store, level, context, message: lines.append((level, context, message)))

    guest = Guest((DEMO / "ticker.wasm").read_bytes(), serve)
    for _ in range(12):
        guest.call("wasmfleet:schedule/task@0.1.0", "run", 1_700_000_000_000)
    assert lines[0] == ("info", "ticker", "run 1")
    assert lines[11] == ("info", "ticker", "run 12")


def test_the_files_are_those_of_the_list():
    listed = dict(reversed(line.split("  ")) for line in (DEMO / "SHA256SUMS").read_text().splitlines())
    assert listed == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in DEMO.glob("*.wasm")}
    assert sum(path.stat().st_size for path in (ROOT / "components").rglob("*.wasm")) < 60_000, "fixtures stay small"


def test_the_sources_give_exactly_these_files():
    pytest.importorskip("ziglang", reason="the demo's compiler: pip install ziglang==0.17.1")
    if shutil.which("wasm-tools") is None:
        pytest.skip("wasm-tools is not on PATH")
    built = subprocess.run([sys.executable, DEMO / "build.py", "--check"], capture_output=True, text=True, check=False)
    if built.returncode == 2:
        pytest.skip(built.stderr.strip())
    assert built.returncode == 0, built.stderr
