"""Words for people: durations, sizes, targets, labels."""

from datetime import UTC, datetime, timedelta

import pytest

from fleet.cli import output
from fleet.cli.base import Fault, config_values, label_values
from fleet.cli.device import seconds

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("passed", "text"),
    [
        (timedelta(seconds=0), "0 s ago"),
        (timedelta(seconds=119), "119 s ago"),
        (timedelta(minutes=2), "2 min ago"),
        (timedelta(minutes=119), "119 min ago"),
        (timedelta(hours=2), "2 h ago"),
        (timedelta(days=3), "3 d ago"),
        (timedelta(seconds=-5), "0 s ago"),
    ],
)
def test_how_long_ago(passed, text):
    assert output.ago(NOW - passed, NOW) == text


def test_never():
    assert output.ago(None) == "never"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1749, "1.7 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3072.0 GiB")]
)
def test_sizes(count, text):
    assert output.size(count) == text


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("components/main/hello/1.0.0.wasm", "main/hello@1.0.0"),
        ("components/main/hello/0.0.0-dev.3.wasm", "main/hello@0.0.0-dev.3"),
        ("", "-"),
        ("elsewhere.wasm", "elsewhere.wasm"),
    ],
)
def test_targets_as_people_write_them(path, text):
    assert output.target(path) == text


@pytest.mark.parametrize(("text", "value"), [("90s", 90), ("30m", 1800), ("12h", 43_200), ("7d", 604_800)])
def test_durations(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "0s", "5", "1w", "-1h", "1.5h"])
def test_no_durations(text):
    with pytest.raises(Fault, match="is not a duration"):
        seconds(text)


def test_settings_keep_everything_after_the_first_equals_sign():
    assert config_values(["url=http://x/?a=b", "empty="]) == {"url": "http://x/?a=b", "empty": ""}
    assert config_values([]) is None


@pytest.mark.parametrize("pairs", [["level"], ["=x"], ["a=1", "a=2"]])
def test_settings_that_are_none(pairs):
    with pytest.raises(Fault):
        config_values(pairs)


def test_labels_are_set_and_removed():
    assert label_values(["site=berlin", "old-"]) == {"site": "berlin", "old": None}
    for wrong in ("site=", "=x", "-", "site"):
        with pytest.raises(Fault):
            label_values([wrong])
