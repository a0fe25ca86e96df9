"""HTTP/1.1 cases: raw bytes, expected statuses, and the state of the connection afterwards."""

KEPT, CLOSED = "kept", "closed"
HOST = b"host: board\r\n"


def at(prefix, raw):
    """`@/` stands for the instance's root."""
    return raw.replace(b"@/", prefix + b"/")


def get(*fields, target=b"@/", version=b"1.1", host=HOST):
    return b"GET %b HTTP/%b\r\n%b%b\r\n" % (target, version, host, b"".join(f + b"\r\n" for f in fields))


def post(*fields, body=b"", host=HOST):
    return b"POST @/ HTTP/1.1\r\n%b%b\r\n%b" % (host, b"".join(f + b"\r\n" for f in fields), body)


def chunked(body, *fields):
    return post(b"transfer-encoding: chunked", *fields, body=body)


OK = get()
# what is sent, the statuses that come, what becomes of the connection
ROWS = {
    # lines and fields
    "an ordinary request": (OK, [200], KEPT),
    "empty lines before a request": (b"\r\n\r\n" + OK, [200], KEPT),
    "three requests at once": (OK * 3, [200] * 3, KEPT),
    "a folded field": (get(b"a: b\r\n c"), [400], CLOSED),
    "a folded Transfer-Encoding": (post(b"transfer-encoding:\r\n chunked"), [400], CLOSED),
    "a bare LF in the head": (b"GET @/ HTTP/1.1\nhost: board\n\n", [400], CLOSED),
    "a bare LF after a field": (b"GET @/ HTTP/1.1\r\nhost: board\na: b\r\n\r\n", [400], CLOSED),
    "a bare CR in a value": (get(b"a: b\rc"), [400], CLOSED),
    "a space before the colon": (get(b"a : b"), [400], CLOSED),
    "a space before the name": (get(b" a: b"), [400], CLOSED),
    "a space before the first name": (b"GET @/ HTTP/1.1\r\n host: board\r\n\r\n", [400], CLOSED),
    "a field without a name": (get(b": b"), [400], CLOSED),
    "a line that is no field": (get(b"nothing"), [400], CLOSED),
    "NUL in a value": (get(b"a: \0"), [400], CLOSED),
    "a control character in a value": (get(b"a: \x01"), [400], CLOSED),
    "DEL in a value": (get(b"a: \x7f"), [400], CLOSED),
    "a tab in a value": (get(b"a: b\tc"), [200], KEPT),
    "bytes above 127 in a value": (get(b"a: \xe9\xff"), [200], KEPT),
    "bytes above 127 in a name": (get(b"\xe9: b"), [400], CLOSED),
    "NUL in the target": (get(target=b"@/\0"), [400], CLOSED),
    "a space in the target": (get(target=b"@/a b"), [400], CLOSED),
    "a fragment in the target": (get(target=b"@/#top"), [400], CLOSED),
    "a method that nobody knows": (b"FROB @/ HTTP/1.1\r\nhost: board\r\n\r\n", [501], CLOSED),
    "a method in small letters": (b"get @/ HTTP/1.1\r\nhost: board\r\n\r\n", [501], CLOSED),
    "a hundred and one fields": (get(*[b"a: b"] * 101), [431], CLOSED),
    "a head of 70 KiB in one field": (get(b"a: " + b"x" * 70_000), [431], CLOSED),
    "a head without an end": (b"GET @/ HTTP/1.1\r\nhost: board\r\na: " + b"x" * 400_000, [431], CLOSED),
    "a target without an end": (b"GET @/" + b"x" * 400_000, [431], CLOSED),
    # versions, methods, targets
    "HTTP/1.0": (get(version=b"1.0"), [200], CLOSED),
    "HTTP/1.0 without a host": (b"GET @/ HTTP/1.0\r\n\r\n", [200], CLOSED),
    "HTTP/1.0 that asks to be kept": (get(b"connection: keep-alive", version=b"1.0"), [200], KEPT),
    "HTTP/1.2": (get(version=b"1.2"), [400], CLOSED),
    "HTTP/2.0": (get(version=b"2.0"), [505], CLOSED),
    "HTTP/2's preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400], CLOSED),
    "HTTP/0.9": (b"GET @/\r\n\r\n", [505], CLOSED),
    "a TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50), [400], CLOSED),
    "CONNECT": (b"CONNECT board:443 HTTP/1.1\r\nhost: board:443\r\n\r\n", [501], CLOSED),
    "the asterisk for GET": (get(target=b"*"), [400], CLOSED),
    "an absolute target": (get(target=b"http://board@/"), [200], KEPT),
    "an absolute target with a user": (get(target=b"http://me:secret@board/"), [400], CLOSED),
    "an absolute target without a host": (get(target=b"http:///x"), [400], CLOSED),
    "an absolute target of another scheme": (get(target=b"ftp://board@/"), [400], CLOSED),
    # Host
    "no host": (get(host=b""), [400], CLOSED),
    "an empty host": (get(host=b"host:\r\n"), [200], KEPT),
    "two hosts": (get(host=HOST * 2), [400], CLOSED),
    "two hosts in HTTP/1.0": (get(host=HOST * 2, version=b"1.0"), [400], CLOSED),
    "a host with a path": (get(host=b"host: board/x\r\n"), [400], CLOSED),
    "a host with a user": (get(host=b"host: me@board\r\n"), [400], CLOSED),
    "two hosts in one field": (get(host=b"host: board, other\r\n"), [400], CLOSED),
    "a host with a port": (get(host=b"host: board:8080\r\n"), [200], KEPT),
    "an IPv6 host": (get(host=b"host: [::1]:80\r\n"), [200], KEPT),
    # Content-Length
    "a body": (post(b"content-length: 3", body=b"abc"), [200], KEPT),
    "no length for a POST": (post(), [200], KEPT),
    "a length twice the same": (post(b"content-length: 1", b"content-length: 1", body=b"x"), [400], CLOSED),
    "two lengths": (post(b"content-length: 1", b"content-length: 2", body=b"xy"), [400], CLOSED),
    "a list of lengths": (post(b"content-length: 1, 1", body=b"x"), [400], CLOSED),
    "a length with a sign": (post(b"content-length: +1", body=b"x"), [400], CLOSED),
    "a negative length": (post(b"content-length: -1", body=b"x"), [400], CLOSED),
    "a length in hexadecimal": (post(b"content-length: 0x1", body=b"x"), [400], CLOSED),
    "an empty length": (post(b"content-length:", body=b"x"), [400], CLOSED),
    "a length beyond 64 bits": (post(b"content-length: 99999999999999999999999", body=b"x"), [400], CLOSED),
    "more than is taken": (post(b"content-length: 1048577"), [413], CLOSED),
    "more than is taken, and it is sent": (post(b"content-length: 4000000", body=bytes(4_000_000)), [413], CLOSED),
    "more than is taken, in chunks": (chunked(b"200000\r\n" + bytes(0x200000)), [413], CLOSED),
    # Transfer-Encoding
    "chunks": (chunked(b"3\r\nabc\r\n0\r\n\r\n"), [200], KEPT),
    "chunks and the next request": (chunked(b"3\r\nabc\r\n0\r\n\r\n") + OK, [200, 200], KEPT),
    "chunks, in capitals": (post(b"Transfer-Encoding: CHUNKED", body=b"0\r\n\r\n"), [200], KEPT),
    "a length and chunks": (chunked(b"0\r\n\r\n", b"content-length: 5"), [400], CLOSED),
    "chunks and a length": (
        post(b"content-length: 5", b"transfer-encoding: chunked", body=b"0\r\n\r\n"),
        [400],
        CLOSED,
    ),
    "a coding nobody knows": (post(b"transfer-encoding: xchunked", body=b"0\r\n\r\n"), [501], CLOSED),
    "a coding before the chunks": (post(b"transfer-encoding: gzip, chunked", body=b"0\r\n\r\n"), [501], CLOSED),
    "a coding after the chunks": (post(b"transfer-encoding: chunked, gzip", body=b"0\r\n\r\n"), [400], CLOSED),
    "identity": (post(b"transfer-encoding: identity"), [501], CLOSED),
    "chunks twice": (chunked(b"0\r\n\r\n", b"transfer-encoding: chunked"), [400], CLOSED),
    "chunks and then identity": (chunked(b"0\r\n\r\n", b"transfer-encoding: identity"), [400], CLOSED),
    "chunks behind a vertical tab": (post(b"transfer-encoding: \x0bchunked", body=b"0\r\n\r\n"), [400], CLOSED),
    "chunks with a space before the colon": (post(b"transfer-encoding : chunked", body=b"0\r\n\r\n"), [400], CLOSED),
    "chunks in HTTP/1.0": (get(b"transfer-encoding: chunked", version=b"1.0") + b"0\r\n\r\n", [400], CLOSED),
    "a name that only looks like it": (get(b"transfer_encoding: chunked"), [200], KEPT),
    # chunks
    "extensions": (chunked(b'3;a=b;c="d;e"\r\nabc\r\n0;end\r\n\r\n'), [200], KEPT),
    "an extension without an end": (chunked(b"3;a=" + b"x" * 400_000), [400], CLOSED),
    "an extension for every byte": (chunked(b"".join([b"1;%b\r\nx\r\n" % (b"e" * 5_000)] * 100)), [400], CLOSED),
    "a line feed in an extension": (chunked(b"3;a\nb\r\nabc\r\n0\r\n\r\n"), [400], CLOSED),
    "a chunk size ended by LF": (chunked(b"3\nabc\r\n0\r\n\r\n"), [400], CLOSED),
    "chunk data ended by LF": (chunked(b"3\r\nabc\n0\r\n\r\n"), [400], CLOSED),
    "more data than the chunk says": (chunked(b"3\r\nabcd\r\n0\r\n\r\n"), [400], CLOSED),
    "a space before the size": (chunked(b" 3\r\nabc\r\n0\r\n\r\n"), [400], CLOSED),
    "a size in another notation": (chunked(b"0x3\r\nabc\r\n0\r\n\r\n"), [400], CLOSED),
    "a size beyond 64 bits": (chunked(b"FFFFFFFFFFFFFFFFF\r\nabc\r\n0\r\n\r\n"), [400], CLOSED),
    "trailers": (chunked(b"3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n") + OK, [200, 200], KEPT),
    "a length among the trailers": (chunked(b"0\r\ncontent-length: 5\r\n\r\n"), [400], CLOSED),
    "a hundred and one trailers": (chunked(b"0\r\n" + b"a: b\r\n" * 101 + b"\r\n"), [431], CLOSED),
    "trailers without an end": (chunked(b"0\r\na: " + b"x" * 400_000), [400], CLOSED),
    # the connection
    "close": (get(b"connection: close"), [200], CLOSED),
    "close and then more": (get(b"connection: close") + OK, [200], CLOSED),
    "keep-alive, close": (get(b"connection: keep-alive, close"), [200], CLOSED),
    "an offer to upgrade": (get(b"connection: upgrade", b"upgrade: h2c") + OK, [200, 200], KEPT),
    "an offer to upgrade with a body": (
        post(b"connection: upgrade", b"upgrade: websocket", b"content-length: 3", body=b"abc") + OK,
        [200, 200],
        KEPT,
    ),
    "an offer to upgrade with chunks": (
        chunked(b"3\r\nabc\r\n0\r\n\r\n", b"connection: upgrade", b"upgrade: h2c") + OK,
        [200, 200],
        KEPT,
    ),
    "an expectation nobody knows": (post(b"expect: miracles", b"content-length: 1"), [417], CLOSED),
    "rubbish after a request": (OK + b"rubbish\r\n\r\n", [200, 400], CLOSED),
    "a body nobody announced": (post(body=b"abc\r\n\r\n"), [200, 400], CLOSED),
}
