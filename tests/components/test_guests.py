"""The guests that misbehave do so in exactly the way their first line says: host tests rely on it."""

from pathlib import Path

import pytest
from wasmtime import Config, Engine, Store, WasmtimeError
from wasmtime import component as wc

GUESTS = Path(__file__).resolve().parents[2] / "components/guests"
HANDLER, HEALTH = "wasmfleet:http/handler@0.1.0", "wasmfleet:http/health@0.1.0"


@pytest.fixture(scope="module")
def engine():
    config = Config()
    config.consume_fuel = True  # a bound on the guests that spin; the clock has no say
    return Engine(config)


@pytest.fixture
def instantiate(engine):
    def instantiate(name, *, fuel=10_000_000, memory=-1):
        store = Store(engine)
        store.set_fuel(fuel)
        store.set_limits(memory_size=memory)
        text = (GUESTS / f"{name}.wat").read_text()
        return store, wc.Linker(engine).instantiate(store, wc.Component(engine, text))

    return instantiate


def call(guest, interface, function, *args):
    store, instance = guest
    func = instance.get_func(
        store, instance.get_export_index(store, function, instance.get_export_index(store, interface))
    )
    answer = func(store, *args)
    func.post_return(store)
    return answer


def get():
    request = wc.Record()
    request.method, request.target, request.headers, request.body = "GET", "/", "", b""
    return request


@pytest.mark.parametrize(
    ("name", "status", "body"),
    [("hello", 200, b"hello\n"), ("error-500", 500, b"sorry\n"), ("unhealthy", 200, b"hello\n")],
)
def test_what_answers(instantiate, name, status, body):
    answer = call(instantiate(name), HANDLER, "handle", get())
    assert (answer.status, answer.headers, bytes(answer.body)) == (status, "", body)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("trap", "unreachable"),
        ("spin", "fuel consumed"),
        ("recurse", "call stack exhausted"),
        ("hoard", "unreachable"),
    ],
)
def test_what_traps_on_a_request_but_is_well_when_asked(instantiate, name, why):
    guest = instantiate(name, memory=4 << 20)
    assert call(guest, HEALTH, "check") is None
    with pytest.raises(WasmtimeError, match=why):
        call(guest, HANDLER, "handle", get())


@pytest.mark.parametrize(("name", "why"), [("trap-in-start", "unreachable"), ("spin-in-start", "fuel consumed")])
def test_what_does_not_even_start(instantiate, name, why):
    with pytest.raises(WasmtimeError, match=why):
        instantiate(name)


def test_the_unhealthy_one_says_why(instantiate):
    assert "the sensor does not answer" in str(call(instantiate("unhealthy"), HEALTH, "check"))


def test_the_one_whose_check_traps(instantiate):
    with pytest.raises(WasmtimeError, match="unreachable"):
        call(instantiate("trap-in-check"), HEALTH, "check")


def test_the_answer_that_no_host_may_pass_on(instantiate):
    answer = call(instantiate("bad-answer"), HANDLER, "handle", get())
    assert answer.status == 7
    assert "\r\n\r\n" in answer.headers


def test_the_large_answer(instantiate):
    assert len(call(instantiate("large-answer"), HANDLER, "handle", get()).body) == 2 << 20


def test_an_ungranted_import_cannot_be_instantiated(instantiate):
    with pytest.raises(WasmtimeError, match="wasi:clocks/monotonic-clock"):
        instantiate("wants-clock")


def test_each_guest_says_what_it_is_for_in_its_first_line():
    for path in GUESTS.glob("*.wat"):
        assert path.read_text().startswith(f";; {path.stem}: "), path
