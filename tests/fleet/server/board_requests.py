"""Requests of a board to the server, over HTTPS with the certificate that the board holds."""

import asyncio


async def ask(board, path="/v1/tuf/timestamp.json"):
    with board.http() as http:
        return await asyncio.to_thread(http.get, path)
