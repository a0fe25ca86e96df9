"""component.toml: what is read, what is told from the component, and what people hear when it is wrong."""

import contextlib
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleet.component import component_toml, reader, served, toml_fields, wasi
from fleet.component.component_toml import NeedsTomlError, UnservedError
from fleet.component.reader import Component
from fleet.protocol.hardware import Hardware
from fleet.protocol.manifest import (
    BadManifestError,
    ConfigKey,
    DataUse,
    Grants,
    Health,
    Http,
    Limits,
    Manifest,
    MetricGate,
    OnMessage,
    Schedule,
    SecretKey,
    Service,
    trigger_conflict,
)
from fleet.protocol.manifest import convert as manifest_of

DEMO = Path(__file__).resolve().parents[3] / "components/demo"


def made(*, imports=(), exports=("wasmfleet:http/handler@0.1.0",)):
    return Component(size_bytes=1000, imports=tuple(imports), exports=tuple(exports))


V1 = made(exports=("wasmfleet:http/handler@0.1.0", "wasmfleet:http/health@0.1.0"))
TASK = made(exports=("wasmfleet:schedule/task@0.1.0",))


GATE_KEYS = ("max-increase", "min-samples", "per", "wait")

EVERY = "{{ type = 'schedule', every = '{}s' }}"


def refusal(text, **kwargs):
    with pytest.raises(BadManifestError) as caught:
        component_toml.load(text, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Reading


def test_a_whole_text():
    manifest = component_toml.load("""
        name = "greeter"
        version = "1.2.3-rc.1"
        description = "says hello"
        trigger = { type = "schedule", every = "1.5s" }
        security_epoch = 2
        data_schema = 3
        arch = ["aarch64", "riscv64"]

        [grants]
        interfaces = ["wasi:logging", "wasi:cli/stdout"]
        outbound = ["https://api.example.com:443", "http://*.example.com:8080"]
        instances = ["store"]

        [limits]
        memory = "2MiB"
        call = "500ms"
        start = "2s"
        concurrency = 4
        request = "64KB"
        response = "128KiB"
        log_lines_per_minute = 60
        fuel = 1000
        storage = "1MiB"

        [health]
        check = false
        interval = "10s"
        probation = "1m"
        min_calls = 5
        max_faults = 1
        max_error_percent = 2

        [config.greeting]
        description = "what it says"
        default = "hello"
        [config.name]
        [secrets.db-password]
        description = "of the database"
        [secrets.proxy_key]
        required = false
    """)
    assert manifest == Manifest(
        name="greeter",
        version="1.2.3-rc.1",
        description="says hello",
        trigger=Schedule(every_ms=1500),
        security_epoch=2,
        data_schema=3,
        arch=("aarch64", "riscv64"),
        grants=Grants(
            interfaces=("wasi:logging", "wasi:cli/stdout"),
            outbound=("https://api.example.com:443", "http://*.example.com:8080"),
            instances=("store",),
        ),
        limits=Limits(
            memory_bytes=2 << 20,
            call_ms=500,
            start_ms=2000,
            concurrency=4,
            request_bytes=64_000,
            response_bytes=128 << 10,
            log_lines_per_minute=60,
            fuel=1000,
            storage_bytes=1 << 20,
        ),
        health=Health(interval_ms=10_000, probation_ms=60_000, min_calls=5, max_faults=1, max_error_percent=2),
        config={"greeting": ConfigKey(description="what it says", default="hello"), "name": ConfigKey()},
        secrets={"db-password": SecretKey(description="of the database"), "proxy_key": SecretKey(required=False)},
    )


def test_the_least_text_takes_the_rest_from_the_component():
    manifest = component_toml.load("", component=V1, file_name="build/Hello_World.component.wasm")
    assert manifest.name == "hello-world"
    assert manifest.version == component_toml.DEV_VERSION
    assert (manifest.trigger, manifest.world) == (Http(), "wasmfleet:http")
    assert manifest.health.check


def test_an_exported_health_check_may_be_left_unasked():
    assert not component_toml.load("[health]\ncheck = false", component=V1).health.check


@pytest.mark.parametrize("name", ["v1", "v2", "v3", "ticker"])
def test_the_demo_s_own_texts(name):
    seen = reader.read((DEMO / f"{name}.wasm").read_bytes())
    manifest = component_toml.describe(seen, (DEMO / f"{name}.toml").read_text(), file_name=f"{name}.wasm")
    assert manifest.version == ("1.0.0" if name == "ticker" else f"{name[1]}.0.0")
    assert manifest.health.check is (name != "ticker")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name = ", "component.toml is not TOML: Invalid value (at end of document)"),
        ("a = 1\nb = = 2", "line 2, column 5"),
        ('name = "x"\nname = "y"', "not TOML"),
        ("[limits]\nmemmory = '1MiB'", "limits.memmory: unknown field; did you mean memory?"),
        ("colour = 'red'", "component.toml: colour: unknown field; known are "),
        ("[health]\nsomething = 1", "health.something: unknown field"),
        ("[grants]\nnetwork = true", "grants.network: unknown field"),
        ("[config.x]\nsecret = true", "config.x.secret: unknown field"),
        ("trigger = { type = 'http', every = '1s' }", "trigger.every: unknown field"),
        ("limits = 3", "limits: expected a table, not a number"),
        ("[limits]\nmemory = 16", 'limits.memory: expected a size with its unit, such as "16MiB", not a number'),
        ("[limits]\nmemory = '16 parsec'", "limits.memory: '16 parsec' is not valid: write \"16MiB\""),
        ("[limits]\nmemory = '1B'", "limits.memory: 1 is not between 65536 and"),
        ("[limits]\ncall = '0ms'", "limits.call: 0 is not between 1 and"),
        ("[limits]\ncall = '1.5ms'", "limits.call: '1.5ms' is not a whole number of ms"),
        ("[limits]\nconcurrency = '2'", "limits.concurrency: expected a whole number, not a text"),
        ("[limits]\nconcurrency = true", "limits.concurrency: expected a whole number, not a switch"),
        ("[limits]\nconcurrency = 65", "limits.concurrency: 65 is not between 1 and 64"),
        ("[health]\ncheck = 'yes'", "health.check: expected true or false, not a text"),
        ("[health]\nmax_error_percent = 101", "health.max_error_percent: 101 is not between 0 and 100"),
        ("security_epoch = -1", "security_epoch: -1 is not between 0 and"),
        ("version = '1'", "version: version '1' is not SemVer"),
        ("version = 1979-05-27", "version: expected a text, not a date or time"),
        ("name = 'Hello'", "name: component 'Hello' is not a name"),
        ("arch = ['m68k']", "arch: 'm68k': the known ones are x86_64, aarch64, riscv64"),
        ("[grants]\ninterfaces = 'wasi:cli'", "grants.interfaces: expected a list of texts, not a text"),
        ("[grants]\ninterfaces = [1]", "grants.interfaces: expected a list of texts, not a number"),
        ("[grants]\ninterfaces = ['wasi:cli/stdout@0.2.0']", "without the version: 'wasi:cli/stdout'"),
        ("[grants]\ninterfaces = ['*']", "grants.interfaces: '*': expected an interface or a package"),
        ("[grants]\noutbound = ['example.com']", "grants.outbound: 'example.com': expected scheme, host and port"),
        ("[grants]\noutbound = ['https://example.com:70000']", "grants.outbound"),
        ("[grants]\ninstances = ['A b']", "grants.instances"),
        ("trigger = 'often'", "trigger.type 'often': one of http, schedule, message, service"),
        ("trigger = ['http']", "trigger.type: expected a text, not a list"),
        ("trigger = { type = 'schedule', every = '99ms' }", "trigger.every: 99 is not between 100 and"),
        ("trigger = { type = 'schedule' }", "trigger: a schedule has either every"),
        ("trigger = { type = 'schedule', every = '1s', cron = '* * * * *' }", "trigger: a schedule has either every"),
        ("trigger = { type = 'schedule', cron = '* * *' }", "trigger.cron: '* * *' has 3 fields"),
        ("trigger = { type = 'schedule', cron = 5 }", "trigger.cron: expected a text"),
        ("trigger = { type = 'message' }", "trigger.topics is missing"),
        ("trigger = { type = 'message', topics = ['a/#/b'] }", "'a/#/b': # is the last level of a filter"),
        ("trigger = { type = 'message', topics = ['a+'] }", "'a+': + and # are whole levels of a filter"),
        ("trigger = { type = 'message', topics = ['a'], full = 'x' }", "trigger.full 'x': one of refuse, drop-oldest"),
        (
            f"trigger = {{ type = 'message', topics = {[str(number) for number in range(17)]} }}",
            "trigger.topics: 17 filters, at most 16 are allowed",
        ),
        (
            "triggers = ['http', { type = 'message', topics = ['a'] }]",
            "'message' does not fit: component.wasm exports no wasi:messaging/incoming-handler",
        ),
        ("[grants]\nsubscribe = ['$SYS/#']", "'$SYS/#' is no topic"),
        ("[grants]\npublish_local = ['a//b']", "'a//b' is no topic"),
        ("trigger = 'schedule'", "trigger: a schedule has either every"),
        ("trigger = 'service'", "trigger does not fit: component.wasm exports no wasi:cli/run"),
        ("trigger = 'http'\ntriggers = ['http']", "trigger and triggers: write one of them"),
        ("triggers = 'http'", "triggers: expected a list of triggers, not a text"),
        ("triggers = []", "triggers is empty"),
        ("swap = 'handover'", "swap: 'handover' is none of overlap, replace"),
        ("swap = true", "swap: expected a text"),
        ("trigger = { type = 'service', args = 'x' }", "trigger.args: expected a list of texts, not a text"),
        ("trigger = { type = 'service', args = [1] }", "trigger.args: expected a list of texts"),
        (
            "trigger = { type = 'service', args = ['a\\u0000'] }".replace("'a", '"a').replace("0']", '0"]'),
            "holds no NUL",
        ),
        ("trigger = { type = 'service', stop = '11m' }", "trigger.stop: 660000 is not between 1 and 600000"),
        ("trigger = { type = 'http', args = ['x'] }", "trigger.args: unknown field"),
        ("triggers = ['http', 'often']", "triggers[1].type 'often': one of http"),
        ("triggers = ['http', { type = 'schedule' }]", "triggers[1]: a schedule has either every"),
        ("triggers = ['http', { type = 'schedule', cron = '* *' }]", "triggers[1].cron: '* *' has 2 fields"),
        ("triggers = ['http', 'http']", "triggers: one of the triggers is there twice"),
        ("triggers = ['http', 'service']", "a service runs without end"),
        (f"triggers = [{', '.join(EVERY.format(n) for n in range(1, 10))}]", "9 triggers, at most 8 are allowed"),
        (
            f"triggers = ['http', {EVERY.format(1)}]",
            "'schedule' does not fit: component.wasm exports neither wasmfleet:schedule/task nor wasi:cli/run",
        ),
        (
            f"triggers = [{EVERY.format(1)}, 'http']",
            "'schedule' does not fit: component.wasm exports neither wasmfleet:schedule/task nor wasi:cli/run",
        ),
        ("world = 'wasi:http'", "world is 'wasi:http', but component.wasm exports wasmfleet:http/handler"),
        ("[config.'a b']", "config: 'a b' is not a key"),
        ("[config.x]\ntype = 'float'", "config.x.type: 'float' is none of text, integer, number, boolean"),
        ("[config.x]\nmin = 'a'", "config.x.min: expected a whole number, not a text"),
        ("[config.x]\nmax = 0.5", "config.x.max: expected a whole number, not a number"),
        ("[config.x]\nmax = 90071992547409921", "config.x.max: beyond 2^53"),
        ("[config.x]\ntype = 'integer'\nmin = 3\nmax = 2", "config.x: min is 3, above max, 2"),
        ("[config.x]\ntype = 'boolean'\nmin = 3", "config.x: min and max are for numbers and texts"),
        ("[config.x]\ntype = 'integer'\ndefault = 'a'", "config.x: default: 'a' is not a whole number"),
        ("[config.x]\nenum = ['a', 'b']\ndefault = 'c'", "config.x: default: 'c' is none of a, b"),
        ("[config.x]\ntype = 'number'\nenum = ['1e3']", "config.x: enum: '1e3' is not a number"),
        ("[config.x]\npattern = '^a'", "config.x: pattern: column 1: ^ has no place"),
        ("[config.x]\nrestart = 'no'", "config.x.restart: expected true or false, not a text"),
        ("[secrets.'a b']", "secrets: secret 'a b' is not a name"),
        ("[secrets.key]\nvalue = 'hunter2'", "secrets.key.value: unknown field"),
        ("[secrets.key]\nrequired = 'yes'", "secrets.key.required: expected true or false, not a text"),
        ("[config.key]\n[secrets.key]", "secrets.key: a configuration key has the same name"),
        ("\n".join(f"[secrets.s{n}]" for n in range(17)), "secrets: 17 secrets, at most 16 are allowed"),
        ("[secrets.key]", "imports none of wasi:cli/environment, wasi:config/store"),
        (f"[config.x]\ndefault = '{'y' * 9000}'", "config.x.default: at most 8192 bytes"),
        (f"description = '{'y' * 5000}'", "at most 4096 are signed"),
        ("#" * 70_000, "at most 65536 are read"),
        ("x = " + "[" * 10_000, "is not TOML"),
        ("x = " + "9" * 5_000, "is not TOML"),
    ],
)
def test_what_is_wrong_is_named(text, says):
    assert says in refusal(text, component=V1)


METER = made(imports=("wasmfleet:metrics/metrics@0.1.0",))


def gated(text):
    return f'name = "meter"\n[grants]\ninterfaces = ["wasmfleet:metrics"]\n[health.metrics]\n{text}'


def test_a_gate_on_a_figure_of_the_component():
    text = gated("read_errors_total = { max-increase = '20%', per = 'reads_total', wait = '1h' }\n")
    manifest = component_toml.load(text, component=METER)
    gate = MetricGate(max_increase_percent=20, min_samples=50, per="reads", wait_ms=3_600_000)
    assert manifest.health.metrics == {"read_errors": gate}
    assert component_toml.load(component_toml.render(manifest), component=METER) == manifest
    assert manifest_of(manifest.plain()) == manifest
    assert "metrics" not in component_toml.load(gated(""), component=METER).plain()["health"]
    device = (*wasi.SERVED, *wasi.CALLED)
    assert served.uncalled(METER, manifest, device) == ""
    assert "gates" in served.uncalled(METER, manifest, [each for each in device if each != wasi.GATES])


@pytest.mark.parametrize(
    ("gate", "says"),
    [
        ("n = {}", "health.metrics.n.max-increase: missing: write a percentage"),
        ("n = { max-increase = '20' }", "'20' is none: write a percentage, such as \"20%\""),
        ("n = { max-increase = 20 }", "health.metrics.n.max-increase: expected a text, not a number"),
        ("n = { max-increase = '-5%' }", "'-5%' is none"),
        ("n = { max-increase = '100001%' }", "n: max-increase is above 100000%"),
        ("n = { max-increase = '5%', min-samples = 0 }", "min-samples: 0 is not between 1 and"),
        ("n = { max-increase = '5%', wait = '2d' }", "n: wait is at most a day"),
        ("n = { max-increase = '5%', per = 'n' }", "n: per names the figure itself"),
        ("n = { max-increase = '5%', max_decrease = '5%' }", "unknown field; did you mean max-increase?"),
        ("'x y' = { max-increase = '5%' }", "'x y' is no name of a metric"),
        ("x_bucket = { max-increase = '5%' }", "ends with _bucket"),
        ("n = { max-increase = '5%' }\nn_total = { max-increase = '6%' }", "n has a gate already"),
        ("\n".join(f"n{each} = {{ max-increase = '5%' }}" for each in range(9)), "9 gates, at most 8 are judged"),
        ("n = 5", "health.metrics.n: expected a table, not a number"),
    ],
)
def test_a_gate_that_is_none_is_refused(gate, says):
    assert says in refusal(gated(gate), component=METER)


def test_a_gate_of_a_component_without_figures_is_refused():
    text = "name = 'x'\n[health.metrics]\nn = { max-increase = '5%' }"
    assert "does not import wasmfleet:metrics/metrics" in refusal(text, component=made())


def test_a_signed_manifest_with_a_gate_that_is_none_is_refused():
    plain = component_toml.load(gated("n = { max-increase = '5%' }"), component=METER).plain()
    plain["health"]["metrics"]["x y"] = plain["health"]["metrics"].pop("n")
    with pytest.raises(BadManifestError, match=r"health.metrics: x y: 'x y' is no name"):
        manifest_of(plain)


def test_a_secret_is_for_a_component_that_can_read_it():
    reader = made(imports=["wasi:config/store@0.2.0-rc.1"], exports=["wasmfleet:http/handler@0.1.0"])
    manifest = component_toml.load("[secrets.key]", component=reader, file_name="reader.wasm")
    assert manifest.secrets == {"key": SecretKey(required=True)}


def test_a_manifest_without_secrets_is_signed_as_before_there_were_any():
    plain = Manifest(name="x", version="1.0.0", trigger=Http())
    assert "secrets" not in plain.plain()
    assert manifest_of(plain.plain()) == plain
    with_one = msgspec.structs.replace(plain, secrets={"key": SecretKey()})
    assert manifest_of(with_one.plain()) == with_one
    assert with_one.digest() != plain.digest()


def test_a_check_that_is_not_exported():
    assert "exports no wasmfleet:http/health" in refusal("[health]\ncheck = true", component=made())


MAIN = made(exports=("wasi:cli/run@0.2.6",))


def test_a_main_runs_by_a_schedule_or_as_a_service():
    text = "trigger = { type = 'schedule', every = '10s', args = ['--once', '--once'] }"
    manifest = component_toml.load(text, component=MAIN)
    assert (manifest.trigger, manifest.world) == (Schedule(every_ms=10_000, args=("--once", "--once")), "wasi:cli")
    manifest = component_toml.load("trigger = { type = 'service', stop = '30s', args = [] }", component=MAIN)
    assert (manifest.trigger, manifest.world) == (Service(stop_ms=30_000), "wasi:cli")
    assert component_toml.describe(MAIN, None).trigger == Service()
    assert "more_triggers" not in manifest.plain()


def test_a_task_takes_no_arguments():
    assert "takes none: wasi:cli/run does" in refusal(
        "trigger = { type = 'schedule', every = '1s', args = ['x'] }", component=TASK
    )


def test_a_service_answers_no_health_check():
    both = made(exports=("wasi:cli/run@0.2.6", "wasmfleet:http/health@0.1.0"))
    assert not component_toml.load("trigger = 'service'", component=both).health.check
    assert not component_toml.describe(both, None).health.check
    assert "a service is in its run" in refusal("trigger = 'service'\n[health]\ncheck = true", component=both)


def test_without_the_component_name_and_trigger_must_be_written():
    assert "name is missing" in refusal('trigger = "http"')
    assert "trigger is missing" in refusal('name = "x"')


# Inferring


@pytest.mark.parametrize(
    ("export", "trigger", "world"),
    [
        ("wasmfleet:http/handler@0.1.0", Http(), "wasmfleet:http"),
        ("wasi:http/incoming-handler@0.2.3", Http(), "wasi:http"),
        ("wasi:cli/run@0.2.0", Service(), "wasi:cli"),
    ],
)
def test_the_trigger_follows_from_the_exports(export, trigger, world):
    manifest = component_toml.infer("thing.wasm", made(exports=[export]), version="0.0.0-dev.7")
    expected = Manifest(name="thing", version="0.0.0-dev.7", trigger=trigger, world=world)
    assert manifest == expected


def test_a_schedule_cannot_be_guessed_but_the_file_to_save_is_shown():
    with pytest.raises(NeedsTomlError, match="must say when it runs") as caught:
        component_toml.infer("ticker.wasm", TASK)
    read_back = component_toml.load(caught.value.suggestion, component=TASK)
    assert (read_back.name, read_back.trigger) == ("ticker", Schedule(every_ms=60_000))


def test_a_component_that_no_device_can_call():
    with pytest.raises(BadManifestError, match=r"exports nothing; a device can call one of wasmfleet:http/handler"):
        component_toml.infer("x.wasm", made(exports=[]))
    with pytest.raises(BadManifestError, match=r"exports only my:own/thing@1\.0\.0; a device can call"):
        component_toml.infer("x.wasm", made(exports=["my:own/thing@1.0.0"]))


@pytest.mark.parametrize("file_name", ["...wasm", ".wasm", "x" * 64 + ".wasm", "日本.wasm"])
def test_a_file_name_that_gives_no_name(file_name):
    with pytest.raises(BadManifestError, match="gives no valid name for the component"):
        component_toml.infer(file_name, V1)


# Grants


@pytest.mark.parametrize(
    ("granted", "said"),
    [
        ("wasi:clock", "did you mean wasi:clocks?"),
        ("wasi:cli/stdot", "did you mean wasi:cli/stdout?"),
        ("wasi:loging", "did you mean wasi:logging?"),
        ("acme:rockets", "no such interface; devices serve wasi:cli, "),
    ],
)
def test_a_grant_that_names_nothing_is_refused_with_what_is_meant(granted, said):
    text = f'[grants]\ninterfaces = ["wasi:logging", "{granted}"]'
    with pytest.raises(
        BadManifestError, match=re.escape(f"grants.interfaces: {granted!r}: no such interface")
    ) as caught:
        component_toml.load(text, component=made(imports=LIBRARIES), file_name="x.wasm")
    assert said in str(caught.value)


def test_a_grant_of_an_import_that_no_device_serves_names_something():
    component = made(imports=["acme:rockets/engine@1.0.0"])
    for granted in ("acme:rockets", "acme:rockets/engine", "wasi:io", "wasi:logging/logging"):
        text = f'[grants]\ninterfaces = ["{granted}"]'
        assert component_toml.load(text, component=component, file_name="x.wasm").grants.interfaces == (granted,)


def test_missing_grants_come_with_the_exact_file_to_save():
    wanting = made(
        imports=["wasi:config/store@0.2.0-rc.1", "wasi:config/runtime@0.2.0-draft", "wasi:logging/logging@0.1.0-draft"]
    )
    with pytest.raises(NeedsTomlError, match=r"imports wasi:config/store@0\.2\.0-rc\.1, ") as caught:
        component_toml.describe(wanting, '[grants]\ninterfaces = ["wasi:logging"]', file_name="x.wasm")
    granted = component_toml.describe(wanting, caught.value.suggestion, file_name="y.wasm")
    assert granted.name == "x"
    assert granted.grants.interfaces == ("wasi:logging", "wasi:config/store", "wasi:config/runtime")
    assert component_toml.check_grants(wanting, granted) == []


LIBRARIES = [f"{name}@0.2.3" for name in sorted(wasi.UNGRANTED)]


def test_a_suggestion_never_names_what_standard_libraries_import():
    wanting = made(imports=[*LIBRARIES, "wasi:logging/logging@0.1.0-draft"])
    assert component_toml.describe(made(imports=LIBRARIES), None, file_name="x.wasm").grants == Grants()
    with pytest.raises(NeedsTomlError) as caught:
        component_toml.describe(wanting, None, file_name="x.wasm")
    granted = component_toml.load(caught.value.suggestion, component=wanting)
    assert granted.grants == Grants(interfaces=("wasi:logging/logging",))


@pytest.mark.parametrize(
    ("text", "interface"),
    [
        ('[config.greeting]\ndefault = "hello"', "wasi:cli/environment"),
        ("[secrets.token]", "wasi:cli/environment"),
        ("data_schema = 1", "wasi:filesystem/preopens"),
        ('[grants]\noutbound = ["https://a.example"]', "wasi:http/outgoing-handler"),
        ('[grants]\ninstances = ["meter"]', "wasi:http/outgoing-handler"),
    ],
)
def test_what_a_manifest_says_to_be_used_is_named_until_it_is_granted(text, interface):
    wanting = made(imports=LIBRARIES)
    with pytest.raises(NeedsTomlError, match=f"imports {interface}@0") as caught:
        component_toml.describe(wanting, text, file_name="x.wasm")
    assert interface in component_toml.describe(wanting, caught.value.suggestion, file_name="x.wasm").grants.interfaces


def test_a_component_that_wants_nothing_needs_no_file():
    assert component_toml.describe(V1, None, file_name="hello.wasm").grants == Grants()


# There and back

texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=40)
labels = st.from_regex(r"\A[a-z0-9-]{1,20}\Z")
interfaces = st.from_regex(r"\A[a-z][a-z0-9-]{0,8}:[a-z][a-z0-9-]{0,8}(/[a-z][a-z0-9-]{0,8})?\Z")
arguments = st.lists(texts.filter(lambda text: "\0" not in text), max_size=3).map(tuple)
a_trigger = st.one_of(
    st.just(Http()),
    st.builds(Service, args=arguments, stop_ms=st.integers(1, 600_000)),
    st.builds(Schedule, every_ms=st.integers(100, 10**9), args=arguments),
    st.builds(Schedule, cron=st.sampled_from(["*/5 * * * *", "0 3 * * 1-5"]), args=arguments),
    st.builds(
        OnMessage,
        topics=st.lists(st.sampled_from(["a", "plant/#", "é/+/\\x", "+"]), min_size=1, max_size=3, unique=True).map(
            tuple
        ),
        full=st.sampled_from(["refuse", "drop-oldest"]),
    ),
)
small = st.integers(1, 10**9)
manifests = st.builds(
    Manifest,
    name=labels,
    version=st.sampled_from(["1.2.3", "0.0.0-dev.0", "2.0.0-rc.1+build.5"]),
    trigger=a_trigger,
    world=st.sampled_from(["", "wasi:http"]),
    description=texts,
    grants=st.builds(
        Grants,
        interfaces=st.lists(interfaces, max_size=3, unique=True).map(tuple),
        outbound=st.lists(st.just("https://a.example:443"), max_size=1).map(tuple),
        instances=st.lists(labels, max_size=2, unique=True).map(tuple),
    ),
    limits=st.builds(
        Limits, memory_bytes=st.integers(1 << 16, 1 << 32), call_ms=small, concurrency=st.integers(1, 64), fuel=small
    ),
    health=st.builds(
        Health,
        check=st.booleans(),
        probation_ms=small,
        max_error_percent=st.integers(0, 100),
        metrics=st.dictionaries(
            st.sampled_from(["read_errors", "tank_litres"]),
            st.builds(
                MetricGate,
                max_increase_percent=st.integers(0, 100_000),
                min_samples=small,
                per=st.sampled_from(["", "reads"]),
                wait_ms=st.integers(1, 86_400_000),
            ),
        ),
    ),
    config=st.dictionaries(
        st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,9}\Z"),
        st.builds(ConfigKey, description=texts, default=st.none() | texts)
        | st.builds(ConfigKey, type=st.just("integer"), min=st.integers(-9, 0), max=st.integers(0, 9))
        | st.builds(ConfigKey, restart=st.booleans())
        | st.builds(ConfigKey, type=st.just("boolean"), default=st.sampled_from(["true", "false"]))
        | st.builds(ConfigKey, pattern=st.sampled_from(["[a-z]+", '"\\\\x41|b"']))
        | st.builds(ConfigKey, type=st.just("text"), enum=st.lists(texts, max_size=3, unique=True).map(tuple)),
        max_size=3,
    ),
    secrets=st.dictionaries(
        st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,9}\Z"),
        st.builds(SecretKey, description=texts, required=st.booleans()),
        max_size=3,
    ),
    security_epoch=st.integers(0, 9),
    arch=st.sampled_from([(), ("aarch64",)]),
    swap=st.sampled_from(["overlap", "replace"]),
)


several = st.lists(a_trigger, min_size=2, max_size=8).filter(lambda each: not trigger_conflict(each))


@given(several)
def test_several_triggers_read_back_to_the_same_ones(triggers):
    manifest = Manifest(name="x", version="1.0.0", trigger=triggers[0], more_triggers=tuple(triggers[1:]))
    assert component_toml.load(component_toml.render(manifest)) == manifest
    assert manifest_of(manifest.plain()) == manifest


def test_several_triggers_of_a_component_that_exports_what_they_call():
    both = made(exports=("wasmfleet:schedule/task@0.1.0", "wasi:http/incoming-handler@0.2.0"))
    manifest = component_toml.load(f"triggers = [{EVERY.format(10)}, 'http']", component=both)
    assert manifest.triggers == (Schedule(every_ms=10_000), Http())
    assert manifest.world == "wasmfleet:schedule", "that of the first"


@settings(suppress_health_check=[HealthCheck.too_slow])  # of the machine, when it has much else to do
@given(manifests.filter(lambda each: not each.config.keys() & each.secrets.keys()))
def test_what_is_suggested_reads_back_to_the_same_manifest(manifest):
    assert component_toml.load(component_toml.suggest_toml(made(), manifest)) == manifest


def test_only_what_differs_from_the_defaults_is_suggested():
    manifest = Manifest(name="hello", version=component_toml.DEV_VERSION, trigger=Http(), limits=Limits(call_ms=250))
    assert component_toml.suggest_toml(made(imports=["wasi:logging/logging@0.1.0-draft"]), manifest) == (
        'name = "hello"\ntrigger = "http"\n\n[grants]\ninterfaces = ["wasi:logging/logging"]\n\n'
        '[limits]\ncall = "250ms"\n\n[health]\ncheck = false\n'
    )


@given(st.text(max_size=300))
def test_whatever_the_text_only_its_own_error_comes_out(text):
    with contextlib.suppress(BadManifestError):
        component_toml.load(text, component=V1)


def test_directories_are_read_and_written_by_place():
    text = 'name = "a"\ntrigger = "http"\n[grants.directories]\n"/maps" = "maps"\n"/b/c" = "books"\n'
    manifest = component_toml.load(text)
    assert manifest.grants.mounts == {"/maps": "maps", "/b/c": "books"}
    assert component_toml.load(component_toml.render(manifest)) == manifest


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            '"maps" = "maps"',
            "grants.directories: 'maps' is no path for a directory: write an absolute one, such as /maps",
        ),
        ('"/data/maps" = "maps"', "/data has the component's own files"),
        ('"/maps" = "/srv/maps"', "directory '/srv/maps' is not a name"),
        ('"/maps" = 3', "grants.directories./maps: expected a text"),
    ],
)
def test_a_directory_that_is_none_is_refused_by_its_field(line, said):
    with pytest.raises(BadManifestError) as caught:
        component_toml.load(f'name = "a"\ntrigger = "http"\n[grants.directories]\n{line}\n')
    assert said in str(caught.value)


def test_buckets_are_read_and_written_by_name():
    lines = 'default = ["durable"]\nplant = ["shared", "durable"]\nx = []\n'
    manifest = component_toml.load(f'name = "a"\ntrigger = "http"\n[grants.buckets]\n{lines}')
    assert manifest.grants.stores == {"default": ("durable",), "plant": ("durable", "shared"), "x": ()}
    assert component_toml.load(component_toml.render(manifest)) == manifest


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('plant = ["public"]', "grants.buckets.plant: 'public': durable or shared"),
        ('plant = "shared"', "grants.buckets.plant: expected a list of texts"),
        ('Plant = ["shared"]', "grants.buckets: bucket 'Plant' is not a name"),
        ('default = ["shared"]', "the bucket 'default' is each instance's own"),
    ],
)
def test_a_bucket_that_is_none_is_refused_by_its_field(line, said):
    with pytest.raises(BadManifestError) as caught:
        component_toml.load(f'name = "a"\ntrigger = "http"\n[grants.buckets]\n{line}\n')
    assert said in str(caught.value)


# Documentation

WRITTEN_AS = {"more_triggers": "triggers"}
WRITTEN_APART = {"hardware": tuple(field.name for field in msgspec.structs.fields(Hardware))}
PIECES = {
    f"{kind}.{field.name}"
    for kind, struct in component_toml._HARDWARE.items()
    for field in msgspec.structs.fields(struct)
}
DOCS = (Path(__file__).resolve().parents[3] / "docs/component-toml.md").read_text()


def documented(path):
    rows = [line for line in DOCS.splitlines() if line.startswith(f"| `{path}` |")]
    assert len(rows) == 1, f"{path} has {len(rows)} rows in docs/component-toml.md"
    return rows[0]


NESTED = {
    *(f"config.KEY.{field.name}" for field in msgspec.structs.fields(ConfigKey)),
    *(f"secrets.NAME.{field.name}" for field in msgspec.structs.fields(SecretKey)),
    *(f"health.metrics.NAME.{name}" for name in GATE_KEYS),
    *(f"data.NAME.{field.name}" for field in msgspec.structs.fields(DataUse)),
}
"""Fields of tables that have a table for each name."""


def test_the_docs_list_every_field_with_its_default():
    for table, struct in (("limits", Limits), ("health", Health)):
        for field in toml_fields.fields(struct):
            default = component_toml.quantity(field, getattr(struct(), field.name)).strip('"')
            assert f"`{default}`" in documented(f"{table}.{field.key}")
    for field in msgspec.structs.fields(Manifest):
        if field.name not in {"limits", "health", "grants", "config", "secrets", "data"}:
            documented(WRITTEN_AS.get(field.name, field.name))
    for path in NESTED:
        documented(path)


def test_the_docs_list_every_grant_and_every_field_of_a_piece_of_hardware():
    for field in msgspec.structs.fields(Grants):
        for name in WRITTEN_APART.get(field.name, (field.name,)):
            documented(f"grants.{name}")
    for name in PIECES:
        documented(name)


def test_the_docs_list_no_field_that_is_not_there():
    known = {f"trigger.{name}" for name in ("every", "cron", "topics", "full", "type", "args", "stop")}
    known |= {WRITTEN_AS.get(field.name, field.name) for field in msgspec.structs.fields(Manifest)}
    for field in msgspec.structs.fields(Grants):
        known |= {f"grants.{name}" for name in WRITTEN_APART.get(field.name, (field.name,))}
    known |= PIECES
    known |= NESTED
    for table, struct in (("limits", Limits), ("health", Health)):
        known |= {f"{table}.{field.key}" for field in toml_fields.fields(struct)}
    paths = [line.split("`")[1] for line in DOCS.splitlines() if line.startswith("| `")]
    assert set(paths) <= known


def test_the_docs_examples_are_read():
    blocks = [part.split("```")[0] for part in DOCS.split("```toml\n")[1:]]
    assert blocks
    for block in blocks:
        component_toml.load(block)


LABELS = st.from_regex(r"[a-z][a-z0-9]{0,4}(-([a-z][a-z0-9]{0,4}|[A-Z][A-Z0-9]{0,4})){0,2}", fullmatch=True)
INTERFACES = st.builds("{}:{}/{}@{}".format, LABELS, LABELS, LABELS, st.sampled_from(["0.1.0", "0.2.0-draft", "1.2.3"]))
SERVED = st.builds("{}@{}".format, st.sampled_from(sorted(served.IMPORTS)), st.sampled_from(["0.2.0", "0.2.12"]))
IMPORTS = st.one_of(LABELS, INTERFACES, SERVED, st.builds("url=<https://{}.com>".format, LABELS))


@given(st.lists(IMPORTS, max_size=4, unique=True))
def test_a_suggestion_is_always_accepted(imports):
    component = made(imports=imports)
    try:
        component_toml.describe(component, None, file_name="x.wasm")
    except NeedsTomlError as error:
        component_toml.describe(component, error.suggestion, file_name="x.wasm")
    except UnservedError:
        assert any(component_toml.bare(name) not in served.IMPORTS for name in imports)


@given(st.lists(INTERFACES, max_size=4, unique=True))
def test_what_is_suggested_for_any_interface_is_read_back(imports):
    component = made(imports=imports)
    text = component_toml.suggest_toml(component, component_toml.infer("x.wasm", component))
    read = component_toml.load(text, component=component, file_name="x.wasm")
    assert component_toml.check_grants(component, read) == []


@pytest.mark.parametrize("name", ["host-log", "my-things", "url=<https://a.com/x.wasm>"])
def test_an_import_outside_of_any_package_is_refused_in_words(name):
    with pytest.raises(BadManifestError, match="belongs to no package") as caught:
        component_toml.describe(made(imports=["wasi:logging/logging@0.1.0-draft", name]), None, file_name="x.wasm")
    assert not isinstance(caught.value, NeedsTomlError)
    assert repr(name) in str(caught.value)
