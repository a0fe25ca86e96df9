"""The table of interfaces that devices serve: what it refuses, and that it says what versions.toml says."""

import tomllib
from pathlib import Path

import pytest

from fleet.component import component_toml, reader, served, wasi
from fleet.component.component_toml import UnservedError
from fleet.component.reader import Component
from fleet.protocol.manifest import Grants, Http, Limits, Manifest, OnMessage, Schedule, Service
from tests import odd_components

WIT = Path(__file__).resolve().parents[3] / "components/wit/versions.toml"
HTTP = "wasi:http/incoming-handler@0.2.0"
NATIVE = "wasmfleet:http/handler@0.1.0"


def made(*imports, exports=(HTTP,)):
    return Component(size_bytes=1, imports=imports, exports=exports)


def manifest(**more):
    return Manifest(name="x", version="1.0.0", **({"trigger": Http(), "world": "wasi:http"} | more))


def test_the_table_has_the_packages_that_are_listed_for_people():
    listed = tomllib.loads(WIT.read_text())["imports"]
    packages = {reader.package(name) for name in listed}
    table = {reader.package(name) for name in served.IMPORTS}
    assert table == packages
    for name, allowed in served.IMPORTS.items():
        of = listed.get(name) or listed[reader.package(name)]
        assert allowed == served.ANY or [allowed] == of


def test_what_a_host_reports_are_the_packages_of_the_table():
    table = served.IMPORTS.items()
    assert tuple(sorted({f"{reader.package(name)}@{version}" for name, version in table})) == wasi.SERVED


@pytest.mark.parametrize("kind", odd_components.UNSERVED)
def test_an_import_that_no_device_serves_is_named_with_what_to_do(kind):
    text, sentence = odd_components.UNSERVED[kind]
    component = reader.read(odd_components.server(text), file_name="x.wasm")
    (found,) = served.unserved(component, file_name="x.wasm")
    assert sentence in found.why
    with pytest.raises(UnservedError) as caught:
        component_toml.describe(component, None, file_name="x.wasm")
    assert found.why in str(caught.value)


@pytest.mark.parametrize("kind", odd_components.UNSERVED)
def test_no_grant_helps(kind):
    """A manifest that grants it is refused in the same words, so that nobody signs it."""
    component = reader.read(odd_components.server(odd_components.UNSERVED[kind][0]), file_name="x.wasm")
    names = [reader.bare(name) for name in component.imports if ":" in name]
    text = f'trigger = "http"\n[grants]\ninterfaces = {component_toml.texts(names)}\n'
    with pytest.raises(UnservedError):
        component_toml.describe(component, text, file_name="x.wasm")


@pytest.mark.parametrize(
    ("name", "is_served"),
    [
        ("wasi:cli/environment@0.2.0", True),
        ("wasi:cli/environment@0.2.12", True),
        ("wasi:cli/environment@0.2.3+build", True),
        ("wasi:cli/environment@0.2", True),
        ("wasi:cli/environment@0.2.0-rc-2023-12-05", False),
        ("wasi:cli/environment@0.20.0", False),
        ("wasi:cli/environment@0.3.0", False),
        ("wasi:cli/environment", False),
        ("wasi:cli/run@0.2.0", False),
        ("wasi:cli/command@0.2.0", False),
        ("wasi:config/store@0.2.0-rc.1", True),
        ("wasi:config/runtime@0.2.0-draft", True),
        ("wasi:logging/logging@0.1.0-draft", True),
        ("wasi:logging/other@0.1.0-draft", False),
        ("wasi:http/types@0.2.3", True),
        ("wasmfleet:http/handler@0.1.0", False),
        ("wasmfleet:adapter/host@0.1.0", False),
    ],
)
def test_versions(name, is_served):
    assert served.is_served(name) is is_served
    assert (served.unserved(made(name)) == ()) is is_served


def test_outgoing_requests_are_sent_for_servers_of_wasi_http_alone():
    asks = "wasi:http/outgoing-handler@0.2.0"
    granted = Grants(interfaces=("wasi:http",), outbound=("https://a.example",))
    assert served.unserved(made(asks)) == ()
    assert served.notes(made(asks), granted) == ()
    for exports in ((NATIVE,), (NATIVE, HTTP)):
        assert served.unserved(made(asks, exports=exports)) == ()
        (note,) = served.notes(made(asks, exports=exports), granted)
        assert "only a component that exports wasi:http/incoming-handler sends any" in note


def test_an_import_of_types_alone_needs_nobody_who_serves_it():
    component = Component(size_bytes=1, imports=("acme:types/t@1.0.0",), exports=(HTTP,), plain={"acme:types/t@1.0.0"})
    assert served.unserved(component) == ()


def test_a_device_is_judged_by_what_it_reported():
    wanted = made("wasi:random/random@0.2.0", "wasi:config/store@0.2.0-rc.1")
    assert served.unserved(wanted, device=wasi.SERVED) == ()
    (found,) = served.unserved(wanted, device=("wasi:random@0.2",))
    assert found.name == "wasi:config/store@0.2.0-rc.1"
    newer = made("wasi:keyvalue/store@0.2.0")
    assert served.unserved(newer, device=(*wasi.SERVED, "wasi:keyvalue@0.2")) == ()
    assert served.unserved(made("wasi:clocks/timezone@0.2.8"), device=wasi.SERVED)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"trigger": OnMessage(topics=("a",))}, "grants.subscribe does not cover 'a'"),
        ({"limits": Limits(memory_bytes=5 << 30)}, "limits.memory is 5GiB: a component addresses at most 4GiB"),
    ],
)
def test_a_manifest_that_no_device_could_carry_out(more, sentence):
    (found,) = served.problems(made(), manifest(**more))
    assert found.startswith(sentence)


RUN = "wasi:cli/run@0.2.3"


@pytest.mark.parametrize(
    ("exports", "more", "said"),
    [
        ((RUN,), {"trigger": Service()}, "it does not run wasi:cli/run"),
        ((RUN,), {"trigger": Schedule(every_ms=1000)}, "it does not run wasi:cli/run"),
        (("wasmfleet:schedule/task@0.1.0",), {"trigger": Schedule(every_ms=1000)}, ""),
        ((HTTP,), {"trigger": Http()}, ""),
        ((HTTP,), {"swap": "replace"}, "it does not swap by replacement"),
        ((HTTP,), {"trigger": OnMessage(topics=("a",))}, "it has no bus for messages between components"),
        ((HTTP,), {"grants": Grants(publish_local=("a",))}, "it has no bus for messages between components"),
        ((HTTP,), {"grants": Grants(subscribe=("a",))}, "it has no bus for messages between components"),
        ((HTTP,), {"grants": Grants(publish=("a",))}, ""),
        ((HTTP,), {"more_triggers": (OnMessage(topics=("a",)),)}, "it knows manifests with one trigger only"),
    ],
)
def test_a_device_of_before_is_told_apart_by_what_it_calls(exports, more, said):
    component = made(exports=exports)
    assert served.uncalled(component, manifest(**more), wasi.SERVED) == said
    assert served.uncalled(component, manifest(**more), (*wasi.SERVED, *wasi.CALLED)) == ""


def test_requests_wait_for_each_other_unless_the_manifest_says_otherwise():
    assert "limits.concurrency" in served.serial(manifest())
    assert served.serial(manifest(limits=Limits(concurrency=2))) == ""
    assert served.serial(manifest(trigger=Service())) == ""


def test_sockets_are_said_to_reach_nothing():
    assert "access-denied" in served.notes(made("wasi:sockets/tcp@0.2.0"), Grants())[0]
    assert "access-denied" in served.notes(made("wasi:sockets/tcp@0.2.0"), Grants(interfaces=("wasi:sockets",)))[0]
    assert served.notes(made("wasi:io/poll@0.2.0"), Grants()) == ()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (wasi.ENVIRONMENT, "has no variables"),
        (wasi.PREOPENS, "has no directories"),
        (wasi.OUTGOING_HANDLER, "denies each request"),
    ],
)
def test_what_holds_nothing_without_a_grant_is_said_to(name, words):
    (note,) = served.notes(made(f"{name}@0.2.0"), Grants())
    assert words in note
    assert served.notes(made(f"{name}@0.2.0"), Grants(interfaces=(name,))) == ()


def test_grants_are_still_suggested_for_what_is_served():
    wanting = made("wasi:config/store@0.2.0-rc.1")
    with pytest.raises(component_toml.NeedsTomlError) as caught:
        component_toml.describe(wanting, None, file_name="x.wasm")
    read = component_toml.load(caught.value.suggestion, component=wanting)
    assert read.grants == Grants(interfaces=("wasi:config/store",))


def test_messages_without_topics_are_told():
    asks = "wasi:messaging/producer@0.2.0-draft"
    granted = Grants(interfaces=("wasi:messaging",))
    (note,) = served.notes(made(asks), granted)
    assert "grants.publish" in note
    assert served.notes(made(asks), Grants(interfaces=("wasi:messaging",), publish=("plant/#",))) == ()
    assert served.is_served(asks)
    assert not served.is_served("wasi:messaging/request-reply@0.2.0-draft")


def test_directories_need_a_host_that_has_them_and_an_owner_who_offers_them():
    wanted = manifest(grants=Grants(directories={"/maps": "maps", "/b": "books"}))
    assert served.uncalled(None, wanted, wasi.SERVED) == "it gives components no directories but their own"
    device = (*wasi.SERVED, *wasi.CALLED, wasi.offered_directory("maps"))
    assert served.uncalled(None, wanted, device) == ""
    assert served.not_offered(wanted.grants, device) == (
        "its owner offers no directory books ([policy.directories] in its agent.toml)"
    )
    assert served.not_offered(wanted.grants, (*device, wasi.offered_directory("books"))) == ""
    assert served.not_offered(Grants(), wasi.SERVED) == ""
    (note,) = served.notes(made(), wanted.grants)
    assert note == "grants.directories names directories, and the component does not import wasi:filesystem"
    assert served.notes(made("wasi:filesystem/preopens@0.2.0"), wanted.grants) == ()


def test_buckets_need_a_host_that_has_them():
    wanted = manifest(grants=Grants(interfaces=("wasi:keyvalue",), buckets={"plant": ("shared",)}))
    said = "it has no key-value buckets but default, which is not durable"
    assert served.uncalled(None, wanted, [each for each in wasi.CALLED if each != wasi.BUCKETS]) == said
    assert served.uncalled(None, wanted, wasi.CALLED) == ""
    (note,) = served.notes(made(), wanted.grants)
    assert note == "grants.buckets names buckets, and the component does not import wasi:keyvalue"
