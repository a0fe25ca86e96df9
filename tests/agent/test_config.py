"""Configuration files, merging and validation, and the device owner's policy."""

import re
from pathlib import Path

import msgspec
import pytest

from agent import config
from agent.config import ConfigError, Policy
from fleet.component import served
from fleet.component.reader import package
from fleet.protocol.hardware import GpioLine, Hardware, SerialPort
from fleet.protocol.manifest import Grants, Limits

DOCS = Path(__file__).parents[2] / "docs" / "agent.md"


def write(directory, **files):
    (directory / "config.d").mkdir(exist_ok=True)
    for name, text in files.items():
        path = directory / "agent.toml" if name == "main" else directory / "config.d" / f"{name}.toml"
        path.write_text(text)
    return directory / "agent.toml"


def test_a_device_needs_no_configuration_file(tmp_path):
    settings = config.load(tmp_path / "agent.toml")
    assert not settings.production
    assert settings.policy.logs == "errors"


def test_later_fragments_override_single_keys(tmp_path):
    path = write(
        tmp_path,
        main="health_s = 60\n[policy]\nlogs = 'off'\ncall_ms = 100\n",
        a20="[policy]\nlogs = 'all'\n",
        a10="health_s = 5\n[policy]\nlogs = 'errors'\n",
    )
    settings = config.load(path)
    assert (settings.health_s, settings.policy.logs, settings.policy.call_ms) == (5, "all", 100)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prodution = true", "prodution"),
        ("production = 'yes'", "production"),
        ("[policy]\nlogs = 'some'", "policy.logs: Invalid enum value 'some'; give one of off, errors, all"),
        ("[network]\nrequest_s = 0", "network.request_s"),
        ("[network]\nrequest_s = inf", "network.request_s is inf, but must be a number"),
        ("health_s = nan", "health_s is nan, but must be a number"),
        ("health_s = ", "agent.toml"),
    ],
)
def test_an_error_names_its_key(tmp_path, text, named):
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        config.load(write(tmp_path, main=text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prodution = true", "unknown key 'prodution'"),
        ("[policy]\nmemory = 1", "unknown key 'policy.memory'"),
        ("production = 'yes'", "production: Expected `bool`"),
        ("[network]\nrequest_s = 0", "network.request_s is 0"),
        ("[policy]\nstate_bytes = -1", "policy.state_bytes is -1"),
    ],
)
def test_an_error_names_the_file_that_holds_it(tmp_path, text, words):
    path = write(tmp_path, main="health_s = 60\n", a10=text, a20="[policy]\nlogs = 'off'\n")
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.d' / 'a10.toml'}: {words}")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("prodution = true", 1),
        ("\n# production = 1\nproduction = 'yes'", 3),
        ("health_s = 60\n\n[policy]\nlogs = 'off'\n 'state_bytes' = -1", 5),
        ("[policy]\nlogs = 'off'\n[network]\nlogs = 1", 4),
        ("policy.logs = 'off'\npolicy.memory = 1", 2),
        ("[policy]\ninterfaces = [1]", 2),
        ("network = { proxy = '', request_s = 0 }", 1),
        ("health_s = \n", 1),
    ],
)
def test_an_error_names_the_line(tmp_path, text, line):
    with pytest.raises(ConfigError, match=rf"\b(at )?line {line}\b"):
        config.load(write(tmp_path, main=text))


def test_the_policy_narrows_limits_and_never_widens_them():
    policy = Policy(memory_bytes=1000, call_ms=50, concurrency=1)
    narrowed = policy.limit(Limits(memory_bytes=5000, call_ms=10, concurrency=4, fuel=7))
    assert (narrowed.memory_bytes, narrowed.call_ms, narrowed.concurrency, narrowed.fuel) == (1000, 10, 1, 7)


def test_the_policy_may_deny_granted_interfaces():
    wanted = Grants(interfaces=("wasi:clocks", "wasi:i2c/i2c"), outbound=("https://a:443", "https://b:443"))
    assert Policy().denied(wanted, None) == ()
    assert Policy(interfaces=("wasi:clocks",)).denied(wanted, None) == ("wasi:i2c/i2c",)
    assert Policy(outbound=("https://a:443",)).denied(wanted, None) == ("https://b:443",)
    assert Policy(interfaces=()).denied(wanted, None) == wanted.interfaces


@pytest.mark.parametrize(
    ("ports", "denied"),
    [
        (None, {1, 80, 1023}),
        (("80", "8000-8001"), {1, 1023, 1024, 8080, 65535}),
        ((), {1, 80, 1023, 1024, 8000, 8080, 65535}),
    ],
)
def test_the_policy_bounds_the_ports_that_a_director_may_give(ports, denied):
    policy = Policy() if ports is None else Policy(ports=ports)
    for port in (1, 80, 1023, 1024, 8000, 8080, 65535):
        assert policy.denied(Grants(), port) == ((f"port {port}",) if port in denied else ()), port
    assert policy.denied(Grants(), None) == ()


@pytest.mark.parametrize("ports", ["http", "0", "65536", "9-8", "-1", "1-", "", "80,443"])
def test_a_range_of_ports_that_is_none_is_named(tmp_path, ports):
    path = write(tmp_path, main=f'[policy]\nports = ["{ports}"]\n')
    with pytest.raises(ConfigError, match=r"policy\.ports: .* is not a port"):
        config.load(path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("outbound = ['example.com']", "policy.outbound: 'example.com': expected scheme, host and port, such as"),
        ("outbound = ['example.com']", '"https://example.com"'),
        (
            "outbound = ['https://a.example', 'ftp://b.example']",
            "the scheme is http, https or * for requests, tcp or udp for sockets, not 'ftp'",
        ),
        ("interfaces = ['clocks']", "policy.interfaces: 'clocks': expected an interface or a package"),
        ("interfaces = ['wasi:clocks@0.2.0']", "without the version: 'wasi:clocks'"),
        ("interfaces = ['wasi:clock']", "no such interface; did you mean wasi:clocks?"),
        ("interfaces = ['wasi:io', 'wasi:clocks/monotonic']", "did you mean wasi:clocks/monotonic-clock?"),
        ("interfaces = ['acme:rockets']", "no such interface; devices serve wasi:cli, "),
        ("interfaces = ['']", "policy.interfaces: '': expected"),
        ("ports = ['http']", "policy.ports: 'http' is not a port"),
        ("logs = 'some'", "give one of off, errors, all"),
    ],
)
def test_a_name_in_a_list_that_names_nothing_is_refused_with_what_is_meant(tmp_path, line, said):
    (tmp_path / "agent.toml").write_text(f"[policy]\n{line}\n")
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        config.load(tmp_path / "agent.toml")
    assert "(line 2)" in str(caught.value)


def test_every_interface_that_devices_serve_may_be_listed(tmp_path):
    names = sorted(served.IMPORTS) + sorted({package(each) for each in served.IMPORTS})
    (tmp_path / "agent.toml").write_text(f"[policy]\ninterfaces = {names}\noutbound = ['*://*:*']\n")
    assert config.load(tmp_path / "agent.toml").policy.interfaces == tuple(names)


def test_the_documentation_lists_every_key_and_no_other():
    documented = set(
        re.findall(r"^\| `([a-z_.]+)` \|", DOCS.read_text().partition("## Configuration")[2], re.MULTILINE)
    )

    def keys(struct, prefix=""):
        for field in msgspec.structs.fields(struct):
            if isinstance(field.default, msgspec.Struct):
                yield from keys(type(field.default), f"{prefix}{field.name}.")
            else:
                yield prefix + field.name

    files = {"store.db", "runset.json", "wake"}
    assert documented - files == set(keys(config.Settings))


@pytest.mark.parametrize(("logs", "kept"), [("off", 0), ("errors", 52), ("all", 300)])
def test_the_log_in_a_failure_report_is_the_owners_to_give(logs, kept):
    lines = [f"2026-05-01T10:00:00Z info: {number}" for number in range(300)]
    lines[7], lines[9] = "2026-05-01T10:00:00Z error: low", "2026-05-01T10:00:00Z host: wasm trap"
    lines[11] = "info: no error: here"
    found = Policy(logs=logs).excerpt(tuple(lines))
    assert len(found) == kept
    assert found[-50:] == tuple(lines[-50:] if kept else ())


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"max": "lots"}, "uplink.readings.max"),
        ({"max": "10KiB"}, "uplink.readings.max"),
        ({"max": "2000GiB"}, "uplink.readings.max"),
        ({"keep": "1s"}, "uplink.readings.keep"),
        ({"keep": "99999d"}, "uplink.readings.keep"),
        ({"full": "perhaps"}, "uplink.readings.full"),
        ({"other": 1}, "uplink.readings"),
    ],
)
def test_bounds_of_readings_that_cannot_be_are_refused_by_name(table, key):
    with pytest.raises(config.ConfigError) as caught:
        config.validate({"uplink": {"readings": table}})
    assert caught.value.key.startswith(key)


def test_the_owner_names_the_directories_that_components_may_read():
    wanted = Grants(directories={"/maps": "maps", "/b": "books"})
    policy = config.validate({"policy": {"directories": {"maps": "/srv/maps"}}}).policy
    assert policy.denied(wanted, None) == ("directory books",)
    assert policy.mounts(wanted) == {"/maps": "/srv/maps"}
    assert Policy().denied(wanted, None) == ("directory books", "directory maps")


@pytest.mark.parametrize(
    ("directories", "said"),
    [
        ({"Maps": "/srv/maps"}, "directory 'Maps' is not a name"),
        ({"maps": "srv/maps"}, "but must be an absolute path, such as /srv/maps"),
        ({"maps": "/srv/../etc"}, "must be an absolute path"),
        ({"maps": "//srv"}, "must be an absolute path"),
        ({"maps": "/"}, "components may not read /"),
        ({"maps": "/var/lib"}, "components may not read /var/lib/wasmfleet-agent"),
        ({"maps": "/var/lib/wasmfleet-agent/identity"}, "components may not read /var/lib/wasmfleet-agent"),
        ({"maps": "/etc"}, "components may not read /etc/wasmfleet"),
        ({"maps": "/proc/self"}, "components may not read /proc"),
        ({f"m{number}": "/srv/maps" for number in range(17)}, "has 17 directories, at most 16"),
    ],
)
def test_a_directory_that_no_component_is_to_read_is_refused_by_name(directories, said):
    with pytest.raises(config.ConfigError, match=re.escape(said)) as caught:
        config.validate({"policy": {"directories": directories}})
    assert caught.value.key.startswith("policy.directories")


def test_the_owner_bounds_topics():
    policy = Policy(publish=("plant/#",))
    assert policy.denied(Grants(publish=("plant/+/t",)), None) == ()
    assert policy.denied(Grants(publish=("plant/a", "other")), None) == ("messages on other",)
    assert Policy().denied(Grants(publish=("other",)), None) == ()
    assert policy.denied(Grants(publish_local=("plant/a", "x/#")), None) == ("messages within the device on x/#",)
    policy = Policy(subscribe=("plant/#",))
    assert policy.denied(Grants(subscribe=("plant/a", "#"), publish=("x",), publish_local=("x",)), None) == (
        "receiving messages on #",
    )
    assert Policy(subscribe=()).denied(Grants(subscribe=("a",)), None) == ("receiving messages on a",)
    with pytest.raises(config.ConfigError, match=r"policy\.publish"):
        config.validate({"policy": {"publish": ["a/#/b"]}})


def test_lines_are_the_owners_to_allow_and_none_is_by_default(tmp_path):
    lines = (
        GpioLine(name="relay", chip="gpiochip0", line=17, direction="output"),
        GpioLine(name="door", chip="gpiochip1", line=22),
    )
    grants = Grants(hardware=Hardware(gpio=lines))
    assert Policy().denied(grants, None) == (
        'GPIO line gpiochip0:17 as output (policy.gpio in agent.toml would have "gpiochip0:17")',
        'GPIO line gpiochip1:22 as input (policy.gpio in agent.toml would have "gpiochip1:22")',
    )
    file = write(tmp_path, main='[policy]\ngpio = ["gpiochip0:17", "gpiochip1:20-22"]\n')
    assert config.load(file).policy.denied(grants, None) == ()
    assert len(Policy(gpio=("gpiochip0:18-30", "gpiochip1:23")).denied(grants, None)) == 2


@pytest.mark.parametrize("text", ["gpiochip0", "gpiochip0:9-3", "17", "gpiochip0:2000", "/dev/gpiochip0:1"])
def test_what_is_no_line_is_refused_with_an_example(tmp_path, text):
    file = write(tmp_path, main=f'[policy]\ngpio = ["{text}"]\n')
    with pytest.raises(ConfigError, match=r"policy.gpio: .* is no GPIO line: write gpiochip0:17, or gpiochip0:22-27"):
        config.load(file)


def test_serial_ports_are_the_owners_to_name_and_there_are_none_by_default(tmp_path):
    grants = Grants(hardware=Hardware(serial=(SerialPort(name="meter", baud=9600),)))
    assert Policy().denied(grants, None) == (
        'serial port meter at 9600 8N1 (policy.serial in agent.toml would have meter = "/dev/...")',
    )
    policy = config.load(write(tmp_path, main='[policy.serial]\nmeter = "/dev/serial/by-id/usb-FTDI_A1-if00"\n')).policy
    assert policy.denied(grants, None) == ()


@pytest.mark.parametrize("node", ["ttyUSB0", "/etc/passwd", "/dev/../etc/passwd", "/dev/", "/dev//tty", "/dev/.x", ""])
def test_what_is_no_device_is_refused_with_an_example(tmp_path, node):
    file = write(tmp_path, main=f'[policy.serial]\nmeter = "{node}"\n')
    with pytest.raises(ConfigError, match=r"policy.serial: meter: .* is no device: write one such as /dev/ttyUSB0"):
        config.load(file)
