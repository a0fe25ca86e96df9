"""What standard libraries import needs no grant, holds nothing, and denies each call: counted, and named once.

Real hosts and workers; the components are small ones in WebAssembly text, beside those of
`test_wasi_http_languages.py`, which toolchains make.
"""

import re

import pytest
import support
from native_guests import handler
from support import Grants

from agent.host.ipc import heads, host_api

NETWORK = "network"
CODES = (
    *("unknown", "access-denied", "not-supported", "invalid-argument", "out-of-memory", "timeout"),
    *("concurrency-conflict", "not-in-progress", "would-block", "invalid-state", "new-socket-limit"),
    *("address-not-bindable", "address-in-use", "remote-unreachable", "connection-refused", "connection-reset"),
    *("connection-aborted", "datagram-too-large", "name-unresolvable", "temporary-resolver-failure"),
    "permanent-resolver-failure",
)


def quoted(names):
    return " ".join(f'"{name}"' for name in names)


def creates(kind, version):
    """Import what makes sockets of a kind, and lower it as `$create-KIND`."""
    return f"""
    (import "wasi:sockets/{kind}@{version}" (instance ${kind} (export "{kind}-socket" (type (sub resource)))))
    (alias export ${kind} "{kind}-socket" (type ${kind}-socket))
    (import "wasi:sockets/{kind}-create-socket@{version}" (instance ${kind}-create
      (alias outer 1 ${kind}-socket (type $s)) (export "{kind}-socket" (type $socket (eq $s)))
      (alias outer 1 $code (type $c)) (export "error-code" (type $code (eq $c)))
      (alias outer 1 $family (type $f)) (export "ip-address-family" (type $family (eq $f)))
      (export "create-{kind}-socket"
        (func (param "address-family" $family) (result (result (own $socket) (error $code)))))))
    (core func $create-{kind} (canon lower (func ${kind}-create "create-{kind}-socket")
      (memory (core memory $room "memory"))))"""


def sockets(version):
    """Imports of a standard library's sockets and names."""
    return f"""
    (import "wasi:sockets/network@{version}" (instance $network
      (export "network" (type (sub resource)))
      (type $c (enum {quoted(CODES)})) (export "error-code" (type (eq $c)))
      (type $f (enum "ipv4" "ipv6")) (export "ip-address-family" (type (eq $f)))))
    (alias export $network "network" (type $a-network))
    (alias export $network "error-code" (type $code))
    (alias export $network "ip-address-family" (type $family))
    (import "wasi:sockets/instance-network@{version}" (instance $default
      (alias outer 1 $a-network (type $n)) (export "network" (type $network (eq $n)))
      (export "instance-network" (func (result (own $network))))))
    {creates("tcp", version)}
    {creates("udp", version)}
    (import "wasi:sockets/ip-name-lookup@{version}" (instance $names
      (alias outer 1 $a-network (type $n)) (export "network" (type $network (eq $n)))
      (alias outer 1 $code (type $c)) (export "error-code" (type $code (eq $c)))
      (export "resolve-address-stream" (type $addresses (sub resource)))
      (export "resolve-addresses" (func (param "network" (borrow $network)) (param "name" string)
        (result (result (own $addresses) (error $code)))))))
    (core func $default (canon lower (func $default "instance-network")))
    (core func $resolve (canon lower (func $names "resolve-addresses") (memory (core memory $room "memory"))))"""


FUNCTIONS = ("create-tcp", "create-udp", "default", "resolve")
OUTGOING = "wasi:http/outgoing-handler.handle is denied: requests go out only from components that export"


def guest(imports, functions, types, code):
    """Native guest whose body is the bytes that `code` leaves at 16: it calls `functions`, which it imports."""
    given = " ".join(f'(export "{name}" (func ${name}))' for name in functions)
    taken = " ".join(
        f'(import "host" "{name}" (func ${name} {kind}))' for name, kind in zip(functions, types, strict=True)
    )
    return f"""(component
  (core module $room
    (memory (export "memory") 1)
    (global $top (mut i32) (i32.const 4096))
    (data (i32.const 64) "\\c8\\00\\00\\00" "\\00\\00\\00\\00\\00\\00\\00\\00" "\\10\\00\\00\\00\\08\\00\\00\\00")
    (data (i32.const 200) "name.test")
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (local $at i32)
      (local.set $at (i32.and (i32.add (global.get $top) (i32.const 7)) (i32.const -8)))
      (global.set $top (i32.add (local.get $at) (local.get 3)))
      (local.get $at))
    (func (export "reset") (param i32) (global.set $top (i32.const 4096))))
  (core instance $room (instantiate $room))
  {imports}
  (core module $guest
    (import "room" "memory" (memory 1))
    {taken}
    (func (export "handle") (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)
      (local $n i32)
      {code}
      (i32.const 64)))
  (core instance $guest (instantiate $guest
    (with "room" (instance $room)) (with "host" (instance {given}))))
  {handler("guest", "room")})"""


ASKS_SOCKETS = """
  (call $create-tcp (i32.const 0) (i32.const 16))
  (call $create-udp (i32.const 1) (i32.const 24))
  (i32.store16 (i32.const 18) (i32.load8_u (i32.const 20)))
  (i32.store16 (i32.const 20) (i32.load8_u (i32.const 28)))
  (call $resolve (call $default) (i32.const 200) (i32.const 9) (i32.const 24))
  (i32.store16 (i32.const 22) (i32.load8_u (i32.const 28)))
"""


def asks_sockets(version="0.2.0"):
    types = ("(param i32 i32)", "(param i32 i32)", "(result i32)", "(param i32 i32 i32 i32)")
    return guest(sockets(version), FUNCTIONS, types, ASKS_SOCKETS)


def asks_requests(version="0.2.0"):
    """A native guest that sends a request by the engine's own wasi:http, as far as it may."""
    codes = " ".join(f'(case "{name}")' for name in heads.ERRORS)
    imports = f"""
    (import "wasi:http/types@{version}" (instance $types
      (export "fields" (type $fields (sub resource)))
      (export "outgoing-request" (type $request (sub resource)))
      (export "request-options" (type (sub resource)))
      (export "future-incoming-response" (type (sub resource)))
      (type $c (variant {codes})) (export "error-code" (type (eq $c)))
      (export "[constructor]fields" (func (result (own $fields))))
      (export "[constructor]outgoing-request" (func (param "headers" (own $fields)) (result (own $request))))))
    (alias export $types "outgoing-request" (type $request'))
    (alias export $types "request-options" (type $options'))
    (alias export $types "future-incoming-response" (type $future'))
    (alias export $types "error-code" (type $code'))
    (import "wasi:http/outgoing-handler@{version}" (instance $outgoing
      (alias outer 1 $request' (type $r)) (export "outgoing-request" (type $request (eq $r)))
      (alias outer 1 $options' (type $o)) (export "request-options" (type $options (eq $o)))
      (alias outer 1 $future' (type $f)) (export "future-incoming-response" (type $future (eq $f)))
      (alias outer 1 $code' (type $c)) (export "error-code" (type $code (eq $c)))
      (export "handle" (func (param "request" (own $request)) (param "options" (option (own $options)))
        (result (result (own $future) (error $code)))))))
    (core func $fields (canon lower (func $types "[constructor]fields")))
    (core func $request (canon lower (func $types "[constructor]outgoing-request")))
    (core func $send (canon lower (func $outgoing "handle") (memory (core memory $room "memory"))
      (realloc (core func $room "realloc"))))"""
    code = "(call $send (call $request (call $fields)) (i32.const 0) (i32.const 0) (i32.const 16))"
    types = ("(result i32)", "(param i32) (result i32)", "(param i32 i32 i32 i32)")
    return guest(imports, ("fields", "request", "send"), types, code)


def log_of(host, instance):
    return host.ask(host_api.Logs, instance=instance).lines


@pytest.mark.parametrize("version", ["0.2.0", "0.2.6", "0.2.99"])
@pytest.mark.parametrize("grants", [Grants(), Grants(interfaces=("wasi:sockets", "wasi:io"))])
def test_sockets_and_names_are_denied_counted_and_named_once(host, version, grants):
    """Whatever is granted: no component has sockets."""
    port = support.free_port()
    started = host.start(asks_sockets(version), support.a_run("asks", 1, port=port, grants=grants))
    assert isinstance(started, host_api.Started)
    for _ in range(3):
        status, _, body = support.http(port)
        denied = CODES.index("access-denied")
        assert (status, body[2], body[4], body[6]) == (200, denied, denied, denied)
        assert body[0] == 1  # an error
    assert host.health("asks").denials == 9
    said = [line for line in log_of(host, "asks") if "is denied" in line]
    assert [re.sub(" is denied.*", "", line) for line in said] == [
        "host: wasi:sockets/tcp-create-socket.create-tcp-socket",
        "host: wasi:sockets/udp-create-socket.create-udp-socket",
        "host: wasi:sockets/ip-name-lookup.resolve-addresses",
    ]


@pytest.mark.parametrize("version", ["0.2.0", "0.2.6", "0.2.99"])
@pytest.mark.parametrize("grants", [Grants(), Grants(interfaces=("wasi:http",), outbound=("http://localhost",))])
def test_requests_of_components_without_an_adapter_are_denied(host, version, grants):
    port = support.free_port()
    started = host.start(asks_requests(version), support.a_run("asks", 1, port=port, grants=grants))
    assert isinstance(started, host_api.Started)
    for _ in range(3):
        status, _, body = support.http(port)
        assert (status, body[0]) == (200, 1)
        assert heads.REQUEST_DENIED in body
    assert host.health("asks").denials == 3
    assert len([line for line in log_of(host, "asks") if line.startswith(f"host: {OUTGOING}")]) == 1


def test_a_function_of_another_type_is_refused_and_not_served(host):
    """A guest's types decide what a function of the host's own makes of its values."""
    odd = asks_sockets().replace('"access-denied"', '"forbidden"')
    refused = host.start(odd, support.a_run("odd", 1))
    assert (type(refused), refused.code) == (host_api.Failed, "start-failed")
    assert "with another type" in refused.message


@pytest.mark.parametrize("name", ["wants-clock", "wants-everything"])
def test_clocks_random_files_and_sockets_are_imported_without_a_grant(host, name):
    port = support.free_port()
    assert isinstance(host.start(name, support.a_run("wants", 1, port=port)), host_api.Started)
    assert support.http(port)[0] == 200
    health = host.health("wants")
    assert (health.denials, health.errors) == (0, 0)
