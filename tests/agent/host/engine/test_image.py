"""Images: which imports need a grant, and what is refused before it is compiled."""

import pytest
from wasmtime import wat2wasm

from agent.host.engine import runtime
from fleet.component import reader
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Grants

TYPES = """
(component
  (import "acme:io/error@0.2.0" (instance $error (export "error" (type (sub resource)))))
  (alias export $error "error" (type $e))
  (import "err" (type (eq $e)))
  (type $r (record (field "a" u32)))
  (import "rec" (type (eq $r))))
"""


def test_a_type_that_a_world_uses_needs_no_grant_on_the_device_as_for_its_author():
    image = runtime.Engine().read(TYPES)
    assert image.not_granted(Grants()) == ("acme:io/error@0.2.0",)
    assert image.not_granted(Grants()) == reader.read(bytes(wat2wasm(TYPES))).missing(Grants())


def test_a_pre_release_of_wasi_is_named_by_the_compiler():
    draft = '(component (import "wasi:cli/stdout@0.2.0-rc-2023-12-05" (instance)))'
    with pytest.raises(runtime.EngineError, match=r"pre-release of WASI 0\.2") as caught:
        runtime.Engine().compile(bytes(wat2wasm(draft)))
    assert caught.value.code is RejectCode.NOT_A_COMPONENT
