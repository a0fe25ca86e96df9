"""Incoming requests for comparisons: raw bytes on a connection, to `components/adapter/script.c`."""

from compared import CONTINUE, EOF, Case, Until

HOST = b"host: board\r\n"
ECHO = b"/~/r/a/."
SIZE = b"/~/q/r/."
PATTERN = bytes(range(256))


def request(target=b"/", *fields, method=b"GET", version=b"1.1", host=HOST, body=b""):
    lines = b"".join(each + b"\r\n" for each in fields)
    return b"%b %b HTTP/%b\r\n%b%b\r\n%b" % (method, target, version, host, lines, body)


def post(body, *fields, target=ECHO, method=b"POST"):
    return request(target, b"content-length: %d" % len(body), *fields, method=method, body=body)


def chunked(body, *fields, target=ECHO):
    return request(target, b"transfer-encoding: chunked", *fields, method=b"POST", body=body)


def chunks(data, size):
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in pieces) + b"0\r\n\r\n"


def get(target=b"/", *fields, **how):
    return Case((request(target, *fields, **how),))


def script(steps, *fields, **how):
    return get(b"/~/" + steps, *fields, **how)


def by(method, target=b"/", *fields, **how):
    return Case((request(target, *fields, method=method, **how),), (method.decode("latin-1"),))


def sent(*steps, methods=("POST",), **how):
    return Case(steps, methods, **how)


METHODS = {
    **{f"{name}": by(name.encode()) for name in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH")},
    "HEAD": by(b"HEAD"),
    "HEAD of an answer with a length": by(b"HEAD", b"/~/hcontent-length:1234/r/."),
    "HEAD of an answer with a body": by(b"HEAD", b"/~/r/whello/."),
    "HEAD and then GET": sent(request(method=b"HEAD") + request(), methods=("HEAD", "GET")),
    "DELETE with a body": sent(post(b"abc", method=b"DELETE"), methods=("DELETE",)),
    "GET with a body": sent(post(b"abc", method=b"GET"), methods=("GET",)),
    "OPTIONS of the asterisk": by(b"OPTIONS", b"*"),
    "PROPFIND": by(b"PROPFIND"),
    "M-SEARCH": by(b"M-SEARCH"),
    "PURGE": by(b"PURGE"),
    "BREW": by(b"BREW"),
    "a method in small letters": by(b"get"),
    "a method of all sorts of characters": by(b"G!#$%&'*+-.^_`|~"),
    "a method of 60 letters": by(b"X" * 60),
    "no method": by(b""),
    "a method with a NUL": by(b"G\0T"),
    "CONNECT": by(b"CONNECT", b"board:443"),
}

TARGETS = {
    "a path": get(b"/a/b/c"),
    "a query": get(b"/a?b=c&d=e"),
    "an empty query": get(b"/a?"),
    "a query with slashes and question marks": get(b"/a?b/c?d"),
    "percent-encoded bytes": get(b"/a%20b%2Fc%00%ff"),
    "a percent sign that encodes nothing": get(b"/a%zz%"),
    "dots": get(b"/a/../b/./c"),
    "two slashes first": get(b"//a//b"),
    "a semicolon and a colon": get(b"/a;b=c:d@e"),
    "quotes and brackets": get(b"/a\"<>[]{}|\\^`'"),
    "bytes that are no ASCII": get(b"/caf\xc3\xa9"),
    "bytes that are no UTF-8": get(b"/caf\xe9"),
    "a target of 8 KiB": get(b"/" + b"a" * 8192),
    "a target of 60 KiB": get(b"/" + b"a" * 61440),
    "an absolute one": get(b"http://other:81/a?b"),
    "an absolute one without a path": get(b"http://other"),
    "an absolute one with a query and no path": get(b"http://other?a"),
    "an absolute one of https": get(b"https://other/a"),
    "an absolute one of another scheme": get(b"ftp://other/a"),
    "an absolute one with a user": get(b"http://me:secret@other/a"),
    "an absolute one without a host": get(b"http:///a"),
    "an absolute one and no host": get(b"http://other/a", host=b""),
    "the asterisk for GET": get(b"*"),
    "an authority for GET": get(b"board:80"),
    "no slash first": get(b"a/b"),
    "a fragment": get(b"/a#b"),
    "a space": get(b"/a b"),
    "a NUL": get(b"/a\0b"),
    "a control character": get(b"/a\x01b"),
    "a DEL": get(b"/a\x7fb"),
    "nothing": get(b""),
}

VERSIONS = {
    "HTTP/1.0": get(version=b"1.0"),
    "HTTP/1.0 without a host": get(version=b"1.0", host=b""),
    "HTTP/1.0 that asks to be kept": get(b"/", b"connection: keep-alive", version=b"1.0"),
    "HTTP/1.0 that asks to be kept, two at once": sent(
        request(b"/", b"connection: keep-alive", version=b"1.0") * 2, methods=("GET", "GET")
    ),
    "HTTP/1.0 that is streamed to": script(b"r/wone/wtwo/.", version=b"1.0"),
    "HTTP/1.0 with a body": sent(
        request(ECHO, b"content-length: 3", method=b"POST", version=b"1.0", body=b"abc"), methods=("POST",)
    ),
    "HTTP/1.0 with chunks": sent(
        request(ECHO, b"transfer-encoding: chunked", method=b"POST", version=b"1.0", body=b"0\r\n\r\n")
    ),
    "HTTP/1.2": get(version=b"1.2"),
    "HTTP/2.0": get(version=b"2.0"),
    "HTTP/0.9": sent(b"GET /\r\n\r\n", methods=("GET",)),
    "no version": sent(b"GET / \r\nhost: board\r\n\r\n", methods=("GET",)),
    "a version in small letters": sent(b"GET / http/1.1\r\nhost: board\r\n\r\n", methods=("GET",)),
    "a version with two digits": get(version=b"1.10"),
    "HTTP/2's preface": sent(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", methods=("PRI",)),
    "two spaces after the method": sent(b"GET  / HTTP/1.1\r\nhost: board\r\n\r\n", methods=("GET",)),
    "a space after the version": sent(b"GET / HTTP/1.1 \r\nhost: board\r\n\r\n", methods=("GET",)),
    "a TLS hello": sent(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50), methods=("GET",)),
}

HEADS = {
    "fields in their order": get(b"/", b"x-b: 1", b"x-a: 2", b"x-c: 3"),
    "a field twice": get(b"/", b"x-a: 1", b"x-b: 2", b"x-a: 3"),
    "names in capitals": get(b"/", b"X-Shout: Yes"),
    "an empty value": get(b"/", b"x-empty:"),
    "white space around a value": get(b"/", b"x-a: \t b \t"),
    "a tab in a value": get(b"/", b"x-a: b\tc"),
    "bytes that are no ASCII in a value": get(b"/", b"x-name: caf\xe9\xff"),
    "every character that a name may have": get(b"/", b"!#$%&'*+-.^_`|~09azAZ: 1"),
    "a colon in a value": get(b"/", b"x-a: b:c:d"),
    "a list of cookies": get(b"/", b"cookie: a=1", b"cookie: b=2"),
    "fields of the connection": get(b"/", b"connection: keep-alive, x-a", b"keep-alive: timeout=5", b"x-a: 1"),
    "te": get(b"/", b"te: trailers"),
    "te and connection": get(b"/", b"te: trailers", b"connection: te"),
    "proxy fields": get(b"/", b"proxy-connection: keep-alive", b"proxy-authorization: x"),
    "an offer to upgrade": get(b"/", b"connection: upgrade", b"upgrade: h2c"),
    "a web socket": get(b"/", b"connection: Upgrade", b"upgrade: websocket", b"sec-websocket-key: x"),
    "a trailer field": get(b"/", b"trailer: x-sum"),
    "forwarded fields": get(b"/", b"x-forwarded-for: 1.2.3.4", b"forwarded: for=1.2.3.4"),
    "90 fields": get(b"/", *(b"x-%d: %d" % (n, n) for n in range(90))),
    "101 fields": get(b"/", *(b"x-%d: %d" % (n, n) for n in range(101))),
    "a field of 8 KiB": get(b"/", b"x-long: " + b"y" * 8192),
    "a field of 60 KiB": get(b"/", b"x-long: " + b"y" * 61440),
    "a field of 70 KiB": get(b"/", b"x-long: " + b"y" * 71680),
    "a name of 4 KiB": get(b"/", b"x" * 4096 + b": y"),
    "empty lines before a request": sent(b"\r\n\r\n" + request(), methods=("GET",)),
    "lines that end with LF": sent(b"GET / HTTP/1.1\nhost: board\n\n", methods=("GET",)),
    "a folded value": get(b"/", b"x-a: b\r\n c"),
    "a folded value with a tab": get(b"/", b"x-a: b\r\n\tc"),
    "a folded first field": sent(b"GET / HTTP/1.1\r\n x-a: b\r\nhost: board\r\n\r\n", methods=("GET",)),
    "a space before the colon": get(b"/", b"x-a : b"),
    "a field without a name": get(b"/", b": b"),
    "a line that is no field": get(b"/", b"nothing"),
    "a name with a space": get(b"/", b"x a: b"),
    "a name that is no ASCII": get(b"/", b"caf\xe9: b"),
    "a NUL in a value": get(b"/", b"x-a: b\0c"),
    "a control character in a value": get(b"/", b"x-a: b\x01c"),
    "a DEL in a value": get(b"/", b"x-a: b\x7fc"),
    "a bare CR in a value": get(b"/", b"x-a: b\rc"),
}

HOSTS = {
    "none": get(host=b""),
    "an empty one": get(host=b"host:\r\n"),
    "two": get(host=HOST * 2),
    "two that differ": get(host=b"host: a\r\nhost: b\r\n"),
    "one with a port": get(host=b"host: board:8080\r\n"),
    "one with an empty port": get(host=b"host: board:\r\n"),
    "one in capitals": get(host=b"Host: BOARD\r\n"),
    "an IPv6 address": get(host=b"host: [::1]:80\r\n"),
    "one with a path": get(host=b"host: board/x\r\n"),
    "one with a user": get(host=b"host: me@board\r\n"),
    "one with a space": get(host=b"host: a b\r\n"),
    "two in one field": get(host=b"host: a, b\r\n"),
    "one with a port that is no number": get(host=b"host: board:http\r\n"),
    "one with percent-encoded bytes": get(host=b"host: b%6fard\r\n"),
}

THREE = b"3\r\nabc\r\n0\r\n\r\n"
FRAMING = {
    "a length": sent(post(b"abc")),
    "a length of zero": sent(post(b"")),
    "a length with zeros first": sent(request(ECHO, b"content-length: 003", method=b"POST", body=b"abc")),
    "no length and no chunks": sent(request(ECHO, method=b"POST")),
    "chunks": sent(chunked(THREE)),
    "many chunks": sent(chunked(chunks(PATTERN * 16, 7))),
    "no chunk but the last": sent(chunked(b"0\r\n\r\n")),
    "chunks in capitals": sent(request(ECHO, b"Transfer-Encoding: CHUNKED", method=b"POST", body=THREE)),
    "a size in capitals, with zeros first": sent(chunked(b"000A\r\n0123456789\r\n0\r\n\r\n")),
    "extensions": sent(chunked(b'3;a=b;c="d;e"\r\nabc\r\n0;end\r\n\r\n')),
    "white space after a size": sent(chunked(b"3 \r\nabc\r\n0\r\n\r\n")),
    "trailers": sent(chunked(b"3\r\nabc\r\n0\r\nx-sum: 1\r\nx-more: 2\r\n\r\n", target=b"/~/r/a/z/.")),
    "trailers that nobody reads": sent(
        chunked(b"3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n") + request(), methods=("POST", "GET")
    ),
    "trailers that frame": sent(chunked(b"0\r\nhost: x\r\nx-sum: 1\r\n\r\n", target=b"/~/r/z/.")),
    "no trailers": sent(chunked(THREE, target=b"/~/r/z/.")),
    "trailers of a body with a length": sent(post(b"abc", target=b"/~/r/z/.")),
    "chunks and a length": sent(chunked(THREE, b"content-length: 5")),
    "a length and chunks": sent(
        request(ECHO, b"content-length: 5", b"transfer-encoding: chunked", method=b"POST", body=THREE)
    ),
    "the same length twice": sent(post(b"abc", b"content-length: 3")),
    "two lengths": sent(post(b"abc", b"content-length: 4")),
    "a list of lengths": sent(request(ECHO, b"content-length: 3, 3", method=b"POST", body=b"abc")),
    "a length with a sign": sent(request(ECHO, b"content-length: +3", method=b"POST", body=b"abc")),
    "a negative length": sent(request(ECHO, b"content-length: -3", method=b"POST", body=b"abc")),
    "a length in hexadecimal": sent(request(ECHO, b"content-length: 0x3", method=b"POST", body=b"abc")),
    "an empty length": sent(request(ECHO, b"content-length:", method=b"POST", body=b"abc")),
    "a length beyond 64 bits": sent(request(ECHO, b"content-length: 99999999999999999999", method=b"POST", body=b"x")),
    "a coding that nobody knows": sent(request(ECHO, b"transfer-encoding: x", method=b"POST", body=THREE)),
    "a coding before the chunks": sent(request(ECHO, b"transfer-encoding: gzip, chunked", method=b"POST", body=THREE)),
    "a coding after the chunks": sent(request(ECHO, b"transfer-encoding: chunked, gzip", method=b"POST", body=THREE)),
    "identity": sent(request(ECHO, b"transfer-encoding: identity", method=b"POST")),
    "chunks twice": sent(chunked(THREE, b"transfer-encoding: chunked")),
    "a size that is none": sent(chunked(b"zz\r\nabc\r\n0\r\n\r\n")),
    "a size with a sign": sent(chunked(b"+3\r\nabc\r\n0\r\n\r\n")),
    "a size in another notation": sent(chunked(b"0x3\r\nabc\r\n0\r\n\r\n")),
    "a size beyond 64 bits": sent(chunked(b"fffffffffffffffff\r\nabc\r\n0\r\n\r\n")),
    "a size that ends with LF": sent(chunked(b"3\nabc\r\n0\r\n\r\n")),
    "data that ends with LF": sent(chunked(b"3\r\nabc\n0\r\n\r\n")),
    "more data than the size says": sent(chunked(b"3\r\nabcd\r\n0\r\n\r\n")),
    "a line feed in an extension": sent(chunked(b"3;a\nb\r\nabc\r\n0\r\n\r\n")),
    "a size that is missing": sent(chunked(b"\r\nabc\r\n0\r\n\r\n")),
}

CONNECTIONS = {
    "three requests at once": sent(request() * 3, methods=("GET",) * 3),
    "bodies at once": sent(post(b"abc") + chunked(THREE) + post(b"def"), methods=("POST",) * 3),
    "ten at once, of all sorts": sent(
        (
            request()
            + post(b"x" * 5000)
            + request(method=b"HEAD")
            + request(b"/~/s204/r/.")
            + request(b"/~/s404/r/wno/.")
        )
        * 2,
        methods=("GET", "POST", "HEAD", "GET", "GET") * 2,
    ),
    "a request in two pieces": sent(b"GET / HTTP/1.1\r\nhos", b"t: board\r\n\r\n", methods=("GET",)),
    "a request byte by byte": sent(*(bytes([each]) for each in request()), methods=("GET",)),
    "close": get(b"/", b"connection: close"),
    "close, and then more": sent(request(b"/", b"connection: close") + request(), methods=("GET",)),
    "keep-alive": get(b"/", b"connection: keep-alive"),
    "keep-alive and close": get(b"/", b"connection: keep-alive, close"),
    "close in capitals": get(b"/", b"Connection: CLOSE"),
    "rubbish after a request": sent(request() + b"rubbish\r\n\r\n", methods=("GET", "GET")),
    "a body that nobody announced": sent(request(method=b"POST") + b"abc\r\n\r\n", methods=("POST", "GET")),
    "empty lines between requests": sent(request() + b"\r\n" + request(), methods=("GET", "GET")),
    "a request and the end": sent(request(), EOF, methods=("GET",)),
    "two requests and the end": sent(request() * 2, EOF, methods=("GET", "GET")),
    "a body and the end": sent(post(b"abc"), EOF),
    "the end within a head": sent(b"GET / HTTP/1.1\r\nhost", EOF, methods=("GET",)),
    "the end within a body": sent(request(ECHO, b"content-length: 9", method=b"POST", body=b"abc"), EOF),
    "the end within chunks": sent(chunked(b"9\r\nabc"), EOF),
    "the end before anything": sent(EOF, methods=("GET",)),
    "a close while the body goes": sent(post(b"abc", b"connection: close")),
}

EXPECTING = b"expect: 100-continue"
EXPECTATIONS = {
    "100-continue": sent(request(SIZE, b"content-length: 3", EXPECTING, method=b"POST"), Until(CONTINUE), b"abc"),
    "100-continue with chunks": sent(
        request(SIZE, b"transfer-encoding: chunked", EXPECTING, method=b"POST"), Until(CONTINUE), THREE
    ),
    "100-continue in capitals": sent(
        request(SIZE, b"content-length: 3", b"Expect: 100-Continue", method=b"POST"), Until(CONTINUE), b"abc"
    ),
    "a body that does not wait": sent(request(SIZE, b"content-length: 3", EXPECTING, method=b"POST", body=b"abc")),
    "nothing to wait for": get(b"/", EXPECTING),
    "a body that the guest does not read": sent(
        request(b"/~/s403/r/wno/.", b"content-length: 3", EXPECTING, method=b"POST"), Until(b"no"), b"abc", fate=False
    ),
    "HTTP/1.0": sent(request(SIZE, b"content-length: 3", EXPECTING, method=b"POST", version=b"1.0", body=b"abc")),
    "another one": sent(request(SIZE, b"expect: miracles", b"content-length: 3", method=b"POST", body=b"abc")),
}

STATUSES = {
    **{f"{status}": script(b"s%d/r/wbody/." % status) for status in (200, 201, 202, 203, 206, 207, 226)},
    **{f"{status}": script(b"hlocation:%%2fthere/s%d/r/." % status) for status in (300, 301, 302, 303, 307, 308)},
    **{
        f"{status}": script(b"s%d/r/wno/." % status)
        for status in (400, 401, 404, 405, 409, 413, 418, 421, 422, 429, 431)
    },
    **{f"{status}": script(b"s%d/r/woh/." % status) for status in (451, 499, 500, 501, 502, 503, 504, 511, 520, 599)},
    **{f"{status}": script(b"s%d/r/." % status) for status in (204, 205, 304)},
    **{f"{status} with a body": script(b"s%d/r/wbody/." % status) for status in (204, 205, 304)},
    "304 with a length": script(b"hcontent-length:5/s304/r/."),
    "HEAD of 304": by(b"HEAD", b"/~/s304/r/."),
    **{f"{status}": script(b"s%d/r/wbody/." % status) for status in (100, 101, 103, 199, 600, 999)},
    **{f"{status}, which is refused": script(b"s%d/s200/r/n/." % status) for status in (0, 99, 1000, 65535)},
}

ANSWERS = {
    "nothing": script(b"r/."),
    "fields": script(b"hx-a:1/hx-b:2/hx-a:3/hX-Caps:Yes/r/wbody/."),
    "fields with odd bytes": script(b"hx-a:caf%e9/hx-b:a%09b/hx-c:/r/n/."),
    "fields that are refused": script(
        b"hx%20a:1/hx-b:a%0ab/hx-c:a%00b/hconnection:close/htransfer-encoding:x/hhost:x/r/n/."
    ),
    "cookies": script(b"hset-cookie:a=1/hset-cookie:b=2/r/."),
    "a server of its own": script(b"hserver:mine/r/."),
    "a date of its own": Case((request(b"/~/hdate:yesterday/hx-a:1/r/."),)),
    "a content type": script(b"hcontent-type:text%2fplain/r/wbody/."),
    "90 fields": script(b"/".join(b"hx-%d:%d" % (n, n) for n in range(90)) + b"/r/."),
    "its length": script(b"hcontent-length:5/r/whello/."),
    "its length, in pieces": script(b"hcontent-length:10/r/whello/wworld/."),
    "a length of zero": script(b"hcontent-length:0/r/."),
    "a length that is too long": script(b"hcontent-length:9/r/whello/."),
    "a length that is too short": script(b"hcontent-length:3/r/whello/."),
    "a length without a body": script(b"hcontent-length:5/r/."),
    "a length that is no number": script(b"hcontent-length:five/r/whello/."),
    "the same length twice": script(b"hcontent-length:5/hcontent-length:5/r/whello/."),
    "two lengths": script(b"hcontent-length:5/hcontent-length:6/r/whello/."),
    "a body before the answer is set": script(b"s201/uhello/r/."),
    "a body not flushed": script(b"r/uhello/c/."),
    "a body flushed in pieces": script(b"r/ua/f/ub/f/uc/f/."),
    "a trailer": script(b"r/whello/tx-sum:7/.", b"te: trailers"),
    "a trailer, of a body that has its length": script(b"hcontent-length:5/r/whello/tx-sum:7/.", b"te: trailers"),
    "a trailer that nobody asked for": script(b"r/whello/tx-sum:7/."),
    "a trailer of nothing": script(b"r/tx-sum:7/.", b"te: trailers"),
    "trailers announced": script(b"htrailer:x-sum/r/whello/tx-sum:7/.", b"te: trailers"),
    "a trailer to HTTP/1.0": script(b"r/whello/tx-sum:7/.", version=b"1.0"),
    **{
        f"a body of {words}": script(b"r/b%d/." % size)
        for words, size in {"1 byte": 1, "64 KiB": 1 << 16, "1 MiB": 1 << 20}.items()
    },
    "a body of 1 MiB with its length": script(b"hcontent-length:1048576/r/b1048576/."),
    "a body of 1 MiB to HTTP/1.0": script(b"r/b1048576/.", version=b"1.0"),
}

BODIES = {
    **{
        f"{words} back": sent(post(PATTERN * (size // 256) + PATTERN[: size % 256]))
        for words, size in {"1 byte": 1, "64 KiB": 1 << 16, "64 KiB and 1": (1 << 16) + 1, "1 MiB": 1 << 20}.items()
    },
    **{
        f"{words} in chunks back": sent(chunked(chunks(PATTERN * (size // 256), piece)))
        for words, size, piece in (("64 KiB", 1 << 16, 4096), ("1 MiB", 1 << 20, 60_000))
    },
    "1 MiB read, and its size said": sent(post(bytes(1 << 20), target=SIZE)),
    "a body that nobody reads": sent(post(b"abc", target=b"/") + request(), methods=("POST", "GET")),
    "64 KiB that nobody reads": sent(post(bytes(1 << 16), target=b"/"), fate=False),
    "1 MiB that nobody reads": sent(post(bytes(1 << 20), target=b"/"), fate=False),
    "a piece of a body read": sent(post(b"abc", target=b"/~/r/k/.")),
    "an answer before the body": sent(
        request(b"/~/r/whello/a/.", b"content-length: 3", method=b"POST"), Until(b"hello"), b"abc"
    ),
    "pieces in turn": sent(
        request(b"/~/r/wgo/a/.", b"transfer-encoding: chunked", method=b"POST"),
        Until(b"go"),
        b"3\r\nabc\r\n",
        Until(b"abc"),
        b"3\r\ndef\r\n0\r\n\r\n",
    ),
    "pieces of 64 KiB in turn": sent(
        request(ECHO, b"content-length: 131072", method=b"POST") + b"a" * 65536,
        Until(b"a" * 1024),
        b"b" * 65536,
    ),
    "an early answer": sent(
        request(b"/~/s403/r/wtoo+large/.", b"content-length: 3", method=b"POST"),
        Until(b"too+large"),
        b"abc",
        fate=False,
    ),
    "an early answer to chunks": sent(
        request(b"/~/s403/r/wtoo+large/.", b"transfer-encoding: chunked", method=b"POST"),
        Until(b"too+large"),
        THREE,
        fate=False,
    ),
    "an early answer to a large body": sent(
        request(b"/~/s403/r/wtoo+large/.", b"content-length: 131072", method=b"POST") + b"a" * 65536,
        Until(b"too+large"),
        fate=False,
    ),
}

FAILURES = {
    "an error": script(b"e38"),
    "an error of another name": script(b"e3"),
    "no answer": script(b";"),
    "an outparam dropped": script(b"o"),
    "an answer made and not set": script(b"hx-a:1/s201/;"),
    "a trap": script(b"!"),
    "a trap after reading": sent(post(b"abc", target=b"/~/q/!")),
    "a trap with the body unread": sent(post(bytes(1 << 16), target=b"/~/!"), fate=False),
    "a trap after the head": script(b"r/!"),
    "a trap within a body": script(b"r/whello/!"),
    "a trap within a body with its length": script(b"hcontent-length:9/r/whello/!"),
    "a trap within a large body": script(b"r/b1048576/!"),
    "a trap within a large body with its length": script(b"hcontent-length:2000000/r/b1048576/!"),
    "a trap after the end": script(b"r/whello/./!"),
    "a trap after the end of nothing": script(b"r/./!"),
    "a trap after the end of a large body": script(b"r/b1048576/./!"),
    "a trap after the end with trailers": script(b"htrailer:x-sum/r/whello/tx-sum:7/./!", b"te: trailers"),
    "a trap after an answer that was set when its body had ended": script(b"uhello/./r/!"),
    "a trap after a 204": script(b"s204/r/./!"),
    "a trap after an error": script(b"e38/!"),
    "an exit after the end": script(b"r/whello/./X"),
    "an exit after the end of a large body": script(b"r/b1048576/./X"),
    "work after the end": script(b"r/whello/./p30"),
    "work after the end with its length": script(b"hcontent-length:5/r/whello/./p30"),
    "reading after the end": sent(post(b"abc", target=b"/~/r/whello/./q/w.")),
    "writing after the end": script(b"r/whello/./wmore"),
    "a trap after the end, and the next request": sent(request(b"/~/r/whello/./!") + request(), methods=("GET", "GET")),
    "a body dropped": script(b"r/whello/x"),
    "a body dropped, with its length": script(b"hcontent-length:9/r/whello/x"),
    "a body dropped before anything": script(b"r/x"),
    "a return within a body": script(b"r/whello/;"),
    "a return within a large body": script(b"r/b1048576/;"),
    "a trap, and the next request": sent(request(b"/~/!") + request(), methods=("GET", "GET")),
    "an error, and the next request": sent(request(b"/~/e38") + request(), methods=("GET", "GET")),
    "no answer, and the next request": sent(request(b"/~/;") + request(), methods=("GET", "GET")),
}

EXACTLY = {
    "an answer that is whole": Case((request(b"/~/r/whello/."),), exact=True),
    "an answer of nothing": Case((request(b"/~/r/."),), exact=True),
    "a large answer": Case((request(b"/~/r/b1048576/."),), exact=True),
    "an answer with its length": Case((request(b"/~/hcontent-length:5/r/whello/."),), exact=True),
    "204": Case((request(b"/~/s204/r/."),), exact=True),
    "304 with a length": Case((request(b"/~/hcontent-length:5/s304/r/."),), exact=True),
    "HEAD": Case((request(b"/~/r/whello/.", method=b"HEAD"),), ("HEAD",), exact=True),
    "HEAD with a length": Case((request(b"/~/hcontent-length:5/r/.", method=b"HEAD"),), ("HEAD",), exact=True),
    "a refusal": Case((b"GET / nothing\r\n\r\n",), exact=True),
    "a status that has no name": Case((request(b"/~/s499/r/."),), exact=True),
    "a status with another name": Case((request(b"/~/s203/r/."),), exact=True),
    "an error": Case((request(b"/~/e38"),), exact=True),
    "a trap": Case((request(b"/~/!"),), exact=True),
}

TABLES = {
    "method": METHODS,
    "target": TARGETS,
    "version": VERSIONS,
    "head": HEADS,
    "host": HOSTS,
    "framing": FRAMING,
    "connection": CONNECTIONS,
    "expectation": EXPECTATIONS,
    "status": STATUSES,
    "answer": ANSWERS,
    "body": BODIES,
    "failure": FAILURES,
    "exactly": EXACTLY,
}
CASES = {f"{table}: {name}": case for table, cases in TABLES.items() for name, case in cases.items()}
