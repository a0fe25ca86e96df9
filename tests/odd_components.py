"""Components as toolchains make them that no device can run as they are, in WebAssembly text, and one that runs."""

from wasmtime import wat2wasm

_TYPES = """
  (import "wasi:io/error@0.2.0" (instance $error (export "error" (type (sub resource)))))
  (import "wasi:http/types@0.2.12" (instance $types
    (export "incoming-request" (type $request (sub resource)))
    (export "response-outparam" (type $outparam (sub resource)))
    {types}))
  (alias export $types "incoming-request" (type $request))
  (alias export $types "response-outparam" (type $outparam))
"""
_HANDLER = """
  (core module $m
    (memory (export "memory") {pages})
    (func (export "handle") (param i32 i32)))
  (core instance $i (instantiate $m))
  (func $handle (param "request" (own $request)) (param "response-out" (own $outparam))
    (canon lift (core func $i "handle")))
  (component $wrap
    (import "request" (type $request (sub resource)))
    (import "outparam" (type $outparam (sub resource)))
    (import "handle" (func $handle (param "request" (own $request)) (param "response-out" (own $outparam))))
    (export $request' "incoming-request" (type $request))
    (export $outparam' "response-outparam" (type $outparam))
    (export "handle" (func $handle) (func (param "request" (own $request')) (param "response-out" (own $outparam')))))
  (instance $handler (instantiate $wrap
    (with "request" (type $request)) (with "outparam" (type $outparam)) (with "handle" (func $handle))))
  (export "wasi:http/incoming-handler@0.2.12" (instance $handler))
"""
HANDLER_IMPORT = """
  (import "wasi:http/incoming-handler@0.2.12" (instance
    (alias outer 1 $request (type $request')) (alias outer 1 $outparam (type $outparam'))
    (export "incoming-request" (type $request'' (eq $request')))
    (export "response-outparam" (type $outparam'' (eq $outparam')))
    (export "handle" (func (param "request" (own $request'')) (param "response-out" (own $outparam''))))))
"""
INFORMATIONAL = """
    (export "[method]response-outparam.send-informational"
      (func (param "self" (borrow $outparam)) (param "status" u16) (result (result))))
"""


def instance(name: str, function: str = "", kind: str = "") -> str:
    """Text of an import that brings one function."""
    return f'(import "{name}" (instance (export "{function or "f"}" (func {kind}))))'


def server(*imports: str, types: str = "", pages: int = 1) -> bytes:
    """Component that exports the handler of wasi:http 0.2.12 and imports this besides."""
    parts = (_TYPES.format(types=types), *imports, _HANDLER.format(pages=pages))
    return bytes(wat2wasm(f"(component {' '.join(parts)})"))


def middleware_composed() -> bytes:
    """Middleware with the handler behind it composed, as `wac plug` makes it: two components that are nested."""
    nested = {
        "behind": _TYPES.format(types="") + _HANDLER.format(pages=1),
        "before": _TYPES.format(types="") + HANDLER_IMPORT + _HANDLER.format(pages=1),
    }
    wasi = '(with "wasi:io/error@0.2.0" (instance $error)) (with "wasi:http/types@0.2.12" (instance $types))'
    text = f"""(component {_TYPES.format(types="")}
      (component $behind {nested["behind"]})
      (component $before {nested["before"]})
      (instance $b (instantiate $behind {wasi}))
      (alias export $b "wasi:http/incoming-handler@0.2.12" (instance $bh))
      (instance $a (instantiate $before {wasi} (with "wasi:http/incoming-handler@0.2.12" (instance $bh))))
      (alias export $a "wasi:http/incoming-handler@0.2.12" (instance $ah))
      (export "wasi:http/incoming-handler@0.2.12" (instance $ah)))"""
    return bytes(wat2wasm(text))


def composed_with_late_import(*, foreign: bool = False) -> bytes:
    """Server composed with a library, which imports something after it has made the library's instance.

    `foreign`: that import has a type of the library's, which no device can know.
    """
    wasi = '(with "wasi:io/error@0.2.0" (instance $error)) (with "wasi:http/types@0.2.12" (instance $types))'
    random = instance("wasi:random/random@0.2.0", "get-random-u64", "(result u64)")
    library = """
      (type $t' (record (field "a" u32)))
      (core module $m (func (export "f"))) (core instance $i (instantiate $m))
      (func $f (canon lift (core func $i "f")))
      (export $t "t" (type $t')) (export "ask" (func $f))"""
    late = """(import "wasi:random/insecure@0.2.0" (instance
        (alias outer 1 $t (type $t')) (export "t" (type (eq $t')))))"""
    text = f"""(component {_TYPES.format(types="")}
      (component $library {library})
      (instance $l (instantiate $library))
      (alias export $l "t" (type $t))
      {late if foreign else ""}
      (import "wasi:random/random@0.2.0" (instance $random (export "get-random-u64" (func (result u64)))))
      (component $server {_TYPES.format(types="")} {OWN} {random} {_HANDLER.format(pages=1)})
      (instance $s (instantiate $server {wasi}
        (with "acme:db/api@1.0.0" (instance $l)) (with "wasi:random/random@0.2.0" (instance $random))))
      (alias export $s "wasi:http/incoming-handler@0.2.12" (instance $h))
      (export "wasi:http/incoming-handler@0.2.12" (instance $h)))"""
    return bytes(wat2wasm(text))


KEYVALUE = instance("wasi:keyvalue/watcher@0.2.0-draft", "watch", '(param "identifier" string)')
MESSAGING = instance("wasi:messaging/request-reply@0.2.0-draft", "request", '(param "topic" string)')
I2C = instance("wasi:i2c/delay@0.2.0-draft", "delay-ns", '(param "ns" u32)')
NN = instance("wasi:nn/graph@0.2.0-rc-2024-10-28", "load", '(param "name" string)')
SPIN = instance("fermyon:spin/key-value@2.0.0", "open", '(param "name" string)')
OWN = instance("acme:db/api@1.0.0", "ask")
TIMEZONE = instance("wasi:clocks/timezone@0.2.8", "utc-offset", "(result s32)")
UNVERSIONED = instance("wasi:cli/environment", "get-environment", "(result (list (tuple string string)))")
NEWER = instance("wasi:cli/environment@0.2.20", "get-hostname", "(result string)")
WRONG_TYPE = instance("wasi:cli/environment@0.2.20", "get-environment", "(result u32)")
SOCKETS = instance("wasi:sockets/instance-network@0.2.0", "none-of-it")
FUNCTION = '(import "ask-me" (func))'

UNSERVED = {
    "keyvalue": (KEYVALUE, "no device serves wasi:keyvalue/watcher@0.2.0-draft: use wasi:keyvalue/store"),
    "messaging": (
        MESSAGING,
        "no device serves wasi:messaging/request-reply@0.2.0-draft: publish with wasi:messaging/producer",
    ),
    "i2c": (I2C, "no device serves wasi:i2c/delay@0.2.0-draft: have a process on the device offer the hardware"),
    "nn": (NN, "no device serves wasi:nn/graph@0.2.0-rc-2024-10-28: build the model into the component"),
    "spin": (SPIN, "fermyon:spin/key-value@2.0.0 is an interface of Spin, which no device serves"),
    "own": (OWN, "no device serves acme:db/api@1.0.0: compose it with the component that exports it: wac plug"),
    "timezone": (TIMEZONE, "no device serves wasi:clocks/timezone@0.2.8: use wasi:clocks/wall-clock"),
    "unversioned": (UNVERSIONED, "wasi:cli/environment is of a version that no device serves"),
    "middleware": (HANDLER_IMPORT, "this is middleware, compose it with the component that answers behind it"),
    "function": (FUNCTION, "'ask-me' belongs to no package, so that no device serves it"),
}
"""Imports that the table of served interfaces knows to be served nowhere, and how the sentence begins."""

UNLINKED = {
    "newer": (NEWER, "it imports get-hostname of wasi:cli/environment@0.2.20, which this host does not serve"),
    "type": (WRONG_TYPE, "it imports get-environment of wasi:cli/environment@0.2.20 with another type"),
}
"""Imports that only an engine knows not to be served."""
