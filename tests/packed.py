"""Guests of the adapter's tests, which are checked in packed, as bytes and as files."""

import atexit
import functools
import lzma
import shutil
import tempfile
from pathlib import Path

ADAPTER = Path(__file__).resolve().parents[1] / "components" / "adapter"


def guest(name):
    """The bytes of `NAME.wasm.xz` of components/adapter."""
    return lzma.decompress((ADAPTER / f"{name}.wasm.xz").read_bytes())


@functools.cache
def guest_file(name):
    """The same as a file `NAME.wasm`, which goes with this process."""
    directory = tempfile.mkdtemp(prefix="guest-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    file = Path(directory, f"{name}.wasm")
    file.write_bytes(guest(name))
    return file
