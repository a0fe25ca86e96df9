"""The wasi:http adapter as it is shipped: its bytes, and the digest that goes into an image's key.

Built from components/adapter, where its source, its WIT and a rebuild that compares stand.
"""

import functools
import hashlib
from importlib import resources
from typing import Final

_FILE: Final = "adapter.wasm"


@functools.cache
def load() -> bytes:
    """The adapter's file."""
    return resources.files("fleet.protocol").joinpath(_FILE).read_bytes()


def digest() -> str:
    """The sha256 of the adapter's file, in hex."""
    return hashlib.sha256(load()).hexdigest()
