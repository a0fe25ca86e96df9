"""Seeded mutants of HTTP requests: the same seed gives the same bytes."""

import os
import random

from http_cases import ROWS, at

TIMES = int(os.environ.get("FUZZ", "1"))  # `make fuzz` asks for many times the usual count

SEEDS = [raw for raw, _, _ in ROWS.values() if len(raw) < 400]  # limits are not the question here
WELL = [raw for raw, statuses, _ in ROWS.values() if set(statuses) == {200}]
PIECES = (
    *(b"\r\n", b"\n", b"\r", b"\r\n\r\n", b" ", b"\t", b":", b",", b";", b"\0", b"\x0b", b"\x7f", b"\xff", b"0", b"1"),
    *(b"content-length: 5\r\n", b"content-length: 0\r\n", b"transfer-encoding: chunked\r\n", b"Transfer-Encoding:\r\n"),
    *(b"transfer-encoding: identity\r\n", b"host: other\r\n", b"connection: close\r\n", b"connection: host\r\n"),
    *(b"connection: content-length\r\n", b"connection: transfer-encoding\r\n", b"expect: 100-continue\r\n"),
    *(
        b"connection: upgrade\r\nupgrade: h2c\r\n",
        b"0\r\n\r\n",
        b"5\r\nhello\r\n",
        b"ffffffffffffffff\r\n",
        b"5;a=b\r\n",
    ),
    *(b"GET @/smuggled HTTP/1.1\r\nhost: board\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", b" HTTP/1.1"),
    *(b"te: trailers\r\n", b"trailer: x\r\n", b"x-trailer: 1\r\n", b"http://board@/", b"*", b"PRI * HTTP/2.0"),
)


def mutant(seed):
    """A few requests one after the other, some of them damaged."""
    chance = random.Random(seed)
    raw = bytearray(
        b"".join(chance.choice(SEEDS if chance.random() < 0.3 else WELL) for _ in range(chance.randint(1, 3)))
    )
    for _ in range(chance.choice((0, 1, 1, 2, 3, 8))):
        where = chance.randrange(len(raw) + 1)
        match chance.randrange(6):
            case 0:
                raw[where : where + 1] = bytes([chance.randrange(256)])
            case 1:
                del raw[where : where + chance.choice((1, 1, 2, 5, 30))]
            case 2:
                line = raw.find(b"\r\n", where)
                raw[line + 2 if line >= 0 else where : line + 2 if line >= 0 else where] = chance.choice(PIECES)
            case 3:
                other = chance.choice(SEEDS)
                begin = chance.randrange(len(other))
                raw[where:where] = other[begin : begin + chance.randrange(60)]
            case 4:
                raw[where:where] = raw[where : where + chance.randrange(40)]
            case _:
                raw[where:where] = chance.choice(PIECES)
    return bytes(raw)


def cut(seed, raw):
    """The same bytes in the pieces in which a network may bring them."""
    chance = random.Random(-seed - 1)
    if chance.random() < 0.3:
        return [raw]
    pieces = []
    while raw:
        size = chance.choice((1, 2, 3, 10, 50, 500))
        pieces.append(raw[:size])
        raw = raw[size:]
    return pieces


__all__ = ["TIMES", "at", "cut", "mutant"]
