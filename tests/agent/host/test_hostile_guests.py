"""Hostile guests, each with one way to do harm, in a real host beside a neighbour that is asked all the while.

Whatever a guest does, each answer of the neighbour is right, the guest's end is named in words (in its log, in what its
client gets, or in the refusal of its start), and afterwards the host has the processes and the memory that it had
before. The neighbour's p99 is printed beside each kind, and not judged. All kinds run in `make nightly`, a tenth in
each other run (`tests/rotation.py`).
"""

import socket
from dataclasses import dataclass, field

import pytest
import support
from host_processes import forks, lanes_of
from native_guests import handler
from neighbour import GROWTH_MAX_BYTES, Neighbour, private_bytes
from support import Grants, Health, Limits

from agent.host.ipc import host_api
from fleet.protocol.manifest import Schedule
from tests.eventually import eventually
from tests.rotation import rotated

GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
WASI = """
  (import "wasi:io/error@0.2.0" (instance $error (export "error" (type (sub resource)))))
  (alias export $error "error" (type $e))
  (import "wasi:io/poll@0.2.0" (instance $poll
    (export "pollable" (type $pollable (sub resource)))
    (export "[method]pollable.block" (func (param "self" (borrow $pollable))))
    (export "poll" (func (param "in" (list (borrow $pollable))) (result (list u32))))))
  (alias export $poll "pollable" (type $pollable))
  (import "wasi:clocks/monotonic-clock@0.2.0" (instance $clock
    (alias outer 1 $pollable (type $p)) (export "pollable" (type $pollable (eq $p)))
    (export "subscribe-duration" (func (param "when" u64) (result (own $pollable))))))
  (import "wasi:io/streams@0.2.0" (instance $streams
    (alias outer 1 $e (type $e')) (export "error" (type $err (eq $e')))
    (export "output-stream" (type $out (sub resource)))
    (type $failure (variant (case "last-operation-failed" (own $err)) (case "closed")))
    (export "stream-error" (type $stream-error (eq $failure)))
    (export "[method]output-stream.blocking-write-and-flush"
      (func (param "self" (borrow $out)) (param "contents" (list u8)) (result (result (error $stream-error)))))
    (export "[method]output-stream.write"
      (func (param "self" (borrow $out)) (param "contents" (list u8)) (result (result (error $stream-error)))))))
  (alias export $streams "output-stream" (type $stream))
  (import "wasi:cli/stdout@0.2.0" (instance $stdout
    (alias outer 1 $stream (type $s')) (export "output-stream" (type $s (eq $s')))
    (export "get-stdout" (func (result (own $s))))))
  (import "wasi:cli/exit@0.2.0" (instance $exit (export "exit" (func (param "status" (result))))))
  (import "wasi:cli/environment@0.2.0" (instance $cli
    (export "get-environment" (func (result (list (tuple string string)))))))
  (import "wasi:random/random@0.2.0" (instance $random
    (export "get-random-bytes" (func (param "len" u64) (result (list u8))))))
  (import "wasi:filesystem/types@0.2.0" (instance $files (export "descriptor" (type (sub resource)))))
  (alias export $files "descriptor" (type $descriptor))
  (import "wasi:filesystem/preopens@0.2.0" (instance $preopens
    (alias outer 1 $descriptor (type $d')) (export "descriptor" (type $d (eq $d')))
    (export "get-directories" (func (result (list (tuple (own $d) string)))))))
  (core func $block (canon lower (func $poll "[method]pollable.block")))
  (core func $poll (canon lower (func $poll "poll") (memory (core memory $room "memory"))
    (realloc (core func $room "realloc"))))
  (core func $subscribe (canon lower (func $clock "subscribe-duration")))
  (core func $drop-pollable (canon resource.drop $pollable))
  (core func $out (canon lower (func $stdout "get-stdout")))
  (core func $write (canon lower (func $streams "[method]output-stream.blocking-write-and-flush")
    (memory (core memory $room "memory"))))
  (core func $write-only (canon lower (func $streams "[method]output-stream.write")
    (memory (core memory $room "memory"))))
  (core func $drop-out (canon resource.drop $stream))
  (core func $exit (canon lower (func $exit "exit")))
  (core func $environment (canon lower (func $cli "get-environment") (memory (core memory $room "memory"))
    (realloc (core func $room "realloc"))))
  (core func $random (canon lower (func $random "get-random-bytes") (memory (core memory $room "memory"))
    (realloc (core func $room "realloc"))))
  (core func $directories (canon lower (func $preopens "get-directories") (memory (core memory $room "memory"))
    (realloc (core func $room "realloc"))))
  (core instance $host (export "block" (func $block)) (export "poll" (func $poll))
    (export "subscribe" (func $subscribe)) (export "drop-pollable" (func $drop-pollable))
    (export "out" (func $out)) (export "write" (func $write)) (export "write-only" (func $write-only))
    (export "drop-out" (func $drop-out)) (export "exit" (func $exit)) (export "environment" (func $environment))
    (export "random" (func $random)) (export "directories" (func $directories)))
"""
USES = """
    (import "host" "block" (func $block (param i32)))
    (import "host" "poll" (func $poll (param i32 i32 i32)))
    (import "host" "subscribe" (func $subscribe (param i64) (result i32)))
    (import "host" "drop-pollable" (func $drop-pollable (param i32)))
    (import "host" "out" (func $out (result i32)))
    (import "host" "write" (func $write (param i32 i32 i32 i32)))
    (import "host" "write-only" (func $write-only (param i32 i32 i32 i32)))
    (import "host" "drop-out" (func $drop-out (param i32)))
    (import "host" "exit" (func $exit (param i32)))
    (import "host" "environment" (func $environment (param i32)))
    (import "host" "random" (func $random (param i64 i32)))
    (import "host" "directories" (func $directories (param i32)))
"""
GUEST = """(component
  (core module $room
    (memory (export "memory") 3)
    (global $top (mut i32) (i32.const 65536))
    {data}
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (local $at i32)
      {realloc}
      (local.set $at (i32.and (i32.add (global.get $top) (i32.const 7)) (i32.const -8)))
      (global.set $top (i32.add (local.get $at) (local.get 3)))
      (local.get $at))
    (func (export "reset") (param i32) {reset} (global.set $top (i32.const 65536))))
  (core instance $room (instantiate $room))
  {wasi}
  (core module $guest
    (import "room" "memory" (memory 3))
    {uses}
    (type $nothing (func))
    (table $table 64 funcref)
    {functions}
    (func $spin (loop $on (br $on)))
    (func $deeper (param i32) (result i32) (i32.add (call $deeper (local.get 0)) (i32.const 1)))
    (func (export "handle") (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)
      (local $n i32) (local $it i32)
      {handle}
      (i32.const 64))
    (func (export "check") (result i32) {check} (i32.const 96))
    (func $start {start})
    (start $start))
  (core instance $guest (instantiate $guest (with "room" (instance $room)){given}))
  {handler}
  (func $check (result (result (error string)))
    (canon lift (core func $guest "check") (memory (core memory $room "memory"))))
  (instance $health (export "check" (func $check)))
  (export "wasmfleet:http/health@0.1.0" (instance $health)))
"""


def repeat(times, code):
    return f"""(local.set $n (i32.const 0))
      (loop $again {code}
        (local.set $n (i32.add (local.get $n) (i32.const 1)))
        (br_if $again (i32.lt_u (local.get $n) (i32.const {times}))))"""


def answer(status=200, headers=b"", body=(16, 6)):
    """The data of an answer: its head lies at 1024."""
    words = (status, 1024, len(headers), *body)
    record = b"".join(word.to_bytes(4, "little") for word in words)
    return (
        f'(data (i32.const 16) "hello\\n") (data (i32.const 64) "{support.hexed(record)}") '
        f'(data (i32.const 1024) "{support.hexed(headers)}")'
    )


def native(handle="", *, data="", realloc="", reset="", functions="", check="", start="", wasi=False):
    """A guest of the native world that runs this code at the places named."""
    return GUEST.format(
        data=data or answer(),
        realloc=realloc,
        reset=reset,
        wasi=WASI if wasi else "",
        uses=USES if wasi else "",
        given=' (with "host" (instance $host))' if wasi else "",
        functions=functions,
        handle=handle,
        handler=handler("guest", "room"),
        check=check,
        start=start,
    )


@dataclass(frozen=True)
class Hostile:
    """What a guest is and how it is asked; `statuses` of its answers (0: none), `says`: words that name its end."""

    guest: str | bytes
    statuses: tuple[int, ...] = (500,)
    says: str = ""
    asks: tuple[bytes, ...] = (GET, GET)
    refused: bool = False
    reads: bool = True
    limits: dict[str, int] = field(default_factory=dict)
    grants: tuple[str, ...] = ()
    health: Health | None = None
    trigger: Schedule | None = None
    successor: str = ""
    outbound: tuple[str, ...] = ()


def told(steps, *statuses, says="", body=b"", **how):
    """A guest of wasi:http that is told by its request what to do (`components/adapter/script.c`)."""
    method, length = (b"POST", b"content-length: %d\r\n" % len(body)) if body else (b"GET", b"")
    ask = b"%b /~/%b HTTP/1.1\r\nhost: x\r\nte: trailers\r\n%b\r\n%b" % (method, steps, length, body)
    script = support.wasm("script")
    return Hostile(script, statuses or (500,), says, (ask, ask), **how)


def probe(path, *statuses, says="", **how):
    """A path of the adapter's own guest of tests (`components/adapter/probe.c`)."""
    ask = b"GET %b HTTP/1.1\r\nhost: x\r\n\r\n" % path
    return Hostile("probe", statuses, says, (ask, ask), **how)


TIME = "used up its time"
IDLE, TOTAL = {"idle_ms": 700}, {"total_ms": 2500}  # short where a guest is to meet them, else those of any manifest
TASK = Schedule(every_ms=100)
CHECKED = Health(check=True)
BOMB = b"".join(b"x-%d: y\r\n" % number for number in range(3000))
UNWELL = answer() + (
    '(data (i32.const 128) "\\01\\00\\00\\00\\00\\00\\01\\00\\00\\f0\\00\\00") (data (i32.const 65536) "ill")'
)
KINDS = {
    # processor time
    "spins in a call": Hostile(native("(call $spin)"), (504,), TIME),
    "spins while it takes the request": Hostile(native(realloc="(loop $on (br $on))"), (504,), TIME),
    "spins after its answer": Hostile(native(reset="(loop $on (br $on))"), (504,), TIME),
    "spins in its start": Hostile(native(start="(call $spin)"), says=TIME, refused=True),
    "spins in its health check": Hostile(native(check="(call $spin)"), says=TIME, refused=True, health=CHECKED),
    "spins behind wasi:http": probe(b"/spin", 504, says=TIME),
    "copies memory in a circle": Hostile(
        native(repeat(1 << 30, "(memory.copy (i32.const 70000) (i32.const 70001) (i32.const 120000))")), (504,), TIME
    ),
    "runs a task that spins": Hostile("task-spins", says=TIME, asks=(), trigger=TASK),
    # traps
    "traps in a call": Hostile(native("(unreachable)"), says="unreachable"),
    "traps while it takes the request": Hostile(native(realloc="(unreachable)"), says="unreachable"),
    "traps after its answer": Hostile(native(reset="(unreachable)"), says="unreachable"),
    "traps in its start": Hostile(native(start="(unreachable)"), says="unreachable", refused=True),
    "traps in its health check": Hostile(
        native(check="(unreachable)"), says="unreachable", refused=True, health=CHECKED
    ),
    "divides by zero": Hostile(native("(drop (i32.div_u (i32.const 1) (local.get $n)))"), says="divide by zero"),
    "reads beyond its memory": Hostile(native("(drop (i32.load (i32.const -8)))"), says="out of bounds"),
    "calls an empty place of its table": Hostile(
        native("(call_indirect (type $nothing) (i32.const 1))"), says="uninitialized element"
    ),
    "calls beyond its table": Hostile(
        native("(call_indirect (type $nothing) (i32.const 99))"), says="undefined element"
    ),
    "converts what is no number": Hostile(
        native("(drop (i32.trunc_f64_s (f64.const nan)))"), says="invalid conversion to integer"
    ),
    "recurses": Hostile(native("(drop (call $deeper (i32.const 1)))"), says="call stack exhausted"),
    "recurses by its table": Hostile(
        native(
            "(call_indirect (type $nothing) (i32.const 0))",
            functions="(func $around (call_indirect (type $nothing) (i32.const 0)) (call_indirect (type $nothing) "
            "(i32.const 0))) (elem (i32.const 0) $around)",
        ),
        says="call stack exhausted",
    ),
    "runs a task that traps": Hostile("task-traps", says="unreachable", asks=(), trigger=TASK),
    # memory, tables, instances
    "takes all memory and traps": Hostile("hoard", says="limits.memory"),
    "takes all memory, page by page, and goes on": Hostile(
        native("(loop $more (br_if $more (i32.ne (memory.grow (i32.const 1)) (i32.const -1))))"), (200,)
    ),
    "grows its table until it may not": Hostile(
        native("(loop $more (br_if $more (i32.ne (table.grow (ref.null func) (i32.const 999)) (i32.const -1))))"),
        (200,),
    ),
    "begins with a gigabyte": Hostile("declares-1gib", says="limits.memory", refused=True),
    "begins with a table of ten million": Hostile("huge-table", says="limits.table_elements", refused=True),
    "begins with a hundred core instances": Hostile(
        native().replace(
            "(component\n",
            '(component (core module $m (func (export "f")))' + "(core instance (instantiate $m))" * 100,
            1,
        ),
        says="limits.core_instances",
        refused=True,
        limits={"core_instances": 16},
    ),
    "hands the host a place beyond its memory": Hostile(
        native(realloc="(return (i32.const -16))"), says="realloc return: beyond end of memory"
    ),
    "asks for a gigabyte of random bytes": Hostile(
        native("(call $random (i64.const 1073741824) (i32.const 256))", wasi=True), says=" "
    ),
    # handles
    "drops a stream twice": Hostile(
        native(
            "(local.set $it (call $out)) (call $drop-out (local.get $it)) (call $drop-out (local.get $it))", wasi=True
        ),
        says="unknown handle index",
    ),
    "uses a handle that it never had": Hostile(
        native("(call $block (i32.const 77))", wasi=True), says="unknown handle"
    ),
    "passes a stream for a pollable": Hostile(
        native("(call $block (call $out))", wasi=True), says="handle index 1 used with the wrong type"
    ),
    "polls nothing": Hostile(
        native("(call $poll (i32.const 256) (i32.const 0) (i32.const 64))", wasi=True), says="empty poll list"
    ),
    "polls on two thousand timers": Hostile(
        native(
            repeat(
                2000,
                "(i32.store (i32.add (i32.const 131072) (i32.shl (local.get $n) (i32.const 2))) "
                "(call $subscribe (i64.const 3600000000000)))",
            )
            + "(call $poll (i32.const 131072) (i32.const 2000) (i32.const 256))",
            wasi=True,
        ),
        (502, 504, 0),
        "limits.idle",
        limits=IDLE,
    ),
    "collects streams and never drops one": Hostile(
        native(repeat(20_000, "(drop (call $out))"), wasi=True), (200, 500, 504)
    ),
    "collects timers and never drops one": Hostile(
        native(repeat(20_000, "(drop (call $subscribe (i64.const 1)))"), wasi=True), (200, 500, 504)
    ),
    "asks for its directories and variables all the time": Hostile(
        native(repeat(5_000, "(call $directories (i32.const 256)) (call $environment (i32.const 256))"), wasi=True),
        (200, 504),
    ),
    # waiting
    "waits for an hour": Hostile(
        native("(call $block (call $subscribe (i64.const 3600000000000)))", wasi=True),
        (502, 504, 0),
        "limits.idle",
        limits=IDLE,
    ),
    "waits a little, for ever": Hostile(
        native("(loop $on (call $block (call $subscribe (i64.const 100000000))) (br $on))", wasi=True),
        (502, 504, 0),
        "limits.total",
        limits=TOTAL,
    ),
    # output
    "writes to its output without a line's end": Hostile(
        native(
            "(local.set $it (call $out)) (memory.fill (i32.const 131072) (i32.const 120) (i32.const 4096))"
            + repeat(500, "(call $write (local.get $it) (i32.const 131072) (i32.const 4096) (i32.const 256))"),
            wasi=True,
        ),
        (200, 504),
        "xxxx",
    ),
    "writes nothing, twenty thousand times": Hostile(
        native(
            "(local.set $it (call $out))"
            + repeat(20_000, "(call $write (local.get $it) (i32.const 131072) (i32.const 0) (i32.const 256))"),
            wasi=True,
        ),
        (200, 504),
    ),
    "writes more than it may at once": Hostile(
        native("(call $write (call $out) (i32.const 65536) (i32.const 65536) (i32.const 256))", wasi=True),
        says="Buffer too large",
    ),
    "writes without asking how much": Hostile(
        native(
            repeat(9, "(call $write-only (call $out) (i32.const 65536) (i32.const 65536) (i32.const 256))"), wasi=True
        ),
        says="write",
    ),
    "floods its log": Hostile("flood", (200, 502, 504), "the flood rises", grants=("wasi:logging",)),
    "is unwell at length": Hostile(
        native(check="(return (i32.const 128))", data=UNWELL), says="ill", refused=True, health=CHECKED
    ),
    # answers
    "answers with status 7": Hostile(native(data=answer(7)), (502,), "status 7"),
    "answers with status 65535": Hostile(native(data=answer(65535)), (502,), "status 65535"),
    "answers with no status": Hostile(native(data=answer(0)), (502,), "status 0"),
    "ends its head early": Hostile(
        native(data=answer(headers=b"x: y\r\n\r\nHTTP/1.1 200 OK\r\n")), (500, 502), "the component"
    ),
    "names no field": Hostile(
        native(data=answer(headers=b"no colon here\r\n")), (502,), "its answer is refused: header line"
    ),
    "has a field name of 64 KiB": Hostile(native(data=answer(headers=b"x" * 60_000 + b": y\r\n")), (200, 502)),
    "has three thousand fields": Hostile(native(data=answer(headers=BOMB)), (200, 502)),
    "has a negative length": Hostile(native(data=answer(headers=b"content-length: -1\r\n")), (200, 502)),
    "has a length of a thousand digits": Hostile(
        native(data=answer(headers=b"content-length: " + b"9" * 1000 + b"\r\n")), (502,), "content-length"
    ),
    "has a body shorter than its length": Hostile(
        native(data=answer(headers=b"content-length: 7\r\n")), (502,), "content-length"
    ),
    "has a body beyond its memory": Hostile(native(data=answer(body=(16, 1 << 30))), says="out of bounds"),
    "has fields that are no text": Hostile(native(data=answer(headers=b"x: \xff\xfe\r\n")), says="utf-8"),
    "sets no answer": told(b"", says="gave no answer"),
    "drops what it should answer by": told(b"o", says="gave no answer"),
    "sets its answer twice": told(b"r/r", says=" "),
    "sets an error that there is none of": told(b"e99", says=" "),
    "traps within its answer": told(b"r/b100000/f/!", 200, 500, 0, says="unreachable"),
    "drops its body unfinished": told(b"r/whello/x", 200, 502, 0, says="before its end"),
    "writes more than it announced": told(b"hcontent-length:3/r/whello/.", 502, 500, 200, 0, says="content-length"),
    "has trailers that frame": told(b"r/whello/tcontent-length:5", 200, 502),
    "answers without an end": told(
        b"r/b400000000/.", 200, 0, says="limits.", limits=TOTAL | {"response_bytes": 1 << 20, "call_ms": 2000}
    ),
    "never reads its request": told(b"r/whello/.", 200, body=b"x" * 200_000),
    "answers a client that never reads": told(
        b"r/b60000000/.", 0, reads=False, limits=IDLE | {"response_bytes": 16 << 20}
    ),
    "makes sixty thousand fields": probe(b"/fields/60000", 200, 500, 504, 502),
    # the network
    "asks for sites that nobody granted": probe(b"/fetch", 200, says="no outgoing requests are granted"),
    # state
    "traps while it saves its state": Hostile("trap-in-save", (200,), "unreachable", successor="remembers"),
    "spins while it saves its state": Hostile("hostage", (200,), " ", successor="remembers"),
    "saves more than it may": Hostile("hoards-state", (200,), "limits.state", successor="remembers"),
    "traps while it loads a state": Hostile("remembers", (200,), "unreachable", successor="trap-in-load"),
}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A host for this file alone: what others have on theirs is none of it."""
    with support.shared_host(tmp_path_factory.mktemp("hostile")) as host:
        yield host


@pytest.fixture(autouse=True)
def _nobody_bad_is_left(host):
    yield
    host.ask(host_api.Stop, instance="bad")
    host.events.clear()


@pytest.fixture(scope="module")
def beside(host):
    neighbour = Neighbour(host)
    yield neighbour
    neighbour.close()


def ask(host, port, kind):
    """The statuses with which the guest answers, 0 for a connection that ended, and what it said in its bodies."""
    statuses, said = [], ""
    for request in kind.asks:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
            if not kind.reads:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                sock.sendall(request)
                eventually(lambda: "client-slow" in host.health("bad").calls, "the client is given up")
                continue
            try:
                status, _, body = support.http(port, request, sock=sock)
            except OSError:
                status, body = 0, b""
        statuses.append(status)
        said += body[:2000].decode(errors="replace")
    return statuses, said


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", rotated(KINDS))
def test_a_hostile_guest_harms_nobody_and_its_end_is_named(host, beside, kind, capsys):
    hostile = KINDS[kind]
    support.TESTS.append(kind)
    workers, own = set(lanes_of(host)), forks(host) | {host.process.pid}
    before, since, first = private_bytes(own), host.health("neighbour").since, len(beside.took_s)
    port = support.free_port()
    limits = Limits(**({"call_ms": 300, "start_ms": 300} | hostile.limits))
    more = {"trigger": hostile.trigger} if hostile.trigger else {"port": port}
    grants = Grants(interfaces=hostile.grants, outbound=hostile.outbound)
    run = support.a_run("bad", 1, grants=grants, limits=limits, health=hostile.health, **more)
    reply = host.start(hostile.guest, run)
    said = getattr(reply, "message", "")
    assert isinstance(reply, host_api.Failed) == hostile.refused, said
    if not hostile.refused:
        statuses, told = ask(host, port, hostile)
        said += told
        assert set(statuses) <= set(hostile.statuses), (statuses, said)
        if hostile.successor:
            follows = host.start(hostile.successor, support.a_run("bad", 2, port=port, limits=limits))
            said += getattr(follows, "message", "")
        if hostile.says:
            eventually(
                lambda: hostile.says in said + "\n".join(host.lines_of("bad")),
                f"a log with {hostile.says!r}",
            )
        host.ask(host_api.Stop, instance="bad")
    assert hostile.says in said or not hostile.refused, said
    beside.asked()
    beside.asked()
    assert beside.wrong == []
    health = host.health("neighbour")
    assert (health.since, health.restarts, health.errors) == (since, 0, 0)
    assert forks(host) | {host.process.pid} == own
    eventually(lambda: set(lanes_of(host)) <= workers, "its workers end")
    assert private_bytes(own) - before < GROWTH_MAX_BYTES
    took = sorted(beside.took_s[first:])
    with capsys.disabled():
        print(f"\n{kind}: neighbour's p99 {took[len(took) * 99 // 100] * 1000:.1f} ms of {len(took)}")


def test_there_are_at_least_sixty_kinds():
    assert len(KINDS) >= 60
