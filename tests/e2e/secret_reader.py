"""Component that answers with the hash of its secret, and what its secrets are in the tests."""

import asyncio
import http.client
from pathlib import Path

from tests.eventually import eventually_async

GUEST = Path(__file__).parents[2] / "components" / "guests" / "secret.wat"
FIRST, SECOND = "correct horse battery staple", "the rotated password"
TOML = """
name = "reader"
version = "{version}"

[grants]
interfaces = ["wasi:config/store", "wasi:logging/logging"]

[health]
probation = "{probation}"
min_calls = 0

[secrets.db-password]
description = "what is hashed"
"""


def fnv1a(text):
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return f"{value:016x}"


def get(port, path="/"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        connection.close()


async def answers(port, value):
    """Until the component answers with the hash of this value."""

    async def answered():
        return await asyncio.to_thread(get, port) == fnv1a(value)

    await eventually_async(answered, "the hash of the secret", within_s=90)
