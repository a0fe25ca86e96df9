"""Requests of a device to the server, over HTTPS with the certificate that the device holds."""

import asyncio


async def ask(device, path="/v1/tuf/timestamp.json"):
    with device.http() as http:
        return await asyncio.to_thread(http.get, path)
