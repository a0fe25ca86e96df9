"""Misbehaving guests do exactly what their first line says, as host tests rely on it."""

from pathlib import Path

import pytest
from wasmtime import Config, Engine, Store, WasiConfig, WasmtimeError
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
    def instantiate(name, *, fuel=10_000_000, memory=-1, tables=-1):
        store = Store(engine)
        store.set_fuel(fuel)
        store.set_limits(memory_size=memory, table_elements=tables)
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


@pytest.mark.parametrize(
    ("name", "which"), [("wants-clock", "wasi:clocks/monotonic-clock"), ("wants-everything", "wasi:")]
)
def test_an_ungranted_import_cannot_be_instantiated(instantiate, name, which):
    with pytest.raises(WasmtimeError, match=which):
        instantiate(name)


@pytest.mark.parametrize(("name", "why"), [("declares-1gib", "memory minimum size"), ("huge-table", "table minimum")])
def test_what_asks_for_too_much_before_it_runs(instantiate, name, why):
    with pytest.raises(WasmtimeError, match=why):
        instantiate(name, memory=16 << 20, tables=100_000)


@pytest.mark.parametrize(("name", "why"), [("answer-1gib", "out of bounds"), ("not-utf8", "(?i)utf-8")])
def test_an_answer_that_does_not_pass_the_component_model(instantiate, name, why):
    with pytest.raises(WasmtimeError, match=why):
        call(instantiate(name), HANDLER, "handle", get())


def test_the_one_that_traps_at_its_thousandth_request(instantiate):
    guest = instantiate("trap-at-1000")
    for _ in range(999):
        assert call(guest, HANDLER, "handle", get()).status == 200
    with pytest.raises(WasmtimeError, match="unreachable"):
        call(guest, HANDLER, "handle", get())


def test_the_counter_counts(instantiate):
    guest = instantiate("counter")
    bodies = [bytes(call(guest, HANDLER, "handle", get()).body) for _ in range(101)]
    assert (bodies[0], bodies[8], bodies[9], bodies[100]) == (
        b"00000001\n",
        b"00000009\n",
        b"00000010\n",
        b"00000101\n",
    )


def test_the_busy_one_comes_to_an_end(instantiate):
    assert call(instantiate("busy", fuel=500_000_000), HANDLER, "handle", get()).status == 200


def test_the_one_whose_check_spins(instantiate):
    with pytest.raises(WasmtimeError, match="fuel consumed"):
        call(instantiate("spin-in-check"), HEALTH, "check")


def test_the_flood(engine):
    store, linker = Store(engine), wc.Linker(engine)
    store.set_fuel(100_000_000)
    lines = 0

    def count(_store, level, context, message):
        nonlocal lines
        assert (level, context, len(message)) == ("info", "the flood", 64)
        lines += 1

    with linker.root() as root, root.add_instance("wasi:logging/logging@0.1.0-draft") as logging:
        logging.add_func("log", count)
    instance = linker.instantiate(store, wc.Component(engine, (GUESTS / "flood.wat").read_text()))
    assert call((store, instance), HANDLER, "handle", get()).status == 200
    assert lines == 20_000


def test_the_sleeper_is_good_once_it_has_its_clock(engine):
    # Its health check is asked only: the request would take an hour.
    store, linker = Store(engine), wc.Linker(engine)
    store.set_fuel(1_000_000)
    store.set_wasi(WasiConfig())
    linker.add_wasip2()
    instance = linker.instantiate(store, wc.Component(engine, (GUESTS / "sleep.wat").read_text()))
    assert call((store, instance), HEALTH, "check") is None


@pytest.mark.parametrize(("config", "answer"), [({}, (404, b"")), ({"greeting": "servus"}, (200, b"servus"))])
def test_the_one_that_answers_with_its_configuration(engine, config, answer):
    store, linker = Store(engine), wc.Linker(engine)
    store.set_fuel(1_000_000)
    with linker.root() as root, root.add_instance("wasi:config/store@0.2.0-rc.1") as instance:
        instance.add_func("get", lambda _store, key: config.get(key))
    guest = store, linker.instantiate(store, wc.Component(engine, (GUESTS / "config.wat").read_text()))
    for _ in range(3):
        given = call(guest, HANDLER, "handle", get())
        assert (given.status, bytes(given.body)) == answer


def test_the_tasks(instantiate):
    task = "wasmfleet:schedule/task@0.1.0"
    assert call(instantiate("task"), task, "run", 1) is None
    assert "the pump is stuck" in str(call(instantiate("task-fails"), task, "run", 1))
    with pytest.raises(WasmtimeError, match="unreachable"):
        call(instantiate("task-traps"), task, "run", 1)
    with pytest.raises(WasmtimeError, match="fuel consumed"):
        call(instantiate("task-spins"), task, "run", 1)


def test_each_guest_says_what_it_is_for_in_its_first_line():
    for path in GUESTS.glob("*.wat"):
        assert path.read_text().startswith(f";; {path.stem}: "), path
