"""Values that people type as `key=value`."""

import re
from collections.abc import Sequence
from datetime import timedelta

from fleet.cli.base import Fault


def config_values(pairs: Sequence[str]) -> dict[str, str] | None:
    """Configuration from `--config key=value`; None when there is none, so that the instance keeps its own.

    Raises:
        Fault: no '=', an empty key, or a key given twice.
    """
    values: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise Fault(f"--config {pair!r} is no setting", "it has no '='", "write --config key=value")
        if key in values:
            raise Fault(f"--config {key} is given twice", "only one value can hold", "give it once")
        values[key] = value
    return values or None


def label_values(words: Sequence[str]) -> dict[str, str | None]:
    """Labels from `key=value`, or `key-` to remove one (None); raises `Fault`."""
    values: dict[str, str | None] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key and value:
            values[key] = value
        elif not equals and word.endswith("-") and len(word) > 1:
            values[word[:-1]] = None
        else:
            raise Fault(
                f"{word!r} is no label", "a label has a name and a value", "write name=value, or name- to remove it"
            )
    return values


def days(text: str) -> timedelta:
    """A time in days, as `30d`; raises `Fault`."""
    found = re.fullmatch(r"([1-9][0-9]{0,3})d?", text.strip())
    if found is None:
        raise Fault(f"{text!r} is no number of days", "1 to 9999 are possible", "write it as 30d")
    return timedelta(days=int(found[1]))
