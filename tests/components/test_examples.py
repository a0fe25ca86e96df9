"""Examples in each language behave alike; languages without tools on this machine are skipped by name.

For Go, WASI_PREVIEW1_ADAPTER names wasi_snapshot_preview1.reactor.wasm.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from wasmtime import Engine, Store, WasiConfig
from wasmtime import component as wc

from fleet.component import component_toml, reader
from fleet.protocol.manifest import Grants

BUILD = Path(__file__).resolve().parents[2] / "components/examples/build.py"
SAYS = {
    "c": "v1",
    "zig": "Zig",
    "rust": "Rust",
    "go": "Go",
    "js": "JavaScript",
    "python": "Python",
    "wat": "WebAssembly text",
}


@pytest.fixture(params=SAYS)
def built(request, tmp_path):
    out = tmp_path / f"{request.param}.wasm"
    adapter = os.environ.get("WASI_PREVIEW1_ADAPTER")
    more = ["--preview1-adapter", adapter] if adapter else []
    done = subprocess.run(
        [sys.executable, BUILD, request.param, "-o", out, *more], capture_output=True, text=True, check=False
    )
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return request.param, out.read_bytes()


@pytest.mark.timeout(600)
def test_it_says_hello_echoes_and_is_well(built):
    language, data = built
    engine = Engine()
    store, linker = Store(engine), wc.Linker(engine)
    store.set_wasi(WasiConfig())
    linker.add_wasip2()
    instance = linker.instantiate(store, wc.Component(engine, data))

    def call(interface, function, *args):
        index = instance.get_export_index(store, function, instance.get_export_index(store, interface))
        func = instance.get_func(store, index)
        answer = func(store, *args)
        func.post_return(store)
        return answer

    def ask(method, target, body=b""):
        request = wc.Record()
        request.method, request.target, request.headers, request.body = method, target, "host: board\r\n", body
        return call("wasmfleet:http/handler@0.1.0", "handle", request)

    assert call("wasmfleet:http/health@0.1.0", "check") is None
    answer = ask("GET", "/")
    assert (answer.status, bytes(answer.body)) == (200, f"hello from {SAYS[language]}\n".encode())
    # More in all than an arena that is never emptied could hold.
    body = bytes(n % 251 for n in range(100_000))
    for _ in range(25):
        assert bytes(ask("POST", "/echo", body).body) == body

    # Each goes as it is, also Go's, whose runtime imports what a system has.
    assert component_toml.describe(reader.read(data), None, file_name="hello.wasm").grants == Grants()
