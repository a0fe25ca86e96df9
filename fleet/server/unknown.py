"""Refusals of names that the server does not know, with the names like them."""

import difflib
from typing import Final

from fleet.protocol.operator_api import Refusal
from fleet.store.store import Store

_GUESSES_MAX: Final = 3


def unknown_device(store: Store, device: str) -> Refusal:
    """Return the refusal of an id that no device has; it names those that begin with it or are like it."""
    ids = store.devices.ids_near(device)
    near = [each for each in ids if each.startswith(device)] or difflib.get_close_matches(device, ids, _GUESSES_MAX)
    guess = f"did you mean {' or '.join(near[:_GUESSES_MAX])}?" if near else ""
    return Refusal(404, "unknown-device", f"there is no device {device}", guess, "fleet devices lists them")


def unknown_group(store: Store, group: str, *, action: str) -> Refusal:
    """Return the refusal of a name that no group has, with those that there are."""
    known = ", ".join(each.name for each in store.devices.groups()[:10]) or "none yet"
    return Refusal(404, "unknown-group", f"there is no group {group!r}", f"groups: {known}", action)
