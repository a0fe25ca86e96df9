"""Hardware in component.toml: read, inferred, rendered, refused, and named to people."""

import msgspec
import pytest

from fleet.component import component_toml, served
from fleet.component.reader import Component
from fleet.protocol import hardware, manifest
from fleet.protocol.hardware import GpioLine, Hardware, SerialPort
from fleet.protocol.manifest import BadManifestError, Grants
from signing import policy

HEAD = 'name = "web"\ntrigger = "http"\n'
METER = {"name": '"meter"', "baud": "9600", "parity": '"even"', "rs485": "true"}
RELAY = {"name": '"relay"', "chip": '"gpiochip0"', "line": "17", "direction": '"output"'}


def text(kind, *pieces, head=HEAD):
    tables = [
        "\n".join([f"[[grants.{kind}]]", *(f"{key} = {value}" for key, value in each.items())]) for each in pieces
    ]
    return "\n".join([head, *tables]) + "\n"


def test_a_line_is_read_and_rendered_with_what_is_not_the_default():
    found = component_toml.load(text("gpio", RELAY, {"name": '"door"', "chip": '"gpiochip0"', "line": "0"}))
    assert found.grants.devices == Hardware(
        gpio=(
            GpioLine(name="relay", chip="gpiochip0", line=17, direction="output"),
            GpioLine(name="door", chip="gpiochip0", line=0),
        )
    )
    assert component_toml.load(component_toml.render(found)) == found
    assert manifest.convert(found.plain()) == found
    assert found.plain()["grants"]["hardware"]["gpio"][1] == {"name": "door", "chip": "gpiochip0", "line": 0}


def test_a_serial_port_is_read_and_rendered_with_what_is_not_the_default():
    found = component_toml.load(text("serial", METER))
    assert found.grants.devices.serial == (SerialPort(name="meter", baud=9600, parity="even", rs485=True),)
    assert component_toml.load(component_toml.render(found)) == found
    assert manifest.convert(found.plain()) == found
    assert found.swap == "replace"
    assert str(found.grants.devices.serial[0]) == "serial port meter at 9600 8E1, RS-485"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"baud": "9601"}, "grants.serial[1].baud: 9601 is none of 300, 600,"),
        ({"baud": None}, "grants.serial[1].baud is missing"),
        ({"data_bits": "9"}, "grants.serial[1].data_bits: 9 is none of 7, 8"),
        ({"stop_bits": "0"}, "grants.serial[1].stop_bits: 0 is none of 1, 2"),
        ({"parity": '"mark"'}, "grants.serial[1].parity: 'mark' is none of none, even, odd"),
        ({"rs485": '"yes"'}, "grants.serial[1].rs485: expected true or false, not a text"),
        ({"device": '"/dev/sda"'}, "grants.serial[1].device: unknown field"),
    ],
)
def test_what_is_no_serial_port_is_refused_with_its_field(change, said):
    piece = {key: value for key, value in {**METER, **change}.items() if value is not None}
    with pytest.raises(BadManifestError) as error:
        component_toml.load(text("serial", piece))
    assert said in str(error.value)


def test_calls_at_once_cannot_share_a_serial_port():
    with pytest.raises(BadManifestError, match=r"limits.concurrency is 2, and two calls at once would mix"):
        component_toml.load(text("serial", METER) + "[limits]\nconcurrency = 2\n")


def test_versions_with_hardware_replace_each_other_unless_the_author_says_otherwise():
    assert component_toml.load(text("gpio", RELAY)).swap == "replace"
    other = component_toml.load(text("gpio", RELAY, head=HEAD + 'swap = "overlap"\n'))
    assert other.swap == "overlap"
    assert component_toml.load(component_toml.render(other)) == other
    assert component_toml.load(HEAD).swap == "overlap"


def test_a_manifest_without_hardware_is_signed_as_before_there_was_any():
    assert "hardware" not in component_toml.load(HEAD).plain()["grants"]
    assert Grants(hardware=hardware.NONE) == Grants()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"line": "-1"}, "grants.gpio[1].line: -1 is not between 0 and 1023"),
        ({"line": "1024"}, "grants.gpio[1].line: 1024 is not between 0 and 1023"),
        ({"line": '"17"'}, "grants.gpio[1].line: expected a whole number, not a text"),
        ({"line": None}, "grants.gpio[1].line is missing"),
        ({"lin": "3"}, "grants.gpio[1].lin: unknown field; did you mean line?"),
        ({"chip": '"../sda"'}, "grants.gpio[1].chip: '../sda' is no GPIO chip: write one such as gpiochip0"),
        ({"name": '"Relay 1"'}, "grants.gpio[1].name: 'Relay 1' is no name"),
        ({"direction": '"both"'}, "grants.gpio[1].direction: 'both' is none of input, output"),
        ({"safe": '"off"'}, "grants.gpio[1].safe: 'off' is none of low, high"),
        ({"pull": '"up"'}, "grants.gpio[1].pull: an output has no pull resistor"),
        ({"direction": '"input"', "safe": '"low"'}, "grants.gpio[1].safe: an input has no level of its own"),
    ],
)
def test_what_is_no_line_is_refused_with_its_field(change, said):
    piece = {key: value for key, value in {**RELAY, **change}.items() if value is not None}
    with pytest.raises(BadManifestError) as error:
        component_toml.load(text("gpio", piece))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([RELAY, {**RELAY, "line": "18"}], "grants.gpio: two entries have the name 'relay'"),
        ([RELAY, {**RELAY, "name": '"lamp"'}], "grants.gpio: two entries have the place 'gpiochip0:17'"),
        (
            [{**RELAY, "name": f'"r{at}"', "line": str(at)} for at in range(17)],
            "grants.gpio: 17 entries, at most 16 are allowed",
        ),
    ],
)
def test_what_is_there_twice_or_too_often_is_refused(pieces, said):
    with pytest.raises(BadManifestError) as error:
        component_toml.load(text("gpio", *pieces))
    assert said in str(error.value)


def test_one_table_in_place_of_a_list_is_refused():
    with pytest.raises(BadManifestError, match=r"grants.gpio: expected tables, each as \[\[grants.gpio\]\]"):
        component_toml.load(HEAD + '[grants.gpio]\nname = "relay"\n')


def test_a_signed_manifest_is_held_to_the_same():
    value = component_toml.load(text("gpio", RELAY)).plain()
    value["grants"]["hardware"]["gpio"][0]["chip"] = "../sda"
    with pytest.raises(BadManifestError, match="is no GPIO chip"):
        manifest.convert(value)


def test_hardware_is_narrowed_and_named_like_every_grant():
    relay = GpioLine(name="relay", chip="gpiochip0", line=17, direction="output")
    wanted, had = Grants(hardware=Hardware(gpio=(relay,))), Grants(interfaces=("wasi:gpio",))
    assert wanted.within(wanted)
    assert not wanted.within(had)
    other = msgspec.structs.replace(relay, safe="high")
    assert not wanted.within(Grants(hardware=Hardware(gpio=(other,)))), "another safe level is another grant"
    assert wanted.devices.beyond(had.devices) == ("GPIO line gpiochip0:17 as output",)
    assert wanted.devices.within(had.devices) == hardware.NONE
    assert "GPIO line gpiochip0:17 as output" in policy._describe_grants(wanted)


def test_an_import_without_lines_is_explained_at_push():
    component = Component(size_bytes=1, imports=("wasi:gpio/digital@0.2.0",), exports=("wasmfleet:http/handler@0.1.0",))
    assert not served.unserved(component)
    (note,) = served.notes(component, Grants(interfaces=("wasi:gpio",)))
    assert "[[grants.gpio]]" in note
    granted = Grants(
        interfaces=("wasi:gpio",), hardware=Hardware(gpio=(GpioLine(name="door", chip="gpiochip0", line=4),))
    )
    assert served.notes(component, granted) == ()
