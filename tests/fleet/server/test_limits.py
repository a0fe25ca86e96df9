"""Limits in `server.toml`: every key is documented with its default and bounds, and every mistake is named."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from fleet.protocol import bounds
from fleet.server.config import HomeError, ServerConfig
from fleet.server.limits import BETWEEN, ServerLimits

ROOT = Path(__file__).resolve().parents[3]
CONFIG = ServerConfig("test", "dev", "127.0.0.1", "127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3")


def load(tmp_path, more):
    path = tmp_path / "server.toml"
    path.write_text(CONFIG.dump() + more)
    return ServerConfig.load(path)


def test_without_the_table_every_limit_is_the_default(tmp_path):
    assert load(tmp_path, "").limits == ServerLimits()
    assert load(tmp_path, "[limits]\n").limits == ServerLimits()


def test_a_limit_is_read_and_written_again(tmp_path):
    limits = ServerLimits(device_connections=4000, artifact_bytes=2 * bounds.MIB)
    path = tmp_path / "server.toml"
    path.write_text(replace(CONFIG, limits=limits).dump())
    assert ServerConfig.load(path).limits == limits
    assert "operator_connections" not in path.read_text(), "defaults may change with the version"


@pytest.mark.parametrize("key", BETWEEN)
def test_a_limit_beyond_its_bounds_is_refused_by_its_name(tmp_path, key):
    least, most = BETWEEN[key]
    for value in (least - 1, most + 1, -1, 2**63, "true", "1.5", '"many"', "[]", "nan"):
        with pytest.raises(HomeError, match=rf"limits\.{key} must be a whole number from {least} to {most}, not "):
            load(tmp_path, f"[limits]\n{key} = {value}\n")


def test_the_default_is_within_the_bounds():
    for each in fields(ServerLimits):
        least, most = BETWEEN[each.name]
        assert least <= each.default <= most


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("[limits]\ncolour = 1\n", "unknown key 'limits.colour'; known are operator_connections, "),
        ("limits = 3\n", "limits must be a table"),
        ("limits = [1]\n", "limits must be a table"),
        ("[limits.device_connections]\n", "limits.device_connections must be a whole number"),
        ("[limits]\ndevice_connections = 0x" + "f" * 5000, "limits.device_connections must be a whole number"),
        (
            "[limits]\ndevice_connections = 100\n",
            "limits.device_connections_per_address is 256, more than limits.device_connections (100) in all",
        ),
    ],
)
def test_a_mistake_in_the_table_is_one_line_that_names_the_key(tmp_path, more, words):
    with pytest.raises(HomeError) as raised:
        load(tmp_path, more)
    assert words in str(raised.value)
    assert str(tmp_path / "server.toml") in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("value", ["0", "-1", "true", "2.5", "1000000000000"])
def test_days_that_no_report_can_be_kept_are_refused(tmp_path, value):
    path = tmp_path / "server.toml"
    path.write_text(CONFIG.dump().replace("keep_days = 90", f"keep_days = {value}"))
    with pytest.raises(HomeError, match=r"keep_days must be a whole number from 1 to 36500, not "):
        ServerConfig.load(path)


def test_the_manual_names_every_limit_with_its_default_and_bounds():
    text = (ROOT / "docs" / "operations.md").read_text()
    rows = re.findall(r"^\| `([a-z_]+)` \| ([\d,]+) \| ([\d,]+) to ([\d,]+) \|", text, re.MULTILINE)
    documented = {key: [int(number.replace(",", "")) for number in numbers] for key, *numbers in rows}
    assert documented == {each.name: [each.default, *BETWEEN[each.name]] for each in fields(ServerLimits)}
