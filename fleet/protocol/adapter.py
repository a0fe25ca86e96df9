"""The wasi:http adapter as it is shipped: its bytes, and the digest that goes into an image's key.

Built from components/adapter, where its source, its WIT and a rebuild that compares stand. The file is packed, as the
repository keeps what it carries of binaries small.
"""

import functools
import gzip
import hashlib
from importlib import resources
from typing import Final

_FILE: Final = "adapter.wasm.gz"


@functools.cache
def load() -> bytes:
    """The adapter."""
    return gzip.decompress(resources.files("fleet.protocol").joinpath(_FILE).read_bytes())


def digest() -> str:
    """The sha256 of the adapter, in hex."""
    return hashlib.sha256(load()).hexdigest()
